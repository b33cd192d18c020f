"""What trainers of other libraries need: a class that they can call, and the optimizer inside their wrappers."""

from precond.integrations.trainers import inner_optimizer, with_model

__all__ = ["inner_optimizer", "with_model"]

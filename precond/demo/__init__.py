"""The demo, ``python -m precond demo``: K-FAC and EKFAC beside AdamW and SGD on scikit-learn's digits."""

from precond.demo.command import add_arguments, run

__all__ = ["add_arguments", "run"]

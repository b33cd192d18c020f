"""Whether a model still has the parameters that its optimizer was made for, and no others that nobody trains."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Collection, Iterable, Mapping

from torch import Tensor, nn

from curvature.model.fully_sharded import named_parameters


class Membership:
    """Notices layers that were deleted, replaced, added or unfrozen after the optimizer was made.

    Args:
        model: The model as it is when the optimizer is made.
        method: Name of the optimizer's class, for the messages.
    """

    def __init__(self, model: nn.Module, method: str) -> None:
        self._model, self._method = weakref.ref(model), method
        self._known = {id(p): weakref.ref(p) for _, p in named_parameters(model) if p.requires_grad}
        self._looked_at: set[str] = set()

    def require(self, parameters: Mapping[str, Tensor], missing: Collection[str]) -> None:
        """Refuse to go on where parameters that had no gradient are no longer in the model.

        Args:
            parameters: Those that the optimizer trains, by name.
            missing: Names of those without a gradient.

        Raises:
            RuntimeError: Naming them.
        """
        missing = set(missing)
        model = self._model()
        if missing <= self._looked_at or model is None:
            return
        own = {id(p) for _, p in named_parameters(model)}
        if gone := [name for name in missing if id(parameters[name]) not in own]:
            names = ", ".join(name for name in parameters if name in gone)
            raise RuntimeError(
                f"{self._method} was made for {names}, which the model no longer has: a layer was deleted, replaced or "
                "parametrized since. Make the optimizer when the model is complete; a layer that comes later is added "
                "by optimizer.add_param_group({'params': list(layer.parameters())}) to an optimizer for the others "
                "(params=)."
            )
        self._looked_at |= missing

    def tell_untrained(self, trained: Iterable[Tensor]) -> None:
        """Warn, once for each, of trainable parameters that came to the model later and that nobody was told of.

        Args:
            trained: Those of the optimizer's groups.
        """
        model = self._model()
        if model is None:
            return
        groups = {id(p) for p in trained}
        names = []
        for name, p in named_parameters(model):
            known = self._known.get(id(p))
            if p.requires_grad and id(p) not in groups and (known is None or known() is not p):
                names.append(name)
                self._known[id(p)] = weakref.ref(p)
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            warnings.warn(
                f"{self._method} does not train {shown}: added to the model, or unfrozen, after the optimizer was "
                "made. Add them by optimizer.add_param_group({'params': [...]}), or make the optimizer anew.",
                UserWarning,
                stacklevel=6,
            )

"""Residuals at points, each of which depends on one point alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap


@dataclass(frozen=True)
class PointwiseResidual:
    r"""Residuals at points, each of which depends on one point alone; their Jacobian is taken point by point.

    .. math:: r_n = w\, f(u, x_n), \qquad u(x) = \text{model}(x)

    Costs one Jacobian of f per point under ``vmap``, while a residual given as a tensor costs a backward
    pass over all points for each row.

    Args:
        model: Maps a batch ``(N, d)`` to ``(N, ...)``, example by example; without buffers that it changes.
        function: ``f(u, x)`` with ``u`` the model as a function of one point ``(d,)`` and ``x`` one point; may use
            ``torch.func`` on ``u``. Returns a tensor.
        points: ``(N, d)``.
        weight: w, often ``N ** -0.5``.
    """

    model: nn.Module
    function: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
    points: Tensor
    weight: float = 1.0

    def numel(self) -> int:
        """Number of residuals, ``N * entries``."""
        return 0 if not len(self.points) else len(self.points) * self.at({}, self.points[0]).numel()

    def value(self, graph: bool = True) -> Tensor:
        """``(N * entries,)``.

        Args:
            graph: Whether it can be differentiated with respect to the parameters.
        """
        values = {} if graph else {name: p.detach() for name, p in self.model.named_parameters()}
        return vmap(lambda x: self.at(values, x))(self.points).reshape(-1)

    def value_and_jacobian(self, params: list[Tensor], out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Residuals ``(R,)`` and their Jacobian ``(R, P)`` with respect to the concatenated parameters.

        Args:
            params: The parameters.
            out: Where the Jacobian goes.

        Raises:
            ValueError: If the function uses one of the parameters other than through the model.
        """
        names = {id(p): name for name, p in self.model.named_parameters()}
        free = {names[id(p)]: p.detach() for p in params if id(p) in names}
        self._require_through_model(free, params)

        def both(values: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
            r = self.at(values, x)
            return r, r

        rows, value = vmap(jacrev(both, has_aux=True), in_dims=(None, 0))(free, self.points)
        count = value.numel()
        if out is None:
            out = value.new_empty(count, sum(p.numel() for p in params))
        for p, block in zip(params, out.split([p.numel() for p in params], 1), strict=True):
            name = names.get(id(p))
            block.copy_(rows[name].detach().reshape(count, -1)) if name is not None else block.zero_()
        return value.reshape(-1), out

    def _require_through_model(self, free: dict[str, Tensor], params: list[Tensor]) -> None:
        with torch.enable_grad():
            r = self.at(free, self.points[0]).sum() if len(self.points) else torch.zeros(())
        if not r.requires_grad:
            return
        slopes = torch.autograd.grad(r, params, allow_unused=True)
        shapes = [str(tuple(p.shape)) for p, slope in zip(params, slopes, strict=True) if slope is not None]
        if shapes:
            raise ValueError(
                f"the function of a PointwiseResidual uses trained parameters of shapes {', '.join(shapes)} other than "
                "through u, where its Jacobian does not see them. Let the model return them as a further output (as "
                "docs/how-to/physics.md does with an unknown coefficient), or return the residual as a tensor."
            )

    def at(self, values: dict[str, Tensor], x: Tensor) -> Tensor:
        """The residuals of one point, ``(entries,)``, with some parameters in place of the model's."""

        def u(point: Tensor) -> Tensor:
            return functional_call(self.model, values, (point.unsqueeze(0),)).squeeze(0)

        return self.weight * self.function(u, x).reshape(-1)

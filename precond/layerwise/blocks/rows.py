"""The rows behind a dense layer's gradient, while the gradient is exactly their product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvature.estimation.followed_layer import FollowedLayer
from curvature.estimation.tape import Tape
from curvature.layers.block import Block
from curvature.model.moment import writes
from precond.layerwise.blocks.preconditioner import Preconditioner
from solvers import Eigen, Kronecker, LinearOperator
from solvers.precision import reduced

#: Multiplications that rows have to save to be worth their hooks and checks: of three layers of 128 x 128 with 16 rows
#: they make a step slower by a tenth (of 32 x 32 by a half), of 256 x 256 faster by as much.
WORTH = 1 << 22


@dataclass
class GradientRows:
    """Inputs ``a (m, d_in)`` and output gradients ``g (m, d_out)`` of one backward pass: ``grad = g^T a``.

    Attributes:
        ones: The input has a one for the bias appended.
        rough: The backward pass multiplied in less than the precision of the gradient.
    """

    a: Tensor
    g: Tensor
    ones: bool
    rough: bool = False

    @property
    def inputs(self) -> Tensor:
        """Inputs with the one of the bias appended."""
        return torch.cat([self.a, self.a.new_ones(len(self.a), 1)], dim=1) if self.ones else self.a

    def agree(self, seen: Tensor, probe: Tensor) -> Tensor:
        """0-d bool: the gradient is the product of the rows, judged by one combination of its columns.

        Up to rounding, which is relative to the sizes of the terms: a gradient that was clipped or changed by a hook
        before it was written is another one.

        Args:
            seen: The combination ``(d_out,)``, that of the weight times ``probe``, and once that of the bias.
            probe: Factors of the columns of the weight ``(d_in,)``.
        """
        made = self.g.mT @ (self.a @ probe + float(self.ones))
        size = self.g.abs().mT @ (self.a.abs() @ probe.abs() + float(self.ones))
        eps = torch.finfo(seen.dtype).eps
        return ((seen - made).abs() <= (16 * eps**0.5 if self.rough else 64 * eps) * size).all()

    def apply(self, inverse: Kronecker | Eigen) -> list[Tensor]:
        r""":math:`B^{-1} (g^\top a) A^{-1}` as :math:`(g B^{-1})^\top (a A^{-1})`, for the weight and for the bias.

        The factors are symmetric. Into an eigenbasis a gradient turns in the same way,
        :math:`Q_B^\top (g^\top a) Q_A = (g Q_B)^\top (a Q_A)`.
        """
        if isinstance(inverse, Eigen):
            assert isinstance(inverse.basis, Kronecker)
            left, right = self._times(inverse.basis.adjoint())
            d = inverse.basis @ (left.mT @ right).mul_(inverse.values)
            return [d[:, :-1], d[:, -1:]] if self.ones else [d]
        left, right = self._times(inverse)
        if not self.ones:
            return [left.mT @ right]
        # Apart, so that each lies in one piece.
        return [left.mT @ right[:, :-1], (left.mT @ right[:, -1]).unsqueeze(1)]

    def _times(self, factors: Kronecker) -> tuple[Tensor, Tensor]:
        B, A = factors.factors
        return B @ self.g.to(B.dtype), A @ self.inputs.to(A.dtype)


def has_rows(inverse: LinearOperator | None) -> bool:
    """Whether an inverse can be applied to the rows behind a gradient: it takes a factor for each side."""
    kronecker = inverse.basis if isinstance(inverse, Eigen) else inverse
    return isinstance(kronecker, Kronecker) and len(kronecker.factors) == 2 and not kronecker.stack


def combination(columns: int, like: Tensor) -> Tensor:
    """Random numbers to combine columns, always the same."""
    return torch.randn(columns, generator=torch.Generator().manual_seed(0), dtype=like.dtype).to(like.device)


def cheaper(rows: int, d_out: int, d_in: int) -> bool:
    """Whether two products on the rows and one between them cost less than two on the gradient, by :data:`WORTH`."""
    return rows * (d_out**2 + d_in**2 + d_out * d_in) + WORTH < 0.8 * d_out * d_in * (d_out + d_in)


class RowTap(FollowedLayer):
    """Watches one ``nn.Linear`` and offers the rows of its gradient.

    The rows stand for the gradient only if one forward pass used the layer since the last step, the gradient was empty
    before its backward pass, it was not changed afterwards (judged by its version, and by a random combination, bit by
    bit, which also notices changes through ``.data``), and it was not summed over processes.
    """

    def __init__(self, module: nn.Linear, params: Mapping[str, nn.Parameter]) -> None:
        super().__init__(module, params.values())
        self.params = params
        self.shape = module.out_features, module.in_features
        self.count = 0  # rows of the last backward pass that stood for the gradient
        self._passes = 0
        self._input: tuple[Tensor, int] | None = None
        self._gradient: Tensor | None = None
        self._written: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._rough = False
        self._probe: Tensor | None = None  # combines the columns of the weight

    def close(self) -> None:
        """Remove the hooks and forget the rows."""
        super().close()
        self.clear()

    def clear(self) -> None:
        """Forget the rows, for the next step."""
        self._passes, self._input, self._gradient, self._written = 0, None, None, {}

    def ran(self, x: Tensor, output: Tensor) -> bool:
        """Note a forward pass."""
        self._passes += 1
        m = x.numel() // max(1, x.shape[-1])
        fresh = all(p.grad is None for p in self.params.values())
        if self._passes > 1 or not fresh or not cheaper(m, *self.shape):
            self._input = self._gradient = None
            return False
        kept = x.detach()
        self._input = (kept, writes(kept))
        self._rough = torch.is_autocast_enabled(x.device.type) or reduced()
        return True

    def arrived(self, gradient: Tensor) -> None:
        """Note the output's gradient."""
        self._gradient = gradient

    def written(self, parameter: Tensor) -> None:
        """Note that autograd wrote a parameter's gradient."""
        grad, key = parameter.grad, id(parameter)
        assert grad is not None
        if self._input is not None:
            self._written[key] = (grad, grad._version if key not in self._written else -1, self._combined(grad))

    def rows(self, gradients: Mapping[str, Tensor]) -> GradientRows | None:
        """The rows, if they stand for these gradients."""
        self.count = 0
        if self._passes != 1 or self._input is None or self._gradient is None:
            return None
        for name, p in self.params.items():
            grad, version, _ = self._written.get(id(p), (None, -1, None))
            if grad is None or grad is not p.grad or gradients.get(name) is not grad or grad._version != version:
                return None
        a, version = self._input
        if writes(a) != version:
            return None
        dtype = next(iter(self.params.values())).dtype  # autocast has rows of its own
        rows = GradientRows(
            a.reshape(-1, a.shape[-1]).to(dtype),
            self._gradient.reshape(-1, self._gradient.shape[-1]).to(dtype),
            len(self.params) > 1,
            self._rough,
        )
        self.count = len(rows.a)
        return rows

    def stand(self, rows: GradientRows) -> Tensor:
        """0-d bool: the gradients hold what autograd wrote, bit by bit, and that is the product of the rows."""
        now = [self._combined(grad) for grad, _, _ in self._written.values()]
        same = [(seen == after).all() for (_, _, seen), after in zip(self._written.values(), now, strict=True)]
        assert self._probe is not None
        return torch.stack([*same, rows.agree(now[0] + now[1] if len(now) > 1 else now[0], self._probe)]).all()

    @torch.no_grad()
    def _combined(self, gradient: Tensor) -> Tensor:
        """Numbers ``(d_out,)`` that change with any entry of a gradient; a bias as it is."""
        if gradient.dim() == 1:
            return gradient.clone()
        if self._probe is None or (self._probe.dtype, self._probe.device) != (gradient.dtype, gradient.device):
            self._probe = combination(gradient.shape[1], gradient)
        return gradient @ self._probe


def taps_for(model: nn.Module, blocks: Mapping[str, tuple[Block, LinearOperator | None]]) -> dict[str, RowTap]:
    """A tap for every block that is one whole ``nn.Linear`` with a factor for each side in its inverse.

    Args:
        model: Where to look for the layers.
        blocks: Name -> block and its inverse.
    """
    owners: dict[tuple[str, ...], nn.Linear] = {}
    for prefix, module in model.named_modules():
        if type(module) is nn.Linear:
            names = tuple(f"{prefix}.{n}" if prefix else n for n, p in module.named_parameters() if p.requires_grad)
            owners[names] = module
    out = {}
    for name, (block, inverse) in blocks.items():
        module = owners.get(block.names)
        if module is None or not has_rows(inverse) or len(block.shape) != 2:
            continue
        if not cheaper(1, module.out_features, module.in_features):
            continue
        params = dict(zip(block.names, (p for p in module.parameters() if p.requires_grad), strict=True))
        if len(params) == len(block.parts) and block.names[0].endswith("weight"):
            out[name] = RowTap(module, params)
    return out


class RowTaps:
    """The taps of a model, renewed when its blocks change."""

    def __init__(self) -> None:
        self.taps: dict[str, RowTap] = {}
        self._known: set[str] = set()

    def watch(self, tape: Tape, preconditioners: Mapping[str, Preconditioner]) -> None:
        """Watch the layers whose blocks have an inverse that :func:`has_rows`, through the tape of the model."""
        known = {name: p for name, p in preconditioners.items() if p.inverse is not None}
        if not tape.handles or self._known == set(known):  # closed for good, or nothing new
            return
        self.close()
        self._known = set(known)
        self.taps = taps_for(tape.model, {name: (p.estimator.block, p.inverse) for name, p in known.items()})
        for tap in self.taps.values():
            tape.follow(tap)

    def close(self) -> None:
        """Remove the hooks and forget the blocks."""
        for tap in self.taps.values():
            tap.close()
        self.taps, self._known = {}, set()

    def clear(self) -> None:
        """Forget the rows, for the next step."""
        for tap in self.taps.values():
            tap.clear()

    def count(self, name: str) -> int | None:
        """The number of rows whose product is the last gradient of a block, if known."""
        return self.taps[name].count or None if name in self.taps else None

    def rows(self, gradients: Mapping[str, Tensor]) -> dict[str, GradientRows]:
        """Blocks whose gradient is at hand as a product of few rows, checked against the gradient itself."""
        found = {name: rows for name, tap in self.taps.items() if (rows := tap.rows(gradients)) is not None}
        if not found:
            return {}
        same = dict(
            zip(found, torch.stack([self.taps[n].stand(rows) for n, rows in found.items()]).tolist(), strict=True)
        )
        for name in found:
            self.taps[name].count *= same[name]
        return {name: rows for name, rows in found.items() if same[name]}

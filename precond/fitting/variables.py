"""The unknowns as the caller has them, and as rows ``(problems, n)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from precond.step.graph import jacobian_rows
from solvers.outcome.memory import is_out_of_memory

_BY_TORCH = (
    "residuals are tensors, made from x by torch operations so that they can be differentiated (torch.exp in place of "
    "numpy.exp, torch.as_tensor of data)."
)

#: Columns of the Jacobian that are pushed forward at once.
_COLUMNS = 64


class Variables:
    """Residuals as a function of rows of unknowns.

    Args:
        fun: Residuals of the unknowns, a tensor or a tree of tensors.
        x0: The unknowns: a tensor, a tree of tensors, or a module, whose trainable parameters are meant.
        batched: Whether the first axis of all tensors counts problems.

    Raises:
        TypeError: If there is nothing to fit, or it is not floating point.
        ValueError: If the first axes differ.
    """

    def __init__(self, fun: Callable[[Any], Any], x0: Any, batched: bool) -> None:
        self.fun, self.batched = fun, batched
        self.module = x0 if isinstance(x0, nn.Module) else None
        self.spec: TreeSpec | None = None
        if self.module is not None:
            if batched:
                raise ValueError("batched=True fits tensors whose first axis counts problems; a module is one problem.")
            leaves: list[Any] = [p for p in self.module.parameters() if p.requires_grad]
        else:
            leaves, self.spec = tree_flatten(x0)
            leaves = [leaf if isinstance(leaf, Tensor) else torch.as_tensor(np.asarray(leaf)) for leaf in leaves]
            leaves = [leaf.to(torch.float64) if _whole(leaf) else leaf for leaf in leaves]
        if not any(leaf.numel() for leaf in leaves):
            if self.module is not None and any(True for _ in self.module.parameters()):
                raise TypeError("all parameters of the module have requires_grad=False; set it on those to fit.")
            raise TypeError("x0 must hold numbers to fit: tensors, a tree of tensors, or a module with parameters.")
        for leaf in leaves:
            if leaf.dtype not in (torch.float32, torch.float64) or leaf.layout != torch.strided:
                dense = "x0" if leaf.layout == torch.strided else "x0.to_dense()"
                if leaf.is_complex():
                    dense = f"torch.view_as_real({dense})"
                elif leaf.dtype not in (torch.float32, torch.float64):
                    dense = f"{dense}.double()"
                raise TypeError(
                    f"x0 holds a tensor of {leaf.dtype} and {leaf.layout}; fits are of dense real numbers in float32 "
                    f"or float64. Give {dense} in its place."
                )
        self.parameters = leaves
        self.shapes = [leaf.shape[1:] if batched else leaf.shape for leaf in leaves]
        self.problems = leaves[0].shape[0] if batched and leaves[0].dim() else 1
        if batched and any(leaf.dim() == 0 or leaf.shape[0] != self.problems for leaf in leaves):
            raise ValueError(
                f"with batched=True the first axis of every tensor counts problems; got shapes "
                f"{', '.join(str(tuple(leaf.shape)) for leaf in leaves)}."
            )
        self.sizes = [shape.numel() for shape in self.shapes]
        self.calls = 0
        self._forward = True

    def rows(self) -> Tensor:
        """The start ``(problems, n)``."""
        return self.flatten([leaf.detach() for leaf in self.parameters])

    def flatten(self, leaves: list[Tensor]) -> Tensor:
        """Tensors as rows."""
        return torch.cat([leaf.reshape(self.problems, -1) for leaf in leaves], 1)

    def like(self, name: str, value: Any, default: float) -> Tensor:
        """A number, or a tree like the unknowns, as rows.

        Raises:
            ValueError: If its shape does not fit.
        """
        rows = self.rows()
        if value is None:
            return torch.full_like(rows, default)
        leaves = [value] if len(self.shapes) == 1 and not isinstance(value, dict) else tree_flatten(value)[0]
        given = [torch.as_tensor(leaf, dtype=rows.dtype, device=rows.device) for leaf in leaves]
        if len(given) == 1 and given[0].dim() == 0:
            return given[0].expand_as(rows).clone()
        if len(given) != len(self.shapes):
            raise ValueError(f"{name} must be a number, or have as many tensors as x0, {len(self.shapes)}.")
        out = []
        for leaf, shape in zip(given, self.shapes, strict=True):
            try:
                out.append(leaf.expand((self.problems, *shape)) if self.batched else leaf.expand(shape))
            except RuntimeError:
                raise ValueError(f"{name} of shape {tuple(leaf.shape)} does not fit {tuple(shape)} of x0.") from None
        return self.flatten(out)

    def tree(self, rows: Tensor) -> Any:
        """Rows as the caller has the unknowns; a module is written to, and returned."""
        leaves = [
            piece.reshape((self.problems, *shape) if self.batched else shape)
            for piece, shape in zip(rows.split(self.sizes, 1), self.shapes, strict=True)
        ]
        if self.module is None:
            assert self.spec is not None
            return tree_unflatten(leaves, self.spec)
        with torch.no_grad():
            for p, leaf in zip(self.parameters, leaves, strict=True):
                p.copy_(leaf)
        return self.module

    def residuals(self, rows: Tensor) -> Tensor:
        """Residuals ``(problems, m)``.

        Raises:
            ValueError: If they have no axis of problems, or there are none.
            TypeError: If they are no dense real tensors.
        """
        self.calls += 1
        leaves, _ = tree_flatten(self.fun(self.tree(rows.clone())))  # of its own, which fun may write to
        found = [_residual(leaf) for leaf in leaves]
        if self.batched and any(leaf.dim() < 1 or leaf.shape[0] != self.problems for leaf in found):
            raise ValueError(
                f"with batched=True fun must return residuals (problems, m) with {self.problems} problems; got "
                f"{', '.join(str(tuple(leaf.shape)) for leaf in found)}."
            )
        if not found or not sum(leaf.numel() for leaf in found):
            raise ValueError("fun returned no residuals.")
        return torch.cat([leaf.reshape(self.problems, -1).to(rows.dtype) for leaf in found], 1)

    def require_dependence(self, rows: Tensor) -> None:
        """Look whether the residuals depend on the unknowns, where their Jacobian is zero.

        Raises:
            TypeError: If torch sees no dependence.
        """
        before = self.calls
        with torch.enable_grad():
            if self.module is not None:
                self.tree(rows)
                depends = any(_residual(leaf).requires_grad for leaf in tree_flatten(self.fun(self.module))[0])
            else:
                depends = self.residuals(rows.detach().requires_grad_()).requires_grad
        self.calls = before
        if not depends:
            raise TypeError(
                "the residuals do not depend on the unknowns as far as torch sees, so there is nothing to fit. Compute "
                "them from x by torch operations on real numbers, without NumPy, .item(), .detach(), .data or rounding."
            )

    def jacobian(self, rows: Tensor) -> Tensor:
        """Jacobian ``(problems, m, n)``: by columns, forward; by rows, backward, where forward mode is missing."""
        if self.module is not None:
            self.tree(rows)
            with torch.enable_grad():
                leaves, _ = tree_flatten(self.fun(self.module))
                residuals = torch.cat([leaf.reshape(-1).to(rows.dtype) for leaf in leaves])
                return jacobian_rows(residuals, self.parameters).detach().unsqueeze(0)
        if self._forward:
            try:
                return self._columns(rows)
            except (NotImplementedError, RuntimeError) as error:
                if is_out_of_memory(error):
                    raise
                self._forward = False  # no forward derivative of some operation; an error of fun comes again below
        return self._by_rows(rows)

    def _columns(self, rows: Tensor) -> Tensor:
        def push(tangent: Tensor) -> Tensor:
            """The derivative of all problems at once along one direction ``(n,)``."""
            return torch.func.jvp(self.residuals, (rows,), (tangent.expand_as(rows),))[1]

        unit = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
        before = self.calls
        columns = [torch.func.vmap(push)(part) for part in unit.split(_COLUMNS)]
        self.calls = before
        return torch.cat(columns).permute(1, 2, 0).detach()

    def _by_rows(self, rows: Tensor) -> Tensor:
        with torch.enable_grad():
            x = rows.detach().requires_grad_()
            before = self.calls
            try:
                r = self.residuals(x)
            except RuntimeError as error:
                if "numpy()" not in str(error):
                    raise
                raise TypeError(f"fun computes the residuals by NumPy; {_BY_TORCH}") from error
            self.calls = before
            pull = (torch.autograd.grad(r_k.sum(), x, retain_graph=True, allow_unused=True)[0] for r_k in r.unbind(1))
            out = list(pull)
        return torch.stack([torch.zeros_like(rows) if g is None else g for g in out], 1)


def _whole(leaf: Tensor) -> bool:
    return not leaf.is_floating_point() and not leaf.is_complex()


def _residual(leaf: Any) -> Tensor:
    """Residuals as they are computed with; what holds no derivative or would lose a part is refused."""
    if not isinstance(leaf, (Tensor, int, float)):
        raise TypeError(f"fun returned {type(leaf).__name__}; {_BY_TORCH}")
    found = torch.as_tensor(leaf)
    if found.is_complex() or found.layout != torch.strided:
        kind = "complex" if found.is_complex() else f"sparse ({found.layout})"
        raise TypeError(
            f"fun returned {kind} residuals, but they are dense and real. Return torch.view_as_real(r) of complex "
            "ones, r.to_dense() of sparse ones."
        )
    return found

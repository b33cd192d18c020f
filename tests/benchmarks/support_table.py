"""Which models and losses are served, and which refused? ``python -m tests.benchmarks.support_table`` runs them to see.

The models of :mod:`tests.benchmarks.support_models`, small and untrained, in float64. The references are written from
the definitions: derivatives of the plain loss by autograd, number by number; Kronecker factors from the rows of the
calls that a function mode sees. They share nothing with the packages.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import re
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import curvature
from curvature.losses import AutogradLoss
from solvers import Diagonal, Eigen, Kronecker
from tests.benchmarks.support_models import MODELS, Case
from tests.curvature.dense_reference import flat_indices, jacobian, run, trainable
from tests.curvature.loops import watching

EXACT = 1e-9
COMPILED = "_orig_mod."
PACKAGES = ("/curvature/", "/solvers/", "/precond/")
#: Part of an error's message -> the words of the page.
WORDS: dict[str, str] = {
    "is linear in the model's output": "the loss is linear in the output, so its Gauss-Newton matrix is zero; take the "
    "Fisher",
    "not known as a negative log-likelihood": "the loss is no likelihood; take `ggn` or `kind='empirical'`",
    "neither the mean nor the sum|taken example by example": "the loss is no mean or sum over examples, so it has no "
    "terms",
    "No derivatives are known for the loss": "no derivatives are known for the loss: wrap it in `AutogradLoss` or "
    "register it",
    "no derivatives are known for a loss of several outputs": "no derivatives are known for a loss of several outputs, "
    "unless it is a sum of losses of one",
    "has the scale of whatever backward": "a loss of unknown type does not tell the scale of its terms",
    "differentiate[d]? .*only once": "PyTorch differentiates an operation only once, so second derivatives do not "
    "exist; `structure='dense'` and the layers need first ones only",
    "Jacobian-vector products of this model cannot be taken": "an operation has no Jacobian-vector products; "
    "`structure='dense'` and the layers do without",
    "depends on parameters .* other than through": "the loss depends on parameters other than through the output; add "
    "the penalty by `shift`",
    "is complex": "a complex parameter: hold its real and imaginary parts, joined by `torch.view_as_complex`",
    "sparse=True": "sparse gradients cannot be differentiated again: `sparse=False`",
    "torch.utils.checkpoint is incompatible": "reentrant checkpoints are for `backward()` alone: `use_reentrant=False`",
    "has a sparse gradient": "sparse gradients are not for this optimizer: `sparse=False`",
    "belongs to one draw": "the numbers are those of one draw: dropout, or random numbers in `forward`",
}


@dataclass(frozen=True, eq=False)
class Reference:
    """What the matrices of a case are by definition.

    Letters: ``t`` loss term, ``c`` output of a term, ``P`` all trainable parameters.
    """

    case: Case

    @cached_property
    def model(self) -> nn.Module:
        return self.case.plain or self.case.model

    @cached_property
    def params(self) -> list[Any]:
        return list(trainable(self.model).values())

    @cached_property
    def calls(self) -> Uses:
        return Uses()

    @cached_property
    def outputs(self) -> list[Any]:
        """Of each batch, as the loss takes them."""
        before = [
            (module, name, b) for module in self.model.modules() for name, b in module.named_buffers(recurse=False)
        ]
        for module, name, b in before:  # passes may change them
            setattr(module, name, b.clone())
        with self.calls, sdpa_kernel(SDPBackend.MATH), one_draw():
            found = [resolved(self.case, run(self.model, x)) for x, _ in self.case.data]
        for module, name, b in before:
            setattr(module, name, b)
        return found

    @cached_property
    def batches(self) -> list[tuple[Tensor, Any]]:
        """Outputs ``(t, c)`` and targets of each batch."""
        return [self.rows(z, y) for z, (_, y) in zip(self.outputs, self.case.data, strict=True)]

    def rows(self, z: Any, y: Any) -> tuple[Tensor, Any]:
        """Outputs ``(t, c)`` and targets of as many terms."""
        if isinstance(z, tuple):
            return torch.cat(z, -1), y
        if self.case.class_dim is not None:
            z = z.movedim(self.case.class_dim, -1)
            return z.flatten(0, -2), y.flatten()
        if z.dim() == 1:
            return z[:, None], y[:, None]
        if isinstance(y, Tensor) and y.shape == z.shape:
            return z.flatten(0, -2), y.flatten(0, -2)
        return z.flatten(1), y

    @cached_property
    def z(self) -> Tensor:
        return torch.cat([z for z, _ in self.batches])

    @cached_property
    def y(self) -> Any:
        targets = [y for _, y in self.batches]
        return (
            tuple(map(torch.cat, zip(*targets, strict=True))) if isinstance(targets[0], tuple) else torch.cat(targets)
        )

    def loss(self, z: Tensor, y: Any, reduction: str | None = None) -> Tensor:
        """The plain loss of terms."""
        loss_fn = self.case.loss_fn
        loss_fn = loss_fn.loss_fn if isinstance(loss_fn, AutogradLoss) else loss_fn
        if reduction is not None and hasattr(loss_fn, "reduction"):
            loss_fn = copy.deepcopy(loss_fn)
            loss_fn.reduction = reduction
        return called(self.case, loss_fn, self.shaped(z), y)

    def shaped(self, z: Tensor) -> Any:
        """Rows as the loss takes them."""
        first, y = self.outputs[0], self.case.data[0][1]
        if isinstance(first, tuple):
            return tuple(z.chunk(len(first), -1))
        if self.case.class_dim is None and first.dim() > 2 and y.shape != first.shape:
            return z.unflatten(1, first.shape[1:])
        return z

    @cached_property
    def slope(self) -> Tensor:
        """``(P,)``, with its graph."""
        grads = torch.autograd.grad(self.loss(self.z, self.y), self.params, create_graph=True, allow_unused=True)
        return flat(grads, self.params)

    def hessian_product(self, v: Tensor) -> Tensor:
        grads = torch.autograd.grad(self.slope @ v, self.params, retain_graph=True, allow_unused=True)
        return flat(grads, self.params)

    @cached_property
    def J(self) -> Tensor:
        """``(t, c, P)``."""
        return jacobian(self.z, self.params)

    def quadratic(self, B: Tensor) -> Tensor:
        """``J^T B J`` with ``B (t, c, t, c)``."""
        J = self.J.flatten(0, 1)
        return J.T @ B.reshape(len(J), len(J)) @ J

    @cached_property
    def output_hessian(self) -> Tensor:
        """``(t, c, t, c)``."""
        z = self.z.detach()
        return torch.autograd.functional.hessian(lambda z: self.loss(z, self.y), z)  # type: ignore[no-any-return]

    @cached_property
    def ggn(self) -> Tensor:
        return self.quadratic(self.output_hessian)

    @cached_property
    def output_fisher(self) -> Tensor | None:
        """``(t, c, t, c)``: closed forms where the parameters are not natural, None without a likelihood."""
        loss, z = self.case.loss_fn, self.z.detach()
        mean = getattr(loss, "reduction", "mean") == "mean"
        entries = z.numel() if mean else 1
        if isinstance(loss, nn.CrossEntropyLoss | nn.MSELoss | nn.BCEWithLogitsLoss) or loss is F.cross_entropy:
            return self.output_hessian
        if isinstance(loss, nn.PoissonNLLLoss):
            return self.output_hessian if loss.log_input else diagonal(1 / (z + loss.eps) / entries)
        if isinstance(loss, nn.GaussianNLLLoss):
            if isinstance(self.y, tuple):
                return self.output_hessian
            v = z.chunk(2, -1)[1]
            return diagonal(torch.cat([1 / v, 0.5 / v**2], -1) / v.numel())
        if isinstance(loss, nn.BCELoss):
            return diagonal(1 / (z * (1 - z)) / entries)
        if isinstance(loss, nn.L1Loss):
            return diagonal(torch.ones_like(z) / entries)
        if isinstance(loss, nn.NLLLoss):
            w = torch.ones(len(z), dtype=z.dtype) if loss.weight is None else loss.weight[self.y]
            return diagonal(z.exp() * (w / w.sum())[:, None])
        return None

    @cached_property
    def fisher(self) -> Tensor | None:
        return None if self.output_fisher is None else self.quadratic(self.output_fisher)

    @cached_property
    def slopes(self) -> Tensor:
        """Of the sum of the terms in the output, ``(t, c)``."""
        z = self.z.detach().requires_grad_()
        known = isinstance(self.case.loss_fn, nn.Module) and not isinstance(self.case.loss_fn, AutogradLoss)
        if known and not isinstance(self.case.loss_fn, ONE_BY_ONE):
            return torch.autograd.grad(self.loss(z, self.y, "sum"), z)[0]
        return torch.autograd.grad(sum(self.loss(z[t : t + 1], self.y[t : t + 1]) for t in range(len(z))), z)[0]

    @cached_property
    def weight(self) -> Tensor:
        """``w`` of ``L = w * sum_t l_t``."""
        z = self.z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.loss(z, self.y), z)
        return slope.norm() / self.slopes.norm()

    @cached_property
    def term_gradients(self) -> Tensor:
        """``(t, P)``."""
        return torch.einsum("tcp,tc->tp", self.J, self.slopes)

    @cached_property
    def empirical(self) -> Tensor:
        return self.weight * self.term_gradients.T @ self.term_gradients

    @cached_property
    def kind(self) -> str:
        """Of the structures: the Fisher where there is one, the Gauss-Newton matrix, or the empirical Fisher."""
        try:
            if self.fisher is not None:
                return "exact"
            values = torch.linalg.eigvalsh(self.ggn)
            return "ggn" if values[-1] > 0 and values[0] > -1e-12 * values[-1] else "empirical"
        except RuntimeError:  # no second derivative
            return "empirical"

    @cached_property
    def matrix(self) -> Tensor:
        """What the structures estimate."""
        if self.kind == "exact":
            assert self.fisher is not None
            return self.fisher
        return self.ggn if self.kind == "ggn" else self.empirical

    def roots(self) -> Iterable[Tensor]:
        """``s (t, c)``, zero but in one term: the matrix of the outputs is the sum of their outer products."""
        if self.kind == "empirical":
            for t in range(len(self.z)):
                s = torch.zeros_like(self.z)
                s[t] = self.slopes[t] * self.weight.sqrt()
                yield s
            return
        B = self.output_fisher if self.kind == "exact" else self.output_hessian
        assert B is not None
        for t in range(len(self.z)):
            values, vectors = torch.linalg.eigh(B[t, :, t])
            for column in (vectors * values.clamp(min=0).sqrt()).T:
                s = torch.zeros_like(self.z)
                s[t] = column
                yield s

    @cached_property
    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """``{weight: (B (group, o, o), A (group, i, i))}`` with the bias appended, of weights used by known calls."""
        names = {id(p): name for name, p in trainable(self.model).items()}
        by_weight: dict[str, list[Use]] = {}
        roots = list(self.roots())
        for use in self.calls.uses:
            by_weight.setdefault(names[id(use.weight)], []).append(use)
        found = {}
        for name, uses in by_weight.items():
            if len({(use.function, use.bias is None) for use in uses}) > 1 or self.calls.elsewhere(uses[0].weight):
                continue
            A, count, B = 0.0, 0, 0.0
            for use in uses:
                a = use.inputs()
                if use.bias is not None:
                    a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
                A, count = A + torch.einsum("gsi,gsj->gij", a, a), count + a.shape[1]
                for s in roots:
                    (g,) = torch.autograd.grad(self.z, use.output, s, retain_graph=True, allow_unused=True)
                    if g is not None:
                        g = use.channels_last(g)
                        B = B + torch.einsum("gso,gsp->gop", g, g)
            found[name] = (B, A / count)
        return {name: (B, A) for name, (B, A) in found.items() if isinstance(B, Tensor)}


#: Their reduction says how examples are joined, and one term is one example.
ONE_BY_ONE = (nn.MultiMarginLoss, nn.MultiLabelMarginLoss, nn.MultiLabelSoftMarginLoss, nn.SoftMarginLoss)
ONE_BY_ONE = (*ONE_BY_ONE, nn.HingeEmbeddingLoss)


@dataclass(frozen=True, eq=False)
class Use:
    """One call of a layer on a batch, whose weight and bias are parameters."""

    function: Any
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    rest: dict[str, Any]
    output: Tensor

    def channels_last(self, x: Tensor) -> Tensor:
        """``(group, row, channel)`` of a tensor shaped as the output."""
        rows = x.movedim(1, -1) if self.function in CONVOLUTIONS else x
        rows = rows.reshape(-1, rows.shape[-1])
        return rows.unflatten(-1, (self.rest.get("groups", 1), -1)).movedim(1, 0)

    def inputs(self) -> Tensor:
        """``a (group, row, d_in)``: the derivative of ``y_c`` in row ``c`` of the weight."""
        if self.function is F.embedding:
            return F.one_hot(self.input.flatten(), len(self.weight)).to(self.weight.dtype)[None]
        if self.function is F.linear:
            return self.input.detach().reshape(1, -1, self.input.shape[-1])
        W = self.weight.detach().requires_grad_()
        y = self.channels_last(self.function(self.input.detach(), W, None, **self.rest))
        rows = [
            torch.autograd.grad(y[group, s, 0], W, retain_graph=True)[0][group * y.shape[-1]].flatten()
            for group in range(len(y))
            for s in range(y.shape[1])
        ]
        return torch.stack(rows).reshape(len(y), y.shape[1], -1)


CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


class Uses(TorchFunctionMode):
    """Notes which parameters are used by which functions."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: list[Use] = []
        self._others: set[int] = set()

    def elsewhere(self, weight: Tensor) -> bool:
        """Whether something else uses it, too."""
        return id(weight) in self._others

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [*args, *kwargs.values()]
        known = func is F.linear or func in CONVOLUTIONS
        y = func(*args, **kwargs)
        if known and isinstance(given[1], nn.Parameter) and given[1].requires_grad:
            bias = given[2] if len(given) > 2 else None
            names = ("stride", "padding", "dilation", "groups")
            rest = {**dict(zip(names, args[3:], strict=False)), **{k: v for k, v in kwargs.items() if k in names}}
            if given[0] is not given[1] and (bias is None or isinstance(bias, nn.Parameter)):
                bias = bias if bias is not None and bias.requires_grad else None
                self.uses.append(Use(func, given[0], given[1], bias, rest, y))
                return y.clone()  # whatever is done in place afterwards leaves ours alone
        if not isinstance(y, Tensor) or y.requires_grad:
            self._others |= {id(t) for t in given if isinstance(t, nn.Parameter)}
        return y


def resolved(case: Case, z: Any) -> Any:
    """The output tensor, or the tuple that the loss takes."""
    return z if case.output is None else case.output(z)


def called(case: Case, loss_fn: Any, z: Any, y: Any) -> Tensor:
    """A loss, as a loop calls it."""
    if isinstance(case.loss_fn, nn.GaussianNLLLoss):
        return loss_fn(z[0], y, z[1]) if isinstance(z, tuple) else loss_fn(z, *y)  # type: ignore[no-any-return]
    return loss_fn(z, y)  # type: ignore[no-any-return]


def diagonal(values: Tensor) -> Tensor:
    """``(t, c, t, c)``."""
    return values.flatten().diag().reshape(*values.shape, *values.shape)


def flat(tensors: Iterable[Tensor | None], like: list[Tensor]) -> Tensor:
    """Concatenated, zero where there is none."""
    parts = [torch.zeros_like(p) if t is None else t.to_dense() for t, p in zip(tensors, like, strict=True)]
    return torch.cat([torch.view_as_real(t).flatten() if t.is_complex() else t.flatten() for t in parts])


@contextlib.contextmanager
def one_draw() -> Iterator[None]:
    """The same random numbers for the packages' first pass and for the reference's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


# Quantities -----------------------------------------------------------------------------------------------------------

#: In place of what is expected, where there is no definition here.
UNDEFINED = torch.empty(0)
Pairs = Iterable[tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, eq=False)
class Found:
    """What the packages make of a case, beside its reference."""

    case: Case
    reference: Reference

    @property
    def options(self) -> dict[str, Any]:
        given = {"class_dim": self.case.class_dim, "output": self.case.output}
        return {name: value for name, value in given.items() if value is not None}

    def vectors(self, size: int) -> Tensor:
        return torch.randn(2, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def call(self, function: Callable[..., Any], **options: Any) -> Any:
        data: Any = self.case.data if len(self.case.data) > 1 else self.case.data[0]
        with one_draw():
            return function(self.case.model, self.case.loss_fn, data, **self.options, **options)

    def products(self, operator: Any, expected: Callable[[], Tensor | None]) -> Pairs:
        for v in self.vectors(operator.in_shape[0]):
            found = operator @ v
            matrix = expected()
            yield found, None if matrix is None else matrix @ v

    def hessian(self) -> Pairs:
        H = self.call(curvature.hessian)
        for v in self.vectors(H.in_shape[0]):
            yield H @ v, self.reference.hessian_product(v)

    def ggn(self) -> Pairs:
        yield from self.products(self.call(curvature.ggn), lambda: self.reference.ggn)

    def fisher(self) -> Pairs:
        yield from self.products(self.call(curvature.fisher, kind="exact"), lambda: self.reference.fisher)

    def mc(self) -> Pairs:
        """The mean over draws of a quadratic form, in units of its error: 0 where it is less than five."""
        forms = []
        for seed in range(24):
            generator = torch.Generator().manual_seed(seed)
            operator = self.call(curvature.fisher, kind="mc", samples=8, generator=generator)
            v = self.vectors(operator.in_shape[0])[0]
            forms.append(v @ (operator @ v))
        drawn = torch.stack(forms)
        assert self.reference.fisher is not None
        expected, error = v @ self.reference.fisher @ v, drawn.std() / math.sqrt(len(drawn))
        assert error < 0.3 * expected, "the draws say nothing"
        yield (expected if (drawn.mean() - expected).abs() < 5 * error else drawn.mean()), expected

    def empirical(self) -> Pairs:
        operator = self.call(curvature.fisher, kind="empirical")
        yield from self.products(operator, lambda: self.reference.empirical)

    def structured(self, structure: str) -> Any:
        """In the kind that there is."""
        if self.reference.kind == "ggn":
            return self.call(curvature.ggn, structure=structure)
        return self.call(curvature.fisher, kind=self.reference.kind, structure=structure)

    def blocks(self, structure: str) -> Iterable[tuple[Any, Any, Tensor]]:
        """Block, its operator, and where it lies in the flat vector."""
        operator = self.structured(structure)
        size = operator.in_shape[0]
        for place, block in zip(operator.places, operator.blocks, strict=True):
            yield place.block, block, place.gather(torch.arange(size)).flatten()

    def diagonal(self) -> Pairs:
        yield self.structured("diagonal").diagonal(), self.reference.matrix.diagonal()

    def layer(self) -> Pairs:
        for _, operator, index in self.blocks("layer"):
            yield operator.to_dense(), self.reference.matrix[index][:, index]

    def kfac(self) -> Pairs:
        for block, operator, index in self.blocks("kfac"):
            dense, exact = operator.to_dense(), self.reference.matrix[index][:, index]
            if isinstance(operator, Kronecker):
                factors = self.reference.factors.get(block.parts[0].name.replace(COMPILED, ""))
                expected = None if factors is None else torch.block_diag(*map(torch.kron, *factors))
                whole = expected is not None and expected.shape == dense.shape and not self.case.masked
                yield dense, expected if whole else UNDEFINED
            else:  # entries, or parts of a block, that are exact
                yield dense, torch.where((dense != 0) | torch.eye(len(dense), dtype=torch.bool), exact, 0.0)

    def ekfac(self) -> Pairs:
        """In a basis that is orthogonal and diagonalises the factors, the exact diagonal."""
        kfac = {block.name: operator for block, operator, _ in self.blocks("kfac")}
        for block, operator, index in self.blocks("ekfac"):
            exact = self.reference.matrix[index][:, index]
            if isinstance(operator, Eigen):
                Q = operator.basis.to_dense()
                yield Q.T @ Q, torch.eye(len(Q), dtype=Q.dtype)
                rotated = Q.T @ kfac[block.name].to_dense() @ Q
                yield rotated, rotated.diagonal().diag()
                yield operator.values.flatten(), torch.einsum("ij,ik,kj->j", Q, exact, Q)

    def single(self) -> Pairs:
        x, y = self.case.data[0]
        with one_draw():
            rows = curvature.per_sample_gradients(self.case.model, self.case.loss_fn, (x, y), **self.options)
        found = torch.cat([g.reshape(len(g), -1) for g in rows.values()], 1)
        z, _ = self.reference.batches[0]
        yield found, self.reference.term_gradients[: len(z)].reshape(len(found), -1, found.shape[1]).sum(1)

    def step(self) -> Pairs:
        """A training step collects what the data set of its batch has; statistics of a batch it takes as given."""
        if self.case.meets:
            return
        x, y = self.case.data[0]
        kind = "exact" if self.reference.kind == "ggn" else self.reference.kind
        model = copy.deepcopy(self.case.model) if self.case.plain is None else self.case.model
        optimizer = watching(model, self.case.loss_fn, "kfac", kind, eval_mode=not model.training)
        with one_draw():
            z = resolved(self.case, run(model, x))
        if self.case.class_dim is not None:
            z, y = z.movedim(self.case.class_dim, -1).flatten(0, -2), y.flatten()
        called(self.case, self.case.loss_fn, z, y).backward()
        optimizer.step()
        case = replace(self.case, data=self.case.data[:1])
        one = Found(case, Reference(case))
        if one.reference.kind != self.reference.kind:
            return
        try:
            blocks = list(one.blocks("kfac"))
        except RuntimeError:  # training alone serves it
            assert self.case.plain is not None
            blocks = list(Found(replace(case, model=self.case.plain), one.reference).blocks("kfac"))
        whole = {block.name.replace(COMPILED, ""): operator for block, operator, _ in blocks}
        where = flat_indices(self.reference.model)
        terms = 1.0  # a sum stands for the mean over its terms
        if getattr(self.case.loss_fn, "reduction", "mean") == "sum":
            z, y = one.reference.batches[0]
            terms = float(one.reference.loss(z, y) / one.reference.loss(z, y, "mean"))
        for label, preconditioner in optimizer.preconditioners.items():
            name, operator = label.replace(COMPILED, ""), preconditioner.estimator.operator()
            if name in whole and type(whole[name]) is type(operator):
                yield operator.to_dense() * terms, whole[name].to_dense()
            elif isinstance(operator, Diagonal) and name in where:
                exact = one.reference.matrix.diagonal()[where[name].flatten()]
                yield operator.to_dense().diagonal() * terms, exact
            else:
                yield operator.to_dense(), UNDEFINED


QUANTITIES: dict[str, Callable[[Found], Pairs]] = {
    "Hessian": Found.hessian,
    "GGN": Found.ggn,
    "Fisher": Found.fisher,
    "mc": Found.mc,
    "empirical": Found.empirical,
    "diagonal": Found.diagonal,
    "layer": Found.layer,
    "K-FAC": Found.kfac,
    "EKFAC": Found.ekfac,
    "examples": Found.single,
    "step": Found.step,
}


def cell(compute: Callable[[], Pairs]) -> str:
    """ "exact", "", the relative error, or the message of the refusal."""
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            pairs = list(compute())
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        ours = any(part in last for part in PACKAGES) and "/tests/" not in last
        if ours or words(str(error)) in WORDS.values():  # PyTorch refuses some models in words
            return f"refused: {words(str(error))}"
        return f"ERROR: {type(error).__name__}: {str(error)[:200]} at {last}"
    compared = [(found, expected) for found, expected in pairs if expected is not UNDEFINED]
    if not compared:
        return ""
    if any(expected is None for _, expected in pairs):
        return "ERROR: no reference"
    worst = max(distance(found, expected) for found, expected in compared if expected is not None)
    if not worst <= EXACT:
        return f"WRONG: {worst:.1e}"
    right = "exact" if len(compared) == len(pairs) else "in part"
    for warning in seen:
        if warning.category is curvature.NotOneLossWarning and "draw" in str(warning.message):
            return f"{right}: {words(str(warning.message))}"
    return right


def words(message: str) -> str:
    """Of the page, for a message."""
    for part, short in WORDS.items():
        if re.search(part, message, re.S):
            return short
    return message.split(". ")[0]


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative, in the norm; absolute where zero is expected."""
    if found.shape != expected.shape:
        return math.inf
    size = float(expected.norm())
    off = float((found.detach() - expected.detach()).norm())
    return math.inf if math.isnan(off) else off / size if size > 0 else off


def cells(case: Case) -> dict[str, str]:
    """Quantity -> what it is."""
    found = Found(case, Reference(case))
    row = {name: cell(partial(compute, found)) for name, compute in QUANTITIES.items()}
    row["mc"] = row["mc"].replace("exact", "unbiased")
    return row


class Notes:
    """The messages of refusals, numbered as they come."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def short(self, found: str) -> str:
        """A cell of the page: a message by its number."""
        word, colon, message = found.partition(": ")
        return f"{word} ({self.numbers.setdefault(message, len(self.numbers) + 1)})" if colon else word

    def markdown(self) -> str:
        """The list below the table."""
        return "".join(f"{number}. {message}\n" for message, number in self.numbers.items())


def line(cells: Iterable[str]) -> str:
    """A line of the table."""
    return f"| {' | '.join(cells)} |\n"


def markdown(chosen: Callable[[str, str], bool] = lambda family, name: True) -> str:
    """The table of ``docs/support.md`` and its notes, or the rows that are chosen."""
    head, notes, family = ("model or loss", *QUANTITIES), Notes(), ""
    text = line(head) + line(("---",) * len(head))
    for (of, name), make in MODELS.items():
        if not chosen(of, name):
            continue
        if of != family:
            family = of
            text += line((f"**{family}**", *("" for _ in QUANTITIES)))
        text += line((name, *map(notes.short, cells(make()).values())))
    return f"{text}\n{notes.markdown()}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="of the families or names of the rows to run; all by default")
    words = parser.parse_args().words
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = lambda family, name: not words or any(word in f"{family}: {name}" for word in words)  # noqa: E731
        print(markdown(chosen), end="")


if __name__ == "__main__":
    main()

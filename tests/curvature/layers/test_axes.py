"""Where examples lie, from the operations alone: against what changes when one example changes, in float64."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from curvature.layers.axes.calls import CONSTANT, MIXED, Axis, State
from curvature.layers.axes.example_axes import ExampleAxes, Resolved
from curvature.layers.recorder import tensors_in

N = 3


class Watch(TorchFunctionMode):
    """Hands every call to the axes and keeps every result."""

    def __init__(self, axes: ExampleAxes) -> None:
        super().__init__()
        self.axes = axes
        self.results: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.axes.call(func, args, kwargs or {}, output)
        self.results += [t for t in tensors_in(output)]
        return output


def interpret(f: Callable[..., Any], *inputs: Tensor, axes: tuple[int | None, ...], constants: Any = ()) -> Resolved:
    """States after one run of ``f``."""
    return traced(f, *inputs, axes=axes, constants=constants)[0]


def traced(
    f: Callable[..., Any], *inputs: Tensor, axes: tuple[int | None, ...], constants: Any = ()
) -> tuple[Resolved, Any]:
    watched = ExampleAxes()
    for c in constants:
        watched.constant(c)
    for x, axis in zip(inputs, axes, strict=True):
        watched.start(x, axis)
    with Watch(watched):
        output = f(*inputs)
    return watched.resolve(batch=N), output


def state_of(f: Callable[..., Any], *inputs: Tensor, axes: tuple[int | None, ...], constants: Any = ()) -> State:
    """State of what ``f`` returns."""
    resolved, output = traced(f, *inputs, axes=axes, constants=constants)
    return resolved.of(output)


def changed(f: Callable[..., list[Tensor]], inputs: list[Tensor], axes: list[int | None]) -> list[list[Tensor | None]]:
    """For each example, which entries of each result change with it; ``None`` where the shape does."""
    before = [t.clone() for t in f(*[x.clone() for x in inputs])]
    found = []
    for n in range(N):
        others = [x.clone() for x in inputs]
        for x, axis in zip(others, axes, strict=True):
            if axis is not None:
                part = x.select(axis, n)
                part.copy_(~part if x.dtype == torch.bool else (part + 1) % 4 if not x.is_floating_point() else -part)
        after = f(*others)
        pairs = zip(before, after, strict=True) if len(before) == len(after) else ()
        found.append([None if a.shape != b.shape else _differ(a, b) for a, b in pairs])
    return found


def _differ(a: Tensor, b: Tensor) -> Tensor:
    return ~torch.isclose(a, b, rtol=0, atol=1e-12, equal_nan=True) if a.is_floating_point() else a != b


def sound(state: State, shape: torch.Size, moved: list[Tensor | None]) -> bool:
    """Whether a state is true of a tensor whose entries ``moved[n]`` change with example ``n``."""
    if state is MIXED:
        return True
    if any(m is None for m in moved):
        return False
    if state is CONSTANT:
        return not any(bool(m.any()) for m in moved if m is not None)
    assert isinstance(state, Axis)
    examples = torch.arange(shape[state.axis]) // state.inner % N
    examples = examples.reshape([-1 if d == state.axis else 1 for d in range(len(shape))])
    return not any(bool((m & (examples != n)).any()) for n, m in enumerate(moved) if m is not None)


# ---- Random programs -------------------------------------------------------------------------------------------------

Operation = Callable[[random.Random, list[Tensor]], Any]


def _dim(r: random.Random, x: Tensor) -> int:
    return r.randrange(-x.dim(), x.dim()) if x.dim() else 0


def _reshaped(r: random.Random, x: Tensor) -> Tensor:
    sizes: list[int] = []
    rest = x.numel()
    while rest > 1 and len(sizes) < 3:
        size = r.choice([d for d in range(1, rest + 1) if rest % d == 0])
        sizes.append(size)
        rest //= size
    return x.reshape(*sizes, rest) if r.random() < 0.5 else x.contiguous().view((*sizes, rest))


def _index(r: random.Random, x: Tensor) -> Any:
    parts: list[Any] = []
    for size in x.shape[: r.randint(1, max(x.dim(), 1))]:
        choices = [slice(None), slice(0, size, 1), slice(size // 2, None), slice(None, None, 2), r.randrange(size)]
        choices += [torch.randint(size, (N,)), torch.arange(size), torch.arange(size)[:, None], [0, size - 1]]
        parts += [None] if r.random() < 0.2 else []
        parts.append(r.choice(choices))
    return tuple(parts) + ((Ellipsis,) if r.random() < 0.3 else ())


def _set(r: random.Random, x: Tensor, y: Tensor) -> Tensor:
    z = x.clone() if r.random() < 0.7 else torch.zeros(x.shape, dtype=x.dtype)
    index = _index(r, z)
    z[index] = y if r.random() < 0.6 else 1.0
    return z


def _in_place_through_view(r: random.Random, x: Tensor, y: Tensor) -> list[Tensor]:
    z = x.clone() if r.random() < 0.5 else torch.zeros_like(x)
    views: list[Callable[[], Tensor]] = [
        *(lambda: z[_index(r, z)],) * 3,
        *(lambda: z.transpose(0, -1), lambda: z.unfold(-1, 2, 2), lambda: torch.einsum("a...->...a", z), lambda: z.mT),
        *(lambda: z.view(-1), lambda: z.diagonal(), lambda: z.chunk(2, -1)[0], lambda: z.detach(), lambda: z.data),
        *(lambda: z.unbind(1)[0], lambda: z.narrow(0, 0, 1), lambda: z.squeeze(), lambda: z[:, None], lambda: z),
    ]
    view = r.choice(views)()
    before = z * 1, view * 1
    r.choice([view.add_, view.copy_, view.mul_])(y)
    return [z, view, z + 1, view + 1, *before]


OPERATIONS: dict[str, Operation] = {
    "add": lambda r, p: r.choice(p) + r.choice(p),
    "multiply": lambda r, p: torch.mul(r.choice(p), r.choice(p)),
    "reversed": lambda r, p: 1 - r.choice(p),
    "where": lambda r, p: torch.where(r.choice(p) > 0, r.choice(p), r.choice(p)),
    "masked_fill": lambda r, p: r.choice(p).masked_fill(r.choice(p) > 0, 0.5),
    "unary": lambda r, p: r.choice([torch.sin, F.relu, F.gelu, torch.exp, F.silu, torch.abs])(r.choice(p)).clamp(-3, 3),
    "dropout": lambda r, p: F.dropout(r.choice(p), 0.3),
    "reshape": lambda r, p: _reshaped(r, r.choice(p)),
    "flatten": lambda r, p: (x := r.choice(p)).flatten(r.randrange(x.dim())),
    "permute": lambda r, p: (x := r.choice(p)).permute(r.sample(range(x.dim()), x.dim())),
    "transpose": lambda r, p: (x := r.choice(p)).transpose(_dim(r, x), _dim(r, x)),
    "movedim": lambda r, p: (x := r.choice(p)).movedim(_dim(r, x), _dim(r, x)),
    "unsqueeze": lambda r, p: r.choice(p).unsqueeze(r.choice([0, -1, 1])),
    "squeeze": lambda r, p: r.choice(p).squeeze(),
    "property": lambda r, p: r.choice(p).mT,
    "T": lambda r, p: next(x for x in r.sample(p, len(p)) if x.dim() == 2).T,
    "expand": lambda r, p: (x := r.choice(p)).unsqueeze(0).expand(r.choice([2, N]), *x.shape),
    "repeat": lambda r, p: (x := r.choice(p)).repeat(*(r.choice([1, 2]) for _ in x.shape)),
    "interleave": lambda r, p: (x := r.choice(p)).repeat_interleave(2, dim=_dim(r, x)),
    "chunk": lambda r, p: list((x := r.choice(p)).chunk(2, _dim(r, x))),
    "split": lambda r, p: list(torch.split(x := r.choice(p), r.choice([1, 2, 3]), _dim(r, x))),
    "unbind": lambda r, p: list((x := r.choice(p)).unbind(_dim(r, x))),
    "select": lambda r, p: (x := r.choice(p)).select(_dim(r, x), 0),
    "narrow": lambda r, p: (x := r.choice(p)).narrow(d := _dim(r, x), 0, max(1, x.shape[d] - r.choice([0, 1, N]))),
    "getitem": lambda r, p: (x := r.choice(p))[_index(r, x)],
    "getitem by ids": lambda r, p: r.choice(p)[(r.choice(p).abs() * 10).long() % 2],
    "getitem by two": lambda r, p: (x := r.choice(p))[torch.arange(len(x)), (r.choice(p)[..., 0] > 0).long()],
    "mask": lambda r, p: (x := r.choice(p))[x > 0],
    "setitem": lambda r, p: _set(r, r.choice(p), r.choice(p)),
    "view changed": lambda r, p: _in_place_through_view(r, r.choice(p), r.choice(p)),
    "sum": lambda r, p: (x := r.choice(p)).sum(_dim(r, x), keepdim=r.random() < 0.5),
    "mean": lambda r, p: r.choice(p).mean(r.choice([(0, 1), (-1,), (1, 2), None])),
    "amax": lambda r, p: torch.amax(x := r.choice(p), _dim(r, x)),
    "max": lambda r, p: list(torch.max(x := r.choice(p), _dim(r, x))),
    "std": lambda r, p: (x := r.choice(p)).std(_dim(r, x), keepdim=True),
    "norm": lambda r, p: (x := r.choice(p)).norm(dim=_dim(r, x)),
    "softmax": lambda r, p: F.softmax(x := r.choice(p), dim=_dim(r, x)),
    "cumsum": lambda r, p: (x := r.choice(p)).cumsum(_dim(r, x)),
    "sort": lambda r, p: list(torch.sort(x := r.choice(p), _dim(r, x))),
    "topk": lambda r, p: list((x := r.choice(p)).topk(1, _dim(r, x))),
    "flip": lambda r, p: (x := r.choice(p)).flip(_dim(r, x)),
    "roll": lambda r, p: (x := r.choice(p)).roll(1, _dim(r, x)),
    "normalize": lambda r, p: F.normalize(x := r.choice(p), dim=_dim(r, x)),
    "cosine": lambda r, p: F.cosine_similarity(r.choice(p), r.choice(p), dim=-1),
    "unfold": lambda r, p: (x := r.choice(p)).unfold(_dim(r, x), 2, 1),
    "glu": lambda r, p: F.glu(x := r.choice(p), _dim(r, x)),
    "matmul": lambda r, p: torch.matmul(r.choice(p), r.choice(p)),
    "matmul of a transpose": lambda r, p: r.choice(p) @ r.choice(p).transpose(-1, -2),
    "linear": lambda r, p: F.linear(r.choice(p), next(x for x in r.sample(p, len(p)) if x.dim() == 2)),
    "linear by a constant": lambda r, p: F.linear(x := r.choice(p), torch.randn(3, x.shape[-1], dtype=x.dtype)),
    "constant times": lambda r, p: torch.randn((x := r.choice(p)).shape[-2], x.shape[-2], dtype=x.dtype) @ x,
    "bmm": lambda r, p: torch.bmm(r.choice(p), r.choice(p)),
    "baddbmm": lambda r, p: torch.baddbmm(r.choice(p), r.choice(p), r.choice(p)),
    "addmm": lambda r, p: torch.addmm(r.choice(p), r.choice(p), r.choice(p)),
    "einsum": lambda r, p: torch.einsum(
        r.choice(["abc,abd->acd", "abc,cd->abd", "ab,bc->ac", "ab,cb->ac", "abc->ca", "...a,...a->...", "aab->ab"]),
        *r.sample(p, r.choice([1, 2])),
    ),
    "tensordot": lambda r, p: torch.tensordot(r.choice(p), r.choice(p), 1),
    "attention": lambda r, p: F.scaled_dot_product_attention(r.choice(p), x := r.choice(p), x),
    "cdist": lambda r, p: torch.cdist(r.choice(p), r.choice(p)),
    "layer_norm": lambda r, p: F.layer_norm(x := r.choice(p), x.shape[-r.choice([1, 2]) :]),
    "group_norm": lambda r, p: F.group_norm(r.choice(p), 1),
    "instance_norm": lambda r, p: F.instance_norm(r.choice(p)),
    "batch_norm": lambda r, p: F.batch_norm(x := r.choice(p), *torch.ones(2, x.shape[1]).double()),
    "conv1d": lambda r, p: F.conv1d(x := r.choice(p), torch.randn(2, x.shape[-2], 1, dtype=x.dtype)),
    "kernels per example": lambda r, p: F.conv1d((x := r.choice(p)).reshape(1, -1, x.shape[-1]), r.choice(p), groups=N),
    "pool": lambda r, p: F.avg_pool1d(r.choice(p), 2),
    "adaptive": lambda r, p: F.adaptive_avg_pool1d(r.choice(p), 2),
    "interpolate": lambda r, p: F.interpolate(r.choice(p), scale_factor=2),
    "pad": lambda r, p: F.pad(r.choice(p), r.choice([(1, 1), (0, 0, 1, 0), (0, 0, 0, 0, 1, 1)])),
    "cat": lambda r, p: torch.cat([x := r.choice(p), r.choice(p)], _dim(r, x)),
    "cat of halves": lambda r, p: torch.cat([*torch.chunk(x := r.choice(p), 2, d := _dim(r, x))][::-1], d),
    "stack": lambda r, p: torch.stack([r.choice(p), r.choice(p)], r.choice([0, 1, -1])),
    "gather": lambda r, p: (x := r.choice(p)).gather(_dim(r, x), (r.choice(p) > 0).long()),
    "scatter_add": lambda r, p: (x := r.choice(p)).scatter_add(_dim(r, x), (r.choice(p) > 0).long(), r.choice(p)),
    "index_select": lambda r, p: (x := r.choice(p)).index_select(_dim(r, x), torch.tensor([1, 0])),
    "index_add": lambda r, p: (x := r.choice(p)).index_add(_dim(r, x), torch.tensor([1, 0, 1]), r.choice(p)),
    "embedding": lambda r, p: F.embedding((r.choice(p) > 0).long(), torch.randn(2, 3).double()),
    "in place": lambda r, p: r.choice(p).clone().mul_(r.choice(p)),
    "diagonal": lambda r, p: r.choice(p).diagonal(0, r.choice([0, 1]), -1),
    "triangle": lambda r, p: r.choice(p).tril(),
    "one_hot": lambda r, p: F.one_hot((r.choice(p) > 0).long(), 2).double(),
    "fft": lambda r, p: torch.fft.fft(x := r.choice(p), dim=_dim(r, x)).real,
    "solve": lambda r, p: torch.linalg.inv(r.choice(p) + 5),
    "nonzero": lambda r, p: torch.where(r.choice(p) > 0)[0].double(),
    "arange": lambda r, p: torch.arange(N, dtype=torch.double)[:, None].expand(N, 2) * r.choice(p),
    "loss": lambda r, p: F.mse_loss(r.choice(p), r.choice(p), reduction=r.choice(["none", "mean"])),
    "classes": lambda r, p: F.cross_entropy(r.choice(p), (r.choice(p) > 0).long(), reduction="none"),
    "lstm cell": lambda r, p: torch.gru_cell(
        x := r.choice(p), r.choice(p)[:, :2], *(torch.randn(6, d).double() for d in (x.shape[-1], 2))
    ),
}  # fmt: skip

#: Axis of the examples in each of the inputs of a program.
INPUTS: list[tuple[tuple[int, ...], int | None]] = [
    ((N, 3, 4), 0),
    ((N, 4), 0),
    ((2, N, 4), 1),
    ((3, 4), None),
    ((N, N), None),
    ((4, 2, N), 2),
]


def _program(seed: int, length: int, operations: dict[str, Operation]) -> Callable[..., list[Tensor]]:
    """A program of operations drawn by the seed: always the same ones, on whatever values."""
    r = random.Random(seed)
    chosen = [(r.choice([*operations]), r.randrange(1 << 30)) for _ in range(length)]
    alive = [True] * length

    def run(*inputs: Tensor) -> list[Tensor]:
        pool = list(inputs)
        for k, (name, step) in enumerate(chosen):
            if not alive[k]:
                continue
            torch.manual_seed(step)
            own = random.Random(step)
            try:
                made = operations[name](own, [*pool, *pool[-4:]])
            except (RuntimeError, IndexError, ValueError, TypeError, StopIteration, NotImplementedError):
                alive[k] = False
                continue
            for t in tensors_in(made):
                if t.dtype == torch.double and 0 < t.numel() < 3000 and t.dim() < 5:
                    pool.append(t)
        return pool

    run(*[torch.rand(shape, dtype=torch.double) - 0.3 for shape, _ in INPUTS])  # finds out which steps work
    return run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(SEEDS := 60))
def test_random_programs_keep_what_is_said(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.rand(shape, generator=generator, dtype=torch.double) - 0.3 for shape, _ in INPUTS]
    axes = [axis for _, axis in INPUTS]
    run = _program(seed, 25, OPERATIONS)
    watched = ExampleAxes()
    for x, axis in zip(inputs, axes, strict=True):
        watched.start(x, axis)
    with Watch(watched):
        pool = run(*inputs)
    resolved = watched.resolve(batch=N)
    moved = changed(run, inputs, axes)
    if any(len(m) != len(pool) for m in moved):
        pytest.skip("values decided which operations work")
    for i, x in enumerate(pool):
        assert sound(resolved.of(x), x.shape, [m[i] for m in moved]), (i, tuple(x.shape), resolved.of(x))


# ---- Functions that mix, and functions that do not -------------------------------------------------------------------

X = torch.randn(N, N, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0))
MIXING: dict[str, Callable[[Tensor], Any]] = {
    "flip": lambda x: x.flip(0),
    "flip without value": lambda x: x + x.flip(0) * 0,
    "roll": lambda x: x.roll(1, 0),
    "mean": lambda x: x.mean(0),
    "mean kept": lambda x: x - x.mean(0, keepdim=True),
    "sum of all": lambda x: x.sum(),
    "softmax": lambda x: F.softmax(x, 0),
    "cumsum": lambda x: x.cumsum(0),
    "sort": lambda x: x.sort(0).values,
    "adjacency": lambda x: torch.ones(N, N).double() @ x.flatten(1),
    "adjacency by einsum": lambda x: torch.einsum("ij,jab->iab", torch.ones(N, N).double(), x),
    "permutation": lambda x: x[torch.tensor([2, 0, 1])],
    "permutation by list": lambda x: x[[2, 0, 1]],
    "permutation by index_select": lambda x: x.index_select(0, torch.tensor([2, 0, 1])),
    "reversed arange": lambda x: x[N - 1 - torch.arange(N)],
    "one example": lambda x: x[0],
    "arange of booleans": lambda x: x[torch.arange(N).bool().long()],
    "arange cut off": lambda x: x[torch.arange(N, dtype=torch.double).clamp(max=1).long()],
    "some examples": lambda x: x[: N - 1],
    "every other": lambda x: x[::2],
    "mask": lambda x: x[x[:, 0, 0] > 0],
    "attention along the examples": lambda x: F.scaled_dot_product_attention(*[x.transpose(0, 1)] * 3),
    "pairs": lambda x: x[:, 0] @ x[:, 0].T,
    "pairs by broadcasting": lambda x: x[:, None, 0] - x[None, :, 0],
    "transposed and added": lambda x: x[..., 0] + x[..., 0].T,
    "merged with another axis": lambda x: x.reshape(N * N, 4).softmax(0),
    "batch of conv as channels": lambda x: F.conv1d(x[None, :, 0], torch.ones(N, N, 1).double()),
    "statistics detached": lambda x: x / x.detach().norm(),
    "written into another example": lambda x: _written(x),
    "written through a view": lambda x: _written_through(x),
    "written through a transpose": lambda x: _written_through_a_transpose(x),
    "written to some examples": lambda x: _written_to_some(x),
    "unknown function": lambda x: torch.trapezoid(x, dim=-1),
    "group norm of one": lambda x: F.group_norm(x[None], 1)[0],
    "layer norm over all": lambda x: F.layer_norm(x, x.shape),
    "flattened index": lambda x: x.take(torch.arange(N)),
    "positions that hold": lambda x: torch.where(x[:, 0, 0] > -9)[0],
}


def _written(x: Tensor) -> Tensor:
    y = x.clone()
    y[0] = x[1]
    return y


def _written_through(x: Tensor) -> Tensor:
    y = x.clone()
    view = y.view(-1)
    view += x.flip(0).reshape(-1)
    return y


def _written_through_a_transpose(x: Tensor) -> Tensor:
    y = x.clone()
    y.transpose(0, 1).copy_(x)
    return y


def _written_to_some(x: Tensor) -> Tensor:
    y = x.clone()
    y[::2].mul_(x[1])
    return y


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_is_called_mixed(name: str) -> None:
    assert state_of(MIXING[name], X, axes=(0,)) is MIXED


KEEPING: dict[str, tuple[Callable[[Tensor], Any], Axis]] = {
    "heads folded into the batch": (lambda x: x.reshape(N * N, 4).softmax(-1), Axis(0, 1, N)),
    "time major": (lambda x: x.transpose(0, 1).reshape(N * N, 4), Axis(0, N, 1)),
    "unfolded again": (lambda x: x.transpose(0, 1).flatten(0, 1).view(N, N, 4), Axis(1)),
    "half the time": (lambda x: x.transpose(0, 1).flatten(0, 1)[N:], Axis(0, N - 1, 1)),
    "class token": (lambda x: torch.cat([torch.zeros(1, 1, 4).double().expand(N, -1, -1), x], 1), Axis(0)),
    "token of each": (lambda x: x[torch.arange(N), (x[:, :, 0] > 0).int().argmax(-1)], Axis(0)),
    "token of each, by gather": (lambda x: x.gather(1, x.argmax(1, keepdim=True)), Axis(0)),
    "filled buffer": (lambda x: _filled(x), Axis(0)),
    "filled in steps": (lambda x: _filled_in_steps(x), Axis(1)),
    "in place": (lambda x: F.relu(x * 2, inplace=True).mul_(3), Axis(0)),
    "in place through a view": (lambda x: _changed_through_a_view(x), Axis(0)),
    "mixing another axis": (lambda x: torch.ones(N, N).double() @ x.flip(1).softmax(2), Axis(0)),
    "kernels per example": (
        lambda x: F.conv1d(x.reshape(1, N * N, 4), x[:, :, :1].repeat_interleave(3, 0).reshape(-1, N, 1)[: N * 3],
                           groups=N), Axis(1, 1, 3)),
    "out": (lambda x: torch.add(x, 1, out=torch.empty_like(x)), Axis(0)),
    "two examples apart": (lambda x: torch.einsum("nsd,nsd->ns", x, x), Axis(0)),
}  # fmt: skip


def _filled(x: Tensor) -> Tensor:
    buffer = torch.zeros(N, 2, 4, dtype=x.dtype)
    buffer[:, 0] = x[:, 0]
    buffer[:, 1:] = 1.0
    return buffer


def _filled_in_steps(x: Tensor) -> Tensor:
    buffer = torch.empty(N, N, 4, dtype=x.dtype)
    for t, now in enumerate(x.unbind(1)):
        buffer[t] = now
    return buffer


def _changed_through_a_view(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0].mul_(2)
    y[:, 1] += x[:, 0]
    return y


@pytest.mark.parametrize("name", KEEPING)
def test_what_keeps_examples_apart_is_placed(name: str) -> None:
    f, expected = KEEPING[name]
    resolved, output = traced(f, X, axes=(0,))
    assert resolved.of(output) == expected
    moved = changed(lambda x: [f(x)], [X], [0])
    assert sound(expected, output.shape, [m[0] for m in moved])


def test_no_examples_no_dependence() -> None:
    f = lambda x: x.flip(0).softmax(0) @ x[0].T  # noqa: E731
    assert state_of(f, X, axes=(None,)) is CONSTANT


def test_one_record_serves_several_readings() -> None:
    x, y = torch.randn(N, N, 2), torch.randn(N, N, 2)
    watched = ExampleAxes()
    watched.start(x)
    watched.start(y)
    with Watch(watched):
        output = F.softmax(x, 1) + y
    assert watched.resolve().of(output) == Axis(0)
    assert watched.resolve({0: 1, 1: 1}).of(output) is MIXED
    assert watched.resolve({1: None}).of(output) == Axis(0)
    assert watched.resolve({1: 1}).of(output) is MIXED
    assert watched.batch == N
    assert watched.of(output) == Axis(0)


def test_a_reading_must_fit_the_shape() -> None:
    x = torch.randn(2, N)
    assert state_of(torch.sin, x, axes=(0,)) is MIXED  # resolved with N examples


# ---- What function modes do not see ----------------------------------------------------------------------------------


class Hidden(torch.autograd.Function):
    """A kernel that fills memory it was given, behind the back of function modes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, make: Callable[[Tensor], Tensor], bump: bool) -> Tensor:
        out = make(x)
        with torch._C.DisableTorchFunction():
            (out if bump else out.data).copy_(x.flip(0))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0].flip(0), None, None


@pytest.mark.parametrize("bump", [False, True])
@pytest.mark.parametrize("make", [torch.empty_like, torch.zeros_like, lambda x: torch.zeros(x.shape), torch.clone])
def test_a_kernel_that_nobody_saw_is_mixed(make: Callable[[Tensor], Tensor], bump: bool) -> None:
    if make is torch.clone and not bump:
        pytest.skip("a write that leaves no trace, over a copy of the input, cannot be noticed")
    x = X.clone().requires_grad_()
    assert state_of(lambda x: Hidden.apply(x, make, bump) * 2, x, axes=(0,)) is MIXED


def test_a_custom_function_of_known_calls_is_seen_through() -> None:
    class Known(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.exp()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            return grads[0]

    assert state_of(lambda x: Known.apply(x) * 2, X.clone().requires_grad_(), axes=(0,)) == Axis(0)


def test_memory_that_was_handed_out_is_mixed() -> None:
    def kernel(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        pointers = x.data_ptr(), out.data_ptr()
        assert all(pointers)
        return out

    resolved, output = traced(kernel, X, axes=(0,))
    assert resolved.of(output) is MIXED
    assert resolved.of(X) == Axis(0)


def test_a_tensor_that_was_made_unseen_is_mixed() -> None:
    def f(x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            y = x.flip(0)
        return y * 2

    assert state_of(f, X, axes=(0,)) is MIXED
    other = torch.randn(4)
    assert state_of(lambda x: x * other, X.float(), axes=(0,)) is MIXED
    assert state_of(lambda x: x * other, X.float(), axes=(0,), constants=[other]) == Axis(0)


def test_a_change_that_was_made_unseen_is_mixed() -> None:
    def f(x: Tensor) -> Tensor:
        y = x.clone()
        with torch._C.DisableTorchFunction():
            y.add_(x.flip(0))
        return y * 2

    assert state_of(f, X, axes=(0,)) is MIXED


def test_values_that_leave_come_back_as_numbers() -> None:
    assert state_of(lambda x: x / x.abs().max().item(), X, axes=(0,)) == Axis(0)


def test_batch_norm_counts_as_fixed() -> None:
    norm = nn.BatchNorm1d(4)
    own = [*norm.parameters(), *norm.buffers()]
    x = torch.randn(N, 4)
    for training in (True, False):
        norm.train(training)
        resolved, output = traced(lambda x: norm(norm(x)), x, axes=(0,), constants=own)
        assert resolved.of(output) == Axis(0)


def test_it_keeps_no_tensor() -> None:
    x = torch.randn(N, 4)
    watched = ExampleAxes()
    watched.start(x)
    with Watch(watched) as watch:
        y = torch.sin(x).cos()
    watch.results.clear()
    reference = weakref.ref(y)
    del y
    assert reference() is None


# ---- Ordinary models -------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(c), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.b(F.relu(self.norm(self.a(x)), inplace=True)))
        y += x
        return F.relu_(y)


class Vision(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.patches, self.first = nn.Conv2d(3, 16, 4, 4), batch_first
        self.token, self.places = nn.Parameter(torch.zeros(1, 1, 16)), nn.Parameter(torch.zeros(1, 10, 16))
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        x = self.encoder(x if self.first else x.transpose(0, 1))
        return self.head(x[:, 0] if self.first else x[0])


class Sequences(nn.Module):
    def __init__(self, layer: type[nn.Module], batch_first: bool) -> None:
        super().__init__()
        self.table, self.first = nn.Embedding(11, 6), batch_first
        self.layer = layer(6, 7, 2, batch_first=batch_first, bidirectional=True)
        self.head = nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.layer(self.table(x if self.first else x.T))
        return self.head(y[:, -1] if self.first else y[-1])


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(24, 8, 3)
        self.up, self.norm = nn.ConvTranspose2d(16, 16, 2, 2), nn.GroupNorm(2, 16)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        b = F.silu(self.norm(self.b(a)))
        u = F.interpolate(b, scale_factor=2.0, mode="bilinear") + self.up(b)
        return self.c(torch.cat([a, u], 1))


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return self.b(F.relu(adjacency @ self.a(x)))


def _images() -> dict[str, Tensor]:
    return {"x": torch.randn(N, 3, 12, 12)}


def _ids() -> dict[str, Tensor]:
    mask = torch.ones(N, 7, dtype=torch.long)
    mask[0, 5:] = 0
    return {"input_ids": torch.randint(1, 50, (N, 7)), "attention_mask": mask}


def _hugging_face(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    small: dict[str, Any] = {"vocab_size": 50, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    wide = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    if name.startswith("GPT2"):
        config = transformers.GPT2Config(**small, n_positions=16, n_embd=16, n_layer=2, n_head=4)
    elif name.startswith("Bert"):
        config = transformers.BertConfig(**small, **wide)
    else:
        config = transformers.LlamaConfig(**small, **wide, num_key_value_heads=2)
    return getattr(transformers, name)(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "perceptron": (
        lambda: nn.Sequential(nn.Linear(12, 6), nn.ReLU(True), nn.Dropout(), nn.Flatten(), nn.Linear(216, 2)),
        lambda: {"input": torch.randn(N, 3, 12, 12)},
    ),
    "residual": (
        lambda: nn.Sequential(nn.MaxPool2d(2), Residual(3),  nn.AvgPool2d(6), nn.Flatten(), nn.Linear(3, 2)),
        lambda: {"input": torch.randn(N, 3, 12, 12)},
    ),
    "vision": (lambda: Vision(True), _images),
    "vision, time major": (lambda: Vision(False), _images),
    "unet": (UNet, _images),
    "graphs": (Graph, lambda: {"x": torch.randn(N, 6, 4), "adjacency": torch.rand(N, 6, 6)}),
    **{
        f"{layer.__name__} {first}": (partial(Sequences, layer, first), lambda: {"x": torch.randint(11, (N, 5))})
        for layer in (nn.LSTM, nn.GRU, nn.RNN)
        for first in (True, False)
    },
    **{
        name: (partial(_hugging_face, name), _ids)
        for name in (
            "GPT2LMHeadModel",
            "GPT2ForSequenceClassification",
            "BertForSequenceClassification",
            "LlamaForCausalLM",
        )
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_ordinary_models_are_understood(name: str, training: bool) -> None:
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model, batch = make().train(training), inputs()
    watched = ExampleAxes({id(t): t for t in (*model.parameters(), *model.buffers())})
    for x in batch.values():
        watched.start(x)
    with Watch(watched) as watch:
        output = model(**batch)
    resolved = watched.resolve()
    logits = output if isinstance(output, Tensor) else output.logits
    assert resolved.of(logits) == Axis(0)
    mixed = [t for t in watch.results if resolved.of(t) is MIXED and t.numel() > 1]
    assert not mixed


def test_a_graph_over_the_examples_mixes() -> None:
    model = Graph()
    x, adjacency = torch.randn(N, 4), torch.rand(N, N)
    resolved, output = traced(model, x, adjacency, axes=(0, None), constants=[*model.parameters()])
    assert resolved.of(output) is MIXED

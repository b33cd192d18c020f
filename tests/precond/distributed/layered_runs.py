"""What the ranks of the tests on layer-based methods under ``fully_shard`` run."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from precond import (
    EKFAC,
    KFAC,
    SENG,
    LevenbergMarquardt,
    Loop,
    QuadraticModel,
    Refresh,
    SMWNaturalGradient,
    WeightDecay,
)
from solvers import SolverError
from tests.precond.distributed.checks import (
    METHODS,
    Batch,
    Branch,
    Conv,
    Language,
    Net,
    distance,
    images,
    make,
    mine,
    tokens,
    vectors,
)
from tests.precond.distributed.sharded_runs import mesh_of, whole

#: Refused, each by name.
UNSERVED = ("kbfgs", "natural dense")
#: One structure each: others differ in options that know nothing of processes.
SERVED = [name for name in METHODS if name not in (*UNSERVED, "singd block", "natural unit", "natural diagonal")]


def shard(net: nn.Module, mesh: DeviceMesh, layers: tuple[str, ...] = (), **options: Any) -> nn.Module:
    """Some layers in groups of their own, the others with the root."""
    for name in layers:
        fully_shard(net.get_submodule(name), mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def train(optimizer: Any, net: nn.Module, batches: list[Batch]) -> None:
    for x, y in batches:
        part = mine(len(x))
        optimizer.zero_grad()
        optimizer.loss_fn(net(x[part]), y[part].flatten()).backward()
        optimizer.step()


def every_method(shape: tuple[int, ...], names: list[str]) -> dict[str, list[Tensor]]:
    out = {}
    for name in names:
        net = shard(Net(), mesh_of(shape), ("first", "norm"))
        train(make(name, net), net, vectors())
        out[name] = whole(net)
    return out


def accumulated(optimizer: Any, net: Any, batches: list[Batch]) -> None:
    """Two halves of each share, of which the first is not reduced over the processes."""
    for x, y in batches:
        x, y = x[mine(len(x))], y[mine(len(y))]
        optimizer.zero_grad()
        for index, (a, b) in enumerate(zip(x.chunk(2), y.chunk(2), strict=True)):
            if isinstance(net, FSDPModule):
                net.set_requires_gradient_sync(index == 1)
            (optimizer.loss_fn(net(a), b) / 2).backward()
        optimizer.step()


def clipped(optimizer: Any, net: nn.Module, batches: list[Batch]) -> None:
    """Gradients are changed in place before the step; and a pass without a backward pass comes before it."""
    for x, y in batches:
        part = mine(len(x))
        optimizer.zero_grad()
        optimizer.loss_fn(net(x[part]), y[part]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.05)
        net(x)
        optimizer.step()


def halves(optimizer: Any, net: nn.Module, batches: list[Batch]) -> None:
    """Preconditioned gradients under another optimizer."""
    other = torch.optim.SGD(net.parameters(), lr=0.1)
    for x, y in batches:
        part = mine(len(x))
        optimizer.zero_grad()
        optimizer.loss_fn(net(x[part]), y[part]).backward()
        optimizer.precondition()
        other.step()


def both_first(optimizer: Any, net: nn.Module, batches: list[Batch]) -> None:
    """Two forward passes, then their backward passes."""
    for x, y in batches:
        x, y = x[mine(len(x))], y[mine(len(y))]
        optimizer.zero_grad()
        losses = [optimizer.loss_fn(net(a), b) / 2 for a, b in zip(x.chunk(2), y.chunk(2), strict=True)]
        for loss in losses:
            loss.backward()
        optimizer.step()


class Tied(Language):
    """``fully_shard`` warns of results that are views."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clone()


def few() -> list[Batch]:
    """So few rows that each example is told from the others by a signal of its own, in one process too."""
    return vectors(rows=8)


class Inside(Net):
    """Computes its own loss."""

    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        out = super().forward(x)
        return {"logits": out, "loss": nn.functional.cross_entropy(out, y)}


def loss_inside(optimizer: Any, net: nn.Module, batches: list[Batch]) -> None:
    for x, y in batches:
        part = mine(len(x))
        optimizer.zero_grad()
        net(x[part], y[part])["loss"].backward()
        optimizer.step()


class NoRule(Net):
    """Uses a parameter in a way that no rule covers, and runs a layer once more in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(lambda x: torch.tanh(self.first(x)), x, use_reentrant=False)
        return self.second(self.norm(h)) * self.scale.exp().cumsum(0)


def freezing(optimizer: Any, net: nn.Module, batches: list[Batch]) -> None:
    train(optimizer, net, batches[:2])
    net.norm.requires_grad_(False)  # type: ignore[operator, union-attr]
    train(optimizer, net, batches[2:])


def scaled(optimizer: Any, net: nn.Module, batches: list[Batch]) -> None:
    """With a GradScaler, whose scale is divided out by the optimizer."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for x, y in batches:
        part = mine(len(x))
        optimizer.zero_grad()
        scaler.scale(optimizer.loss_fn(net(x[part]), y[part])).backward()
        scaler.step(optimizer)
        scaler.update()


def idle(optimizer: Any, net: nn.Module, batches: list[Batch]) -> None:
    """The first rank has all examples; others take part with empty batches."""
    adds_up = nn.CrossEntropyLoss(reduction="sum")
    optimizer = type(optimizer)(net, adds_up, lr=0.1, fisher="exact")
    size = dist.get_world_size() if dist.is_initialized() else 1
    for x, y in batches:
        rows = slice(0 if dist.is_initialized() and dist.get_rank() else len(x))
        optimizer.zero_grad()
        (adds_up(net(x[rows]), y[rows]) * (size / len(x))).backward()
        optimizer.step()


def reduced_later(optimizer: Any, net: nn.Module, batches: list[Batch]) -> None:
    """As :func:`accumulated`; under HSDP the first half is reduced within each replica, and not over them."""
    for x, y in batches:
        x, y = x[mine(len(x))], y[mine(len(y))]
        optimizer.zero_grad()
        for index, (a, b) in enumerate(zip(x.chunk(2), y.chunk(2), strict=True)):
            if isinstance(net, FSDPModule):
                net.set_requires_all_reduce(index == 1)
            (optimizer.loss_fn(net(a), b) / 2).backward()
        optimizer.step()


def one_layer() -> nn.Module:
    """Of three rows: with four processes the last one has no part of any parameter."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3)).double()


def twice(optimizer: Any, net: nn.Module, batches: list[Batch]) -> None:
    """Two backward passes, both reduced, and clipping."""
    for x, y in batches:
        x, y = x[mine(len(x))], y[mine(len(y))]
        optimizer.zero_grad()
        for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
            (optimizer.loss_fn(net(a), b) / 2).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.05)
        optimizer.step()


Way = tuple[Callable[[], nn.Module], tuple[str, ...], dict[str, Any], Callable[[], list[Batch]], Callable[..., None]]

#: Model, layers in groups of their own, options of ``fully_shard``, data, loop.
WAYS: dict[str, Way] = {
    "kept whole": (Net, ("first", "norm"), {"reshard_after_forward": False}, vectors, train),
    "one group": (Net, (), {}, vectors, train),
    "images": (Conv, ("one", "two"), {}, images, train),
    "tied head": (Tied, ("layer",), {}, tokens, train),
    "unused": (Branch, ("first",), {}, vectors, train),
    "accumulated": (Net, ("first", "norm"), {}, vectors, accumulated),
    "reduced later": (Net, ("first", "norm"), {}, vectors, reduced_later),
    "no part": (one_layer, (), {}, vectors, twice),
    "clipped": (Net, ("first", "norm"), {}, vectors, clipped),
    "halves": (Net, ("first", "norm"), {}, vectors, halves),
    "both first": (Net, ("first", "second"), {}, vectors, both_first),
    "no rule": (NoRule, ("first", "second"), {}, few, train),
    "freezing": (Net, ("first", "norm"), {}, vectors, freezing),
    "scaled": (Net, ("first", "norm"), {}, vectors, scaled),
    "no data on one rank": (Net, ("first", "norm"), {}, vectors, idle),
    "loss inside": (Inside, ("first", "second"), {}, vectors, loss_inside),
}


def every_way(shape: tuple[int, ...], names: tuple[str, ...], ways: list[str]) -> dict[str, list[Tensor]]:
    out = {}
    for way in ways:
        build, layers, options, data, loop = WAYS[way]
        for name in names:
            net: Any = shard(build(), mesh_of(shape), layers, **options)
            if way == "unused":
                net.set_reduce_scatter_unused_params(True)
            loop(make(name, net), net, data())
            out[f"{name}, {way}"] = whole(net)
    return out


# Steps that are judged by the loss of all


def closures(optimizer: Any, net: nn.Module, batches: list[Batch]) -> None:
    for x, y in batches:
        part = mine(len(x))

        def closure(x: Tensor = x[part], y: Tensor = y[part]) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = optimizer.loss_fn(net(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)


_CHOSEN = {"damping_rule": LevenbergMarquardt(), "damping": 1e-2, "lr": 1.0, "weight_decay": WeightDecay(0.01, "l2")}
#: Method, its options, loop.
JUDGED: dict[str, tuple[str, dict[str, Any], Callable[..., None]]] = {
    "chosen": ("kfac exact", {**_CHOSEN, "step_size": QuadraticModel(factor_period=2)}, train),
    "closure": ("ekfac", {**_CHOSEN, "step_size": QuadraticModel()}, closures),
    "rejected": (
        "kfac exact",
        {"damping_rule": LevenbergMarquardt(reject_steps=True), "damping": 0.03, "lr": 1.0, "kl_clip": None},
        train,
    ),
}


def judged(shape: tuple[int, ...], names: tuple[str, ...] = tuple(JUDGED)) -> dict[str, Any]:
    """Parameters, damping, and the steps that were taken back."""
    out = {}
    for case in names:
        name, options, loop = JUDGED[case]
        net = shard(Net(), mesh_of(shape), ("first", "norm")) if shape else Net()
        optimizer, back = make(name, net, **options), []
        for one in vectors():
            loop(optimizer, net, [one])
            back.append(optimizer.taken_back)
        assert all(isinstance(p, DTensor) == bool(shape) for p in net.parameters()), "some stayed whole"
        out[case] = whole(net), optimizer.param_groups[0]["damping"], back
    return out


# What a pass leaves alone


@contextlib.contextmanager
def collectives() -> Iterator[list[str]]:
    """Names of the collectives of torch's own that run inside."""
    found: list[str] = []
    versions = ("all_gather_single", "reduce_scatter_single", "all_gather_into_tensor", "reduce_scatter_tensor")
    own = {name: getattr(dist, name) for name in (*versions, "all_reduce") if hasattr(dist, name)}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            found.append(name)
            return own[name](*args, **kwargs)

        return call

    for name in own:
        setattr(dist, name, counting(name))
    try:
        yield found
    finally:
        for name, function in own.items():
            setattr(dist, name, function)


def undisturbed(shape: tuple[int, ...]) -> dict[str, Any]:
    """Gradients and messages of a forward and a backward pass, with and without an optimizer that watches."""
    out: dict[str, Any] = {}
    for name in (None, "kfac exact", "kfac empirical", "mixed"):
        for reshards in (True, False):
            net = shard(Net(), mesh_of(shape), ("first", "norm"), reshard_after_forward=reshards)
            optimizer = None if name is None else make(name, net)
            (x, y), *_ = vectors(1)
            with collectives() as found:
                nn.functional.cross_entropy(net(x[mine(16)]), y[mine(16)])  # no backward pass follows
                loss_fn = nn.CrossEntropyLoss() if optimizer is None else optimizer.loss_fn
                loss_fn(net(x[mine(16)]), y[mine(16)]).backward()
            gradients = [p.grad.full_tensor() for p in net.parameters() if p.grad is not None]
            out[f"{name}, {reshards}"] = gradients, Counter(found), [type(p).__name__ for p in net.parameters()]
    return out


# Saved and loaded

SAVED = ("kfac exact", "ekfac", "mixed")
OPTIONS: dict[str, Any] = {"curvature_update_period": 3, "inverse_update_period": 3, "momentum": 0.9}


def sharded_or_whole(shape: tuple[int, ...]) -> nn.Module:
    return shard(Net(), mesh_of(shape), ("first", "norm")) if shape else Net()


def saves(shape: tuple[int, ...], folder: str) -> dict[str, Any]:
    """Two steps, and a checkpoint: flat of one method, nested of the others; and what ``state_dict`` gives."""
    out = {}
    for number, name in enumerate(SAVED):
        net = sharded_or_whole(shape)
        optimizer = make(name, net, **OPTIONS)
        train(optimizer, net, vectors(5)[:2])
        out[name] = to_whole(optimizer.state_dict())
        optimizer.zero_grad()
        options = StateDictOptions(flatten_optimizer_state_dict=number == 0)
        parts = dict(zip("mo", get_state_dict(net, optimizer, options=options), strict=True))
        dcp.save(parts, checkpoint_id=f"{folder}/{name}")
    return out


def loads(shape: tuple[int, ...], folder: str) -> dict[str, list[Tensor]]:
    """A fresh model and optimizer go on from there."""
    out = {}
    for number, name in enumerate(SAVED):
        net = sharded_or_whole(shape)
        optimizer = make(name, net, **OPTIONS)
        options = StateDictOptions(flatten_optimizer_state_dict=number == 0)
        parts = dict(zip("mo", get_state_dict(net, optimizer, options=options), strict=True))
        dcp.load(parts, checkpoint_id=f"{folder}/{name}")
        set_state_dict(net, optimizer, model_state_dict=parts["m"], optim_state_dict=parts["o"], options=options)
        train(optimizer, net, vectors(5)[2:])
        out[name] = whole(net)
    return out


def to_whole(saved: Any) -> Any:
    """A state with whole tensors, as one process has it."""
    if isinstance(saved, dict):
        return {key: to_whole(value) for key, value in saved.items()}
    if isinstance(saved, list):
        return [to_whole(value) for value in saved]
    return saved.full_tensor() if hasattr(saved, "full_tensor") else saved


def of_one_process() -> dict[str, Any]:
    """The states of a model and its optimizer after two steps."""
    out = {}
    for name in SAVED:
        net = Net()
        optimizer = make(name, net, **OPTIONS)
        train(optimizer, net, vectors(5)[:2])
        out[name] = net.state_dict(), optimizer.state_dict()
    return out


def reloaded(shape: tuple[int, ...], saved: dict[str, Any]) -> dict[str, list[Tensor]]:
    """Plain ``state_dict``: that of one process, and then the one that this gives."""
    out = {}
    for name in SAVED:
        nets = [sharded_or_whole(shape) for _ in range(2)]
        first, second = (make(name, net, **OPTIONS) for net in nets)
        set_model_state_dict(nets[0], saved[name][0], options=StateDictOptions(full_state_dict=True))
        first.load_state_dict(saved[name][1])
        nets[1].load_state_dict(nets[0].state_dict())
        second.load_state_dict(first.state_dict())
        for net, optimizer in zip(nets, (first, second), strict=True):
            train(optimizer, net, vectors(5)[2:])
        out[name], out[f"{name} again"] = map(whole, nets)
    return out


# Decisions


def refusals(shape: tuple[int, ...]) -> dict[str, str]:
    told = {}

    def tell(name: str, build: Callable[[], Any]) -> None:
        try:
            build()
            told[name] = ""
        except (NotImplementedError, RuntimeError, ValueError) as error:
            told[name] = f"{type(error).__name__}: {error}"

    mesh = mesh_of(shape)
    net: Any = shard(Net(), mesh, ("first",))
    for name in UNSERVED:
        tell(name, lambda name=name: make(name, net))
    loss_fn = nn.CrossEntropyLoss()
    options: dict[str, dict[str, Any]] = {
        "group": {"process_group": dist.group.WORLD},
        "fraction": {"memory_fraction": 1.0},
        "shadow": {"loop": Loop(capture="shadow")},
    }
    for name, some in options.items():
        tell(name, lambda some=some: KFAC(net, loss_fn, lr=0.1, **some))
    tell("rows", lambda: SMWNaturalGradient(net, loss_fn, lr=0.1))
    tell("sketch", lambda: SENG(net, loss_fn, lr=0.1))
    part = Net()
    fully_shard(part.first, mesh=mesh)
    tell("part", lambda: KFAC(part, loss_fn, lr=0.1))
    factor: Any = shard(Net(), mesh)
    factor.set_gradient_divide_factor(1.0)
    tell("factor", lambda: KFAC(factor, loss_fn, lr=0.1))
    hidden = shard(Hidden(), mesh)
    tell("reentrant", lambda: train(KFAC(hidden, loss_fn, lr=0.1), hidden, vectors(2)))
    parallel = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
    parallelize_module(parallel, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    tell("tensor parallel", lambda: KFAC(parallel, loss_fn, lr=0.1))
    return told


class Hidden(Net):
    """A reentrant checkpoint hides what it holds."""

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(lambda x: torch.tanh(self.first(x)), x.requires_grad_(), use_reentrant=True)
        return self.second(self.norm(h)) * self.scale


def disagreements(shape: tuple[int, ...]) -> dict[str, Any]:
    """A gradient that is not finite, and a factorisation that fails, on one rank alone."""
    net = shard(Net(), mesh_of(shape), ("first", "norm"))
    optimizer = make("kfac exact", net, inverse_update_period=1)
    batches = vectors(4)
    train(optimizer, net, batches[:1])
    before = whole(net)
    x, y = batches[1]
    optimizer.zero_grad()
    optimizer.loss_fn(net(x[mine(16)]), y[mine(16)]).backward()
    if dist.get_rank() == 0:
        next(p for p in net.parameters() if p.to_local().numel()).grad.to_local().fill_(float("nan"))  # type: ignore
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    out: dict[str, Any] = {"skipped": (optimizer.skipped, distance(before, whole(net)), len(caught))}
    blocks = optimizer.preconditioners
    kept = [name for name in blocks if blocks[name].inverse is not None]
    inner, broken = blocks[kept[0]].attempt, dist.get_rank() == 1

    def fails(*args: Any, **kwargs: Any) -> bool:
        if broken:
            raise SolverError("no inverse")
        return bool(inner(*args, **kwargs))

    blocks[kept[0]].attempt = fails
    train(optimizer, net, batches[2:3])
    del blocks[kept[0]].attempt
    failures = {name: block.failures for name, block in blocks.items() if block.failures}
    out["failures"] = failures, kept[0], kept
    out["parameters"] = whole(net)
    return out


def measured(shape: tuple[int, ...]) -> tuple[float, float]:
    """The norm of the last step as it is told, for which one rank alone has asked before; and the true one."""
    net = shard(Net(), mesh_of(shape), ("first", "norm"))
    optimizer = make("kfac exact", net)
    for one in vectors(3):
        before = whole(net)
        train(optimizer, net, [one])
        if dist.get_rank() == 0:
            optimizer.metrics()
    moves = [(after - b).flatten() for after, b in zip(whole(net), before, strict=True)]
    return optimizer.metrics()["step_norm"], float(torch.cat(moves).norm())


# What is sent and kept


def traffic(shape: tuple[int, ...], methods: tuple[Any, ...] = (KFAC, EKFAC)) -> dict[str, Any]:
    """Numbers that a rank gives to others, in a step with statistics and in one without; and what it keeps."""
    out: dict[str, Any] = {}
    for cls in methods:
        name = cls.__name__
        torch.manual_seed(0)
        net = shard(nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(SIZES))).double(), mesh_of(shape))
        refresh = Refresh(2, stagger=False)
        kinds = {"fisher": "exact", "curvature_update_period": 2, "inverse_update_period": refresh}
        optimizer = cls(net, nn.CrossEntropyLoss(), lr=0.1, **kinds)
        for step in range(4):
            x, y = torch.randn(8, SIZES[0], dtype=torch.float64), torch.randint(SIZES[-1], (8,))
            optimizer.zero_grad()
            optimizer.loss_fn(net(x), y).backward()
            with sent_to_others() as found:
                optimizer.step()
            out[f"{name}, {step}"] = found
        inverses = {n: p.inverse for n, p in optimizer.preconditioners.items() if p.inverse is not None}
        out[f"{name}, kept"] = sorted(inverses), len(optimizer.preconditioners)
    return out


#: Sizes that two processes divide evenly.
SIZES = (6, 8, 4, 2)


@contextlib.contextmanager
def sent_to_others() -> Iterator[list[int]]:
    """Numbers in messages of tensors; of those to all processes of a mesh, which decide, none."""
    found: list[int] = []
    own, gather = dist.all_to_all_single, dist.all_gather

    def counting(out: Tensor, given: Tensor, into: list[int], of: list[int], group: Any, **more: Any) -> Any:
        if given.dtype != torch.uint8:  # names and shapes, once
            found.append(sum(of) - of[dist.get_rank(group)])
        return own(out, given, into, of, group=group, **more)

    def gathering(out: list[Tensor], given: Tensor, group: Any) -> Any:
        if len(out) < dist.get_world_size():
            found.append(given.numel() * (len(out) - 1))
        return gather(out, given, group=group)

    dist.all_to_all_single, dist.all_gather = counting, gathering
    try:
        yield found
    finally:
        dist.all_to_all_single, dist.all_gather = own, gather


def low_precision(shape: tuple[int, ...]) -> dict[str, Any]:
    """Parameters in float32 that are used in bfloat16; in one process by casts."""
    inside = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    net, mesh = Net().float(), mesh_of(shape)
    for layer in (net.first, net.norm):
        fully_shard(layer, mesh=mesh, mp_policy=inside)
    fully_shard(net, mesh=mesh, mp_policy=replace(inside, output_dtype=torch.float32))
    batches = [(x.float(), y) for x, y in vectors()]
    optimizer = make("kfac exact", net, damping=0.1)
    train(optimizer, net, batches)
    estimates = [p.estimator for p in optimizer.preconditioners.values() if p.estimator.ready]
    return {"parameters": whole(net), "dtypes": {str(e.operator().dtype) for e in estimates}}


# One launch each: a process takes seconds to begin


def on_two(folder: str, saved: dict[str, Any]) -> dict[str, Any]:
    checks = (judged, undisturbed, refusals, disagreements, measured, traffic, low_precision)
    return {
        "methods": every_method((2,), SERVED),
        "ways": every_way((2,), ("kfac exact",), list(WAYS)) | every_way((2,), ("kfac empirical", "ekfac"), FEW),
        "saved": saves((2,), folder),
        "reloaded": reloaded((2,), saved),
        **{check.__name__: check((2,)) for check in checks},
    }


#: Ways in which statistics come from the user's own backward pass, or need a second pass.
FEW = ["tied head", "both first"]


def on_four(folder: str) -> dict[str, Any]:
    return {
        "loaded": loads((2, 2), folder),
        "disagreements": disagreements((2, 2)),
        "judged": judged((2, 2), ("chosen",)),
        "measured": measured((2, 2)),
        "traffic": traffic((2, 2), (KFAC,)),
        "ways": every_way((2, 2), ("kfac exact",), ["accumulated", "reduced later"])
        | every_way((4,), ("kfac exact",), ["no part"]),
    }

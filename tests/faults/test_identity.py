"""Is a file taken up by a run that computes something else?"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvature
from curvature import Checkpoint, CheckpointError

F64 = torch.float64
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


class Model(nn.Module):
    """One set of parameters; ``how`` says what is computed with them, which no attribute of a module tells."""

    def __init__(self, how: str = "tanh", activation: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4).to(F64), nn.Linear(4, 3).to(F64)
        self.activation, self.drop = activation or nn.Identity(), nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(4).to(F64)
        self.how = {"how": how}
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=F64) / 2)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        how, h = self.how["how"], self.norm(self.drop(self.activation(self.first(x))))
        h = h.relu() if how == "relu" else h.clamp(-1.5, 1.5) if how == "clamp" else h if how == "linear" else h.tanh()
        h = h + h.detach() - h.detach() * 0.5 if how == "detached" else 1.5 * h
        z = self.last(h) / (1.0001 if how == "temperature" else 1.0)
        return {"logits": z, "other": z.flip(-1) * 1.1}


class Lambda(nn.Module):
    """A loss whose options are not seen."""

    reduction = "mean"

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.__dict__["function"] = function

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return self.function(z, y)


def hidden(function: Callable[[Tensor, Tensor], Tensor]) -> Any:
    return curvature.losses.AutogradLoss(Lambda(function), reduction="mean")


def data(first: int = 4) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, generator=g, dtype=F64), torch.randint(3, (n,), generator=g)) for n in (first, 3, 5)]


def changed(i: int, what: int, by: float) -> list[tuple[Tensor, Tensor]]:
    batches = [list(batch) for batch in data()]
    batches[i][what] = batches[i][what] + by if what == 0 else (batches[i][what] + 1) % 3
    return [(x, y) for x, y in batches]


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-9
    return model


def loss(temperature: float = 1.0, smoothing: float = 0.0) -> Any:
    return hidden(lambda z, y: F.cross_entropy(z / temperature, y, label_smoothing=smoothing))


#: What is another computation, in a way that shapes, names and values do not show, and in ways that they do.
OTHERS: dict[str, dict[str, Any]] = {
    "another activation in forward": {"model": lambda: Model("relu")},
    "no activation": {"model": lambda: Model("linear")},
    "another temperature": {"model": lambda: Model("temperature")},
    "a detached branch": {"model": lambda: Model("detached")},
    "another activation module": {"model": lambda: Model(activation=nn.Tanh())},
    "an option of a module": {"model": lambda: Model(activation=nn.Hardtanh(-50, 50))},
    "train mode": {"model": lambda: Model().train()},
    "dropout alone": {"model": lambda: _mode(Model(), "drop")},
    "other values": {"model": lambda: moved(Model())},
    "other buffers": {"model": lambda: _buffer(Model())},
    "frozen": {"model": lambda: _frozen(Model())},
    "another loss": {"loss_fn": hidden(lambda z, y: F.cross_entropy(z, y) + 0.1 * z.square().mean())},
    "another temperature of the loss": {"loss_fn": loss(1.001)},
    "another smoothing of the loss": {"loss_fn": loss(smoothing=0.01)},
    "a scaled loss": {"loss_fn": hidden(lambda z, y: 2 * F.cross_entropy(z, y))},
    "a module of torch": {"loss_fn": nn.CrossEntropyLoss(label_smoothing=0.1)},
    "another output": {"output": lambda o: o["other"]},
    "some parameters": {"params": "last.*"},
    "other inputs": {"data": changed(1, 0, 1e-9)},
    "other targets": {"data": changed(2, 1, 0)},
    "another order": {"data": data()[::-1]},
    "fewer data": {"data": data()[:2]},
}


def _mode(model: Model, name: str) -> Model:
    getattr(model, name).train()
    return model


def _buffer(model: Model) -> Model:
    model.norm.running_mean += 0.1
    return model


def _frozen(model: Model) -> Model:
    model.first.bias.requires_grad_(False)
    return model


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


def _matrix(make: Any, structure: Any, **more: Any) -> Callable[..., bytes]:
    def run(model: Any, loss_fn: Any, data: Any, file: Any, **options: Any) -> bytes:
        return _bits(make(model, loss_fn, data, structure=structure, resume=file, **{**more, **options}).to_dense())

    return run


def _influence(model: Any, loss_fn: Any, data: Any, file: Any, **options: Any) -> bytes:
    queries = (data[0][0][:2], data[0][1][:2])
    found = curvature.influence(model, loss_fn, data, queries, store=file, **options)
    return _bits(found.scores)


def _self(model: Any, loss_fn: Any, data: Any, file: Any, **options: Any) -> bytes:
    return _bits(curvature.self_influence(model, loss_fn, data, store=file, **options))


def _eigenpairs(model: Any, loss_fn: Any, data: Any, file: Any, **options: Any) -> bytes:
    op = curvature.ggn(model, loss_fn, data, **options)
    return _bits(curvature.resumable_eigsh(op, file, 2, rtol=1e-8).vectors)


def _report(model: Any, loss_fn: Any, data: Any, file: Any, **options: Any) -> bytes:
    given: dict[str, Any] = {"sections": ("eigenvalues", "noise"), "matrix": "ggn", "k": 2, **options}
    loss_fn = getattr(loss_fn, "loss_fn", loss_fn)
    found = curvature.report(model, loss_fn, data, resume=file, **given)
    return repr([found.eigenvalues, found.noise]).encode()  # type: ignore[union-attr]


DOORS: dict[str, Callable[..., bytes]] = {
    "fisher kfac": _matrix(curvature.fisher, "kfac", kind="empirical"),
    "fisher ekfac": _matrix(curvature.fisher, "ekfac", kind="empirical"),
    "ggn layer": _matrix(curvature.ggn, "layer"),
    "ggn diagonal": _matrix(curvature.ggn, "diagonal"),
    "influence": _influence,
    "self_influence": _self,
    "resumable_eigsh": _eigenpairs,
    "report": _report,
}
#: The same matrix but for rounding: sums over all data in another order; a GGN that no label enters.
ALIKE = {
    ("resumable_eigsh", "another order"),
    ("report", "another order"),
    ("resumable_eigsh", "another smoothing of the loss"),
}


def close(door: str, found: bytes, own: bytes) -> bool:
    """Whether two results are one to rounding, eigenvectors to their sign."""
    if door == "report":
        first, second = (torch.tensor([float(x) for x in NUMBER.findall(text.decode())]) for text in (found, own))
    else:
        first, second = (torch.frombuffer(bytearray(values), dtype=F64).abs() for values in (found, own))
    return first.shape == second.shape and torch.allclose(first, second, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("door", DOORS)
def test_another_computation_is_refused_and_the_same_goes_on(door: str, tmp_path: Path) -> None:
    """A file is of one computation: anything else is refused in words, or gives what it gives without the file."""
    run = DOORS[door]
    given: dict[str, Any] = {"loss_fn": loss(), "data": data(), "output": lambda o: o["logits"]}
    file = tmp_path / "run"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        right = run(Model(), file=file, **given)
        silent = []
        for name, change in OTHERS.items():
            options = {**given, **change}
            model = options.pop("model", Model)()
            torch.manual_seed(0)
            try:
                found = run(copy.deepcopy(model), file=file, **options)
            except CheckpointError as error:
                assert "belongs to another computation" in str(error)
                continue
            except curvature.NondeterministicError:
                continue
            torch.manual_seed(0)
            own = run(model, file=tmp_path / f"{name}.run", **options)
            if found != own and not ((door, name) in ALIKE and close(door, found, own)):
                silent.append(name)
        assert silent == []
        torch.manual_seed(0)
        assert run(Model(), file=file, **given) == right


@pytest.mark.parametrize("batches", [1, 2])
def test_another_function_is_refused_in_the_middle_of_a_run(batches: int, tmp_path: Path) -> None:
    """The first and the last batch that were taken in tell, also where the first one alone does not."""

    class Dead(Exception):
        pass

    class Mortal:
        def __iter__(self) -> Any:
            yield from data()[:batches]
            if alive:
                yield from data()[batches:]
            else:
                raise Dead

    def run(model: nn.Module) -> Tensor:
        options: dict[str, Any] = {
            "structure": "kfac",
            "kind": "empirical",
            "resume": Checkpoint(tmp_path / "run.pt", seconds=0),
        }
        return curvature.fisher(model, loss(), Mortal(), **options).to_dense()

    class Long(Model):
        """Another function for batches of three."""

        def forward(self, x: Tensor) -> Any:
            z = super().forward(x)["logits"]
            return z * 1.5 if len(x) == 3 and self.how["how"] == "relu" else z

    alive = False
    with pytest.raises(Dead):
        run(Model())
    alive = True
    with pytest.raises(CheckpointError, match="outputs on the first batch"):
        run(Model("linear"))
    (tmp_path / "run.pt").unlink()
    alive = False
    with pytest.raises(Dead):
        run(Long("clamp"))
    alive, other = True, Long("clamp")
    other.forward = lambda x: {"logits": nn.Module.__getattribute__(Long, "forward")(other, x) * (1 + (len(x) == 3))}  # type: ignore[method-assign]
    if batches == 2:
        with pytest.raises(CheckpointError, match="outputs on the last batch"):
            run(other)
    whole = run(Long("clamp"))
    assert torch.equal(
        whole, curvature.fisher(Long("clamp"), loss(), data(), structure="kfac", kind="empirical").to_dense()
    )


def test_other_draws_are_refused(tmp_path: Path) -> None:
    def run(**options: Any) -> Tensor:
        given: dict[str, Any] = {"structure": "kfac", "kind": "mc", "resume": tmp_path / "run.pt", **options}
        return curvature.fisher(Model(), loss_fn, data(), **given).to_dense()

    loss_fn = nn.CrossEntropyLoss()
    first = run()
    for options in (
        {"samples": 2},
        {"generator": torch.Generator().manual_seed(1)},
        {"kind": "exact"},
        {"structure": "ekfac"},
        {"sharing": "reduce"},
    ):
        with pytest.raises(CheckpointError, match="belongs to another computation"):
            run(**options)
    assert torch.equal(run(), first)


def test_another_loss_of_the_queries_is_not_answered_with_the_old_one(tmp_path: Path) -> None:
    arguments = (Model(), loss(), data(), (data()[0][0][:2], data()[0][1][:2]))
    queries = hidden(lambda z, y: F.cross_entropy(z, y)), hidden(lambda z, y: F.cross_entropy(3 * z, y))
    first = curvature.influence(*arguments, query_loss=queries[0], store=tmp_path / "run").scores
    with pytest.raises(CheckpointError, match="on the queries"):
        curvature.influence(*arguments, query_loss=queries[1], store=tmp_path / "run")
    again = curvature.influence(*arguments, query_loss=queries[0], store=tmp_path / "run").scores
    assert torch.equal(again, first)

"""Is NaturalGradient the natural gradient of the formulas, in every structure?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precond import NaturalGradient, WholeFisher
from tests.precond import layer_references as ref

STRUCTURES = ["dense", "layer", "unit", "diagonal"]
DAMPING, EMA, LR = 3e-2, 0.8, 0.2
LOSS = nn.CrossEntropyLoss()


def blocks(structure: str, model: ref.Net) -> list[list[int]]:
    """Groups of flat indices that share a dense matrix."""
    where = {name: list(range(span.start, span.stop)) for name, span in ref.spans(model).items()}
    if structure == "dense":
        return [[i for span in where.values() for i in span]]
    if structure == "diagonal":
        return [[i] for span in where.values() for i in span]
    layers = [("inner.weight", "inner.bias"), ("norm.weight", "norm.bias"), ("out.weight", "out.bias")]
    groups = [where["temperature"]]
    for weight, bias in layers:
        if structure == "layer":
            groups.append(where[weight] + where[bias])
        else:
            units = len(where[bias])
            width = len(where[weight]) // units
            groups += [[*where[weight][j * width : (j + 1) * width], where[bias][j]] for j in range(units)]
    return groups


def by_the_book(structure: str, kind: str, data: list[ref.Batch], momentum: float = 0.0) -> Any:
    model = ref.net()
    groups = blocks(structure, model)
    assert sorted(i for group in groups for i in group) == list(range(sum(p.numel() for p in model.parameters())))
    C: Any = None
    weight, velocity = 0.0, torch.zeros(())

    def direction(step: int, g: Tensor, x: Tensor, y: Tensor) -> Tensor:
        nonlocal C, weight, velocity
        U = ref.rows(model, x, y, kind)
        new = U.T @ U / len(x)
        C = new if C is None else (EMA * weight * C + new) / (EMA * weight + 1)
        weight = EMA * weight + 1
        d = torch.zeros_like(g)
        for group in groups:
            block = C[group][:, group] + DAMPING * torch.eye(len(group), dtype=torch.float64)
            d[group] = torch.linalg.inv(block) @ g[group]
        velocity = momentum * velocity + d
        return velocity

    return ref.walk(model, data, LOSS, direction, LR)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_twenty_steps_are_those_of_the_formula(structure: Any, kind: Any) -> None:
    model, data = ref.net(), ref.batches(20)
    optimizer = NaturalGradient(
        model,
        LOSS,
        lr=LR,
        structure=structure,
        damping=DAMPING,
        kl_clip=None,
        fisher=kind,
        curvature_ema=EMA,
        momentum=0.5,
    )
    ref.assert_follows(model, optimizer, by_the_book(structure, kind, data, 0.5), data, LOSS)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_sampled_curvature_tends_to_the_exact_one(structure: Any) -> None:
    data = ref.batches(1)
    found = {}
    for kind, samples in (("exact", 1), ("mc", 1500)):
        model = ref.mlp(6, 2, 3)
        start = ref.flat(model.parameters())
        made: Any = NaturalGradient.fisher_types[structure]
        optimizer = NaturalGradient(model, LOSS, lr=1.0, structure=structure, damping=0.1, fisher=made(kind, samples))
        ref.train(model, optimizer, data, LOSS)
        found[kind] = ref.flat(model.parameters()) - start
    assert (found["mc"] - found["exact"]).norm() < 0.08 * found["exact"].norm()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_huge_damping_leaves_the_gradient_divided_by_it(structure: Any) -> None:
    model, plain, data = ref.net(), ref.net(), ref.batches(3)
    ref.train(model, NaturalGradient(model, LOSS, lr=1e11, structure=structure, damping=1e12, kl_clip=None), data, LOSS)
    ref.train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), data, LOSS)
    torch.testing.assert_close(ref.flat(model.parameters()), ref.flat(plain.parameters()), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("stop", [4, 5])
def test_a_resumed_run_continues_bit_for_bit(structure: Any, stop: int) -> None:
    data = ref.batches(9)

    def make(model: nn.Module) -> NaturalGradient:
        return NaturalGradient(
            model,
            LOSS,
            lr=0.1,
            structure=structure,
            damping=0.1,
            momentum=0.5,
            curvature_update_period=2,
            inverse_update_period=4,
        )

    ref.assert_resumes(make, data, LOSS, stop)


def test_accumulated_batches_are_one_batch() -> None:
    (x, y), *_ = ref.batches(1)
    results = []
    for parts in ([slice(0, 12)], [slice(0, 4), slice(4, 9), slice(9, 12)]):
        model = ref.net()
        optimizer = NaturalGradient(model, LOSS, lr=0.5, structure="dense", fisher="empirical")
        for part in parts:
            (LOSS(model(x[part]), y[part]) * len(y[part]) / len(y)).backward()
        optimizer.step()
        results.append(ref.flat(model.parameters()))
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


class Branches(nn.Module):
    """One of two layers."""

    side = "left"

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 3), nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.side)(x)


def test_a_layer_that_one_batch_leaves_out_counts_as_zero_there() -> None:
    torch.manual_seed(0)
    model = Branches()
    (x, y), (other, labels) = ref.batches(2)
    optimizer = NaturalGradient(model, LOSS, lr=0.0, structure="dense", fisher="empirical")
    rows = []
    for model.side, pair in (("left", (x, y)), ("right", (other, labels))):
        (LOSS(model(pair[0]), pair[1]) / 2).backward()
        rows.append(ref.rows(model, *pair, "empirical"))
    optimizer.step()
    U = torch.cat(rows)
    found = optimizer.preconditioners["all parameters"].estimator.operator().to_dense()
    torch.testing.assert_close(found, U.T @ U / 24, rtol=1e-10, atol=1e-14)


def test_a_layer_without_gradient_stays_where_it_is() -> None:
    torch.manual_seed(0)
    model = Branches()
    before = model.right.weight.clone()
    optimizer = NaturalGradient(model, LOSS, lr=0.5, structure="dense", fisher="empirical", damping=0.1)
    ref.train(model, optimizer, ref.batches(1), LOSS)
    assert torch.equal(model.right.weight, before) and not torch.equal(model.left.weight, before)


def test_freezing_a_layer_starts_anew_without_it() -> None:
    model, data = ref.net(), ref.batches(4)
    optimizer = NaturalGradient(model, LOSS, lr=0.1, structure="dense", fisher="empirical")
    ref.train(model, optimizer, data[:2], LOSS)
    model.norm.requires_grad_(False)
    before, moving = model.norm.weight.clone(), model.out.weight.clone()
    ref.train(model, optimizer, data[2:], LOSS)
    assert torch.equal(model.norm.weight, before) and not torch.equal(model.out.weight, moving)
    assert optimizer.preconditioners["all parameters"].estimator.block.numel == 22


class Scaled(nn.Module):
    """A parameter with a use that no rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.odd = nn.Linear(6, 3), nn.Parameter(torch.zeros(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.odd.exp()


def test_uses_without_a_rule_are_joined_example_by_example() -> None:
    torch.manual_seed(0)
    model, ((x, y), *_) = Scaled(), ref.batches(1)
    optimizer = NaturalGradient(model, LOSS, lr=0.0, structure="dense", fisher="empirical")
    ref.train(model, optimizer, [(x, y)], LOSS)
    U = ref.rows(model, x, y, "empirical")
    found = optimizer.preconditioners["all parameters"].estimator.operator().to_dense()
    torch.testing.assert_close(found, U.T @ U / 12, rtol=1e-10, atol=1e-14)


def test_sampled_gradients_of_uses_without_a_rule_are_refused() -> None:
    model, data = Scaled(), ref.batches(1)
    optimizer = NaturalGradient(model, LOSS, lr=0.1, structure="dense", fisher="mc")
    with pytest.raises(ValueError, match=r"odd do not tell the 12 examples of a batch apart.*structure='layer'"):
        ref.train(model, optimizer, data, LOSS)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="structure is one of dense, layer, unit, diagonal, not 'kfac'"):
        NaturalGradient(ref.net(), LOSS, lr=0.1, structure="kfac")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dense matrix of all 28 parameters has 784 entries; max_size=20"):
        NaturalGradient(ref.net(), LOSS, lr=0.1, fisher=WholeFisher(max_size=20))

"""Is SMWNaturalGradient the exact natural gradient of a batch, and SPRING the one with its momentum?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature.structures.gram import OuterRows, gram_of
from precond import NaturalGradient, PreconditionedOptimizer, SMWNaturalGradient, Tikhonov
from solvers import Rows, Woodbury
from tests.precond import layer_references as ref

DAMPING, LR = 0.1, 0.2
LOSS = nn.CrossEntropyLoss()
LAYERS = [("inner.weight", "inner.bias"), ("norm.weight", "norm.bias"), ("out.weight", "out.bias"), ("temperature",)]


def by_the_book(data: list[ref.Batch], structure: str, kind: str, spring: float, period: int = 1) -> Any:
    model = ref.net()
    where = ref.spans(model)
    total = sum(p.numel() for p in model.parameters())
    groups = [list(range(total))]
    if structure == "layer":
        groups = [[i for name in names for i in range(total)[where[name]]] for names in LAYERS]
    previous = torch.zeros(total, dtype=torch.float64)
    C: Any = None

    def direction(step: int, g: Tensor, x: Tensor, y: Tensor) -> Tensor:
        nonlocal C
        if step % period == 0:
            U = ref.rows(model, x, y, kind)
            C = U.T @ U / len(x)
        d = torch.zeros_like(g)
        for group in groups:
            block = C[group][:, group] + DAMPING * torch.eye(len(group), dtype=torch.float64)
            d[group] = torch.linalg.inv(block) @ (g[group] + DAMPING * spring * previous[group])
        previous.copy_(d)
        return d

    return ref.walk(model, data, LOSS, direction, LR)


@pytest.mark.parametrize("spring", [0.0, 0.9])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("structure", ["dense", "layer"])
def test_twenty_steps_are_those_of_the_formula(structure: Any, kind: Any, spring: float) -> None:
    model, data = ref.net(), ref.batches(20, n=7)
    optimizer = SMWNaturalGradient(
        model, LOSS, lr=LR, structure=structure, damping=DAMPING, kl_clip=None, fisher=kind, spring=spring
    )
    ref.assert_follows(model, optimizer, by_the_book(data, structure, kind, spring), data, LOSS)


def test_a_matrix_serves_for_several_steps() -> None:
    model, data = ref.net(), ref.batches(7)
    optimizer = SMWNaturalGradient(
        model, LOSS, lr=LR, damping=DAMPING, kl_clip=None, spring=0.5, curvature_update_period=3
    )
    ref.assert_follows(model, optimizer, by_the_book(data, "dense", "empirical", 0.5, 3), data, LOSS)


@pytest.mark.parametrize("structure", ["dense", "layer"])
def test_it_is_the_dense_natural_gradient_of_the_batch(structure: Any) -> None:
    data, results = ref.batches(20), []
    for cls, options in ((SMWNaturalGradient, {}), (NaturalGradient, {"curvature_ema": 0.0})):
        model = ref.net()
        optimizer = cls(
            model, LOSS, lr=LR, structure=structure, damping=DAMPING, kl_clip=None, fisher="empirical", **options
        )  # type: ignore[arg-type]
        ref.train(model, optimizer, data, LOSS)
        results.append(ref.flat(model.parameters()))
    torch.testing.assert_close(*results, rtol=0, atol=1e-9)


def test_no_gradient_of_a_single_example_is_formed() -> None:
    model, data = ref.mlp(6, 5, 3), ref.batches(1)
    optimizer = SMWNaturalGradient(model, LOSS, lr=0.1, structure="layer")
    ref.train(model, optimizer, data, LOSS)
    for preconditioner in optimizer.preconditioners.values():
        root = preconditioner.estimator.root  # type: ignore[attr-defined]
        assert isinstance(root, OuterRows) and root.left.shape[:2] == (12, 1)


@pytest.mark.parametrize(("m", "s", "o", "i"), [(5, 1, 3, 4), (4, 3, 30, 20), (6, 9, 2, 3)])
@pytest.mark.parametrize("stack", [(), (2,)])
def test_rows_of_a_layer_are_the_sums_over_its_positions(stack: tuple, m: int, s: int, o: int, i: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    root = OuterRows(draw(*stack, m, s, o), draw(*stack, m, s, i))
    formed = torch.stack(
        [sum(root.left[..., n, t, :, None] * root.right[..., n, t, None, :] for t in range(s)) for n in range(m)]
    )
    x, w = draw(3, *root.in_shape), draw(3, m)
    rows = Rows(formed)
    torch.testing.assert_close(root @ x, rows @ x)
    torch.testing.assert_close(root.adjoint() @ w, rows.adjoint() @ w)
    torch.testing.assert_close(gram_of(root), gram_of(rows))


@pytest.mark.parametrize("structure", ["dense", "layer"])
@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_continues_bit_for_bit(structure: Any, stop: int) -> None:
    data = ref.batches(8)

    def make(model: nn.Module) -> SMWNaturalGradient:
        options: Any = {"structure": structure, "spring": 0.9, "curvature_update_period": 3, "damping": 0.1}
        return SMWNaturalGradient(model, LOSS, lr=0.1, **options)

    ref.assert_resumes(make, data, LOSS, stop)


@pytest.mark.parametrize("structure", ["dense", "layer"])
def test_huge_damping_leaves_the_gradient_divided_by_it(structure: Any) -> None:
    model, plain, data = ref.net(), ref.net(), ref.batches(3)
    ref.train(
        model, SMWNaturalGradient(model, LOSS, lr=1e11, structure=structure, damping=1e12, kl_clip=None), data, LOSS
    )
    ref.train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), data, LOSS)
    torch.testing.assert_close(ref.flat(model.parameters()), ref.flat(plain.parameters()), rtol=1e-9, atol=1e-10)


def test_the_batch_of_a_step_may_come_in_parts() -> None:
    (x, y), *_ = ref.batches(1)
    results = []
    for parts in ([slice(0, 12)], [slice(0, 5), slice(5, 12)]):
        model = ref.net()
        optimizer = SMWNaturalGradient(model, LOSS, lr=0.5)
        for part in parts:
            (LOSS(model(x[part]), y[part]) * len(y[part]) / len(y)).backward()
        optimizer.step()
        results.append(ref.flat(model.parameters()))
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_the_matrix_does_not_follow_inputs_that_are_overwritten() -> None:
    model, data = ref.mlp(6, 5, 3, bias=False), ref.batches(2)
    optimizer = SMWNaturalGradient(model, LOSS, lr=0.0, curvature_update_period=2)
    ref.train(model, optimizer, data[:1], LOSS)
    preconditioner = optimizer.preconditioners["all parameters"]
    before = preconditioner @ torch.ones(45, dtype=torch.float64)
    data[0][0].fill_(7.0)
    assert torch.equal(preconditioner @ torch.ones(45, dtype=torch.float64), before)


def test_refusals() -> None:
    model, data = ref.mlp(6, 3), ref.batches(1)
    with pytest.raises(
        ValueError, match=r"damping must be positive: the matrix that SMWNaturalGradient inverts is singular. Got 0"
    ):
        SMWNaturalGradient(model, LOSS, lr=0.1, damping=0.0)
    with pytest.raises(ValueError, match=r"spring is the weight of the previous step, in \[0, 1\); got 1.0"):
        SMWNaturalGradient(model, LOSS, lr=0.1, spring=1.0)
    with pytest.raises(ValueError, match="structure is one of dense, layer, not 'unit'"):
        SMWNaturalGradient(model, LOSS, lr=0.1, structure="unit")  # type: ignore[arg-type]
    from curvature.structures.gram import GramFisher

    optimizer = PreconditionedOptimizer(
        model, LOSS, curvature=GramFisher("mc"), damping=Tikhonov(1.0), solver=Woodbury(), lr=0.1
    )
    with pytest.raises(ValueError, match="Set curvature_ema=0"):
        ref.train(model, optimizer, data, LOSS)

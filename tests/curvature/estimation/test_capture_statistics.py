"""Are the statistics of a training step those of ``curvature.fisher`` on its batch, whatever the loop looks like?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvature
from precond import KFAC, Loop
from tests.curvature.loops import (
    STRUCTURES,
    assert_same,
    batch,
    fisher,
    mlp,
    run,
    statistics,
    step,
    watching,
)
from tests.curvature.problems import PROBLEMS, Problem

MODELS = [
    "mlp_ce",
    "mlp_ce_all_options",
    "mlp_mse",
    "linear_on_sequences",
    "module_used_twice",
    "mapping_inputs",
    "cnn",
    "residual_eval",
    "encoder_pre_norm",
    "language_model",
]
# Uses that do not keep the examples apart get random signs in training: unbiased, not exact.
SIGNED = {"positions.weight"}


def flat_loss(problem: Problem, z: Tensor, y: Tensor) -> Tensor:
    """The loss as a loop calls it: outputs with positions are flattened."""
    if problem.class_dim is None:
        return problem.loss_fn(z, y)
    return problem.loss_fn(z.movedim(problem.class_dim, -1).flatten(0, -2), y.flatten())


def reference(problem: Problem, structure: str, kind: str = "exact", **options: Any) -> dict[str, Tensor]:
    return fisher(
        problem.model,
        problem.loss_fn,
        problem.data[0],
        kind=kind,
        structure=structure,
        class_dim=problem.class_dim,
        **options,
    )


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_collects_the_fisher_of_its_batch(name: str, structure: str) -> None:
    problem = PROBLEMS[name]()
    x, y = problem.data[0]
    optimizer = watching(problem.model, problem.loss_fn, structure, eval_mode=True)
    actual = step(optimizer, [lambda: flat_loss(problem, run(problem.model, x), y)])
    expected = reference(problem, structure)
    for block in SIGNED & expected.keys():
        del actual[block], expected[block]
    assert_same(actual, expected)


@pytest.mark.parametrize("structure", ["kfac", "diagonal"])  # an eigenbasis is seen in a second pass with other draws
@pytest.mark.parametrize("name", [*MODELS, "bare_parameters", "unknown_uses"])
def test_the_same_draws_give_the_same_fisher(name: str, structure: str) -> None:
    problem = PROBLEMS[name]()
    x, y = problem.data[0]
    optimizer = watching(problem.model, problem.loss_fn, structure, "mc", eval_mode=True)
    generator = torch.Generator().manual_seed(optimizer.statistics.generator.initial_seed())
    actual = step(optimizer, [lambda: flat_loss(problem, run(problem.model, x), y)])
    assert_same(actual, reference(problem, structure, "mc", generator=generator))


def test_the_factors_of_a_cnn_with_batch_norm_are_the_written_out_ones() -> None:
    """In train mode: the batch statistics are taken as given, as every K-FAC does."""
    torch.manual_seed(0)
    conv, head = nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.Linear(3, 4)
    model = nn.Sequential(conv, nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    model.double()
    x, y = torch.randn(5, 2, 4, 4, dtype=torch.float64), torch.randint(0, 4, (5,))
    loss_fn = nn.CrossEntropyLoss()

    h = conv(x)
    a = model[1:5](h.clone())
    z = head(a)
    p = z.softmax(-1).detach()
    B: list[Tensor] = [torch.zeros(3, 3).double(), torch.zeros(4, 4).double()]
    for c in range(4):
        column = p[:, c : c + 1].sqrt() * (torch.eye(4).double()[c] - p)
        for i, (g,) in enumerate([torch.autograd.grad(z, h, column, retain_graph=True), (column,)]):
            rows = g.movedim(1, -1).reshape(-1, g.shape[1])
            B[i] += rows.T @ rows / 5
    patches = F.unfold(x, 3, padding=1).mT.reshape(-1, 18)
    ones = torch.cat([a.detach(), torch.ones(5, 1).double()], 1)
    expected = {
        "0.weight": torch.kron(B[0], patches.T @ patches / len(patches)),
        "5.weight+5.bias": torch.kron(B[1], ones.T @ ones / 5),
    }

    actual = step(watching(model, loss_fn), [lambda: loss_fn(model(x), y)])
    assert_same({name: actual[name] for name in expected}, expected)


# The tokens a language model's loss sees, in every way people call it ------------------------------------------------


class WithLoss(nn.Module):
    """A model that computes its loss inside, from shifted labels, and returns a mapping."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.inner(ids)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=0)
        return {"loss": loss, "logits": logits}


def language_model() -> tuple[nn.Module, nn.CrossEntropyLoss, Tensor, Tensor]:
    problem = PROBLEMS["language_model"]()
    ids = torch.tensor([[1, 2, 2, 4], [3, 1, 4, 2], [2, 0, 0, 0]])
    targets = torch.cat([ids[:, 1:], torch.zeros(3, 1, dtype=torch.long)], 1)
    return problem.model, nn.CrossEntropyLoss(ignore_index=0), ids, targets


def flattened(model: nn.Module, loss_fn: nn.Module, ids: Tensor, y: Tensor) -> Tensor:
    return loss_fn(model(ids).reshape(-1, 5), y.reshape(-1))


def transposed(model: nn.Module, loss_fn: nn.Module, ids: Tensor, y: Tensor) -> Tensor:
    return loss_fn(model(ids).transpose(1, 2), y)


def functional(model: nn.Module, loss_fn: nn.Module, ids: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).view(-1, 5), y.view(-1), ignore_index=0)


def functional_sum(model: nn.Module, loss_fn: nn.Module, ids: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).mT, y, ignore_index=0, reduction="sum")


@pytest.mark.parametrize("options", [{}, {"capture": "shadow"}], ids=["watched", "shadow"])
@pytest.mark.parametrize("call", [flattened, transposed, functional, functional_sum])
@pytest.mark.parametrize("structure", ["kfac", "diagonal"])
def test_language_models_give_the_same_statistics_however_the_loss_is_called(
    structure: str, call: Callable[..., Tensor], options: dict[str, Any]
) -> None:
    model, loss_fn, ids, targets = language_model()
    expected = fisher(model, loss_fn, (ids, targets), kind="exact", structure=structure, class_dim=-1)
    optimizer = watching(model, loss_fn, structure, **options)
    actual = step(optimizer, [lambda: call(model, loss_fn, ids, targets)])
    del actual["positions.weight"], expected["positions.weight"]
    assert_same(actual, expected)


@pytest.mark.parametrize("options", [{}, {"capture": "shadow"}], ids=["watched", "shadow"])
def test_models_that_compute_their_loss_inside_give_the_same_statistics(options: dict[str, Any]) -> None:
    inner, loss_fn, ids, targets = language_model()
    model = WithLoss(inner)
    expected = fisher(inner, loss_fn, (ids, targets), kind="exact", class_dim=-1)
    optimizer = watching(model, loss_fn, **options)
    actual = step(optimizer, [lambda: model(ids, labels=ids)["loss"]])
    actual = {name.replace("inner.", ""): block for name, block in actual.items()}
    del actual["positions.weight"], expected["positions.weight"]
    assert_same(actual, expected)


@pytest.mark.parametrize("name", ["mlp_ce", "mlp_ce_all_options", "cnn", "encoder_pre_norm"])
def test_a_shadow_pass_sees_what_a_watched_pass_sees(name: str) -> None:
    problem = PROBLEMS[name]()
    x, y = problem.data[0]
    found = []
    for capture in ("loss", "shadow"):
        optimizer = watching(problem.model, problem.loss_fn, capture=capture)
        found.append(step(optimizer, [lambda: problem.loss_fn(run(problem.model, x), y)]))
        optimizer.detach()
    assert_same(found[0], found[1])


def test_an_output_that_is_transformed_before_the_loss_is_followed() -> None:
    model, (x, y), loss_fn = mlp(), batch(5), nn.CrossEntropyLoss()
    expected = fisher(model, loss_fn, (x, y), kind="exact")
    actual = step(watching(model, loss_fn), [lambda: loss_fn(model(x)[:, [1, 2, 0]], (y + 2) % 3)])
    assert_same(actual, expected)


# What must not matter ------------------------------------------------------------------------------------------------


def with_loss(
    make: Callable[[], Any], losses: Callable[[nn.Module, Any], list[Callable[[], Tensor]]]
) -> dict[str, Tensor]:
    model, loss_fn = mlp(), make()
    return step(watching(model, loss_fn), losses(model, loss_fn))


X, Y = batch(32)


def whole(model: nn.Module, loss_fn: Any) -> list[Callable[[], Tensor]]:
    return [lambda: loss_fn(model(X), Y)]


def split(sizes: list[int], reduction: str = "mean") -> Callable[[nn.Module, Any], list[Callable[[], Tensor]]]:
    """The loss of all examples as that of micro-batches, each with the weight of its examples."""

    def losses(model: nn.Module, loss_fn: Any) -> list[Callable[[], Tensor]]:
        classes = getattr(loss_fn, "weight", None)
        counts = torch.ones(3).double() if classes is None else classes
        shares = [counts[y].sum() / counts[Y].sum() if reduction == "mean" else 1.0 for y in Y.split(sizes)]
        parts = zip(X.split(sizes), Y.split(sizes), shares, strict=True)
        return [lambda x=x, y=y, s=s: s * loss_fn(model(x), y) for x, y, s in parts]  # type: ignore[misc]

    return losses


@pytest.mark.parametrize(
    "kind", [nn.CrossEntropyLoss, lambda **o: nn.CrossEntropyLoss(torch.tensor([0.2, 1, 3.0]).double(), **o)]
)
@pytest.mark.parametrize(
    ("losses", "reduction"),
    [
        (whole, "sum"),
        (lambda model, loss_fn: [lambda: loss_fn(model(X), Y) / 32], "sum"),
        (split([8] * 4), "mean"),
        (split([8] * 4, "sum"), "sum"),
        (split([1, 20, 11]), "mean"),
        (split([1, 20, 11], "sum"), "sum"),
    ],
    ids=["sum", "sum / 32", "4x8", "4x8 sum", "unequal", "unequal sum"],
)
def test_reduction_and_accumulation_do_not_matter(kind: Any, losses: Any, reduction: str) -> None:
    expected = with_loss(kind, whole)
    assert_same(with_loss(lambda: kind(reduction=reduction), losses), expected)


@pytest.mark.parametrize("losses", [whole, split([8] * 4), split([1, 20, 11])])
@pytest.mark.parametrize("capture", ["auto", "shadow"])
def test_they_do_not_matter_for_functional_losses(capture: str, losses: Any) -> None:
    expected = with_loss(nn.CrossEntropyLoss, whole)
    model = mlp()
    optimizer = watching(model, nn.CrossEntropyLoss(), capture=capture)
    assert_same(step(optimizer, losses(model, F.cross_entropy)), expected)


@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), nn.MSELoss()])
def test_an_empirical_fisher_has_the_weight_of_the_loss(loss_fn: nn.Module) -> None:
    x, y = batch(6)
    target = y if isinstance(loss_fn, nn.CrossEntropyLoss) else F.one_hot(y, 3).double()
    model = mlp()
    expected = fisher(model, loss_fn, (x, target), kind="empirical")
    actual = step(watching(model, loss_fn, kind="empirical"), [lambda: 64 * loss_fn(model(x), target)])
    assert_same({name: block / 64 for name, block in actual.items()}, expected)


class Unknown(nn.Module):
    """A loss nobody registered, with the values of a squared error."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(z, y, reduction=self.reduction) * (3 if self.reduction == "mean" else 1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scale", [1.0, 0.25, 1024.0])
def test_an_empirical_fisher_of_an_unknown_loss_is_read_off_its_gradient(reduction: str, scale: float) -> None:
    model, (x, y) = mlp(), batch(6)
    target = F.one_hot(y, 3).double()
    g = 2 * (model(x) - target).detach()
    a = torch.cat([model[:2](x).detach(), torch.ones(6, 1).double()], 1)
    loss_fn = Unknown(reduction)
    actual = step(watching(model, loss_fn, kind="empirical"), [lambda: scale * loss_fn(model(x), target)])
    weight = scale if reduction == "mean" else 1.0  # a sum stands for its mean
    assert_same({"h": actual["2.weight+2.bias"]}, {"h": weight * torch.kron(g.T @ g / 6, a.T @ a / 6)})


# Several passes, several losses --------------------------------------------------------------------------------------


class Twice(nn.Module):
    """What a loop does with a siamese model, as one module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.model(left) - 0.5 * self.model(right)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_two_passes_before_one_loss_are_two_uses(structure: str) -> None:
    model, loss_fn, (left, y), (right, _) = mlp(), nn.CrossEntropyLoss(), batch(5, 1), batch(5, 2)
    expected = fisher(Twice(model), loss_fn, ((left, right), y), kind="exact", structure=structure)
    actual = step(watching(model, loss_fn, structure), [lambda: loss_fn(model(left) - 0.5 * model(right), y)])
    assert_same({f"model.{name.replace('+', '+model.')}": block for name, block in actual.items()}, expected)


@pytest.mark.parametrize("make", [lambda z1, z2: (z1, z2), lambda z1, z2: (z2, z1)], ids=["in order", "reversed"])
def test_two_passes_with_a_loss_each_are_micro_batches(make: Any) -> None:
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    expected = with_loss(nn.CrossEntropyLoss, whole)

    def loss() -> Tensor:
        outputs = make((model(X[:20]), Y[:20]), (model(X[20:]), Y[20:]))
        return sum(len(y) / 32 * loss_fn(z, y) for z, y in outputs)

    assert_same(step(watching(model, loss_fn), [loss]), expected)


def test_two_losses_on_one_output_add_up() -> None:
    """Exactly: sums of terms with means of their own, inputs counted once."""
    x, y = batch(6)
    other = torch.tensor([-100, 1, -100, 2, 0, -100])
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    p = model(x).softmax(-1).detach()
    H = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    B = H.mean(0) + H[other >= 0].mean(0)
    a = torch.cat([model[:2](x).detach(), torch.ones(6, 1).double()], 1)

    def loss() -> Tensor:
        z = model(x)
        return loss_fn(z, y) + loss_fn(z, other)

    for capture in ("auto", "shadow"):
        optimizer = watching(model, loss_fn, capture=capture)
        actual = step(optimizer, [loss])
        optimizer.detach()
        assert_same({"h": actual["2.weight+2.bias"]}, {"h": torch.kron(B, a.T @ a / 6)})


def test_losses_of_something_else_do_not_count() -> None:
    x, y = batch(6)
    model, other, loss_fn = mlp(), mlp(5), nn.CrossEntropyLoss()
    expected = fisher(model, loss_fn, (x, y), kind="exact")

    def loss() -> Tensor:
        z = model(x)
        loss_fn(other(x[:2]), y[:2])  # another model under the same loss object, first in line
        with torch.no_grad():
            loss_fn(z, y)  # a metric
            loss_fn(model(x), y)
        loss_fn(z.detach(), y)
        return loss_fn(z, y) + loss_fn(other(x), y)

    assert_same(step(watching(model, loss_fn), [loss]), expected)


def test_evaluation_does_not_count() -> None:
    x, y = batch(6)
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    expected = fisher(model, loss_fn, (x, y), kind="exact")
    optimizer = watching(model, loss_fn)
    model.eval()
    loss_fn(model(X), Y)
    model.train()
    assert_same(step(optimizer, [lambda: loss_fn(model(x), y)]), expected)


INSPECTIONS: dict[str, Callable[[nn.Module, nn.Module, Any], Any]] = {
    "hessian": lambda m, f, data: curvature.hessian(m, f, data) @ torch.ones(43).double(),
    "ggn": lambda m, f, data: curvature.ggn(m, f, data, structure="full") @ torch.ones(43).double(),
    "empirical": lambda m, f, data: curvature.fisher(m, f, data, kind="empirical", structure="full").to_dense(),
    "ekfac": lambda m, f, data: curvature.fisher(m, f, data, kind="exact", structure="ekfac"),
    "mc": lambda m, f, data: curvature.fisher(m, f, data, kind="mc", structure="kfac"),
    "per sample": lambda m, f, data: curvature.per_sample_gradients(m, f, data),
    "jacobian": lambda m, f, data: curvature.jacobian(m, data[0]).to_dense(),
}


@pytest.mark.parametrize("name", INSPECTIONS)
def test_inspection_in_the_middle_of_a_step_does_not_count(name: str) -> None:
    x, y = batch(6)
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    expected = fisher(model, loss_fn, (x, y), kind="exact")
    optimizer = watching(model, loss_fn)

    def inspect() -> None:
        INSPECTIONS[name](model, loss_fn, batch(9, 3))

    def loss() -> Tensor:
        z = model(x)
        inspect()
        value = loss_fn(z, y)
        inspect()
        return value

    inspect()
    assert_same(step(optimizer, [loss]), expected)


def test_two_optimizers_share_a_model() -> None:
    """Each sees its own parameters in full."""
    x, y = batch(6)
    model, loss_fn = mlp(), nn.CrossEntropyLoss()
    expected = fisher(model, loss_fn, (x, y), kind="exact")
    first, second = (watching(model, loss_fn, params=f"{i}.*") for i in (0, 2))
    loss_fn(model(x), y).backward()
    first.step()
    second.step()
    assert_same({**statistics(first), **statistics(second)}, expected)


def test_draws_differ_from_step_to_step_and_repeat_with_the_seed() -> None:
    x, y = batch(6)

    def two_steps(seed: int) -> list[Tensor]:
        model, loss_fn = mlp(), nn.CrossEntropyLoss()
        optimizer = KFAC(model, loss_fn, lr=0.0, curvature_ema=0.0, loop=Loop(seed=seed))
        return [step(optimizer, [lambda: loss_fn(model(x), y)])["2.weight+2.bias"] for _ in range(2)]

    runs = [two_steps(seed) for seed in (0, 0, 1)]
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert not torch.allclose(runs[0][0], runs[0][1])
    assert not torch.allclose(runs[0][0], runs[2][0])

"""Losses on several outputs: every matrix is the weighted sum of those of the losses, over all the data."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
from curvature.losses import NoLikelihoodError, SumOfLosses
from precond import KFAC
from tests.curvature import dense_reference as reference
from tests.curvature.loops import assert_same, fisher, silently, statistics, watching
from tests.curvature.problems import Problem, normal
from tests.curvature.structures.test_parts_of_the_matrix import assert_close

F64 = torch.float64
AXIS: Any = {"label": -1, 0: -1}
WEIGHTS = {"label": 0.7, "depth": 2.0}


@dataclass
class Outputs:
    label: Tensor
    depth: Tensor


Pair = namedtuple("Pair", ["label", "depth"])
#: What a model may return, and the keys of the losses then.
CONTAINERS: dict[str, tuple[Callable[[Tensor, Tensor], Any], tuple[Any, Any]]] = {
    "dict": (lambda a, b: {"label": a, "depth": b}, ("label", "depth")),
    "tuple": (lambda a, b: (a, b), (0, 1)),
    "namedtuple": (Pair, ("label", "depth")),
    "dataclass": (Outputs, ("label", "depth")),
}


class TwoHeads(nn.Module):
    """Labels (N, T, 3) for each of T positions, and two numbers (N, 2) for an example."""

    def __init__(self, container: str = "dict") -> None:
        super().__init__()
        self.trunk, self.label, self.depth = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2, bias=False)
        self.wrap = CONTAINERS[container][0]

    def forward(self, x: Tensor) -> Any:
        h = self.trunk(x).tanh()
        return self.wrap(self.label(h), self.depth(h.mean(1)))


def two_heads(container: str = "dict", reduction: str = "mean") -> tuple[TwoHeads, SumOfLosses, list[Any]]:
    """Two batches in which another fraction of the labels is ignored, so that the divisors' ratio differs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TwoHeads(container).double()
        ce, mse = nn.CrossEntropyLoss(reduction=reduction, label_smoothing=0.1), nn.MSELoss(reduction=reduction)
        wrap, (a, b) = CONTAINERS[container]
        loss_fn = SumOfLosses({a: (WEIGHTS["label"], ce), b: (WEIGHTS["depth"], mse)})
        labels = [torch.tensor([[0, -100], [-100, 1], [-100, -100]]), torch.tensor([[2, 1], [1, 0]])]
        data = [(normal(len(y), 2, 3), wrap(y, normal(len(y), 2))) for y in labels]
    return model, loss_fn, data


def alone(model: TwoHeads, loss_fn: SumOfLosses, data: list[Any], index: int) -> Problem:
    """One of the losses, on its output alone."""

    def get(tree: Any, index: int) -> Tensor:
        name = ("label", "depth")[index]
        return tree[name] if isinstance(tree, dict) else tree[index] if isinstance(tree, tuple) else getattr(tree, name)

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return get(self.model(x), index)

    loss = list(loss_fn.losses.values())[index].loss_fn
    return Problem(One(), loss, [(x, get(y, index)) for x, y in data], class_dim=-1 if index == 0 else None)


def expected(model: TwoHeads, loss_fn: SumOfLosses, data: list[Any], kind: str) -> Tensor:
    pairs = enumerate(loss_fn.weights.values())
    return sum((w * reference.curvature(alone(model, loss_fn, data, k), kind) for k, w in pairs), torch.zeros(()))


def make(model: nn.Module, loss_fn: nn.Module, data: Any, structure: Any, kind: Any = "exact", **options: Any) -> Any:
    if isinstance(loss_fn, SumOfLosses):
        options["class_dim"] = AXIS
    return curvature.fisher(model, loss_fn, data, structure=structure, kind=kind, progress=False, **options)


def parts(operator: Any) -> list[Tensor]:
    entries = torch.arange(operator.size)
    return [place.gather(entries).flatten() for place in operator.places]


@pytest.mark.parametrize("container", sorted(CONTAINERS))
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_every_structure_is_the_weighted_sum(container: str, reduction: str, kind: str) -> None:
    model, loss_fn, data = two_heads(container, reduction)
    C = expected(model, loss_fn, data, kind)
    for structure in ("full", "dense", "low_rank"):
        assert_close(make(model, loss_fn, data, structure, kind).to_dense(), C)
    layer = make(model, loss_fn, data, "layer", kind)
    for block, index in zip(layer.blocks, parts(layer), strict=True):
        assert_close(block.to_dense(), C[index][:, index])
    assert_close(make(model, loss_fn, data, "diagonal", kind).diagonal(), C.diagonal())
    assert_close(make(model, loss_fn, data, "tnt", kind).trace(), C.trace())
    if kind == "empirical":
        uncentered = curvature.gradient_covariance(
            model,
            loss_fn,
            data,
            centered=False,
            class_dim=AXIS,
        )
        assert_close(uncentered.to_dense(), C)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_kfac_sums_the_gradient_factors(kind: str) -> None:
    model, loss_fn, data = two_heads()
    kfac = make(model, loss_fn, data, "kfac", kind)
    dense = kfac.to_dense()
    references = [reference.kfac(alone(model, loss_fn, data, k), kind) for k in range(2)]
    w = list(loss_fn.weights.values())
    B = w[0] * references[0]["model.trunk"][0] + w[1] * references[1]["model.trunk"][0]
    # A counts all positions, since the depth depends on each of them.
    expected = {"trunk": (B, references[1]["model.trunk"][1])}
    for k, name in enumerate(("label", "depth")):
        head_B, A = references[k][f"model.{name}"]
        expected[name] = (w[k] * head_B, A)
    for name, (B, A) in expected.items():
        index, block = reference.kfac_block(model, name, B, A)
        assert_close(dense[index][:, index], block)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_hessian_and_loss_of_all_the_data(reduction: str) -> None:
    model, loss_fn, data = two_heads(reduction=reduction)
    params = list(model.parameters())

    def loss() -> Tensor:
        z = model(torch.cat([x for x, _ in data]))
        y = {key: torch.cat([y[key] for _, y in data]) for key in ("label", "depth")}
        ce, mse = (loss.loss_fn for loss in loss_fn.losses.values())
        return 0.7 * ce(z["label"].flatten(0, 1), y["label"].flatten()) + 2.0 * mse(z["depth"], y["depth"])

    gradient = torch.autograd.grad(loss(), params, create_graph=True)
    rows = []
    for entry in torch.cat([g.flatten() for g in gradient]):
        row = torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat([torch.zeros(p.numel()) if r is None else r.flatten() for r, p in zip(row, params, strict=True)])
        )
    H = torch.stack(rows)
    assert_close(curvature.hessian(model, loss_fn, data, class_dim=AXIS).to_dense(), H)
    diagonal = curvature.hessian(model, loss_fn, data, class_dim=AXIS, structure="diagonal")
    assert_close(diagonal.diagonal(), H.diagonal())


@pytest.mark.parametrize("structure", ["full", "diagonal", "kfac"])
def test_draws_are_unbiased(structure: str) -> None:
    model, loss_fn, data = two_heads()
    exact = make(model, loss_fn, data, structure).to_dense().trace()
    drawn = make(model, loss_fn, data, structure, "mc", samples=500).to_dense().trace()
    assert abs(drawn / exact - 1) < 0.1


def test_forward_mode_gives_the_same() -> None:
    model, loss_fn, data = two_heads()
    v = normal(model_size := sum(p.numel() for p in model.parameters()))
    reverse = make(model, loss_fn, data, "full", mode="reverse") @ v
    assert_close(make(model, loss_fn, data, "full", mode="forward") @ v, reverse)
    assert reverse.shape == (model_size,)


def test_two_losses_on_one_output() -> None:
    model = nn.Linear(4, 3).double()
    x, y, t = normal(5, 4), torch.tensor([0, 1, 2, 2, 1]), normal(5, 3)
    loss_fn = SumOfLosses({"ce": (0.3, nn.CrossEntropyLoss()), "mse": (2.0, nn.MSELoss())})
    both = make(model, loss_fn, (x, {"ce": y, "mse": t}), "full").to_dense()
    ce = curvature.ggn(model, nn.CrossEntropyLoss(), (x, y)).to_dense()
    mse = curvature.ggn(model, nn.MSELoss(), (x, t)).to_dense()
    assert_close(both, 0.3 * ce + 2.0 * mse)
    shared = SumOfLosses({"mse": (1.0, nn.MSELoss()), "huber": (1.0, nn.HuberLoss(delta=9.0))})
    both = curvature.ggn(model, shared, (x, t), structure="layer").to_dense()
    assert_close(both, 1.5 * make(model, nn.MSELoss(), (x, t), "layer").to_dense())
    with pytest.raises(NoLikelihoodError, match=r"HuberLoss.*curvature\.ggn"):
        make(model, shared, (x, t), "layer")


def test_the_module_is_the_sum_and_weights_may_change() -> None:
    model, loss_fn, data = two_heads()
    x, y = data[1]
    z = model(x)
    z = {"label": z["label"].mT, "depth": z["depth"]}
    ce, mse = (loss.loss_fn for loss in loss_fn.losses.values())
    assert_close(loss_fn(z, y).detach(), (0.7 * ce(z["label"], y["label"]) + 2 * mse(z["depth"], y["depth"])).detach())
    loss_fn.weights["depth"] = 0.0
    assert_close(
        make(model, loss_fn, data, "dense").to_dense(),
        0.7 * reference.curvature(alone(model, loss_fn, data, 0), "exact"),
    )
    weighted = SumOfLosses({"a": (1.0, nn.CrossEntropyLoss(weight=torch.ones(3)))})
    assert next(weighted.buffers()).shape == (3,)  # moves with the module


def test_further_arguments_of_a_loss() -> None:
    model, x = nn.Linear(4, 2).double(), normal(5, 4)
    t, var = normal(5, 2), normal(5, 2).abs() + 0.1
    loss_fn = SumOfLosses({"mean": (1.0, nn.GaussianNLLLoss())})
    G = make(model, loss_fn, (x, {"mean": (t, var)}), "diagonal").diagonal()
    a = torch.cat([x, torch.ones(5, 1).double()], 1)
    by_hand = torch.einsum("no,ni->oi", 1 / var, a.square()) / 10
    assert_close(G, torch.cat([by_hand[:, :4].flatten(), by_hand[:, 4]]))
    assert torch.isfinite(loss_fn({"mean": model(x)}, {"mean": (t, var)}))


def test_refusals() -> None:
    model, loss_fn, data = two_heads()
    batch: Any = data[1]
    with pytest.raises(ValueError, match=r"a loss for 'label', but the outputs, a tuple, have 2 entries"):
        make(TwoHeads("tuple").double(), loss_fn, batch, "kfac")
    with pytest.raises(ValueError, match=r"a loss for 'depth', but the targets, a dict, have the keys \['label'\]"):
        make(model, loss_fn, (batch[0], {"label": batch[1]["label"]}), "kfac")
    with pytest.raises(ValueError, match=r"but the outputs, a Outputs, have the fields \['label', 'depth'\]"):
        make(TwoHeads("dataclass").double(), SumOfLosses({"x": (1.0, nn.MSELoss())}), (batch[0], normal(2, 3)), "kfac")
    for function in (curvature.per_sample_gradients, curvature.per_sample_norms, curvature.gradient_variance):
        with pytest.raises(TypeError, match="gradients of single examples and their covariance are those of one loss"):
            function(model, loss_fn, batch, class_dim=AXIS)
    with pytest.raises(TypeError, match=r"one loss. Take the losses of the sum \('label', 'depth'\) one by one"):
        curvature.gradient_covariance(model, loss_fn, batch, class_dim=AXIS)
    with pytest.raises(TypeError, match="one-shot iterator"):
        make(model, loss_fn, iter(data), "kfac")
    with pytest.raises(ValueError, match=r"different reductions \(\{'a': 'mean', 'b': 'sum'\}\)"):
        SumOfLosses({"a": (1.0, nn.MSELoss()), "b": (1.0, nn.MSELoss(reduction="sum"))})
    with pytest.raises(ValueError, match="weight of loss 'a' must be finite and not negative, got -1"):
        SumOfLosses({"a": (-1.0, nn.MSELoss())})
    with pytest.raises(ValueError, match="a sum of losses itself"):
        SumOfLosses({"a": (1.0, loss_fn)})
    with pytest.raises(ValueError, match="needs a loss at least"):
        SumOfLosses({})
    loss: Any = curvature.losses.loss_for(loss_fn)
    terms = loss.terms(model(batch[0]), batch[1], class_dim=AXIS)
    with pytest.raises(TypeError, match=r"terms of a sum of losses \('label', 'depth'\) are not of one shape"):
        _ = terms.columns


def test_outputs_of_different_numbers_of_examples_are_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            z = self.a(x)
            return {"each": z, "first": z[:3]}

    x = normal(5, 4)
    loss_fn = SumOfLosses({"each": (1.0, nn.MSELoss()), "first": (1.0, nn.MSELoss())})
    y = {"each": normal(5, 2), "first": normal(3, 2)}
    with pytest.raises(ValueError, match=r"different numbers of examples \(\{'each': 5, 'first': 3\}\)"):
        make(Model().double(), loss_fn, (x, y), "kfac")


class TokensFirst(TwoHeads):
    """As a training loop calls the loss: the classes come second, as PyTorch has it."""

    def forward(self, x: Tensor) -> Any:
        h = self.trunk(x).tanh()
        return self.wrap(self.label(h).mT, self.depth(h.mean(1)))


def training(container: str = "dict") -> tuple[nn.Module, SumOfLosses, tuple[Tensor, Any]]:
    _, loss_fn, data = two_heads(container)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TokensFirst(container).double(), loss_fn, data[0]


@pytest.mark.parametrize("container", sorted(CONTAINERS))
@pytest.mark.parametrize("structure", ["kfac", "diagonal"])
@pytest.mark.parametrize("mode", ["auto", "shadow"])
def test_training_sees_what_the_data_set_gives(container: str, structure: str, mode: str) -> None:
    model, loss_fn, (x, y) = training(container)
    optimizer = watching(model, loss_fn, structure, capture=mode)
    loss_fn(model(x), y).backward()
    silently(optimizer.step)
    axes: Any = {"label": 1, 0: 1}
    found = fisher(model, loss_fn, (x, y), kind="exact", structure=structure, class_dim=axes)
    assert_same(statistics(optimizer), found)


@pytest.mark.parametrize("kind", ["empirical", "mc"])
def test_training_takes_the_losses_one_by_one(kind: str) -> None:
    """What a single loss leaves in a head of its own is what the sum leaves there, times the weight."""
    model, loss_fn, (x, y) = training()
    both = watching(model, loss_fn, "diagonal", kind)
    loss_fn(model(x), y).backward()
    silently(both.step)
    both.detach()
    found = statistics(both)
    assert set(found) == {"trunk.weight+trunk.bias", "label.weight+label.bias", "depth.weight"}
    model.zero_grad()
    mse = nn.MSELoss()
    one = watching(model, mse, "diagonal", "empirical")
    mse(model(x)["depth"], y["depth"]).backward()
    silently(one.step)
    if kind == "empirical":
        assert_same({"depth": found["depth.weight"]}, {"depth": 2.0 * statistics(one)["depth.weight"]})


def test_training_without_calling_the_sum_says_what_to_do() -> None:
    model, loss_fn, (x, y) = training()
    optimizer = watching(model, loss_fn, lr=0.1)
    z = model(x)
    (nn.functional.cross_entropy(z["label"], y["label"]) + nn.functional.mse_loss(z["depth"], y["depth"])).backward()
    with pytest.raises(RuntimeError, match="calls the loss module given to the optimizer"):
        optimizer.step()


def test_a_training_loop_learns_both() -> None:
    model, loss_fn, (x, y) = training()
    optimizer = KFAC(model, loss_fn, lr=0.03, damping=0.1, momentum=0.0)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.7 * values[0]

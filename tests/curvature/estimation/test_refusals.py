"""Is what cannot be right refused, with a message that says how to mend it?"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from curvature import (
    DiagonalFisher,
    EigenbasisFisher,
    KroneckerFisher,
    coverage,
    fisher,
    ggn,
    hessian,
    jacobian,
    per_sample_gradients,
)
from curvature.losses import AmbiguousClassAxisError, NonFiniteLossError, UnknownLossError
from curvature.losses.signals import Signals
from curvature.model.data import call, resolve_output
from precond import KFAC, SOAP, HessianFree
from tests.curvature import dense_reference as dense
from tests.curvature import loops
from tests.curvature.estimates import estimate
from tests.curvature.problems import PROBLEMS, Fn, Problem, classes, normal

PROBLEM = PROBLEMS["mlp_ce"]()
MODEL, LOSS, DATA = PROBLEM.model, PROBLEM.loss_fn, PROBLEM.data


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "kron"}, r"structure must be one of .*'kfac'.*got 'kron'"),
        ({"kind": "sampled"}, r"kind is one of exact, mc, empirical, not 'sampled'"),
        ({"samples": 0}, "samples is at least 1, not 0"),
        ({"samples": -2}, "samples is at least 1, not -2"),
        ({"sharing": "sum"}, r"sharing must be 'expand', 'reduce' or 'auto', got 'sum'"),
        ({"bias": "none"}, r"bias must be 'joint' or 'separate', got 'none'"),
        ({"params": "encoder.*"}, r"params= names 'encoder\.\*', which is no trainable parameter.*0\.weight"),
        ({"params": [torch.zeros(2)]}, r"params= names a tensor of shape \(2,\), which is no trainable parameter"),
        ({"params": []}, r"params= is empty; name at least one of 0\.weight"),
        ({"class_dim": 5}, "class_dim=5 is no axis of the outputs"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fisher(MODEL, LOSS, DATA, **{"structure": "kfac", **options})


def test_unknown_option_names_are_python_errors() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'sharng'"):
        fisher(MODEL, LOSS, DATA, sharng="reduce", structure="kfac")
    with pytest.raises(TypeError, match="sharing"):
        fisher(MODEL, LOSS, DATA, structure="diagonal", sharing="reduce")


@pytest.mark.parametrize("curvature", [DiagonalFisher, KroneckerFisher, EigenbasisFisher])
def test_estimates_check_their_options_when_made(curvature: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="got 'true'"):
        curvature("true")
    with pytest.raises(ValueError, match="samples must be at least 1"):
        curvature("mc", 0)


def test_data() -> None:
    x, y = DATA[0]
    with pytest.raises(ValueError, match=r"data has no batches"):
        fisher(MODEL, LOSS, [], structure="kfac")
    consumed = iter(DATA)
    list(consumed)
    with pytest.raises(ValueError, match="data has no batches"):
        fisher(MODEL, LOSS, consumed, structure="diagonal")
    with pytest.raises(
        TypeError, match=r"one-shot iterator \(list_iterator\), but 2 passes.*list of batches or a DataLoader"
    ):
        fisher(MODEL, LOSS, iter(DATA), structure="ekfac")
    with pytest.raises(TypeError, match=r"one batch \(x, y\) or an iterable of batches.*not 3"):
        fisher(MODEL, LOSS, cast(Any, 3), structure="kfac")
    with pytest.raises(TypeError, match=r"a pair \(x, y\), got a tuple of length 3"):
        fisher(MODEL, LOSS, [(x, x, y)], structure="kfac")
    with pytest.raises(TypeError, match=r"a pair \(x, y\), got a Tensor"):
        fisher(MODEL, LOSS, [x], structure="kfac")
    with pytest.raises(TypeError, match=r"needs the key 'labels' for the targets, got \['x'\]"):
        fisher(MODEL, LOSS, {"x": x}, structure="kfac")
    with pytest.raises(ValueError, match="no example"):
        fisher(MODEL, LOSS, (x[:0], y[:0]), structure="kfac")


def test_one_pass_over_an_iterator_is_enough_for_one_pass() -> None:
    once = fisher(MODEL, LOSS, iter(DATA), kind="exact", structure="kfac").to_dense()
    assert torch.equal(once, fisher(MODEL, LOSS, DATA, kind="exact", structure="kfac").to_dense())


def test_models() -> None:
    with pytest.raises(
        ValueError, match=r"Linear has no trainable parameter: every requires_grad is False.*requires_grad_"
    ):
        fisher(nn.Linear(4, 3).requires_grad_(False), LOSS, DATA, structure="kfac")
    double = nn.Linear(4, 3).double()
    with pytest.raises(TypeError, match=r"returned a tuple; say which tensor the loss sees with output="):
        fisher(nn.Sequential(double, Fn(cast(Any, lambda z: (z, z)))), LOSS, DATA, structure="kfac")
    with pytest.raises(TypeError, match=r"output= must return a tensor, got tuple"):
        fisher(double, LOSS, DATA, output=lambda z: (z, z), structure="kfac")
    with pytest.raises(ValueError, match=r"does not depend on any of the parameters"):
        fisher(nn.Sequential(double, Fn(lambda z: z.detach())), LOSS, DATA, structure="kfac")


def test_losses() -> None:
    x, y = DATA[0]
    with pytest.raises(UnknownLossError, match=r"(?s)No derivatives are known for the loss CTCLoss"):
        fisher(MODEL, nn.CTCLoss(), DATA, structure="kfac")
    with pytest.raises(ValueError, match=r"reduction='none', so it is no scalar. Use 'mean' or 'sum'"):
        fisher(MODEL, nn.CrossEntropyLoss(reduction="none"), DATA, structure="kfac")
    square = nn.Sequential(nn.Linear(4, 3), Fn(lambda z: z.unsqueeze(1).expand(-1, 3, -1))).double()
    with pytest.raises(AmbiguousClassAxisError, match=r"class_dim=1 or class_dim=2"):
        fisher(square, LOSS, (x, torch.zeros(3, 3, dtype=torch.long)), structure="kfac")
    with pytest.raises(NonFiniteLossError, match=r"3 of 3 terms are not finite.*9 NaN"):
        fisher(MODEL, LOSS, (x * torch.nan, y), kind="exact", structure="kfac")
    with pytest.raises(ValueError, match=r"(?i)no term|ignore"):
        fisher(MODEL, LOSS, (x, torch.full_like(y, -100)), kind="exact", structure="kfac")


def test_sampling_without_a_generator() -> None:
    terms: Any = SimpleNamespace(shape=(1, 1, 1))
    with pytest.raises(ValueError, match=r"generator=torch\.Generator\(\); the global random state is never used"):
        next(iter(Signals(terms, "mc")))


def test_a_dense_input_factor_of_a_large_embedding_is_not_made() -> None:
    model = nn.Sequential(nn.Embedding(9, 2), Fn(lambda x: x.sum(1)), nn.Linear(2, 3)).double()
    data = (torch.tensor([[1, 2], [3, 4]]), torch.tensor([0, 1]))
    whole, cut = (fisher(model, LOSS, data, sharing="reduce", max_dim=n, structure="kfac") for n in (9, 8))
    assert [type(factor).__name__ for factor in cut.blocks[0].factors] == ["Dense", "Diagonal"]
    torch.testing.assert_close(cut.diagonal(), whole.diagonal(), rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore:not one loss")  # one of the problems has a batch norm in train mode
@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", ["encoder_time_major", "encoder_time_major_square", "positions_picked_by_a_mask"])
def test_averages_over_positions_that_cannot_be_told_apart(name: str, structure: Any) -> None:
    with pytest.raises(ValueError, match=r"'reduce' averages over the positions of each example.*batch_first=True"):
        estimate(PROBLEMS[name](), structure, sharing="reduce")
    for name in ("residual_train", "bare_parameters", "language_model"):  # mixed, but it is clear what belongs together
        estimate(PROBLEMS[name](), structure, sharing="reduce")


def test_a_layer_that_changes_its_use_between_batches() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.a.weight if len(x) == 3 else self.a.weight.exp()
            return nn.functional.linear(x, weight) + nn.functional.linear(x, self.b.weight, self.b.bias)

    problem = Problem(Fickle().double(), LOSS, DATA)
    of_a = dense.ggn(problem)[:12, :12]
    factors = loops.fisher(problem.model, LOSS, DATA, kind="exact")  # by autograd alone, from the first batch on
    torch.testing.assert_close(factors["a.weight"].diagonal(), of_a.diagonal(), rtol=1e-10, atol=1e-12)


def test_a_bias_that_comes_and_goes() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if len(x) == 3 else nn.functional.linear(self.a(x) @ self.a.weight, self.a.weight)

    model, exact = Fickle().double(), cast(Any, {"kind": "exact"})
    for structure in ("kfac", "layer", "diagonal"):  # apart from the start, in any order
        later, first = (fisher(model, LOSS, data, structure=structure, **exact) for data in (DATA, DATA[::-1]))
        torch.testing.assert_close(later.to_dense(), first.to_dense(), rtol=1e-10, atol=1e-13)
    apart = fisher(model, LOSS, DATA, bias="separate", structure="kfac", **exact)
    torch.testing.assert_close(fisher(model, LOSS, DATA, structure="kfac", **exact).to_dense(), apart.to_dense())
    with pytest.raises(RuntimeError, match=r"a\.weight\+a\.bias.*a later batch uses it in another way.*in one batch"):
        fisher(model, LOSS, iter(DATA), structure="kfac")

    optimizer = KFAC(model, LOSS, lr=0.01, fisher="exact")
    for x, y in [*DATA, *DATA]:
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()
    assert sorted(optimizer.preconditioners) == ["a.bias", "a.weight"]
    assert all(p.estimator.ready for p in optimizer.preconditioners.values())


class Named(nn.Module):
    def forward(self, left: Tensor, right: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=left if right is None else left + right)


class Whole(nn.Module):
    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": batch["left"]}


def test_how_inputs_and_outputs_are_passed() -> None:
    """A mapping becomes keywords where forward takes those names, one argument otherwise."""
    one = torch.ones(2)
    assert torch.equal(resolve_output(call(Named(), {"left": one, "right": one})), 2 * one)
    assert torch.equal(resolve_output(call(Named(), (one, one))), 2 * one)
    assert torch.equal(resolve_output(call(Named(), one)), one)
    assert torch.equal(resolve_output(call(Whole(), {"left": one})), one)
    assert torch.equal(resolve_output((one, 0), lambda result: result[0]), one)


INFERENCE: dict[str, Callable[..., Tensor]] = {
    "by layers": lambda x, y, v: fisher(MODEL, LOSS, (x, y), kind="exact", structure="kfac").to_dense(),
    "products": lambda x, y, v: hessian(MODEL, LOSS, (x, y)) @ v,
    "rows": lambda x, y, v: fisher(MODEL, LOSS, (x, y), kind="empirical") @ v,
    "jacobian": lambda x, y, v: jacobian(MODEL, x) @ v,
    "per sample": lambda x, y, v: per_sample_gradients(MODEL, LOSS, (x, y))["0.weight"],
}


@pytest.mark.parametrize("door", INFERENCE)
def test_inference_mode_does_not_stand_in_the_way(door: str) -> None:
    x, y = normal(3, 4), classes(3, of=3)
    v = normal(sum(p.numel() for p in MODEL.parameters()))
    expected = INFERENCE[door](x, y, v)
    with torch.inference_mode():
        got = INFERENCE[door](x * 1, y * 1, v * 1)
    assert torch.equal(got, expected)


MADE_THERE: dict[str, Callable[[nn.Module], Any]] = {
    "data": lambda m: hessian(m, LOSS, (normal(3, 4), classes(3, of=3))),
    "coverage": lambda m: coverage(m, LOSS),
    "jacobian": lambda m: jacobian(m, normal(3, 4)),
    "layers": lambda m: KFAC(m, LOSS, lr=0.1),
    "gradients": lambda m: SOAP(m.named_parameters(), lr=0.1),
    "closure": lambda m: HessianFree(m, LOSS),
}


@pytest.mark.parametrize("door", MADE_THERE)
def test_parameters_of_inference_mode_are_refused_by_name(door: str) -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model[0].requires_grad_(False)  # torch refuses such ones where a graph needs them
    what = "a parameter of shape" if door == "closure" else r"2\.weight"
    with pytest.raises(ValueError, match=rf"{what}.*was made under torch.inference_mode\(\).*Build the model"):
        MADE_THERE[door](model)


def test_frozen_tables_and_inputs_of_inference_mode_are_taken() -> None:
    rows, x, y, found = normal(5, 4), classes(3, of=5), classes(3, of=3), []
    start = nn.Linear(4, 3).double()
    for inside in (True, False):
        head = copy.deepcopy(start)
        with torch.inference_mode(inside):
            table = nn.Embedding.from_pretrained(rows * 1, freeze=True)
            x = x * 1
        model = nn.Sequential(table, head)
        optimizer = KFAC(model, LOSS, lr=0.1, fisher="exact")
        for _ in range(2):
            optimizer.zero_grad()
            LOSS(model(x), y).backward()
            optimizer.step()
        found.append(head.weight.detach().clone())
    assert torch.equal(found[0], found[1])


def test_the_package_may_be_imported_in_inference_mode() -> None:
    code = "import torch; torch.inference_mode().__enter__(); import curvature.layers.explained"
    subprocess.run([sys.executable, "-c", code], check=True)


class Rows(nn.Module):
    """Sequences of different lengths, packed or jagged, to the scores of each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.run, self.last = nn.Linear(3, 4), nn.GRU(3, 4), nn.Linear(4, 3)

    def forward(self, x: Any) -> Tensor:
        if isinstance(x, PackedSequence):
            return self.last(self.run(x)[1][-1])
        rows = self.first(x).unbind() if x.is_nested else self.first(x)
        return self.last(torch.stack([row.sum(0) for row in rows]).tanh())


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "jagged"])
def test_sequences_of_different_lengths(packed: bool) -> None:
    """As those of each length alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Rows().double()
    rows, y = [normal(length, 3).double() for length in (2, 4, 1)], classes(3, of=3)
    x = pack_sequence(rows, enforce_sorted=False) if packed else torch.nested.nested_tensor(rows, layout=torch.jagged)
    got = ggn(model, LOSS, (x, y), structure="diagonal").to_dense()
    alone = [pack_sequence([row]) if packed else row.unsqueeze(0) for row in rows]
    expected = [ggn(model, LOSS, (one, y[i : i + 1]), structure="diagonal").to_dense() for i, one in enumerate(alone)]
    torch.testing.assert_close(got, torch.stack(expected).mean(0))
    assert got.abs().max() > 0

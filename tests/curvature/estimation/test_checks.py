"""Is the structure of a model tried out when it is new, and only then?"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
from curvature.estimation import checks
from curvature.losses import loss_for
from curvature.model import kernels
from curvature.model.parameters import Parameters
from tests.curvature import dense_reference as dense
from tests.curvature.problems import Problem, classes, mlp, normal


class Sorting(nn.Module):
    """Sends the examples through its layers in the order of their first entries."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return self.last(self.first(x[order]).tanh())[order.argsort()]


class Mixing(nn.Module):
    """Adds the mean over the examples once it is told to; all shapes stay."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.mixes = nn.Linear(4, 5), nn.Linear(5, 3), False

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        return self.last(h + h.mean(0) if self.mixes else h + h)


class Scaled(torch.autograd.Function):
    """Scales by a number that no mode sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(x, factor)
        return x * factor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, factor = ctx.saved_tensors
        return gradients[0] * factor, (gradients[0] * x).sum()


class Hidden(nn.Module):
    """Uses the bias of its layer a second time, in a function of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return Scaled.apply(self.layer(x), self.layer.bias.sum())


class Placed(nn.Module):
    """Adds a table of positions, the same for all examples, whose rows may end up at another example."""

    def __init__(self, moved: bool) -> None:
        super().__init__()
        self.table, self.last, self.moved = nn.Embedding(4, 4), nn.Linear(4, 3), moved

    def forward(self, x: Tensor) -> Tensor:
        places = self.table(torch.arange(4).expand(len(x), 4))
        return self.last((x.unsqueeze(1) + (places.flip(0) if self.moved else places)).tanh().mean(1))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Backward passes so far."""
    count, plain = [0], torch.autograd._engine_run_backward  # grad() hands itself to function modes first

    def counting(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "_engine_run_backward", counting)
    seen = kernels._SEEN_INSIDE[torch.autograd.grad]  # a copy of grad(), which runs where kernels are replaced
    monkeypatch.setitem(seen.__globals__, "_engine_run_backward", counting)
    return count


def taken(count: list[int], run: Callable[[], Any]) -> int:
    before = count[0]
    run()
    return count[0] - before


def gradients(model: nn.Module, x: Tensor, y: Tensor, loss_fn: Any = None) -> Tensor:
    found = curvature.per_sample_gradients(model, loss_fn or nn.CrossEntropyLoss(), (x, y))
    return torch.cat([g.flatten(1) for g in found.values()], 1)


def true_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """From the definition: the terms of each example in the presence of the others."""
    terms = nn.functional.cross_entropy(model(x), y, reduction="none")
    return dense.jacobian(terms, list(dense.trainable(model).values()))


def test_equal_passes_are_tried_out_once(passes: list[int]) -> None:
    torch.manual_seed(0)
    model, x, y = mlp().double(), normal(6, 4), classes(6, of=3)
    first = taken(passes, lambda: gradients(model, x, y))
    assert first > 1
    assert taken(passes, lambda: gradients(model, x.flip(0), y)) == 1
    torch.testing.assert_close(gradients(model, x.flip(0), y), true_gradients(model, x.flip(0), y), rtol=1e-10, atol=0)
    assert taken(passes, lambda: gradients(model, x, normal(6, 3), nn.MSELoss())) == 1  # whatever the loss


@pytest.mark.parametrize("change", ["shape", "layer", "parameters", "copy"])
def test_whatever_is_new_is_tried_out(change: str, passes: list[int]) -> None:
    torch.manual_seed(0)
    model, x, y = mlp().double(), normal(6, 4), classes(6, of=3)
    first = taken(passes, lambda: gradients(model, x, y))
    runs: dict[str, Callable[[], Any]] = {
        "shape": lambda: gradients(model, x[:5], y[:5]),
        "layer": lambda: gradients(nn.Sequential(*model[:1], nn.ReLU(), *model[2:]), x, y),
        "parameters": lambda: curvature.per_sample_gradients(model, nn.CrossEntropyLoss(), (x, y), params="0.*"),
        "copy": lambda: gradients(mlp().double(), x, y),
    }
    assert taken(passes, runs[change]) == first


def test_examples_that_start_to_mix_are_noticed() -> None:
    """The same shapes and parameters, with another graph between them."""
    torch.manual_seed(0)
    model, x, y = Mixing().double(), normal(6, 4), classes(6, of=3)
    for model.mixes in (False, True, False):
        torch.testing.assert_close(gradients(model, x, y), true_gradients(model, x, y), rtol=1e-9, atol=1e-12)


def test_batch_norm_that_starts_to_learn_is_noticed() -> None:
    """Its graph has the same nodes and shapes in both modes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    x, y = normal(6, 4), classes(6, of=3)
    for training in (False, True, False):
        model.train(training)
        torch.testing.assert_close(gradients(model, x, y), true_gradients(model, x, y), rtol=1e-9, atol=1e-12)


def test_rows_that_are_moved_by_values_are_followed_in_every_pass() -> None:
    """The first batch happens to be in order, the second is not."""
    torch.manual_seed(0)
    model, x, y = Sorting().double(), normal(6, 4), classes(6, of=3)
    ordered = x[x[:, 0].argsort()]
    for rows in (ordered, x):
        torch.testing.assert_close(gradients(model, rows, y), true_gradients(model, rows, y), rtol=1e-9, atol=1e-12)
    problem = Problem(model, nn.CrossEntropyLoss(reduction="sum"), [(ordered, y), (x, y)])
    diagonal = curvature.ggn(model, problem.loss_fn, problem.data, structure="diagonal").diagonal()
    torch.testing.assert_close(diagonal, dense.ggn(problem).diagonal(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("moved", [False, True])
def test_rows_of_a_table_of_positions_go_to_the_examples_they_are_counted_to(moved: bool, passes: list[int]) -> None:
    torch.manual_seed(0)
    model, x, y = Placed(moved).double(), normal(6, 4), classes(6, of=3)
    torch.testing.assert_close(gradients(model, x, y), true_gradients(model, x, y), rtol=1e-9, atol=1e-12)
    assert (taken(passes, lambda: gradients(model, x, y)) == 1) == (not moved)


def test_functions_of_the_users_own_are_tried_out_in_every_pass(passes: list[int]) -> None:
    torch.manual_seed(0)
    model, x, y = Hidden().double(), normal(6, 4), normal(6, 1)
    first = taken(passes, lambda: gradients(model, x, y, nn.MSELoss()))
    assert taken(passes, lambda: gradients(model, x, y, nn.MSELoss())) == first
    terms = (model(x) - y).square().sum(1)
    expected = dense.jacobian(terms, list(dense.trainable(model).values()))
    torch.testing.assert_close(gradients(model, x, y, nn.MSELoss()), expected, rtol=1e-10, atol=1e-12)


def test_a_pass_in_which_some_example_has_no_term_proves_nothing(passes: list[int]) -> None:
    torch.manual_seed(0)
    model, x, y = mlp().double(), normal(6, 4), classes(6, of=3)
    y[2] = -100
    first = taken(passes, lambda: gradients(model, x, y))
    assert taken(passes, lambda: gradients(model, x, y)) == first


def test_nothing_is_kept_of_a_model_that_is_gone() -> None:
    torch.manual_seed(0)
    model, x, y = mlp().double(), normal(6, 4), classes(6, of=3)
    gc.collect()
    before = len(checks._known)
    gradients(model, x, y)
    assert len(checks._known) == before + 1
    del model
    gc.collect()
    assert len(checks._known) <= before


def test_graphs_differ_where_parameters_enter_elsewhere() -> None:
    x, (a, b) = normal(3, 2), (nn.Parameter(normal(2, 2)) for _ in range(2))
    holder = nn.ParameterDict({"a": a, "b": b})
    parameters = Parameters(holder)
    found = [checks.graph(z, parameters) for z in (x @ a @ b, x @ b @ a, x @ a @ b)]
    keys = [pair[0] for pair in found if pair is not None]
    assert keys[0] == keys[2] != keys[1]
    assert checks.graph((x @ a)[torch.tensor([1, 0, 2])], parameters) is None


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "weight": torch.tensor([0.5, 2.0, 1.0, 0.1])}])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_the_shortest_root_of_a_softmax(options: dict[str, Any], scale: float) -> None:
    """One column fewer than classes, the same Hessian, in single precision and where it is nearly zero too."""
    torch.manual_seed(0)
    z, y = scale * normal(5, 4), classes(5, of=4)
    y[0] = -100
    exact = loss_for(nn.CrossEntropyLoss(**options)).terms(z, y)
    single = loss_for(nn.CrossEntropyLoss(**options)).terms(z.float(), y)
    S = torch.stack([exact.sqrt_column(c) for c in range(4)])
    H = torch.einsum("knc,knd->ncd", S, S)
    for terms, tolerance in ((exact, 1e-13), (single, 1e-5)):
        R = terms.root(0, terms.rank)
        assert len(R) == 3 and R.dtype == terms.output.dtype
        torch.testing.assert_close(terms.root(1, 3), R[1:])
        got = torch.einsum("knc,knd->ncd", R.double(), R.double())
        # Relative to each term's Hessian, of the size of its smaller probabilities; 1 - p has an error of eps itself.
        bound = tolerance * scale * H.flatten(1).norm(dim=1) + 4 * torch.finfo(R.dtype).eps ** 2
        assert bool(((got - H).flatten(1).norm(dim=1) <= bound).all())

"""Is the diagonal exact for every kind of layer, and does every parameter that should have a rule have one?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from curvature import fisher
from curvature.estimation.dataset import record
from curvature.model.parameters import Parameters
from tests.curvature import dense_reference as dense
from tests.curvature.problems import Problem

CLASSES = 3
LENGTHS = [2, 4, 1]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Head(nn.Module):
    """A layer, and a nonlinear head that gives logits per example whatever the layer's output shape is."""

    def __init__(self, layer: nn.Module, width: int, pick: Callable[[Any], Tensor] = lambda y: y) -> None:
        super().__init__()
        self.layer, self.pick, self.head = layer, pick, nn.Linear(width, CLASSES)

    def forward(self, *x: Tensor) -> Tensor:
        y = self.pick(self.layer(*x))
        # Positions are mixed by unequal weights, so that none can stand for another.
        y = torch.tanh(y).flatten(1)
        return self.head(y * torch.linspace(0.5, 1.5, y.shape[1], dtype=y.dtype))


CASES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {}


def case(factory: Callable[[], tuple[nn.Module, Any]]) -> Callable[[], tuple[nn.Module, Any]]:
    def build() -> tuple[nn.Module, Any]:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model, x = factory()
            model.double()
            for p in model.parameters():
                p.data += 0.2 * torch.randn_like(p)
        return model, x

    CASES[factory.__name__] = build
    return build


# Transposed convolutions ---------------------------------------------------------------------------------------------


@case
def transposed_1d() -> tuple[nn.Module, Any]:
    return Head(nn.ConvTranspose1d(2, 3, 3), 3 * 6), normal(3, 2, 4)


@case
def transposed_1d_all_options() -> tuple[nn.Module, Any]:
    layer = nn.ConvTranspose1d(4, 6, 3, stride=3, padding=2, output_padding=2, groups=2, dilation=2)
    return Head(layer, 6 * 9), normal(3, 4, 3)


@case
def transposed_1d_padding_beyond_the_kernel() -> tuple[nn.Module, Any]:
    return Head(nn.ConvTranspose1d(2, 2, 2, padding=2), 2 * 2), normal(3, 2, 5)


@case
def transposed_2d() -> tuple[nn.Module, Any]:
    return Head(nn.ConvTranspose2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0)), 3 * 3 * 4), normal(3, 2, 2, 3)


@case
def transposed_2d_groups_without_bias() -> tuple[nn.Module, Any]:
    layer = nn.ConvTranspose2d(4, 2, 2, stride=2, output_padding=1, groups=2, dilation=(1, 2), bias=False)
    return Head(layer, 2 * 5 * 6), normal(3, 4, 2, 2)


@case
def transposed_3d() -> tuple[nn.Module, Any]:
    return Head(nn.ConvTranspose3d(2, 2, 2, stride=(1, 2, 1), padding=(0, 1, 0)), 2 * 3 * 2 * 3), normal(3, 2, 2, 2, 2)


@case
def transposed_output_size() -> tuple[nn.Module, Any]:
    class Sized(nn.ConvTranspose1d):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, output_size=[10])

    return Head(Sized(2, 2, 3, stride=2), 2 * 10), normal(3, 2, 4)


@case
def transposed_weight_alone() -> tuple[nn.Module, Any]:
    layer = nn.ConvTranspose1d(2, 3, 3, stride=2)
    layer.bias.requires_grad_(False)  # type: ignore[union-attr]
    return Head(layer, 3 * 9), normal(3, 2, 4)


# Bags, bilinear forms, slopes ----------------------------------------------------------------------------------------


@case
def bag_of_means() -> tuple[nn.Module, Any]:
    return Head(nn.EmbeddingBag(5, 4, mode="mean"), 4), torch.tensor([[0, 1, 1], [4, 4, 4], [2, 0, 3]])


@case
def bag_of_means_with_padding() -> tuple[nn.Module, Any]:
    layer = nn.EmbeddingBag(5, 4, mode="mean", padding_idx=-4)
    return Head(layer, 4), torch.tensor([[0, 1, 1], [1, 1, 1], [2, 0, 1]])


@case
def bag_of_sums() -> tuple[nn.Module, Any]:
    return Head(nn.EmbeddingBag(5, 4, mode="sum", padding_idx=2), 4), torch.tensor([[0, 1, 1], [2, 4, 4], [2, 0, 3]])


@case
def bag_of_weighted_sums() -> tuple[nn.Module, Any]:
    class Weighted(nn.EmbeddingBag):
        def forward(self, ids: Tensor, weights: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(ids, per_sample_weights=weights)

    return Head(Weighted(5, 4, mode="sum"), 4), (torch.tensor([[0, 1, 1], [2, 4, 4], [2, 0, 3]]), normal(3, 3))


@case
def bag_with_offsets() -> tuple[nn.Module, Any]:
    layer = nn.EmbeddingBag(5, 4, mode="mean")
    return Head(layer, 4), (torch.tensor([0, 1, 1, 4, 4, 2, 0]), torch.tensor([0, 3, 5]))


@case
def bag_with_offsets_an_empty_bag_and_a_last_offset() -> tuple[nn.Module, Any]:
    layer = nn.EmbeddingBag(5, 4, mode="sum", include_last_offset=True)
    return Head(layer, 4), (torch.tensor([0, 1, 1, 4, 2]), torch.tensor([0, 3, 3, 5]))


@case
def bag_of_maxima() -> tuple[nn.Module, Any]:
    return Head(nn.EmbeddingBag(5, 4, mode="max"), 4), torch.tensor([[0, 1, 1], [4, 4, 4], [2, 0, 3]])


@case
def bilinear() -> tuple[nn.Module, Any]:
    return Head(nn.Bilinear(2, 3, 4), 4), (normal(3, 2), normal(3, 3))


@case
def bilinear_on_positions_without_bias() -> tuple[nn.Module, Any]:
    return Head(nn.Bilinear(2, 3, 2, bias=False), 8), (normal(3, 4, 2), normal(3, 4, 3))


@case
def prelu_one_slope() -> tuple[nn.Module, Any]:
    return Head(nn.PReLU(), 6), normal(3, 2, 3)


@case
def prelu_a_slope_per_channel() -> tuple[nn.Module, Any]:
    return Head(nn.PReLU(2), 12), normal(3, 2, 3, 2)


@case
def prelu_on_vectors() -> tuple[nn.Module, Any]:
    return Head(nn.PReLU(4), 4), normal(3, 4)


@case
def layer_scale() -> tuple[nn.Module, Any]:
    class LayerScale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.gamma = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gamma * self.inner(x)

    return Head(LayerScale(), 8), normal(3, 2, 4)


class Bare(nn.Module):
    """A parameter in a function of it and the input."""

    def __init__(self, shape: tuple[int, ...], function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.p, self.function = nn.Parameter(torch.zeros(shape)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.p, x)


@case
def matrix_on_the_left() -> tuple[nn.Module, Any]:
    return Head(Bare((4, 2), lambda p, x: p @ x), 12), normal(3, 2, 3)


@case
def transposed_matrix_on_the_left() -> tuple[nn.Module, Any]:
    return Head(Bare((2, 4), lambda p, x: torch.matmul(p.T, x)), 12), normal(3, 2, 3)


@case
def matrix_that_mixes_examples() -> tuple[nn.Module, Any]:
    return Head(Bare((3, 3), lambda p, x: p @ x), 4), normal(3, 4)


@case
def table_of_relative_positions() -> tuple[nn.Module, Any]:
    distance = torch.arange(3).unsqueeze(1) - torch.arange(3)  # counts from both ends
    return Head(Bare((5, 2), lambda p, x: x + p[distance].sum(1)), 6), normal(3, 3, 2)


@case
def table_indexed_by_the_input() -> tuple[nn.Module, Any]:
    return Head(Bare((5, 2), lambda p, x: p.index_select(0, x[:, 0]) * p[x[:, 1]]), 2), torch.tensor([[0, 4]] * 3)


@case
def linear_on_two_views_of_a_batch() -> tuple[nn.Module, Any]:
    class Two(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            one, other = super().forward(torch.cat([x, x.square()])).tanh().chunk(2)
            return one * other

    return Head(Two(3, 4), 4), normal(3, 3)


@case
def expert_that_sees_as_many_tokens_as_there_are_examples() -> tuple[nn.Module, Any]:
    class Expert(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(0, 1)
            chosen = torch.tensor([4, 2, 5])  # none of the first example, two of the last
            return x + torch.zeros_like(tokens).index_add(0, chosen, super().forward(tokens[chosen])).view_as(x)

    return Head(Expert(2, 2), 4), normal(3, 2, 2)


@case
def expert_that_sees_the_tokens_of_one_example() -> tuple[nn.Module, Any]:
    class Expert(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x[:2], super().forward(x[2]).unsqueeze(0)])

    return Head(Expert(2, 2), 6), normal(3, 3, 2)


@case
def linear_on_the_first_of_one_example() -> tuple[nn.Module, Any]:
    class First(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[0]).unsqueeze(0)

    return Head(First(3, 4), 4), normal(1, 3)


# Recurrent layers ----------------------------------------------------------------------------------------------------


def outputs(result: Any) -> Tensor:
    return result[0]


def outputs_of_time_major(result: Any) -> Tensor:
    return result[0].transpose(0, 1)


def outputs_and_states(result: Any) -> Tensor:
    """Everything a recurrent layer returns, ``(n, features)``."""
    y, states = result
    states = states if isinstance(states, tuple) else (states,)
    return torch.cat([y.flatten(1), *(s.transpose(0, 1).flatten(1) for s in states)], 1)


@case
def rnn_tanh() -> tuple[nn.Module, Any]:
    return Head(nn.RNN(2, 3, batch_first=True), 12, outputs), normal(3, 4, 2)


@case
def rnn_relu_without_bias() -> tuple[nn.Module, Any]:
    return Head(nn.RNN(2, 3, nonlinearity="relu", bias=False, batch_first=True), 12, outputs), normal(3, 4, 2)


@case
def lstm() -> tuple[nn.Module, Any]:
    return Head(nn.LSTM(2, 3, batch_first=True), 4 * 3 + 2 * 3, outputs_and_states), normal(3, 4, 2)


@case
def lstm_two_layers_both_directions() -> tuple[nn.Module, Any]:
    layer = nn.LSTM(2, 2, num_layers=2, bidirectional=True, batch_first=True)
    return Head(layer, 4 * 4 + 2 * 8, outputs_and_states), normal(3, 4, 2)


@case
def lstm_projected() -> tuple[nn.Module, Any]:
    layer = nn.LSTM(2, 4, proj_size=2, num_layers=2, batch_first=True, bidirectional=True)
    return Head(layer, 4 * 4, outputs), normal(3, 4, 2)


@case
def gru_both_directions_with_states() -> tuple[nn.Module, Any]:
    layer = nn.GRU(2, 3, bidirectional=True, batch_first=True)
    return Head(layer, 4 * 6 + 6, outputs_and_states), (normal(3, 4, 2), normal(2, 3, 3))


@case
def gru_with_input_weights_frozen() -> tuple[nn.Module, Any]:
    layer = nn.GRU(2, 3, batch_first=True)
    layer.weight_ih_l0.requires_grad_(False)
    layer.bias_hh_l0.requires_grad_(False)
    return Head(layer, 12, outputs), normal(3, 4, 2)


@case
def gru_time_major_inside_a_batch_first_model() -> tuple[nn.Module, Any]:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.gru = nn.Linear(2, 2), nn.GRU(2, 3)

        def forward(self, x: Tensor) -> Any:
            return self.gru(self.embed(x).transpose(0, 1))

    return Head(Transposed(), 12, outputs_of_time_major), normal(3, 4, 2)


@case
def lstm_time_major() -> tuple[nn.Module, Any]:
    return Head(nn.LSTM(2, 3), 12, outputs_of_time_major), normal(4, 3, 2)


@case
def lstm_time_major_with_as_many_steps_as_examples() -> tuple[nn.Module, Any]:
    return Head(nn.LSTM(2, 3), 9, outputs_of_time_major), normal(3, 3, 2)


def packed(x: Tensor, enforce_sorted: bool) -> PackedSequence:
    lengths = sorted(LENGTHS, reverse=True) if enforce_sorted else LENGTHS
    return pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=enforce_sorted)


class Packed(nn.Module):
    def __init__(self, layer: nn.Module, enforce_sorted: bool = False) -> None:
        super().__init__()
        self.layer, self.enforce_sorted = layer, enforce_sorted

    def forward(self, x: Tensor) -> Any:
        y, states = self.layer(packed(x, self.enforce_sorted))
        return pad_packed_sequence(y, batch_first=True)[0], states


@case
def lstm_packed() -> tuple[nn.Module, Any]:
    return Head(Packed(nn.LSTM(2, 3)), 4 * 3 + 6, outputs_and_states), normal(3, 4, 2)


@case
def gru_packed_both_directions_two_layers() -> tuple[nn.Module, Any]:
    layer = Packed(nn.GRU(2, 2, num_layers=2, bidirectional=True), enforce_sorted=True)
    return Head(layer, 4 * 4 + 8, outputs_and_states), normal(3, 4, 2)


class Steps(nn.Module):
    """A cell applied step by step."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state, seen = None, []
        for x_t in x.unbind(1):
            state = self.cell(x_t, state)
            seen.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(seen, 1)


@case
def lstm_cell() -> tuple[nn.Module, Any]:
    return Head(Steps(nn.LSTMCell(2, 3)), 12), normal(3, 4, 2)


@case
def gru_cell_without_bias() -> tuple[nn.Module, Any]:
    return Head(Steps(nn.GRUCell(2, 3, bias=False)), 12), normal(3, 4, 2)


@case
def rnn_cell() -> tuple[nn.Module, Any]:
    return Head(Steps(nn.RNNCell(2, 3)), 12), normal(3, 4, 2)


@case
def rnn_cell_relu() -> tuple[nn.Module, Any]:
    return Head(Steps(nn.RNNCell(2, 3, nonlinearity="relu")), 12), normal(3, 4, 2)


@case
def lstm_on_a_parameter() -> tuple[nn.Module, Any]:
    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.prompt = nn.LSTM(2, 3, batch_first=True), nn.Parameter(torch.zeros(1, 2, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(self.prompt)[0] * x

    return Head(Prompted(), 6), normal(3, 2, 3)


@case
def gru_that_learns_its_first_state() -> tuple[nn.Module, Any]:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.start = nn.GRU(2, 3, batch_first=True), nn.Parameter(torch.zeros(1, 1, 3))

        def forward(self, x: Tensor) -> Any:
            return self.gru(x, self.start.expand(1, len(x), 3).contiguous())

    return Head(Learned(), 12, outputs), normal(3, 4, 2)


# Left to automatic differentiation -----------------------------------------------------------------------------------


@case
def weight_norm() -> tuple[nn.Module, Any]:
    return Head(parametrizations.weight_norm(nn.Linear(3, 4)), 4), normal(3, 3)


@case
def spectral_norm() -> tuple[nn.Module, Any]:
    return Head(parametrizations.spectral_norm(nn.Linear(3, 4)).eval(), 4), normal(3, 3)


@case
def gru_cell_with_weight_norm() -> tuple[nn.Module, Any]:
    return Head(Steps(parametrizations.weight_norm(nn.GRUCell(2, 3), "weight_hh")), 12), normal(3, 4, 2)


#: Parameters the rules leave to automatic differentiation; for all other cases there are none.
UNRULED = {
    "matrix_that_mixes_examples": {"layer.p"},
    "lstm_on_a_parameter": {f"layer.lstm.{kind}_{side}_l0" for kind in ("weight", "bias") for side in ("ih", "hh")}
    | {"layer.prompt"},
    "bag_of_maxima": {"layer.weight"},
    "weight_norm": {f"layer.parametrizations.weight.original{i}" for i in (0, 1)},
    "spectral_norm": {"layer.parametrizations.weight.original"},
    "gru_cell_with_weight_norm": {f"layer.cell.parametrizations.weight_hh.original{i}" for i in (0, 1)},
}


def targets(x: Any) -> Tensor:
    return torch.arange(1 if isinstance(x, Tensor) and len(x) == 1 else 3)


@pytest.mark.parametrize("name", CASES)
def test_diagonal_is_exact(name: str) -> None:
    model, x = CASES[name]()
    y = targets(x)
    for kind in ("exact", "empirical"):
        problem = Problem(model, nn.CrossEntropyLoss(), [(x, y)])
        expected = dense.curvature(problem, kind).diagonal()
        assert expected.norm() > 1e-6
        got = fisher(model, problem.loss_fn, (x, y), kind=kind, structure="diagonal").diagonal()
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_eigenvalue_corrected_factors_keep_the_trace(name: str) -> None:
    model, x = CASES[name]()
    y = targets(x)
    expected = dense.ggn(Problem(model, nn.CrossEntropyLoss(), [(x, y)])).trace()
    got = fisher(model, nn.CrossEntropyLoss(), (x, y), kind="exact", structure="ekfac").diagonal().sum()
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_rules_cover_what_they_should(name: str) -> None:
    model, x = CASES[name]()
    assert set(record(model, Parameters(model), x)[1].unknown) == UNRULED.get(name, set())

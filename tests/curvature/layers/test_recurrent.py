"""Do recurrent layers compute the same step by step, and are the user's own passes left alone?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature.estimation.collector import Collector
from curvature.estimation.dataset import record
from curvature.layers.recorder import Recorder
from curvature.losses import loss_for
from curvature.losses.signals import Signals
from curvature.model.parameters import Parameters
from curvature.model.trees import tensors_in
from curvature.structures.diagonal import DiagonalEstimator
from tests.curvature import dense_reference as dense
from tests.curvature.layers.test_diagonal import CASES
from tests.curvature.problems import Problem

# A layer whose input is itself a parameter runs fused.
RECURRENT = {name for name in CASES if name.split("_")[0] in ("rnn", "lstm", "gru")} - {"lstm_on_a_parameter"}


def run(model: nn.Module, x: Any) -> Any:
    return model(*x) if isinstance(x, tuple) else model(x)


@pytest.mark.parametrize("name", sorted(RECURRENT))
def test_values_agree_with_the_fused_layer(name: str) -> None:
    model, x = CASES[name]()
    expected = run(model, x)
    got, recorder = record(model, Parameters(model), x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    assert any(site.operation == "recurrent" for site in recorder.sites)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_whatever_a_layer_returns_has_its_shape(kind: Any) -> None:
    layer = kind(2, 3, num_layers=2, bidirectional=True)
    for x in (torch.randn(5, 4, 2), torch.randn(5, 2)):  # with and without a batch
        expected = list(tensors_in(layer(x)))
        got = list(tensors_in(record(layer, Parameters(layer), x)[0]))
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_dropout_between_layers_is_drawn_in_train_mode_only() -> None:
    layer = nn.LSTM(2, 8, num_layers=2, dropout=0.5)
    x = torch.randn(5, 4, 2)
    states = torch.random.get_rng_state()
    first, second = (record(layer, Parameters(layer), x)[0][0] for _ in range(2))
    assert not torch.allclose(first, second)
    layer.eval()
    torch.random.set_rng_state(states)
    torch.testing.assert_close(record(layer, Parameters(layer), x)[0][0], layer(x)[0])
    assert torch.equal(torch.random.get_rng_state(), states)


def in_training(model: nn.Module, x: Tensor) -> tuple[Any, Recorder]:
    recorder = Recorder(Parameters(model), batch=len(x))
    recorder.mark_inputs(x)
    with recorder:
        return run(model, x), recorder


@pytest.mark.parametrize("name", ["lstm_two_layers_both_directions", "gru_cell_without_bias", "lstm_packed"])
def test_a_pass_of_the_user_keeps_its_bits(name: str) -> None:
    model, x = CASES[name]()
    expected = run(model, x)
    got, recorder = in_training(model, x)
    assert torch.equal(got, expected)
    assert set(recorder.unknown) == {n for n in Parameters(model) if n.startswith("layer.")}


def test_sampled_statistics_of_a_pass_of_the_user_are_unbiased() -> None:
    model, x = CASES["rnn_tanh"]()
    parameters, y, draws = Parameters(model), torch.arange(3), 1500
    collector = Collector(parameters, lambda block, form: DiagonalEstimator(block))
    z, recorder = in_training(model, x)
    signals = Signals(loss_for(nn.CrossEntropyLoss()).terms(z, y), "mc", draws, torch.Generator().manual_seed(0), 3)
    collector.collect(recorder, z, signals)
    collector.commit(0.0)
    got = collector.operator().diagonal()
    expected = dense.ggn(Problem(model, nn.CrossEntropyLoss(), [(x, y)])).diagonal()
    # A square of a sum of bounded terms has a standard deviation of about 1.5 times its mean; four of them.
    assert ((got - expected).abs() <= 4 * 1.5 * expected / draws**0.5).all()


def test_a_tracked_first_state_is_left_to_automatic_differentiation() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.start = nn.GRU(2, 3, batch_first=True), nn.Parameter(torch.zeros(1, 4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(x, self.start)[0]

    model = Learned()
    recorder = record(model, Parameters(model), torch.randn(4, 2, 2))[1]
    assert set(recorder.unknown) == set(Parameters(model))
    assert recorder.unknown["start"] == {"gru"}

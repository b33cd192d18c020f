"""Models and data that are not one loss are named; those that are pass."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvature
from curvature import NondeterministicError, NotOneLossWarning, check_deterministic
from curvature.estimation.checkpoint import Checkpoint
from curvature.losses import SumOfLosses
from tests.curvature.problems import normal


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def data() -> list[Any]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return [(normal(n, 2), torch.randint(2, (n,))) for n in (3, 2)]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_fixed_models_and_data_pass(batch_norm: bool) -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2), *plain()).double().eval() if batch_norm else plain()
    check_deterministic(model, data())
    check_deterministic(model, data()[0])
    check_deterministic(model, DataLoader(TensorDataset(normal(6, 2), torch.zeros(6)), batch_size=4))


def test_dropout_is_named_and_nothing_else_changes() -> None:
    model = nn.Sequential(plain(), nn.Dropout(0.0), nn.Sequential(nn.Dropout(0.5)))
    state, before = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    with pytest.raises(NondeterministicError, match=r"not one loss: \(a\) dropout is active in 2\.0 \(model\.eval"):
        check_deterministic(model, data())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    check_deterministic(model.eval(), data())


def test_recurrent_and_attention_dropout_is_named() -> None:
    model = nn.TransformerEncoderLayer(2, 1, 4, dropout=0.3, batch_first=True).double()
    with pytest.raises(NondeterministicError, match=r"self_attn, dropout, dropout1, dropout2"):
        check_deterministic(model, (normal(3, 2, 2), torch.zeros(3)))


def test_batch_norm_in_train_mode_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    with pytest.raises(NondeterministicError, match="1 normalise by the statistics of the batch"):
        check_deterministic(model, data())
    check_deterministic(model.eval(), data())


def test_shuffling_loader_is_named() -> None:
    loader = DataLoader(TensorDataset(normal(16, 2), torch.arange(16)), batch_size=4, shuffle=True)
    with pytest.raises(NondeterministicError, match="the loader shuffles: its batches hold other examples"):
        check_deterministic(plain(), loader)
    one_by_one = DataLoader(TensorDataset(normal(16, 2), torch.arange(16)), batch_size=1, shuffle=True)
    with pytest.raises(NondeterministicError, match="the batches come in another order"):
        check_deterministic(plain(), one_by_one)


def test_augmentation_is_named() -> None:
    class Noisy:
        def __iter__(self) -> Iterator[Any]:
            for x, y in data():
                yield x + torch.randn_like(x), y

    with pytest.raises(NondeterministicError, match="the data differ between two passes"):
        check_deterministic(plain(), Noisy())


def test_everything_found_is_listed() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5)).double()
    loader = DataLoader(TensorDataset(normal(16, 2), torch.arange(16)), batch_size=4, shuffle=True)
    with pytest.raises(NondeterministicError, match=r"\(a\) the loader .*; \(b\) dropout .* 1 .*; \(c\) 0 normalise"):
        check_deterministic(model, loader)


def test_a_model_that_draws_numbers_itself() -> None:
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = plain()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x + torch.randn_like(x))

    with pytest.raises(NondeterministicError, match="the model draws random numbers itself"):
        check_deterministic(Noise(), data())
    # One realisation is one matrix all the same.
    H = curvature.hessian(Noise(), nn.CrossEntropyLoss(), data())
    v = normal(H.shape[1])
    with pytest.warns(NotOneLossWarning, match="the model draws random numbers itself"):
        product = H @ v
    assert torch.equal(product, H @ v)


@pytest.mark.parametrize("killed", [False, True], ids=["at once", "resumed in the second pass"])
def test_the_second_pass_of_a_structure_draws_what_the_first_drew(killed: bool, tmp_path: Path) -> None:
    """The spectrum of EKFAC comes from a second pass; an orthogonal change of basis keeps the trace."""
    model = nn.Sequential(plain(), nn.Dropout(0.5))

    class Batches:
        lives = 3 if killed else 10**6

        def __iter__(self) -> Iterator[Any]:
            for batch in data():
                if not self.lives:
                    raise KeyboardInterrupt
                self.lives -= 1
                yield batch

    def trace(batches: Any, structure: str, **options: Any) -> Tensor:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore", NotOneLossWarning)
            torch.manual_seed(3)
            C = curvature.fisher(
                model, nn.CrossEntropyLoss(), batches, kind="exact", structure=structure, progress=False, **options
            )
        return C.diagonal().sum()

    options = {"resume": Checkpoint(tmp_path / "sums", seconds=0)} if killed else {}
    if killed:
        with pytest.raises(KeyboardInterrupt):
            trace(Batches(), "ekfac", **options)
    found = trace(data(), "ekfac", **options)
    torch.testing.assert_close(found, trace(data(), "diagonal"), rtol=1e-12, atol=0)


class Heads(nn.Module):
    """Two outputs, and chance in one of them on request."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.inner, self.drop = plain(), nn.Dropout(p)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.inner(x)
        return {"label": z, "size": self.drop(z[:, :1])}


def test_outputs_of_several_losses_are_compared_and_reported() -> None:
    loss_fn = SumOfLosses({"label": (1.0, nn.CrossEntropyLoss()), "size": (0.5, nn.MSELoss())})
    batches = [(x, {"label": y, "size": x[:, :1]}) for x, y in data()]
    with pytest.raises(NondeterministicError, match="dropout is active in drop"):
        check_deterministic(Heads(0.5), batches)
    found = curvature.report(Heads(), loss_fn, batches, sections=["trace"], progress=False)
    exact = float(curvature.hessian(Heads(), loss_fn, batches).to_dense().trace())
    trace = found.traces["hessian"].trace
    assert trace.value == pytest.approx(exact, rel=1e-9, abs=5 * trace.error)


def test_one_shot_iterators_are_refused() -> None:
    with pytest.raises(TypeError, match="one-shot iterator"):
        check_deterministic(plain(), iter(data()))


# The same words at every door


class Draws(nn.Module):
    """Dropout that no module shows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = plain()

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(self.inner(x), 0.5)


FOUND: dict[str, tuple[Any, str]] = {
    "dropout": (lambda: nn.Sequential(plain(), nn.Dropout(0.5)), r"not one loss: \(a\) dropout is active in 1"),
    "norm": (
        lambda: nn.Sequential(nn.BatchNorm1d(2), plain()).double(),
        r"\(a\) 0 normalise by the statistics of the batch",
    ),
    "draws": (Draws, r"\(a\) the model draws random numbers itself"),
}
DOORS: dict[str, Any] = {
    "hessian": lambda *given: curvature.hessian(*given).to_dense(),
    "ggn": lambda *given: curvature.ggn(*given).to_dense(),
    "kfac": lambda *given: curvature.fisher(*given, structure="kfac"),
    "covariance": lambda *given: curvature.gradient_covariance(*given, structure="diagonal"),
    "moments": lambda *given: curvature.gradient_variance(*given),
    "self_influence": lambda *given: curvature.self_influence(*given),
    "Monitor": lambda *given: curvature.Monitor(*given, eval_mode=False, quantities=()).measure(),
}


@pytest.mark.parametrize("why", FOUND)
@pytest.mark.parametrize("door", DOORS)
def test_every_door_says_that_the_loss_is_one_of_many(door: str, why: str) -> None:
    make, words = FOUND[why]
    with pytest.warns(NotOneLossWarning, match=words):
        DOORS[door](make(), nn.CrossEntropyLoss(), data())
    if why != "draws":
        DOORS[door](make().eval(), nn.CrossEntropyLoss(), data())  # a warning is an error here


def test_a_report_says_it_or_refuses() -> None:
    with pytest.warns(NotOneLossWarning, match="normalise by the statistics"):
        found = curvature.report(FOUND["norm"][0](), nn.CrossEntropyLoss(), data(), sections=["trace"])
    assert "normalise by the statistics" in found.notes[0]
    assert " ".join(found.notes[0].split()) in " ".join(str(found).split())
    with pytest.raises(NondeterministicError, match="dropout is active in 1"):
        curvature.report(FOUND["dropout"][0](), nn.CrossEntropyLoss(), data())


def test_one_batch_has_one_split_and_an_order_does_not_matter_to_sums() -> None:
    norm = FOUND["norm"][0]()
    x, y = data()[0]
    curvature.hessian(norm, nn.CrossEntropyLoss(), (x, y)).to_dense()
    curvature.hessian(norm, nn.CrossEntropyLoss(), [(x, y)]).to_dense()
    curvature.per_sample_gradients(norm, nn.CrossEntropyLoss(), (x, y))
    x, y = normal(8, 2), torch.arange(8) % 2
    shuffled = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True)
    got = curvature.hessian(plain(), nn.CrossEntropyLoss(), shuffled).to_dense()
    torch.testing.assert_close(got, curvature.hessian(plain(), nn.CrossEntropyLoss(), (x, y)).to_dense())


def test_data_with_missing_values_are_the_same_data() -> None:
    x = normal(4, 2)
    x[1, 0] = float("nan")
    check_deterministic(nn.Sequential(nn.Linear(2, 2)).double(), [(x[:2].nan_to_num(), x[2:]), (x[2:], x[:2])])

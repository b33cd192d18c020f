"""Structures written on means: what the base does for them, and what older versions called things."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
from curvature import Curvature, CurvatureEstimator, MeansEstimator, TensorNormal
from curvature.estimation import checkpoint
from curvature.estimation.dataset import estimate
from curvature.layers.block import Block
from curvature.layers.samples import Outer, Samples
from curvature.structures.estimator import Form
from curvature.structures.singd import DiagonalBlocks
from curvature.structures.weighted_mean import WeightedMean
from solvers import Dense, Kronecker, LinearOperator, from_state, state

LOSS = nn.CrossEntropyLoss()


class TwoFactors(MeansEstimator):
    """TNT from its formula: ``L (x) R / tr L``."""

    structure = "two factors"
    names = ("L", "R")

    def totals(self, samples: Any) -> Iterator[dict[str, Tensor]]:
        for g in samples.gradients():
            yield {"L": (g @ g.mT).sum(0), "R": (g.mT @ g).sum(0)}

    def of_means(self, means: Mapping[str, Tensor]) -> LinearOperator:
        return Kronecker(Dense(means["L"]), Dense(means["R"] / means["L"].trace()))


@dataclass(frozen=True)
class TwoFactorFisher(Curvature):
    """A curvature of two named means."""

    def estimator(self, block: Block, form: Form) -> CurvatureEstimator:
        return TwoFactors(block)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))


def samples_of(net: nn.Module, data: Any) -> Any:
    """What an estimator of the first layer is given."""
    seen = []

    class Watching(TwoFactors):
        def update(self, samples: Any) -> None:
            seen.append((self.block, samples))

    @dataclass(frozen=True)
    class WatchingFisher(Curvature):
        def estimator(self, block: Block, form: Form) -> CurvatureEstimator:
            return Watching(block)

    with pytest.raises(RuntimeError, match="no statistics yet"):
        estimate(net, LOSS, data, WatchingFisher("empirical"))
    return seen


def test_a_structure_of_two_named_means_is_that_of_the_library() -> None:
    net = model()
    data = [batch(7), batch(3)]
    mine = estimate(net, LOSS, data, TwoFactorFisher("exact"))
    theirs = estimate(net, LOSS, data, TensorNormal("exact"))
    torch.testing.assert_close(mine.to_dense(), theirs.to_dense())


def test_weights_averages_and_states_come_from_the_base() -> None:
    net = model()
    (block, first), *_ = samples_of(net, batch(6))
    (_, second), *_ = samples_of(net, batch(2))
    mine = TwoFactors(block)
    assert not mine.ready and bool(mine.finite())
    with pytest.raises(RuntimeError, match="no statistics yet"):
        mine.operator()
    mine.update(first)
    mine.commit(0.9)
    mine.update(second)
    mine.count(2.0)  # two more examples, which did not reach the block
    mine.commit(0.5)
    gradients = [torch.cat(list(s.gradients())) for s in (first, second)]
    means = [(g @ g.mT).sum(0) / n for g, n in zip(gradients, (6, 4), strict=True)]
    expected = (0.5 * means[0] + means[1]) / 1.5
    L = mine.state_dict()["L"]
    torch.testing.assert_close(L["value"], expected)
    assert mine.state_dict().keys() == {"L", "R"}
    other = TwoFactors(block)
    other.update(first)
    other.load_state_dict(mine.state_dict())
    assert other.ready and torch.equal(other.operator().to_dense(), mine.operator().to_dense())
    other.commit(0.0)
    assert torch.equal(other.operator().to_dense(), mine.operator().to_dense()), "loading forgets the current step"


def test_a_step_that_is_not_finite_is_seen_and_discarded() -> None:
    (block, samples), *_ = samples_of(model(), batch(4))
    mine = TwoFactors(block)
    mine.update(samples)
    mine.R.add(torch.full((5, 5), torch.nan, dtype=torch.float64), 0.0)  # type: ignore[attr-defined]
    assert not bool(mine.finite())
    mine.discard()
    assert bool(mine.finite()) and not mine.ready


@pytest.mark.parametrize("name", ["KroneckerFisher", "EigenbasisFisher", "InputKronecker", "TensorNormal"])
def test_the_former_name_of_the_cap_is_answered_with_the_new_one(name: str) -> None:
    kind = getattr(curvature, name)
    with pytest.raises(TypeError, match=f"{name} takes max_dim=, which was called max_factor before"):
        kind(max_factor=4)
    with pytest.raises(TypeError, match="takes max_dim="):
        curvature.fisher(model(), LOSS, batch(4), structure="kfac", max_factor=4)
    assert kind(max_dim=4).max_dim == 4
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_factor'"):
        curvature.DiagonalFisher(max_factor=4)  # type: ignore[call-arg]


def test_sums_of_tnt_from_version_0_1_go_on(tmp_path: Path) -> None:
    """They kept both means as a pair of one name."""
    net, data, file = model(), [batch(5), batch(4)], tmp_path / "sums.pt"
    whole = curvature.fisher(net, LOSS, data, kind="empirical", structure="tnt", resume=file).to_dense()
    saved = checkpoint.load(file)
    for known in saved["state"]["collector"]["estimators"].values():
        sums = known["sums"]
        sums["means"] = (sums.pop("L"), sums.pop("R"))
        sums["max_factor"] = sums.pop("max_dim")
    assert "max_factor=" in saved["identity"]["curvature"]
    checkpoint.save(file, saved)
    again = curvature.fisher(net, LOSS, data, kind="empirical", structure="tnt", resume=file)
    assert torch.equal(again.to_dense(), whole)


def test_stored_operators_keep_the_names_of_version_0_1() -> None:
    stored = state(curvature.fisher(model(), LOSS, batch(4), structure="kfac"))
    assert {place["class"] for place in stored["places"]} == {"Place"}
    assert {part["class"] for place in stored["places"] for part in place["block"]["parts"]} == {"Part"}
    blocks = DiagonalBlocks(torch.eye(2).expand(2, 2, 2), 3)
    assert state(blocks)["class"] == "Blocks"
    assert torch.equal(from_state(state(blocks)).to_dense(), torch.eye(3))


def test_a_mean_that_was_kept_whole_goes_on_as_a_diagonal_and_takes_no_other_shape() -> None:
    mean, whole, part = WeightedMean(2), torch.eye(3) * 2 + 1, torch.tensor([1.0, 2.0, 3.0])
    mean.add(whole * 4, 4.0)
    mean.commit(0.5)
    mean.add(part * 2, 2.0)
    mean.commit(0.5)
    torch.testing.assert_close(mean.value, (0.5 * whole.diagonal() + part) / 1.5)
    for other in (torch.ones(4), torch.ones(3, 3)):
        mean.add(other, 1.0)
        with pytest.raises(ValueError, match="cannot take in statistics of shape"):
            mean.commit(0.5)
        mean.discard()
    mean.add(part, 1.0)
    with pytest.raises(ValueError, match="options \\(max_dim, max_ratio\\) that it was saved with"):
        mean.add(whole, 1.0)


def test_chunks_of_many_signals_are_no_larger_than_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvature.layers.samples.CACHED_ELEMENTS", 40)
    use = Outer(torch.randn(3, 2, 4), torch.randn(7, 3, 2, 5))
    samples = Samples((use,), 3.0)
    sizes: list[int] = []
    found = samples.summed(lambda chunk: sizes.append(len(chunk)) or chunk.square().sum(0))  # type: ignore[func-returns-value]
    gradients = torch.einsum("knso,nsi->knoi", use.g, use.a)
    assert max(sizes) * 20 <= 40 and sum(sizes) == 21
    torch.testing.assert_close(found, gradients.square().sum((0, 1)))

"""Are averages unbiased from the first step on, and what they would be in one go?"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from curvature.structures.weighted_mean import WeightedMean

floats = st.floats(-10, 10)


def steps(values: list[float], ema: float) -> WeightedMean:
    mean = WeightedMean()
    for value in values:
        mean.add(torch.tensor([value], dtype=torch.float64), 1.0)
        mean.commit(ema)
    return mean


@given(st.lists(floats, min_size=1, max_size=6), st.floats(0, 1))
def test_running_mean_is_the_weighted_mean_of_its_steps(values: list[float], ema: float) -> None:
    weights = [ema ** (len(values) - 1 - i) for i in range(len(values))]
    expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    mean = steps(values, ema)
    assert mean.value is not None
    assert mean.value.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert mean.weight == pytest.approx(sum(weights))


@given(st.lists(floats, min_size=4, max_size=4), st.integers(1, 3))
def test_micro_batches_give_what_one_batch_gives(values: list[float], cut: int) -> None:
    whole, parts = WeightedMean(), WeightedMean()
    rows = torch.tensor(values, dtype=torch.float64)[:, None]
    whole.add(rows.sum(0), 4.0)
    parts.add(rows[:cut].sum(0), torch.tensor(float(cut)))
    parts.add(rows[cut:].sum(0), 4 - cut)
    parts.add(None, 0.0)
    torch.testing.assert_close(whole.step_mean(), parts.step_mean(), rtol=1e-12, atol=1e-12)


def test_a_step_without_data_or_a_discarded_one_leaves_the_mean() -> None:
    mean = steps([1.0, 3.0], 0.5)
    assert mean.value is not None
    value, weight = mean.value.clone(), mean.weight
    mean.commit(0.5)
    mean.add(torch.tensor([torch.inf], dtype=torch.float64), 1.0)
    assert mean.pending and not mean.finite()
    mean.discard()
    mean.commit(0.5)
    assert torch.equal(mean.value, value)
    assert mean.weight == weight
    assert mean.finite()


def test_a_committed_value_is_not_written_to() -> None:
    """Operators hold the committed value: later steps must make a new one."""
    mean = steps([1.0], 0.5)
    held = mean.value
    mean.add(torch.tensor([5.0], dtype=torch.float64), 1.0)
    mean.add(torch.tensor([5.0], dtype=torch.float64), 1.0)
    mean.commit(0.5)
    assert held is not None and held.item() == 1.0


def test_non_finite_steps_are_seen() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        mean = WeightedMean()
        mean.add(torch.tensor([1.0, bad]), 1.0)
        assert not mean.finite()
    mean = WeightedMean()
    mean.add(torch.tensor([torch.inf, -torch.inf]), 1.0)
    assert not mean.finite()
    assert WeightedMean().finite()


def test_state_round_trip_continues_alike() -> None:
    one = steps([1.0, 4.0], 0.9)
    one.add(torch.tensor([100.0]), 1.0)  # waiting, so no part of the state
    other = WeightedMean()
    other.load_state_dict(one.state_dict())
    one.discard()
    for mean in (one, other):
        mean.add(torch.tensor([2.0], dtype=torch.float64), 1.0)
        mean.commit(0.9)
    assert one.value is not None and other.value is not None
    assert torch.equal(one.value, other.value) and one.weight == other.weight
    fresh = WeightedMean()
    fresh.load_state_dict(WeightedMean().state_dict())
    assert fresh.value is None and fresh.weight == 0.0


def test_nothing_to_average_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="nothing was added since the last commit"):
        WeightedMean().step_mean()


def test_what_was_added_and_the_mean_before_stay_as_they_are() -> None:
    """They may be read elsewhere: sums of a posterior, the value that a running refresh takes."""
    mean, total = WeightedMean(), torch.tensor([2.0, 6.0])
    mean.add(total, 2.0)
    mark = mean.mark()
    mean.commit(0.5)
    assert mean.value is not None and mean.value.tolist() == [1.0, 3.0] and total.tolist() == [2.0, 6.0]
    mean.back_to(mark)
    assert mean.value is None and mean.step_mean().tolist() == [1.0, 3.0]
    plain = WeightedMean()
    for sums in (total, torch.tensor([10.0, 10.0])):
        first = plain.value
        plain.add(sums, 2.0)
        plain.commit(1.0)
    assert plain.value is not None and plain.value.tolist() == [3.0, 4.0]
    assert first is not None and first.tolist() == [1.0, 3.0] and total.tolist() == [2.0, 6.0]


def test_every_mark_that_lives_leads_back_to_what_it_saw() -> None:
    mean, marks = WeightedMean(), []
    for k in range(5):
        marks.append((mean.mark(), float(k)))
        if k == 2:
            del marks[1]
        mean.add(torch.ones(3), 1.0)
    for mark, seen in [*marks, *reversed(marks)]:
        mean.back_to(mark)
        assert mean.pending == (seen > 0)
        for more in (0.0, 1.0, 2.0):
            assert seen + more == 0 or mean.step_sum()[0].tolist() == [seen + more] * 3
            mean.add(torch.ones(3), 1.0)


def test_rows_that_wait_stand_for_their_gram_matrix() -> None:
    """Whatever comes between: further sums, marks, counts alone, a step that is forgotten."""
    rows = torch.randn(12, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lazy, plain = WeightedMean(2), WeightedMean(2)
    for i, r in enumerate(rows):
        factor = torch.tensor(0.5 + i if i != 7 else -0.5)
        lazy.add_rows(r, 0.0, factor)
        plain.add(factor * r.mT @ r, 0.0)
        waiting = lazy._rows is not None
        assert waiting == (i % 4 != 2) and lazy.pending
        torch.testing.assert_close(lazy.witness().isfinite(), plain.witness().isfinite())
        mark = lazy.mark()
        if i % 4 == 1:  # a sum beside them, before and after a way back
            lazy.add(torch.ones(7, 7), 1.0)
            torch.testing.assert_close(lazy.step_sum()[0], plain.step_sum()[0] + 1)
            lazy.back_to(mark)
            continue  # two sets of rows in one step
        for mean in (lazy, plain):
            mean.count(2.0 + i)
            mean.commit(0.9)
        assert lazy.value is not None and plain.value is not None and not lazy.pending
        torch.testing.assert_close(lazy.value, plain.value, rtol=1e-13, atol=1e-13)
        assert torch.equal(lazy.value, lazy.value.mT)
        assert lazy.weight == plain.weight
        before = lazy.value
        lazy.back_to(mark)
        assert lazy._rows is not None or not waiting
        lazy.commit(0.9)  # of no weight: everything is masked
        assert not lazy.pending
        lazy.value, lazy.weight = before, plain.weight
    spoilt = WeightedMean()
    spoilt.add_rows(rows[0].clone().fill_(torch.nan), 1.0)
    assert not spoilt.finite()


def test_means_with_the_weight_of_one_step_wait_for_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device every look at a number stops the queue."""
    waits = []
    look = Tensor.__bool__
    monkeypatch.setattr(Tensor, "__bool__", lambda self: waits.append(self) or look(self))
    means = [WeightedMean() for _ in range(3)]
    for step, weight in enumerate((torch.tensor(2.0), torch.tensor(0.0), torch.tensor(4.0))):
        waits.clear()
        for mean in means:
            mean.add(torch.ones(2), 0.0)
            mean.count(weight)
            mean.commit(0.0)
        assert len(waits) == 1
        for mean in means:
            assert torch.equal(mean.value, torch.full((2,), (0.5, 0.5, 0.25)[step]))  # type: ignore[arg-type]


def test_weights_of_inference_mode_count() -> None:
    """They have no version; a step of a loss that is a sum has such ones."""
    with torch.inference_mode():
        mean = WeightedMean()
        mean.add(torch.ones(2), torch.tensor(4.0))
        mean.commit(0.0)
    assert mean.value is not None and mean.value.tolist() == [0.25, 0.25]


def test_a_mean_is_made_in_the_place_of_a_sum_that_nobody_else_has() -> None:
    mean, total = WeightedMean(), torch.randn(3, 4)
    expected, memory = total / 3, total.data_ptr()
    mean.add(total, 3.0, own=True)
    mean.commit(0.9)
    assert mean.value is not None and torch.equal(mean.value, expected) and mean.value.data_ptr() == memory
    before = mean.value
    mean.add(torch.ones(3, 4), 2.0, own=True)
    mean.commit(0.9)
    assert torch.equal(mean.value, torch.lerp(expected, torch.full((3, 4), 0.5), 1 / 1.9))
    assert torch.equal(before, expected)


def test_a_sum_that_somebody_may_go_back_to_or_differentiate_stays() -> None:
    total = torch.randn(3, 4)
    for mark, handed in ((True, total), (False, total.clone().requires_grad_()), (False, total[:, :1].expand(3, 4))):
        mean, before = WeightedMean(), handed.detach().clone()
        mean.add(handed, 3.0, own=True)
        held = mean.mark() if mark else None
        mean.commit(0.9)
        assert mean.value is not None and torch.equal(mean.value, before / 3) and torch.equal(handed, before)
        del held


def test_whose_a_sum_is_does_not_outlive_it() -> None:
    mean, total = WeightedMean(), torch.randn(3, 4)
    expected = total.clone()
    mean.add(total, 3.0)
    mark = mean.mark()
    mean.discard()
    mean.add(torch.ones(3, 4), 1.0, own=True)
    mean.back_to(mark)
    del mark
    mean.commit(0.9)
    assert torch.equal(total, expected)
    mean.add(total, 3.0, own=True)
    handed_out, _ = mean.step_sum()
    mean.commit(0.9)
    assert torch.equal(handed_out, expected)

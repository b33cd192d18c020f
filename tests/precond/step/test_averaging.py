"""Is the average of the iterates unbiased, applied only for a while, and kept by checkpoints?"""

from __future__ import annotations

import io

import pytest
import torch

from precond.step.averaging import IterateAverage


def trained(steps, decay=0.8):
    p = torch.nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([p], lr=0.1)
    average, iterates = IterateAverage(optimizer, decay), []
    for _ in range(steps):
        optimizer.zero_grad()
        p.square().sum().backward()
        optimizer.step()
        iterates.append(p.detach().clone())
    return p, optimizer, average, iterates


def test_equals_the_weighted_mean():
    p, _, average, iterates = trained(5)
    weights = [0.8 ** (4 - i) for i in range(5)]
    expected = sum(w * x for w, x in zip(weights, iterates, strict=True)) / sum(weights)
    with average.applied():
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-15)
    assert torch.equal(p.detach(), iterates[-1])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_blend_lies_between_iterate_and_average(share):
    p, _, average, iterates = trained(5)
    with average.applied():
        whole = p.detach().clone()
    with average.applied(share):
        torch.testing.assert_close(p.detach(), (1 - share) * iterates[-1] + share * whole, rtol=0, atol=1e-15)
    assert torch.equal(p.detach(), iterates[-1])
    with pytest.raises(ValueError, match="share"), average.applied(1.5):
        pass


def test_a_checkpoint_continues_bit_for_bit():
    p, optimizer, average, _ = trained(3)
    buffer = io.BytesIO()
    torch.save(average.state_dict(), buffer)
    buffer.seek(0)
    other = IterateAverage(optimizer, 0.5)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    p.grad = torch.ones_like(p)
    optimizer.step()
    with average.applied():
        expected = p.detach().clone()
    with other.applied():
        assert torch.equal(p.detach(), expected)


def test_after_close_it_watches_no_more():
    p, optimizer, average, _ = trained(3)
    with average.applied():
        before = p.detach().clone()
    average.close()
    p.grad = torch.ones_like(p)
    optimizer.step()
    with average.applied():
        assert torch.equal(p.detach(), before)


def test_refuses_before_the_first_step_and_a_decay_out_of_range():
    _, optimizer, average, _ = trained(0)
    with pytest.raises(RuntimeError, match="no average before the first step"), average.applied():
        pass
    with pytest.raises(ValueError, match=r"decay is a finite number at least 0 and below 1, not 1"):
        IterateAverage(optimizer, 1.0)

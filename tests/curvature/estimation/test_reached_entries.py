"""Positions count to which a way leads back from the output, however it was written: told by a dense Jacobian."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvature
from tests.curvature.estimation.test_cut_positions import ONE, ROWS, SAME, TWO, D, Model, N, R, data, mask, models

Pick = Callable[[Tensor], Tensor]
LENGTHS = torch.tensor([1, 3, 6, 2, 4])
SHORT = torch.arange(R) < LENGTHS[:, None]
M = mask(TWO)
W = M.double()
WHERE = SHORT.nonzero()[:, 0]


def zeros(h: Tensor, rows: int = N) -> Tensor:
    return h.new_zeros(rows, h.shape[-1])


def overwritten(h: Tensor) -> Tensor:
    h = h.clone()
    h[~SHORT] = 0.0
    h[:, 5] = 0.0
    h[:, 4:] *= 0.0
    return h.sum(1)


def filled(h: Tensor) -> Tensor:
    out = zeros(h)
    for i in range(N):
        out[i] = h[i, : LENGTHS[i]].mean(0)
    return out


def packed(h: Tensor) -> Tensor:
    rows = nn.utils.rnn.pack_padded_sequence(h, LENGTHS, batch_first=True, enforce_sorted=False)
    return nn.utils.rnn.pad_packed_sequence(rows, batch_first=True)[0].sum(1)


def weights(h: Tensor) -> Tensor:
    return h.mean(-1, keepdim=True).masked_fill(~SHORT[..., None], -float("inf")).softmax(1)


def to_one(w: Tensor, dim: int = -1) -> Tensor:
    return w / w.sum(dim, keepdim=True)


KERNEL = torch.randn(4, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
SERIES = nn.LSTM(4, 4, batch_first=True).double().requires_grad_(False)
LOW = torch.zeros(N, R, dtype=torch.float64).masked_fill(~SHORT, -1e30)

#: What becomes of a score of each position ``(N, R)`` in pooling by attention: weights.
SCORES: dict[str, Pick] = {
    "filled": lambda e: e.masked_fill(~SHORT, -float("inf")).softmax(-1),
    "added": lambda e: (e + LOW).softmax(-1),
    "along positions": lambda e: (e[..., None] + LOW[..., None]).softmax(1)[..., 0],
    "as one row": lambda e: e[:, None].masked_fill(~SHORT[:, None], -1e30).softmax(-1)[:, 0],
    "masked and added": lambda e: (e * SHORT + ~SHORT * -1e30).softmax(-1),
    "masked after": lambda e: to_one(e.softmax(-1) * SHORT),
    "masked after, along positions": lambda e: to_one(e[..., None].softmax(1) * SHORT[..., None], 1)[..., 0],
    "filled after": lambda e: to_one(e.softmax(-1).masked_fill(~SHORT, 0.0)),
    "exponentials": lambda e: to_one((e - e.amax(-1, keepdim=True).detach()).exp() * SHORT),
}
#: How their weights add positions up.
MEANS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "times": lambda w, h: (w[..., None] * h).sum(1),
    "bmm": lambda w, h: (w[:, None] @ h)[:, 0],
    "einsum": lambda w, h: torch.einsum("nr,nrd->nd", w, h),
}

#: What a model does with ``(N, R, d)`` after a layer.
PICKS: dict[str, Pick] = {
    **{
        f"pooled by scores {score}, {mean}": lambda h, e=e, m=m: m(e(h.mean(-1)), h)  # type: ignore[misc]
        for score, e in SCORES.items()
        for mean, m in MEANS.items()
    },
    "convolved twice": lambda h: F.conv1d(F.conv1d(h.mT, KERNEL, padding=1).tanh(), KERNEL, padding=1)[..., 0],
    "convolved apart": lambda h: F.conv1d(h.mT, KERNEL, dilation=2)[..., 0],
    "convolved to more": lambda h: F.conv_transpose1d(h.mT, KERNEL, stride=2, output_padding=1)[..., 1:4].mean(-1),
    "convolved as images": lambda h: F.conv2d(h.mT.unflatten(-1, (2, 3)), KERNEL[..., None], padding=(1, 0))[..., 0, 1],
    "stretched": lambda h: F.interpolate(h.mT.unflatten(-1, (2, 3)), (4, 6), mode="bilinear")[..., 0, 0],
    "recurrent": lambda h: SERIES(h)[0][:, 2],
    "scatter_reduce": lambda h: zeros(h).scatter_reduce(0, WHERE[:, None].expand(-1, 4), h[SHORT], "mean"),
    "masks in a loop": lambda h: torch.stack([a[m].mean(0) for a, m in zip(h, M, strict=True)]),
    "lengths in a loop": lambda h: torch.cat([h[i : i + 1, :n].mean(1) for i, n in enumerate(LENGTHS)]),
    "splits in a loop": lambda h: torch.stack([a[:3].sum(0) for a in h.flatten(0, 1).split(R)]),
    "filled in a loop": filled,
    "overwritten": overwritten,
    "products in a loop": lambda h: torch.stack([m @ a for m, a in zip(W, h, strict=True)]),
    "dots in a loop": lambda h: torch.stack([torch.stack([b @ m for b in a.T]) for a, m in zip(h, W, strict=True)]),
    "nested lists": lambda h: h[[[0], [1], [2], [3], [4]], TWO.tolist()].mean(1),
    "places among all": lambda h: h.flatten(0, 1)[torch.arange(N) * R + ONE[:, 0]],
    "a mask and a place": lambda h: h[M.any(1), 1],
    "indices apart": lambda h: h.unflatten(2, (2, 2))[ROWS, :, ROWS * 0][:, 1].repeat(1, 2),
    "all that a mask picks": lambda h: zeros(h).index_add(0, WHERE, h[SHORT]),
    "scattered": lambda h: zeros(h).scatter_add(0, WHERE[:, None].expand(-1, h.shape[2]), h[SHORT]),
    "put": lambda h: zeros(h).index_put((WHERE,), h[SHORT], accumulate=True),
    "masked_select": lambda h: h.masked_select(SHORT[..., None]).view(-1, h.shape[2])[WHERE.argsort(stable=True)][:N],
    "take": lambda h: h.take(torch.arange(N * h.shape[2]).view(N, -1)),
    "take_along_dim": lambda h: h.take_along_dim(TWO[..., None], 1).mean(1),
    "einsum": lambda h: torch.einsum("nrd,nr->nd", h, W) + torch.einsum("nr,nrd->nd", W, h),
    "einsum with one mask": lambda h: torch.einsum("nrd,r->nd", h, W[0]) + (h.mT @ W[0]),
    "einsum to several": lambda h: torch.einsum("nrd,knr->knd", h, torch.stack([W, SHORT.double()])).sum(0),
    "addmm": lambda h: torch.baddbmm(h.new_zeros(N, 1, h.shape[2]), W[:, None], h)[:, 0],
    "cat": lambda h: torch.cat([zeros(h)[:, None], h[:, 3:], zeros(h)[:, None], h[:, :3]], 1)[:, [1, 5]].mean(1),
    "cat of features": lambda h: torch.cat([h[:, 1, :2], h[:, 4, 2:]], -1),
    "shifted by padding": lambda h: F.pad(h, (0, 0, 1, 0))[:, 1:4].mean(1),
    "negative padding": lambda h: F.pad(h, (0, 0, -1, -2)).mean(1),
    "repeat": lambda h: h.repeat(2, 3, 1)[N:, [8, 13]].mean(1),
    "repeat_interleave": lambda h: h.repeat_interleave(2, 1)[:, 4:7].mean(1),
    "expand": lambda h: h[:, :, None].expand(-1, -1, 4, -1)[:, [1, 2], :2].mean((1, 2)),
    "largest": lambda h: h[:, :4].max(1).values + h[:, :3].amax(1) + h[:, 1:4].topk(2, 1).values.mean(1),
    "largest but masked": lambda h: h.masked_fill(~SHORT[..., None], -1e9).max(1).values,
    "best example of each": lambda h: h[ROWS, h.detach().norm(dim=-1).argmax(1)],
    "masked before a unit": lambda h: (h * W[..., None]).tanh().sum(1),
    "normaliser": lambda h: h.masked_fill(~SHORT[..., None], -float("inf")).logsumexp(1),
    "attention pooling": lambda h: (h * weights(h)).sum(1),
    "gates that are closed": lambda h: (h * h.mean(-1, keepdim=True).abs() * W[..., None]).sum(1),
    "norm": lambda h: F.layer_norm(h[:, 1:4], (3, h.shape[2])).norm(dim=1) + F.normalize(h, dim=-1)[:, 2],
    "windows": lambda h: h.unfold(1, 2, 2)[:, 1].mean(-1),
    "average pooling": lambda h: F.avg_pool1d(h.mT, 2)[..., 1],
    "axes of its own": lambda h: h.unflatten(1, (2, 3))[:, 1].mean(1) + h.permute(1, 2, 0)[3].T,
    "diagonal": lambda h: h.diagonal(dim1=0, dim2=1).T,
    "cumsum": lambda h: h.cumsum(1)[:, 2],
    "glu": lambda h: F.glu(h[:, 1:3].flatten(1)),
    "packed": packed,
    "vmap": lambda h: torch.vmap(lambda a, i: a.index_select(0, i[None])[0])(h, ONE[:, 0]),
    "rolled as one row": lambda h: h.roll(1)[:, 0],
    "flipped time": lambda h: h.transpose(0, 1).flip(0).transpose(0, 1)[:, 0],
    "pieces of time": lambda h: h.transpose(0, 1)[1:][0] + h.mT[..., SAME[0, 1]],
}


@pytest.mark.parametrize("unit", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("how", PICKS)
def test_positions_count_to_which_a_way_leads_back(how: str, unit: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = models(PICKS[how], activation=unit())[0]
    x, y = data()
    between = model.activation(model.a(x)).detach()
    reaches = torch.autograd.functional.jacobian(PICKS[how], model.b(between).detach())
    # (N, R); terms of a softmax that cancel leave their rounding
    reached = (reaches.abs() > 1e-13).any(-1).flatten(0, 1).any(0)
    assert 0 < reached.sum() < N * R
    assert_counted(model, x, y, reached)


@pytest.mark.parametrize("mode", ["circular", "constant"])
def test_what_strides_skip_of_a_whole_image_counts(mode: str) -> None:
    """As the definition of the factors of a convolution has it, whatever follows."""
    torch.manual_seed(0)
    padded = lambda h: F.pad(F.conv1d(h.mT, KERNEL[..., :1], stride=2), (1, 1), mode)  # noqa: E731
    model = models(lambda h: F.conv1d(padded(h), KERNEL).sum(-1))[0]
    assert_counted(model, *data(), torch.ones(N, R, dtype=torch.bool))


def assert_counted(model: Model, x: Tensor, y: Tensor, reached: Tensor) -> None:
    """The factors of inputs are those of some positions."""
    between = model.activation(model.a(x)).detach()
    blocks = curvature.ggn(model, nn.CrossEntropyLoss(), (x, y), structure="kfac", sharing="expand").to_dense()
    for start, rows in ((0, x[reached]), (4 * D + 4, between[reached])):
        d = rows.shape[1]
        block = blocks[start : start + 4 * d, start : start + 4 * d].reshape(4, d, 4, d)
        block = block.diagonal(dim1=0, dim2=2).sum(-1)
        a = rows.T @ rows
        torch.testing.assert_close(block / block.trace(), a / a.trace(), rtol=1e-10, atol=1e-12)

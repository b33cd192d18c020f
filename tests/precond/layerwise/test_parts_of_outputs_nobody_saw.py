"""Losses of the optimizer's kind, by another module, on parts of an output: whole terms are right, others refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from precond import KFAC, Loop, NaturalGradient

Cut = Callable[[Tensor], Tensor]
N, T, C = 5, 7, 6
THREE = torch.tensor([0, 1, 2])
ENTRIES = torch.rand(N, T, C, generator=torch.Generator().manual_seed(3)) > 0.4
ROWS = ENTRIES[..., :1]
#: Of outputs ``(N, T, C)``: terms as a whole, whatever becomes of the others.
WHOLE: dict[str, Cut] = {
    "all": lambda z: z,
    "positions": lambda z: z[:, :3],
    "examples": lambda z: z[:2],
    "flat": lambda z: z.flatten(0, 1)[:9],
    "last": lambda z: z[:, -1],
    "time-major": lambda z: z.transpose(0, 1)[2:],
    "split": lambda z: z.split([3, 4], 1)[1],
    "indices": lambda z: z[torch.arange(N), torch.arange(N)],
    "mask": lambda z: z[ROWS[..., 0]],
    "where": lambda z: torch.where(ROWS, z, 0.0),
    "columns in another order": lambda z: z.flip(-1).roll(1, -1)[..., [5, 3, 4, 1, 0, 2]],
}
#: Some entries of a term.
PARTS: dict[str, Cut] = {
    "slice": lambda z: z[..., :3],
    "narrow": lambda z: z.narrow(-1, 0, 3),
    "split": lambda z: z.split(3, -1)[0],
    "chunk": lambda z: z.chunk(2, -1)[1],
    "stack": lambda z: torch.stack(z.unbind(-1)[:3], -1),
    "list": lambda z: z[..., [0, 1, 2]],
    "index_select": lambda z: z.index_select(-1, THREE),
    "gather": lambda z: z.gather(-1, THREE.expand(N, T, 3)),
    "columns first": lambda z: z.movedim(-1, 0)[:3],
    "transposed": lambda z: z.mT[:, :3],
    "laid out anew": lambda z: z.view(N, T, 2, 3)[:, :, 0],
    "strides": lambda z: z.as_strided((N, T, 3), (T * C, C, 1)),
    "mask of columns": lambda z: z[..., torch.arange(C) < 3],
    "mask": lambda z: z[ENTRIES],
    "masked_select": lambda z: z.masked_select(ENTRIES),
    "where": lambda z: torch.where(ENTRIES, z, 0.0),
    "triangle": lambda z: z.tril(),
    "one": lambda z: z.select(-1, 0),
}
#: Terms that are seen twice, and sums of terms.
TWICE: dict[str, Cut] = {
    "list": lambda z: z[[0, 0, 1]],
    "as many again": lambda z: z[[0, 0, 1, 3, 4]],
    "index_select": lambda z: z.index_select(1, torch.tensor([2, 3, 3])),
    "cat": lambda z: torch.cat([z, z]),
    "cat of parts": lambda z: torch.cat([z[:2], z[1:3]]),
    "stack": lambda z: torch.stack([z, z]),
    "repeat": lambda z: z.repeat(2, 1, 1),
    "repeat_interleave": lambda z: z.repeat_interleave(2, 0),
    "windows": lambda z: z.unfold(1, 2, 1),
    "sum": lambda z: z[:2] + z[2:4],
}


def model_of(columns_first: bool = False) -> nn.Module:
    torch.manual_seed(0)
    parts = nn.Conv1d(3, C, 1) if columns_first else nn.Linear(3, C)
    return nn.Sequential(parts).double()


def inputs(columns_first: bool = False) -> Tensor:
    x = torch.randn(N, T, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.mT if columns_first else x


def step(
    loss_fn: nn.Module,
    cut: Cut,
    called: Callable[[Tensor], Tensor],
    columns_first: bool = False,
    loop: Loop | None = None,
) -> Tensor:
    """The Fisher matrix of the layer."""
    model = model_of(columns_first)
    options = {"lr": 0.0, "fisher": "exact", "structure": "layer", "curvature_ema": 0.0, "kl_clip": None}
    optimizer = NaturalGradient(model, loss_fn, loop=loop or Loop(), **options)
    called(cut(model(inputs(columns_first)))).backward()
    optimizer.step()
    return optimizer.preconditioners["0.weight+0.bias"].estimator.operator().to_dense()


def dense(cut: Cut, called: Callable[[Tensor], Tensor], columns_first: bool = False) -> Tensor:
    model, x = model_of(columns_first), inputs(columns_first)
    p = torch.cat([v.detach().flatten() for v in model.parameters()])
    shapes = {name: v.shape for name, v in model.named_parameters()}

    def output(p: Tensor) -> Tensor:
        values = dict(zip(shapes, p.split([s.numel() for s in shapes.values()]), strict=True))
        values = {name: v.view(shapes[name]) for name, v in values.items()}
        return torch.func.functional_call(model, values, x).flatten()

    J = torch.autograd.functional.jacobian(output, p)
    z, shape = output(p).detach(), model(x).shape
    J = J[:, torch.cat([torch.arange(3 * C).view(C, 3), 3 * C + torch.arange(C).unsqueeze(1)], 1).flatten()]  # [W, b]
    return J.T @ torch.autograd.functional.hessian(lambda v: called(cut(v.view(shape))), z) @ J


def loss_of(kind: type[nn.Module]) -> Callable[[Tensor], Tensor]:
    """By another module than the optimizer's."""

    def called(z: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        if kind is nn.CrossEntropyLoss:
            shape = z.shape[:1] + z.shape[2:]
            return kind()(z, torch.randint(z.shape[1], shape, generator=generator))
        return kind()(z, torch.rand(z.shape, generator=generator, dtype=torch.float64))

    return called


@pytest.mark.parametrize("cut", WHOLE)
@pytest.mark.parametrize("kind", [nn.MSELoss, nn.BCEWithLogitsLoss])
def test_terms_that_are_seen_as_a_whole_count(kind: type[nn.Module], cut: str) -> None:
    got = step(kind(), WHOLE[cut], loss_of(kind))
    torch.testing.assert_close(got, dense(WHOLE[cut], loss_of(kind)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cut", [*PARTS.values(), *TWICE.values()], ids=[*PARTS, *(f"twice, {key}" for key in TWICE)])
@pytest.mark.parametrize("kind", [nn.MSELoss, nn.BCEWithLogitsLoss])
def test_terms_of_which_some_entries_are_seen_or_all_twice_are_refused(kind: type[nn.Module], cut: Cut) -> None:
    with pytest.raises(TypeError, match="neither its gradient nor the way to it tells"):
        step(kind(), cut, loss_of(kind))


CLASSES: dict[str, tuple[Cut, bool, bool]] = {
    "positions": (lambda z: z[:, :-1].flatten(0, 1), False, True),
    "transposed": (lambda z: z.transpose(1, 2), False, True),
    "last": (lambda z: z[:, -1], False, True),
    "classes": (lambda z: z[..., :3].flatten(0, 1), False, False),
    "split classes": (lambda z: z.flatten(0, 1).split(3, -1)[0], False, False),
    "list of classes": (lambda z: z[..., [0, 1, 2]].flatten(0, 1), False, False),
    "classes in the middle": (lambda z: z.mT[:, :3], False, False),
    "positions, classes in the middle": (lambda z: z[:, :, :4], True, True),
    "one position, classes in the middle": (lambda z: z[..., 0], True, True),
    "some classes in the middle": (lambda z: z[:, :3], True, False),
    "list of classes in the middle": (lambda z: z[:, THREE], True, False),
}


@pytest.mark.parametrize("name", CLASSES)
def test_cross_entropies_of_some_classes_are_refused_and_of_some_positions_count(name: str) -> None:
    cut, columns_first, right = CLASSES[name]
    called = loss_of(nn.CrossEntropyLoss)
    if right:
        got = step(nn.CrossEntropyLoss(), cut, called, columns_first)
        torch.testing.assert_close(got, dense(cut, called, columns_first), rtol=1e-9, atol=1e-12)
    else:
        with pytest.raises(TypeError, match="neither its gradient nor the way to it tells"):
            step(nn.CrossEntropyLoss(), cut, called, columns_first)


def categorical(z: Tensor) -> Tensor:
    label = torch.randint(z.shape[-1], z.shape[:-1], generator=torch.Generator().manual_seed(2))
    return -torch.distributions.Categorical(logits=z).log_prob(label).mean()


def bernoulli(z: Tensor) -> Tensor:
    label = torch.rand(z.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).round()
    return -torch.distributions.Bernoulli(logits=z).log_prob(label).mean()


WRITTEN = pytest.mark.parametrize(
    ("kind", "called"), [(nn.CrossEntropyLoss, categorical), (nn.BCEWithLogitsLoss, bernoulli)]
)


@pytest.mark.parametrize("cut", [key for key in WHOLE if key not in ("where", "columns in another order")])
@WRITTEN
def test_losses_written_out_count_on_whole_terms(
    kind: type[nn.Module], called: Callable[[Tensor], Tensor], cut: str
) -> None:
    got = step(kind(), WHOLE[cut], called)
    torch.testing.assert_close(got, dense(WHOLE[cut], called), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "cut", [key for key in PARTS if key not in ("mask", "masked_select", "where", "triangle", "one")]
)
@WRITTEN
def test_losses_written_out_are_refused_on_some_classes(
    kind: type[nn.Module], called: Callable[[Tensor], Tensor], cut: str
) -> None:
    if kind is nn.CrossEntropyLoss and cut in ("columns first", "transposed"):  # its classes are the second axis
        got = step(kind(), PARTS[cut], called)
        torch.testing.assert_close(got, dense(PARTS[cut], called), rtol=1e-9, atol=1e-12)
        return
    with pytest.raises(TypeError, match="neither its gradient nor the way to it tells"):
        step(kind(), PARTS[cut], called)


def test_entries_without_a_weight_are_no_entries_that_nobody_saw() -> None:
    loss_fn = nn.BCEWithLogitsLoss(weight=torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 1.0], dtype=torch.float64))
    y = torch.rand(N, T, C, generator=torch.Generator().manual_seed(2), dtype=torch.float64).round()

    def called(z: Tensor) -> Tensor:
        return loss_fn(z, y)

    got = step(loss_fn, WHOLE["all"], called, loop=Loop(capture="gradient"))
    torch.testing.assert_close(got, dense(WHOLE["all"], called), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cut", TWICE)
@WRITTEN
def test_losses_written_out_are_right_or_refused_on_terms_that_are_seen_twice(
    kind: type[nn.Module], called: Callable[[Tensor], Tensor], cut: str
) -> None:
    """Two labels of a term give it two weights, which the classes without a label tell; binary ones do not."""
    try:
        got = step(kind(), TWICE[cut], called)
    except TypeError:
        assert kind is nn.BCEWithLogitsLoss or cut in ("sum", "windows")
        return
    torch.testing.assert_close(got, dense(TWICE[cut], called), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cut", [lambda z: z[:, :, :2], lambda z: z.split(1, 2)[0], lambda z: z[:, :, [0]]])
def test_rows_of_an_image_that_nobody_looks_at_are_no_positions(cut: Cut) -> None:
    """The terms of a squared error are the rows of all channels, which are no positions of a convolution."""
    torch.manual_seed(0)
    model, loss_fn = nn.Conv2d(3, 4, 1).double(), nn.MSELoss()
    x = torch.randn(5, 3, 6, 2, dtype=torch.float64)
    options = {"lr": 0.0, "fisher": "exact", "curvature_ema": 0.0, "kl_clip": None, "sharing": "expand"}
    optimizer = KFAC(model, loss_fn, **options)
    loss_of(nn.MSELoss)(cut(model(x))).backward()
    optimizer.step()
    seen = cut(x)
    rows = torch.cat([seen.movedim(1, -1).reshape(-1, 3), torch.ones(seen.numel() // 3, 1).double()], 1)
    got, A = optimizer.preconditioners["weight+bias"].estimator.operator().to_dense(), rows.T @ rows
    part = got[:3, :3] / got[:3, :3].trace()  # of one output, by its weights
    torch.testing.assert_close(part, A[:3, :3] / A[:3, :3].trace(), rtol=1e-10, atol=1e-12)

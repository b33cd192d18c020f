"""Do value, gradient, Hessian product, Hessian root and samples agree with PyTorch's own loss modules?

The reference is the module itself with ``reduction="sum"``, differentiated by ``torch.func`` in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from curvature.losses import NoCurvatureError, loss_for

F64 = torch.float64
RTOL, ATOL = 1e-12, 1e-12


@dataclass(frozen=True)
class Case:
    """A loss module (by reduction), a batch for it, and where the outputs of one term lie."""

    name: str
    make: Callable[..., nn.Module]
    batch: Callable[[torch.Generator], tuple[Tensor, ...]]
    class_axes: tuple[int, ...]
    class_dim: int | None = None
    as_called: bool = False
    hessian_rtol: float = RTOL


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=F64)


def indices(*shape: int, classes: int, ignored: int | None = None, generator: torch.Generator) -> Tensor:
    index = torch.randint(classes, shape, generator=generator)
    if ignored is not None:
        index.view(-1)[::3] = ignored
    return index


def labelled(output: tuple[int, ...], target: tuple[int, ...], classes: int, ignored: int | None = None):
    return lambda g: (randn(*output, generator=g), indices(*target, classes=classes, ignored=ignored, generator=g))


def soft(*shape: int, axis: int):
    return lambda g: (randn(*shape, generator=g), randn(*shape, generator=g).softmax(axis))


def pair(*shape: int):
    return lambda g: (randn(*shape, generator=g), randn(*shape, generator=g))


def unit(*shape: int, outputs: bool = False):
    """Targets, and outputs where they are probabilities, in (0, 1); a few targets at its ends."""

    def batch(g: torch.Generator) -> tuple[Tensor, Tensor]:
        output, target = randn(*shape, generator=g), randn(*shape, generator=g).sigmoid()
        target.view(-1)[:2] = torch.tensor([0.0, 1.0])
        return output.sigmoid() if outputs else output, target

    return batch


def positive(*shape: int, outputs: bool = False):
    def batch(g: torch.Generator) -> tuple[Tensor, Tensor]:
        output, target = randn(*shape, generator=g), 3 * randn(*shape, generator=g).abs()
        return output.abs() + 0.1 if outputs else output, target

    return batch


def with_variance(*shape: int, variance: tuple[int, ...]):
    return lambda g: (randn(*shape, generator=g), randn(*shape, generator=g), randn(*variance, generator=g) ** 2)


W3 = torch.tensor([0.3, 2.0, 1.1], dtype=F64)
W5 = torch.tensor([0.3, 2.0, 1.1, 0.0, 0.7], dtype=F64)
CE, BCE = nn.CrossEntropyLoss, nn.BCEWithLogitsLoss

CASES = [
    Case("ce", CE, labelled((4, 5), (4,), 5), (1,)),
    Case("ce single", CE, labelled((5,), (), 5), (0,)),
    Case("ce class first", CE, labelled((4, 5, 3), (4, 3), 5), (1,)),
    Case("ce class last", CE, labelled((4, 3, 5), (4, 3), 5), (2,)),
    Case("ce image", CE, labelled((2, 3, 4, 2), (2, 4, 2), 3), (1,)),
    Case("ce image class last", CE, labelled((2, 4, 2, 3), (2, 4, 2), 3), (3,)),
    Case("ce square as called", CE, labelled((2, 3, 3), (2, 3), 3), (1,), as_called=True),
    Case("ce square class_dim", CE, labelled((2, 3, 3), (2, 3), 3), (2,), class_dim=-1),
    Case("ce middle class_dim", CE, labelled((2, 4, 3, 2), (2, 4, 2), 3), (2,), class_dim=2),
    Case("ce weight", partial(CE, weight=W5), labelled((4, 5), (4,), 5), (1,)),
    Case("ce weight tokens", partial(CE, weight=W5), labelled((4, 3, 5), (4, 3), 5), (2,)),
    Case("ce ignore default", CE, labelled((4, 3, 5), (4, 3), 5, -100), (2,)),
    Case("ce ignore class", partial(CE, ignore_index=1), labelled((6, 3), (6,), 3), (1,)),
    Case("ce smoothing", partial(CE, label_smoothing=0.2), labelled((4, 5), (4,), 5), (1,)),
    Case(
        "ce everything",
        partial(CE, weight=W3, label_smoothing=0.3, ignore_index=2),
        labelled((4, 3, 5), (4, 5), 3, 2),
        (1,),
    ),
    Case("ce probabilities", CE, soft(4, 5, axis=1), (1,)),
    Case("ce probabilities single", CE, soft(5, axis=0), (0,)),
    Case(
        "ce probabilities image",
        partial(CE, weight=W3, label_smoothing=0.1),
        soft(2, 3, 2, 2, axis=1),
        (1,),
        as_called=True,
    ),
    Case("ce probabilities tokens", partial(CE, weight=W5), soft(2, 3, 5, axis=2), (2,), class_dim=2),
    Case("mse", nn.MSELoss, pair(4, 3), (1,)),
    Case("mse scalar outputs", nn.MSELoss, pair(4), ()),
    Case("mse no axis", nn.MSELoss, pair(), ()),
    Case("mse tokens", nn.MSELoss, pair(2, 3, 4), (2,)),
    Case("mse image", nn.MSELoss, pair(2, 3, 2, 2), (3,)),
    Case("mse image class_dim", nn.MSELoss, pair(2, 3, 2, 2), (1,), class_dim=1),
    Case("bce", BCE, unit(4, 3), (1,)),
    Case("bce scalar outputs", BCE, unit(4), ()),
    Case("bce weight", partial(BCE, weight=W3), unit(4, 3), (1,)),
    Case("bce pos_weight", partial(BCE, pos_weight=W3), unit(2, 4, 3), (2,)),
    Case("bce image", partial(BCE, pos_weight=W3[:, None, None], weight=W3[:2]), unit(2, 3, 2, 2), (1,), class_dim=1),
    # PyTorch's second derivative of BCELoss adds 1e-12 to its denominators p (1 - p)
    Case("bce probabilities", partial(nn.BCELoss, weight=W3), unit(4, 3, outputs=True), (1,), hessian_rtol=1e-10),
    Case("poisson", nn.PoissonNLLLoss, positive(4, 3), (1,)),
    Case("poisson full", partial(nn.PoissonNLLLoss, full=True), positive(4, 3), (1,)),
    Case("poisson rate", partial(nn.PoissonNLLLoss, log_input=False, eps=0.1), positive(4, 3, outputs=True), (1,)),
    Case("gaussian", nn.GaussianNLLLoss, with_variance(4, 3, variance=(4, 3)), (1,)),
    Case("gaussian scalar outputs", nn.GaussianNLLLoss, with_variance(4, variance=(4,)), ()),
    Case("gaussian full", partial(nn.GaussianNLLLoss, full=True), with_variance(2, 4, 3, variance=(2, 4)), (2,)),
    Case("gaussian eps", partial(nn.GaussianNLLLoss, eps=0.5), with_variance(4, 3, variance=(4, 1)), (1,)),
    Case("huber", partial(nn.HuberLoss, delta=0.7), pair(4, 3), (1,)),
    Case("smooth l1", partial(nn.SmoothL1Loss, beta=0.7), pair(2, 4, 3), (2,)),
]

LINEAR = [
    Case("nll", nn.NLLLoss, labelled((4, 5), (4,), 5), (1,)),
    Case("nll single", nn.NLLLoss, labelled((5,), (), 5), (0,)),
    Case("nll everything", partial(nn.NLLLoss, weight=W3, ignore_index=1), labelled((4, 3, 5), (4, 5), 3, 1), (1,)),
    Case("nll class last", partial(nn.NLLLoss, weight=W5), labelled((4, 3, 5), (4, 3), 5, -100), (2,)),
    Case("l1", nn.L1Loss, pair(4, 3), (1,)),
    Case("smooth l1 without beta", partial(nn.SmoothL1Loss, beta=0.0), pair(4, 3), (1,)),
    Case("kl", nn.KLDivLoss, positive(4, 3), (1,)),
    Case("kl log target", partial(nn.KLDivLoss, log_target=True), pair(4, 3), (1,)),
]

derivable = pytest.mark.parametrize("case", CASES + LINEAR, ids=lambda case: case.name)
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def build(case: Case, reduction: str = "sum", copies: int = 1):
    """Output, terms, and PyTorch's loss as a function of the output alone; the batch repeated ``copies`` times."""
    output, target, *extra = (x.repeat(copies, *[1] * (x.ndim - 1)) if copies > 1 else x for x in case.batch(seeded(0)))
    module = case.make(reduction=reduction)
    terms = loss_for(module).terms(
        output, target, *extra, class_dim=case.class_dim, as_called=case.as_called, check=True
    )
    if isinstance(module, (CE, nn.NLLLoss)) and output.ndim > 1:  # show the module the axis order it wants
        target = target.movedim(case.class_axes, (1,)) if target.is_floating_point() else target

        def reference(z: Tensor) -> Tensor:
            return module(z.movedim(case.class_axes, (1,)), target, *extra)
    else:

        def reference(z: Tensor) -> Tensor:
            return module(z, target, *extra)

    return output, terms, reference


def dense(matrix_like: Callable[[Tensor], Tensor], output: Tensor) -> Tensor:
    """The matrix of a linear map on outputs, column by column."""
    basis = torch.eye(output.numel(), dtype=output.dtype).reshape(-1, *output.shape)
    return torch.stack([matrix_like(e).flatten() for e in basis], 1)


def hessian(reference: Callable[[Tensor], Tensor], output: Tensor) -> Tensor:
    # reverse over reverse: torch.func.hessian's forward mode cannot take mse_loss
    return torch.func.jacrev(torch.func.grad(reference))(output).reshape(output.numel(), output.numel())


def block_diagonal(case: Case, shape: torch.Size) -> Tensor:
    """Which entries of the output's Hessian lie within one term."""
    others = [axis for axis in range(len(shape)) if axis not in case.class_axes]
    term = torch.arange(math.prod(shape[axis] for axis in others))
    term = term.reshape([shape[axis] if axis in others else 1 for axis in range(len(shape))]).expand(shape).flatten()
    return term[:, None] == term[None, :]


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # KLDivLoss advises batchmean
@derivable
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_value_is_that_of_the_module(case: Case, reduction: str) -> None:
    output, terms, reference = build(case, reduction)
    ours = terms.value() / terms.total if reduction == "mean" else terms.value()
    torch.testing.assert_close(ours, reference(output).sum(), rtol=RTOL, atol=ATOL)
    assert terms.reduction == reduction
    assert terms.total.shape == ()


@derivable
def test_value_is_differentiable(case: Case) -> None:
    output, terms, reference = build(case)
    leaf = output.clone().requires_grad_()
    terms.output = leaf
    (ours,) = torch.autograd.grad(terms.value(), leaf)
    torch.testing.assert_close(ours, torch.func.grad(reference)(output), rtol=RTOL, atol=ATOL)


@derivable
def test_gradient(case: Case) -> None:
    output, terms, reference = build(case)
    torch.testing.assert_close(terms.gradient(), torch.func.grad(reference)(output), rtol=RTOL, atol=ATOL)


@cases
def test_hessian_product(case: Case) -> None:
    output, terms, reference = build(case)
    H = hessian(reference, output)
    torch.testing.assert_close(dense(terms.hessian_product, output), H, rtol=case.hessian_rtol, atol=ATOL)
    assert not (H != 0)[~block_diagonal(case, output.shape)].any()  # the terms are what the case says they are


@cases
def test_hessian_product_takes_leading_axes(case: Case) -> None:
    output, terms, _ = build(case)
    v = torch.randn(2, 3, *output.shape, dtype=F64, generator=seeded(1))
    one_by_one = torch.stack([torch.stack([terms.hessian_product(b) for b in a]) for a in v])
    torch.testing.assert_close(terms.hessian_product(v), one_by_one, rtol=RTOL, atol=ATOL)


@cases
def test_square_root(case: Case) -> None:
    output, terms, reference = build(case)
    columns = torch.stack([terms.sqrt_column(c).flatten() for c in range(terms.columns)], 1)
    H = (columns @ columns.T) * block_diagonal(case, output.shape)
    torch.testing.assert_close(H, hessian(reference, output), rtol=case.hessian_rtol, atol=ATOL)


@cases
def test_product_with_the_square_root(case: Case) -> None:
    _, terms, _ = build(case)
    x = torch.randn(2, 1, *terms.shape[:2], terms.columns, dtype=F64, generator=seeded(2))
    product = 0.0
    for c in range(terms.columns):
        product = product + x[..., c, None] * terms.rows(terms.sqrt_column(c))
    torch.testing.assert_close(terms.sqrt_product(x), terms.unrows(product), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if 0 not in case.class_axes and case.name != "mse no axis"],
    ids=lambda case: case.name,
)
def test_samples_have_the_hessian_as_covariance(case: Case) -> None:
    output, _, reference = build(case)
    H, draws = hessian(reference, output), 20_000
    many = build(case, copies=draws)[1]  # the batch repeated: one call draws for all copies
    v = many.sample(seeded(3)).reshape(draws, -1)
    # Along random directions, which fix all of H, zeros between terms included; entries of their own are too
    # heavy-tailed for a bound in standard errors.
    directions = torch.randn(output.numel(), 40, dtype=F64, generator=seeded(4))
    seen = v @ directions
    expected = torch.einsum("id,ij,jd->d", directions, H, directions)
    assert ((seen**2).mean(0) - expected).abs().le(5 * (seen**2).std(0) / draws**0.5).all()
    assert seen.mean(0).abs().le(5 * seen.std(0) / draws**0.5).all()
    assert (seen.std(0) > 0).all()


@derivable
def test_rows_put_the_outputs_of_a_term_last(case: Case) -> None:
    output, terms, _ = build(case)
    examples = output.shape[0] if 0 not in case.class_axes and output.ndim else 1
    classes = math.prod(output.shape[axis] for axis in case.class_axes)
    rows = terms.rows(output)
    assert terms.shape == rows.shape == (examples, output.numel() // (examples * classes), classes)
    assert terms.columns == classes
    assert terms.mask.shape == terms.shape[:2]
    if case.class_axes and output.ndim > 1:
        assert torch.equal(rows[-1].flatten(), output[-1].movedim(case.class_axes[0] - 1, -1).flatten())
    assert torch.equal(terms.unrows(rows), output)
    batch = torch.randn(2, 3, *output.shape, dtype=F64)
    assert torch.equal(terms.rows(batch)[1, 2], terms.rows(batch[1, 2]))
    assert torch.equal(terms.unrows(terms.rows(batch)), batch)


@pytest.mark.parametrize("case", LINEAR, ids=lambda case: case.name)
def test_losses_linear_in_the_output_refuse_curvature(case: Case) -> None:
    output, terms, _ = build(case)
    for question in (
        lambda: terms.hessian_product(output),
        lambda: terms.sqrt_column(0),
        lambda: terms.sample(seeded(0)),
    ):
        with pytest.raises(NoCurvatureError, match=r"linear in the .*output.*Use .*fisher='empirical'"):
            question()


def test_kl_batchmean_divides_by_the_number_of_examples() -> None:
    output, target = positive(4, 2, 3)(seeded(0))
    module = nn.KLDivLoss(reduction="batchmean")
    terms = loss_for(module).terms(output, target, check=True)
    assert terms.reduction == "mean"
    torch.testing.assert_close(terms.value() / terms.total, module(output, target), rtol=RTOL, atol=ATOL)


Z = torch.tensor([0.3, -1.0, 0.8], dtype=F64)
COUNTS = torch.arange(60, dtype=F64)

# A loss, outputs of one entry each, and for every entry some targets with their probabilities under the likelihood
# exp(-loss). Two points at one standard deviation stand for a normal distribution: they have its variance.
LIKELIHOODS = {
    "squared error": (nn.MSELoss(), Z, (Z - 0.5**0.5, Z + 0.5**0.5), (0.5, 0.5)),
    "normal": (nn.GaussianNLLLoss(), Z, (Z - 2**0.5, Z + 2**0.5), (0.5, 0.5)),
    "logits": (nn.BCEWithLogitsLoss(), Z, (0 * Z, 0 * Z + 1), ((-Z).sigmoid(), Z.sigmoid())),
    "log-rate": (
        nn.PoissonNLLLoss(),
        Z,
        tuple(k.expand(3) for k in COUNTS),
        tuple((k * Z - Z.exp() - torch.lgamma(k + 1)).exp() for k in COUNTS),
    ),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_hessian_is_the_fisher_information_where_the_loss_says_so(name: str) -> None:
    module, output, targets, probabilities = LIKELIHOODS[name]
    extra = (0 * output + 2,) if isinstance(module, nn.GaussianNLLLoss) else ()
    fisher = torch.zeros_like(output)
    for target, probability in zip(targets, probabilities, strict=True):
        terms = loss_for(module).terms(output, target, *extra)
        fisher += probability * terms.gradient() ** 2
    assert terms.hessian_is_fisher
    torch.testing.assert_close(terms.hessian_product(torch.ones_like(output)), fisher, rtol=RTOL, atol=ATOL)


def test_the_hessian_is_the_fisher_information_for_classes() -> None:
    p, fisher = Z.softmax(0), torch.zeros(3, 3, dtype=F64)
    for c in range(3):
        terms = loss_for(CE()).terms(Z, torch.tensor(c))
        fisher += p[c] * torch.outer(terms.gradient(), terms.gradient())
    assert terms.hessian_is_fisher
    torch.testing.assert_close(dense(terms.hessian_product, Z), fisher, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize(
    "module",
    [nn.BCELoss(), nn.PoissonNLLLoss(log_input=False), nn.HuberLoss(delta=0.5), nn.SmoothL1Loss(beta=0.5)],
    ids=repr,
)
def test_losses_whose_hessian_depends_on_the_target_do_not_say_so(module: nn.Module) -> None:
    output = torch.tensor([0.3, 0.2, 0.8], dtype=F64)
    one, other = (loss_for(module).terms(output, torch.full_like(output, y)) for y in (0.0, 1.0))
    assert not one.hessian_is_fisher
    assert not torch.equal(one.hessian_product(output), other.hessian_product(output))

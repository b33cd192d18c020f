"""Which targets, masks and options does a loss accept, and what does it say about the others?"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from curvature.losses import (
    AmbiguousClassAxisError,
    CrossEntropy,
    ElementwiseLoss,
    Loss,
    NoCurvatureError,
    NonFiniteLossError,
    SquaredError,
    Terms,
    UnknownLossError,
    loss_for,
    register_loss,
)

F64 = torch.float64
ce, mse = loss_for(nn.CrossEntropyLoss()), loss_for(nn.MSELoss())


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=F64)


def labels(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


# Registry ----------------------------------------------------------------------------------------------------------


def test_loss_for_finds_modules_functions_and_losses() -> None:
    assert isinstance(ce, CrossEntropy)
    assert isinstance(loss_for(functional.mse_loss), SquaredError)
    assert loss_for(ce) is ce
    smooth = loss_for(partial(functional.cross_entropy, label_smoothing=0.1))
    assert smooth.loss_fn.label_smoothing == 0.1


def test_options_are_read_when_terms_are_made(generator: torch.Generator) -> None:
    module = nn.CrossEntropyLoss()
    loss = loss_for(module)
    output, target = torch.randn(4, 3, generator=generator, dtype=F64), labels(4)
    module.label_smoothing, module.reduction, module.ignore_index = 0.5, "sum", 0
    target[1:] = 2
    terms = loss.terms(output, target)
    torch.testing.assert_close(terms.value(), module(output, target), rtol=1e-12, atol=0)
    assert terms.reduction == "sum"


class Unchanged(nn.MSELoss):
    """Inherits ``forward``."""


class Changed(nn.MSELoss):
    """Computes something else."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target).sqrt()


@pytest.mark.parametrize(
    ("loss_fn", "name"),
    [
        (Changed(), "Changed"),
        (nn.CTCLoss(), "CTCLoss"),
        (lambda z, y: (z - y).sum(), "lambda"),
        (partial(functional.mse_loss, target=zeros(3)), "partial"),
        (3, "3"),
    ],
)
def test_unknown_losses_are_refused_with_the_ways_out(loss_fn: object, name: str) -> None:
    with pytest.raises(UnknownLossError, match=rf"(?s){name}.*fisher='empirical'.*AutogradLoss.*register_loss"):
        loss_for(loss_fn)  # type: ignore[arg-type]


def test_subclasses_are_served_unless_they_override_forward() -> None:
    assert isinstance(loss_for(Unchanged()), SquaredError)


def test_registered_losses_are_found_nearest_first() -> None:
    class Mine(nn.MSELoss):
        pass

    class MyLoss(SquaredError):
        pass

    register_loss(Mine)(MyLoss)
    assert type(loss_for(Mine())) is MyLoss
    assert type(loss_for(nn.MSELoss())) is SquaredError


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="reduction must be 'mean', 'sum' or 'none', got 'median'"):
        loss_for(nn.MSELoss(reduction="median")).terms(zeros(2, 3), zeros(2, 3))


# Class axis --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "target", "axis"), [((2, 5, 3), (2, 3), 1), ((2, 3, 5), (2, 3), 2), ((2, 5, 3, 4), (2, 3, 4), 1)]
)
def test_the_class_axis_is_found(output: tuple[int, ...], target: tuple[int, ...], axis: int) -> None:
    assert ce.terms(zeros(*output), labels(*target)).layout.class_axes == (axis,)


@pytest.mark.parametrize("target", [labels(2, 5), zeros(2, 5, 5)])
def test_an_ambiguous_class_axis_is_refused_and_class_dim_settles_it(target: Tensor) -> None:
    output = zeros(2, 5, 5)
    with pytest.raises(AmbiguousClassAxisError, match=r"\(2, 5, 5\).*Pass class_dim=1 or class_dim=2"):
        ce.terms(output, target)
    assert ce.terms(output, target, class_dim=2).layout.class_axes == (2,)
    assert ce.terms(output, target, class_dim=-2).layout.class_axes == (1,)
    assert ce.terms(output, target, as_called=True).layout.class_axes == (1,)


def test_as_called_takes_only_what_the_module_takes() -> None:
    with pytest.raises(ValueError, match=r"classes on axis 1: .* must have shape \(2, 5\)"):
        ce.terms(zeros(2, 3, 5), labels(2, 3), as_called=True)


@pytest.mark.parametrize("class_dim", [0, 3, -4])
def test_impossible_class_axes_are_refused(class_dim: int) -> None:
    with pytest.raises(ValueError, match=f"class_dim={class_dim} is no"):
        ce.terms(zeros(2, 3, 4), labels(2, 4), class_dim=class_dim)
    with pytest.raises(ValueError, match=f"class_dim={class_dim} is no"):
        mse.terms(zeros(2, 3, 4), zeros(2, 3, 4), class_dim=class_dim)


def test_a_vector_is_one_example_of_classes_but_many_of_numbers() -> None:
    for class_dim in (None, 0, -1):
        assert ce.terms(zeros(5), labels(), class_dim=class_dim).shape == (1, 1, 5)
    assert mse.terms(zeros(5), zeros(5)).shape == (5, 1, 1)
    with pytest.raises(ValueError, match=r"class_dim=-1 .* \(5,\), whose first axis counts examples: it has no other"):
        mse.terms(zeros(5), zeros(5), class_dim=-1)


# Shapes and values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "output", "target", "message"),
    [
        (ce, zeros(4, 3), labels(3), r"shape \(3,\) .* \(4, 3\) .* must have shape \(4,\)"),
        (ce, zeros(4, 3), zeros(4), r"class probabilities \(floating point\) must have shape \(4, 3\)"),
        (ce, zeros(4, 3), labels(4, 3), r"class indices must have shape \(4,\)"),
        (ce, zeros(0, 3), labels(0), r"shape \(0, 3\): there is no example"),
        (mse, zeros(0, 3), zeros(0, 3), r"shape \(0, 3\): there is no example"),
        (mse, zeros(4, 1), zeros(4), r"output's shape \(4, 1\), got \(4,\).*broadcast"),
        (mse, zeros(4, 3), zeros(4, 1), r"output's shape \(4, 3\), got \(4, 1\)"),
        (loss_for(nn.NLLLoss()), zeros(4, 3), zeros(4, 3), "class indices, got a target of dtype torch.float64"),
        (
            loss_for(nn.CrossEntropyLoss(weight=zeros(2))),
            zeros(4, 3),
            labels(4),
            r"weights of shape \(2,\) for 3 classes",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(loss: Loss, output: Tensor, target: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss.terms(output, target)


@pytest.mark.parametrize(
    ("module", "output", "target", "message"),
    [
        (nn.CrossEntropyLoss(), zeros(4, 3), labels(4) + 3, r"\[0, 3\) .* got values from 3 to 3"),
        (nn.CrossEntropyLoss(), zeros(4, 3), labels(4) - 1, r"\[0, 3\) .* got values from -1 to -1"),
        (nn.CrossEntropyLoss(weight=zeros(3) - 1), zeros(4, 3), labels(4), "Class weights must not be negative"),
        (nn.CrossEntropyLoss(), zeros(4, 3), zeros(4, 3) - 1, "probabilities must not be negative, got -1"),
        (nn.NLLLoss(), zeros(4, 3), labels(4) + 5, r"\[0, 3\) .* got values from 5 to 5"),
        (nn.BCEWithLogitsLoss(), zeros(4, 3), zeros(4, 3) + 2, r"Targets must lie in \[0, 1\], got values from 2"),
        (nn.BCEWithLogitsLoss(pos_weight=zeros(3) - 1), zeros(4, 3), zeros(4, 3), "pos_weight must not be negative"),
        (nn.BCELoss(), zeros(4, 3) - 1, zeros(4, 3), "nn.BCEWithLogitsLoss.* got values from -1"),
        (nn.PoissonNLLLoss(), zeros(4, 3), zeros(4, 3) - 1, "Counts must not be negative, got -1"),
        (nn.PoissonNLLLoss(log_input=False), zeros(4, 3) - 1, zeros(4, 3), "rates and must not be negative, got -1"),
    ],
)
def test_values_that_do_not_fit_are_refused_on_check(
    module: nn.Module, output: Tensor, target: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loss_for(module).terms(output, target, check=True)


def test_indices_out_of_range_never_wrap_around_without_check() -> None:
    for wrong in (-1, 3):
        with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
            ce.terms(zeros(2, 3), labels(2) + wrong)


def test_the_variance_of_a_normal_likelihood() -> None:
    loss = loss_for(nn.GaussianNLLLoss())
    with pytest.raises(NoCurvatureError, match=r"not convex in mean and variance.*curvature.fisher.*var\.detach\(\)"):
        loss.terms(zeros(4, 3), zeros(4, 3), (zeros(4, 3) + 1).requires_grad_()).sqrt_column(0)
    with pytest.raises(TypeError, match="output, target and variance, got 2"):
        loss.terms(zeros(4, 3), zeros(4, 3))
    with pytest.raises(ValueError, match=r"output's shape \(4, 3\).*got \(3,\)"):
        loss.terms(zeros(4, 3), zeros(4, 3), zeros(3))
    by_number = loss.terms(zeros(4, 3), zeros(4, 3) + 1, 0.1)  # type: ignore[arg-type]
    by_tensor = loss.terms(zeros(4, 3), zeros(4, 3) + 1, zeros(4, 3) + 0.1)
    assert torch.equal(by_number.gradient(), by_tensor.gradient())
    with pytest.raises(ValueError, match="Variances must not be negative"):
        loss.terms(zeros(4, 3), zeros(4, 3), zeros(4, 3) - 1, check=True)


def test_further_arguments_are_refused() -> None:
    for loss, target in ((ce, labels(4)), (mse, zeros(4, 3)), (loss_for(nn.NLLLoss()), labels(4))):
        with pytest.raises(TypeError, match="takes an output and a target, got 1 further"):
            loss.terms(zeros(4, 3), target, zeros(4))


def test_values_that_are_not_finite_are_refused_by_value_alone() -> None:
    output = zeros(4, 2, 3)
    output[2, 1, 0] = torch.nan
    terms = ce.terms(output, labels(4, 2))
    assert terms.gradient().isnan().any()
    with pytest.raises(NonFiniteLossError, match=r"1 of 8 terms .* example 2, position 1; the output holds 1 NaN"):
        terms.value()


def test_excluded_logits_do_no_harm() -> None:
    output = zeros(2, 3)
    output[:, 2] = -torch.inf
    terms = ce.terms(output, labels(2))
    for x in (terms.value(), terms.gradient(), terms.hessian_product(zeros(2, 3) + 1), terms.sqrt_column(2)):
        assert x.isfinite().all()


# Masks -------------------------------------------------------------------------------------------------------------

MASKED = [
    (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=F64), label_smoothing=0.1), labels(4, 2) + 1),
    (nn.CrossEntropyLoss(label_smoothing=0.1), zeros(4, 2, 3) + 1 / 3),
    (nn.MSELoss(), zeros(4, 2, 3)),
    (nn.BCEWithLogitsLoss(), zeros(4, 2, 3) + 0.25),
    (nn.NLLLoss(), labels(4, 2)),
]


@pytest.mark.parametrize(("module", "target"), MASKED, ids=lambda x: type(x).__name__)
def test_masked_terms_are_as_if_they_were_not_there(module: nn.Module, target: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(4, 2, 3, generator=generator, dtype=F64)
    mask = torch.tensor([[True, True], [True, False], [False, False], [True, True]])
    kept = loss_for(module).terms(output[mask], target[mask])
    output[2, 1] = torch.nan  # whatever the model says on padding
    terms = loss_for(module).terms(output, target, mask=mask, class_dim=2, check=True)
    assert torch.equal(terms.mask, mask)
    torch.testing.assert_close(terms.total, kept.total)
    torch.testing.assert_close(terms.value(), kept.value(), rtol=1e-12, atol=0)

    def compare(masked: Tensor, alone: Tensor) -> None:
        assert not masked[~mask].any()
        torch.testing.assert_close(masked[mask], alone, rtol=1e-12, atol=1e-14)

    compare(terms.gradient(), kept.gradient())
    if isinstance(module, nn.NLLLoss):
        return
    v = torch.randn(4, 2, 3, generator=generator, dtype=F64)
    compare(terms.hessian_product(v), kept.hessian_product(v[mask]))
    for c in range(3):
        compare(terms.sqrt_column(c), kept.sqrt_column(c))
    sample = terms.sample(generator)
    assert not sample[~mask].any()
    assert sample[mask].any(-1).all()


def test_masks_are_checked() -> None:
    with pytest.raises(TypeError, match=r"boolean .* got torch.int64. Pass mask.bool\(\)"):
        ce.terms(zeros(4, 2, 3), labels(4, 2), mask=labels(4, 2))
    with pytest.raises(ValueError, match=r"shape \(4, 2\) .* got \(4,\)"):
        ce.terms(zeros(4, 2, 3), labels(4, 2), mask=torch.ones(4, dtype=torch.bool))


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (ce.terms(zeros(4, 3), labels(4) - 100, check=True), "No term of the loss counts: 0 of 4"),
        (
            loss_for(nn.CrossEntropyLoss(weight=zeros(3))).terms(zeros(4, 3), labels(4), check=True),
            "0 of 4 terms are valid and their total weight",
        ),
        (mse.terms(zeros(4, 3), zeros(4, 3), mask=torch.zeros(4, dtype=torch.bool), check=True), "0 of 4"),
    ],
)
def test_a_batch_may_be_empty_and_says_so(terms: Terms, message: str) -> None:
    assert terms.empty and terms.value() == 0 and not terms.gradient().any()
    with pytest.raises(ValueError, match=message):
        terms.check()  # as all there is, its mean would be 0/0


# Random numbers, dtypes, shapes ------------------------------------------------------------------------------------

EVERY = [
    (nn.CrossEntropyLoss(label_smoothing=0.1), labels(4)),
    (nn.MSELoss(), zeros(4, 3)),
    (nn.BCEWithLogitsLoss(), zeros(4, 3)),
    (nn.PoissonNLLLoss(), zeros(4, 3)),
    (nn.HuberLoss(), zeros(4, 3)),
]


@pytest.mark.parametrize(("module", "target"), EVERY, ids=lambda x: type(x).__name__)
def test_samples_depend_on_their_generator_alone(module: nn.Module, target: Tensor) -> None:
    terms = loss_for(module).terms(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), target)
    before = torch.get_rng_state()
    one, same = (terms.sample(torch.Generator().manual_seed(1)) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(one, same)
    assert not all(torch.equal(terms.sample(generator), one) for _ in range(10))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("module", "target"), EVERY, ids=lambda x: type(x).__name__)
def test_results_keep_the_dtype_of_the_output(module: nn.Module, target: Tensor, dtype: torch.dtype) -> None:
    output = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    terms = loss_for(module).terms(output, target, check=True)
    exact = loss_for(module).terms(output.double(), target)
    # The arithmetic is that of float32; only the result is rounded to the output's dtype.
    tolerance = max(torch.finfo(dtype).eps, 1e-5)
    for ours, theirs in (
        (terms.gradient(), exact.gradient()),
        (terms.hessian_product(output), exact.hessian_product(output.double())),
        (terms.sqrt_column(1), exact.sqrt_column(1)),
    ):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    assert terms.sample(torch.Generator().manual_seed(0)).dtype == dtype
    assert terms.value().dtype == terms.total.dtype == torch.float32
    torch.testing.assert_close(terms.value().double(), exact.value(), rtol=1e-5, atol=1e-5)


def test_results_are_detached_but_the_output_is_not() -> None:
    output = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for module, target in EVERY:
        terms = loss_for(module).terms(output, target)
        assert terms.output is output
        results = (terms.gradient(), terms.sqrt_column(0), terms.sample(torch.Generator().manual_seed(0)))
        assert not any(x.requires_grad for x in (*results, terms.hessian_product(output)))
        assert terms.value().requires_grad


@pytest.mark.parametrize(("loss", "target"), [(ce, labels(4)), (mse, zeros(4, 3))])
def test_vectors_of_another_shape_are_refused(loss: Loss, target: Tensor) -> None:
    terms = loss.terms(zeros(4, 3), target)
    with pytest.raises(ValueError, match=r"output's shape \(4, 3\).* got \(3,\)"):
        terms.hessian_product(zeros(3))
    with pytest.raises(ValueError, match=r"\(4, 1, 3\)\), got \(4, 3, 1\)"):
        terms.unrows(zeros(4, 3, 1))


@pytest.mark.parametrize(
    ("module", "target"),
    [case for case in EVERY if not isinstance(case[0], nn.PoissonNLLLoss)],
    ids=lambda x: type(x).__name__,
)
def test_only_value_and_check_wait_for_the_device(module: nn.Module, target: Tensor) -> None:
    # Tensors on "meta" have no values: whatever would read one raises.
    terms = loss_for(module).terms(zeros(4, 3).to("meta"), target.to("meta"), mask=torch.ones(4).bool())
    results = (
        terms.gradient(),
        terms.hessian_product(zeros(2, 4, 3).to("meta")),
        terms.sqrt_column(1),
        terms.sample(torch.Generator()),
    )
    assert all(x.is_meta for x in (*results, terms.total))
    for question in (terms.value, terms.check):
        with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
            question()


@pytest.mark.gpu
@pytest.mark.parametrize(("module", "target"), EVERY, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("device_of_generator", ["cpu", "cuda"])
def test_outputs_on_an_accelerator(module: nn.Module, target: Tensor, device_of_generator: str) -> None:
    output = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    there = loss_for(module.cuda()).terms(output.cuda(), target.cuda())
    here = loss_for(module.cpu()).terms(output, target)
    for ours, theirs in (
        (there.value(), here.value()),
        (there.gradient(), here.gradient()),
        (there.hessian_product(output.cuda()), here.hessian_product(output)),
        (there.sqrt_column(1), here.sqrt_column(1)),
    ):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-12, atol=1e-12)
    assert there.sample(torch.Generator(device_of_generator).manual_seed(0)).is_cuda


# A loss of one's own -----------------------------------------------------------------------------------------------


def test_an_elementwise_loss_that_is_not_convex_has_products_but_no_root() -> None:
    class Cosine(nn.Module):
        reduction = "sum"

    @register_loss(Cosine)
    class CosineLoss(ElementwiseLoss):
        def value(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
            return 1 - (z - y).cos()

        def slope(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
            return (z - y).sin()

        def curvature(self, z: Tensor, y: Tensor, *extra: Tensor) -> Tensor:
            return (z - y).cos()

    terms = loss_for(Cosine()).terms(zeros(2, 2) + torch.pi, zeros(2, 2))
    torch.testing.assert_close(terms.hessian_product(zeros(2, 2) + 1), zeros(2, 2) - 1)
    for question in (lambda: terms.sqrt_column(0), lambda: terms.sample(torch.Generator())):
        with pytest.raises(ValueError, match=r"smallest: -1.*not positive semi-definite.*hessian_product"):
            question()

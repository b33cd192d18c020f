"""Does a loss known by its values alone give the same answers as one known by formulas?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from curvature.losses import AutogradLoss, NoCurvatureError, loss_for

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=F64)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


CASES = {
    "classes": (nn.CrossEntropyLoss(label_smoothing=0.1), randn(4, 3), torch.tensor([0, 2, 1, 1]), None),
    "classes, sum": (nn.CrossEntropyLoss(reduction="sum"), randn(4, 3), torch.tensor([0, 2, 1, 1]), None),
    "classes, none": (nn.CrossEntropyLoss(reduction="none"), randn(4, 3), torch.tensor([0, 2, 1, 1]), None),
    "tokens": (nn.CrossEntropyLoss(), randn(2, 4, 3), torch.tensor([[0, 2, 1, 1], [1, 1, 2, 0]]), 2),
    "numbers": (nn.MSELoss(reduction="sum"), randn(4, 3), randn(4, 3, seed=1), None),
    "scalars": (nn.MSELoss(), randn(4), randn(4, seed=1), None),
    "probabilities": (nn.BCEWithLogitsLoss(reduction="none"), randn(4, 3), randn(4, 3, seed=1).sigmoid(), None),
}


@pytest.mark.parametrize("vmappable", [True, False], ids=["vmap", "loop"])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_formulas(case: str, vmappable: bool) -> None:
    module, output, target, class_dim = CASES[case]

    def by_hand(z: Tensor, y: Tensor) -> Tensor:
        if not vmappable:
            z.sum().item()  # vmap cannot trace this
        return module(z, y)

    ours = AutogradLoss(by_hand, reduction=module.reduction).terms(output, target, class_dim=class_dim, check=True)
    theirs = loss_for(module).terms(output, target, class_dim=class_dim)
    assert ours.shape == theirs.shape
    assert ours.reduction == theirs.reduction
    # The mean over one example of C outputs has the divisor N, not N C.
    scale = ours.total / theirs.total if module.reduction == "mean" else 1.0
    v = randn(2, *output.shape, seed=2)
    close(ours.value(), theirs.value() * scale)
    close(ours.gradient(), theirs.gradient() * scale)
    close(ours.hessian_product(v), theirs.hessian_product(v) * scale)
    S, T = (torch.stack([t.rows(t.sqrt_column(c)) for c in range(t.columns)], -1) for t in (ours, theirs))
    close(S @ S.mT, T @ T.mT * scale)
    x = randn(2, *S.shape[:2], S.shape[3], seed=3)
    close(ours.rows(ours.sqrt_product(x)), (S @ x.unsqueeze(-1)).squeeze(-1))
    leaf = output.clone().requires_grad_()
    ours.output = leaf
    close(torch.autograd.grad(ours.value(), leaf)[0], theirs.gradient() * scale)


def test_positions_of_an_example_may_interact() -> None:
    output, target = randn(3, 2, 2), randn(3, 2, 2, seed=1)

    def product_of_rows(z: Tensor, y: Tensor) -> Tensor:
        return ((z.prod(1) - y.prod(1)) ** 2).sum()

    terms = AutogradLoss(product_of_rows, reduction="sum").terms(output, target, check=True)
    assert terms.shape == (3, 1, 4)
    H = torch.func.jacrev(torch.func.grad(product_of_rows))(output, target).reshape(12, 12)
    v = randn(*output.shape, seed=2)
    close(terms.hessian_product(v).flatten(), H @ v.flatten())


def test_masked_terms_are_zero() -> None:
    output, target = randn(4, 3), torch.tensor([0, 2, 1, 1])
    mask = torch.tensor([True, False, True, True])
    loss = AutogradLoss(nn.CrossEntropyLoss())
    terms, kept = loss.terms(output, target, mask=mask, check=True), loss.terms(output[mask], target[mask])
    close(terms.value() / terms.total, kept.value() / kept.total)
    close(terms.gradient()[mask], kept.gradient())
    for x in (terms.gradient(), terms.hessian_product(output), terms.sqrt_column(2), terms.sample(seeded())):
        assert not x[~mask].any()
        assert x[mask].any(-1).all()


def test_samples_have_the_hessian_as_covariance() -> None:
    draws = 20_000
    output, target = randn(1, 3).expand(draws, 3), torch.zeros(draws, dtype=torch.long)
    terms = AutogradLoss(nn.CrossEntropyLoss()).terms(output, target)
    v, before = terms.sample(seeded(1)), torch.get_rng_state()
    assert torch.equal(v, terms.sample(seeded(1)))
    assert torch.equal(torch.get_rng_state(), before)
    products = v[:, :, None] * v[:, None, :]
    p = output[0].softmax(-1)
    assert ((products.mean(0) - (p.diag() - p.outer(p))).abs() <= 5 * products.std(0) / draws**0.5).all()


def test_an_indefinite_hessian_has_products_but_no_root() -> None:
    output = randn(4, 2)

    def saddle(z: Tensor, y: Tensor) -> Tensor:
        return (z[:, 0] ** 2 - z[:, 1] ** 2).sum()

    terms = AutogradLoss(saddle, reduction="sum").terms(output, output)
    close(terms.hessian_product(output), output * torch.tensor([2.0, -2.0], dtype=F64))
    for question in (lambda: terms.sqrt_column(0), lambda: terms.sample(seeded())):
        with pytest.raises(NoCurvatureError, match=r"indefinite \(eigenvalues from -2 to 2\).*not positive semi-def"):
            question()


def test_a_linear_loss_has_no_root() -> None:
    terms = AutogradLoss(nn.L1Loss()).terms(randn(4, 2), randn(4, 2, seed=1))
    close(terms.hessian_product(randn(4, 2)), torch.zeros(4, 2, dtype=F64))
    with pytest.raises(NoCurvatureError, match="zero for every term"):
        terms.sqrt_column(0)


def test_a_root_too_large_is_refused() -> None:
    terms = AutogradLoss(nn.MSELoss(), max_entries=35).terms(randn(4, 3), randn(4, 3))
    with pytest.raises(NoCurvatureError, match=r"3 x 3 matrix for each of 4 terms.*hessian_product"):
        terms.sqrt_column(0)


def contrastive(z: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(z @ z.T, torch.arange(len(z)))


@pytest.mark.parametrize(
    ("loss_fn", "reduction", "message"),
    [
        (nn.MSELoss(reduction="sum"), "mean", "not the 'mean' of its terms"),
        (contrastive, "mean", r"not the 'mean' of its terms.*Examples may interact"),
        (nn.MSELoss(reduction="none"), "sum", r"shape \(4, 3\): with reduction='sum' it must return a scalar"),
        (nn.MSELoss(), "median", "reduction must be 'mean', 'sum' or 'none', got 'median'"),
    ],
)
def test_a_loss_that_is_not_a_sum_of_its_terms_is_refused_on_check(loss_fn, reduction: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutogradLoss(loss_fn, reduction=reduction).terms(randn(4, 3), randn(4, 3, seed=1), check=True)


def test_what_is_missing_is_asked_for() -> None:
    with pytest.raises(ValueError, match="no attribute 'reduction': pass reduction='mean'"):
        AutogradLoss(contrastive)
    with pytest.raises(ValueError, match=r"shape \(4,\) of the terms along their first axes, got \(3,\)"):
        AutogradLoss(nn.MSELoss()).terms(randn(4, 3), randn(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_results_keep_the_dtype_of_the_output(dtype: torch.dtype) -> None:
    output, target = randn(4, 3).to(dtype), torch.tensor([0, 2, 1, 1])
    terms = AutogradLoss(nn.CrossEntropyLoss()).terms(output, target, check=True)
    exact = loss_for(nn.CrossEntropyLoss()).terms(output.double(), target)
    for x in (terms.gradient(), terms.hessian_product(output), terms.sqrt_column(0), terms.sample(seeded())):
        assert x.dtype == dtype
        assert not x.requires_grad
    tolerance = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(terms.gradient().double(), exact.gradient(), rtol=tolerance, atol=tolerance)
    assert terms.value().dtype == torch.float32

"""Does Muon set the singular values of its momentum to one, for every shape?"""

from __future__ import annotations

import pytest
import torch

from precond.gradient.muon import QUINTIC, Muon
from precond.step.options import Momentum
from tests.precond import references as ref

SCALES = {
    "adam": lambda m, n: 0.2 * max(m, n) ** 0.5,
    "spectral": lambda m, n: max(1, m / n) ** 0.5,
    "none": lambda m, n: 1.0,
}


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("scaling", ["adam", "spectral", "none"])
def test_equals_the_reference(nesterov, scaling):
    options = {"lr": 0.02, "betas": (0.9, 0.8), "eps": 1e-6}
    momentum = 0.8 if nesterov else Momentum(0.8)  # a number stands for the method's own, with Nesterov's look-ahead

    def make(model):
        return Muon(
            model.parameters(),
            momentum=momentum,
            scaling=scaling,
            polynomial="quintic",
            weight_decay=0.1,
            **options,
        )

    extra = {
        "scale": SCALES[scaling],
        "coefficients": list(QUINTIC),
        "decay": 0.1,
        "momentum": 0.8,
        "nesterov": nesterov,
    }
    ref.assert_equals_reference(make, ref.muon, {**options, **extra})


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 3, 2, 2), (6, 1)])
def test_polar_express_gives_an_orthogonal_step(shape, generator):
    p = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    p.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    Muon([p], lr=1.0, scaling="none").step()
    values = torch.linalg.svdvals(p.detach().reshape(shape[0], -1))
    torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=0.15)


def test_stacks_of_matrices_are_orthogonal_each(generator):
    p = torch.nn.Parameter(torch.zeros(3, 5, 4, dtype=torch.float64))
    p.grad = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    Muon([p], lr=1.0, scaling="none", stacked=True).step()
    values = torch.linalg.svdvals(p.detach())
    torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=0.15)


def test_groups_may_keep_to_adamw(generator):
    start, gradient = torch.randn(4, 3, generator=generator), torch.randn(4, 3, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    ours.grad, theirs.grad = gradient.clone(), gradient.clone()
    Muon([{"params": [ours], "orthogonalize": False}], lr=0.1, weight_decay=0.1).step()
    torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.1, betas=(0.9, 0.95)).step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("shape", "options", "matrix"),
    [
        ((65, 16), {}, False),  # a table: more than four times as many rows as columns
        ((64, 16), {}, True),
        ((16, 65), {}, True),  # wide matrices stay
        ((65, 16), {"max_ratio": None}, True),
        ((16, 2), {}, True),  # small ones too
        ((64, 1, 3, 3), {}, False),
        ((3, 65, 16), {"stacked": True}, False),
        ((65, 3, 16), {"stacked": True}, True),
    ],
)
def test_tall_matrices_take_the_step_of_adamw(shape, options, matrix, generator):
    start, gradient = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    ours.grad, theirs.grad = gradient.clone(), gradient.clone()
    Muon([ours], lr=0.1, **options).step()
    torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.0, betas=(0.9, 0.95)).step()
    assert torch.allclose(ours, theirs) is not matrix


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e18])
def test_the_size_of_a_gradient_does_not_matter(scale):
    p = torch.nn.Parameter(torch.zeros(2, 3))
    p.grad = torch.tensor([[1.0, 2, 3], [-1, 0, 1]]) * scale
    Muon([p], lr=1.0, scaling="none").step()
    expected = [0.0, 0.0] if scale == 0 else [1.0, 1.0]
    torch.testing.assert_close(torch.linalg.svdvals(p.detach()), torch.tensor(expected), rtol=0, atol=0.15)


@pytest.mark.parametrize("option", ["scaling", "polynomial", "precision"])
def test_refuses_unknown_choices(option):
    with pytest.raises(ValueError, match=f"{option} is one of .*, not 'other'"):
        Muon([torch.nn.Parameter(torch.ones(2, 2))], **{option: "other"})


@pytest.mark.parametrize("stacked", [False, True])
def test_matrices_that_are_orthogonalized_together_are_those_alone(stacked):
    """Bit for bit, also where a stack is full and a state is younger."""
    shapes = [(4, 3), (4, 3), (3, 4), (2, 4, 3), (4, 3), (2, 4, 3), (5,), (5,), (4, 3)]

    def run(places: list[int]) -> list[torch.Tensor]:
        params = [torch.nn.Parameter(torch.ones(shapes[i])) for i in places]
        optimizer = Muon(params, lr=0.1, stacked=stacked)
        for step in range(3):
            for i, p in zip(places, params, strict=True):
                generator = torch.Generator().manual_seed(10 * step + i)
                p.grad = None if step < i % 2 else torch.randn(shapes[i], generator=generator)
            optimizer.step()
        return [p.detach() for p in params]

    together = run(list(range(len(shapes))))
    for i, p in enumerate(together):
        assert torch.equal(p, run([i])[0]), shapes[i]


@pytest.mark.parametrize("polynomial", ["quintic", "polar_express"])
@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_bfloat16_sets_the_singular_values_as_full_precision_does(polynomial, shape, generator):
    """A polynomial's own error, 0.12 and 0.3 of a singular value, is far above the rounding of bfloat16."""
    gradient = torch.randn(shape, generator=generator)
    steps = {}
    for precision in ("full", "bfloat16"):
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = gradient.clone()
        Muon([p], lr=1.0, scaling="none", polynomial=polynomial, precision=precision).step()
        steps[precision] = p.detach()
    assert not torch.equal(*steps.values())
    values, rounded = (torch.linalg.svdvals(step) for step in steps.values())
    torch.testing.assert_close(rounded, values, rtol=0, atol=0.05)


def test_float64_is_never_rounded(generator):
    gradient = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    steps = []
    for precision in ("auto", "full"):
        p = torch.nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
        p.grad = gradient.clone()
        Muon([p], lr=1.0, precision=precision).step()
        steps.append(p.detach())
    assert torch.equal(*steps)

"""Does GaussNewton solve a problem that is written for PINA, as docs/how-to/physics.md has it?"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from precond import GaussNewton

pina: Any = pytest.importorskip("pina")
pytestmark = pytest.mark.filterwarnings("ignore")

PI = math.pi
SIDES = {"left": {"x": 0, "y": [0, 1]}, "right": {"x": 1, "y": [0, 1]}, "low": {"x": [0, 1], "y": 0}}
SIDES["high"] = {"x": [0, 1], "y": 1}


def poisson() -> Any:
    from pina.domain import CartesianDomain
    from pina.equation import Equation, FixedValue
    from pina.operator import laplacian
    from pina.problem import SpatialProblem

    square = CartesianDomain({"x": [0, 1], "y": [0, 1]})

    def equation(x: Any, u: Any) -> Any:
        source = 2 * PI**2 * torch.sin(PI * x.extract(["x"])) * torch.sin(PI * x.extract(["y"]))
        return laplacian(u, x, components=["u"], d=["x", "y"]) + source

    class Poisson(SpatialProblem):
        output_variables: ClassVar = ["u"]
        spatial_domain = square
        domains: ClassVar = {"inside": square, **{side: CartesianDomain(where) for side, where in SIDES.items()}}
        conditions: ClassVar = {
            "inside": pina.Condition(domain="inside", equation=Equation(equation)),
            **{side: pina.Condition(domain=side, equation=FixedValue(0.0)) for side in SIDES},
        }

    problem = Poisson()
    problem.discretise_domain(100, "random", domains=["inside"])
    problem.discretise_domain(15, "random", domains=list(SIDES))
    return problem


def residuals_of(problem: Any, net: torch.nn.Module) -> list[Tensor]:
    found = []
    for name, condition in problem.conditions.items():
        x = problem.discretised_domains[name].requires_grad_()
        u = net(x)
        u.labels = problem.output_variables
        r = condition.equation.residual(x, u).as_subclass(Tensor)
        found.append(r / r.numel() ** 0.5)
    return found


def test_a_problem_of_pina_is_solved() -> None:
    from pina.model import FeedForward

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        problem = poisson()
        net = FeedForward(2, 1, inner_size=12, n_layers=1, func=torch.nn.Tanh)
        optimizer = GaussNewton(net)
        first = float(optimizer.step(lambda: residuals_of(problem, net)))
        for _ in range(25):
            last = float(optimizer.step(lambda: residuals_of(problem, net)))
    finally:
        torch.set_default_dtype(torch.float32)
    assert last < 1e-3 * first

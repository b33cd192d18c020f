"""Physics-informed networks to high accuracy: Poisson's equation in two dimensions, and Burgers' equation.

    python -m tests.benchmarks.pinn [--problems poisson] [--seconds 20] [--seed 0] [--only "GaussNewton;SOAP"]

A 2-32-32-1 tanh network (1185 parameters) in float64 on fixed points; the loss is half the mean square of the residual
of the equation plus 100 times half the mean square on the boundary. The error is ``|u - u*| / |u*|`` on a finer grid.
Methods that need a gradient alone get the same residuals, with derivatives by reverse mode over the batch. Seconds are
of CPU, evaluation excluded; every setting of the grids below is run to the end, and the smallest error is shown.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, hessian

from precond import SOAP, GaussNewton, PointwiseResidual
from solvers import SolverError

BOUNDARY = 100.0
Point = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Equation:
    """A boundary value problem for a function of two variables.

    Attributes:
        name: In tables.
        inner: Points ``(N, 2)`` where the equation holds.
        outer: Points ``(M, 2)`` where values are given.
        values: Those ``(M,)``.
        at: Residual at a point, of ``u(point) -> (1,)``.
        batched: The same from points ``(N, 2)``, ``u (N,)``, first ``(N, 2)`` and pure second derivatives ``(N, 2)``.
        grid: Points for the error.
        exact: The solution there.
    """

    name: str
    inner: Tensor
    outer: Tensor
    values: Tensor
    at: Callable[[Point, Tensor], Tensor]
    batched: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    grid: Tensor
    exact: Tensor

    def error(self, model: nn.Module) -> float:
        """Relative, in the root mean square."""
        with torch.no_grad():
            return float((model(self.grid)[:, 0] - self.exact).norm() / self.exact.norm())

    def residuals(self, model: nn.Module) -> list[PointwiseResidual]:
        """For Gauss-Newton."""
        outer = torch.cat([self.outer, self.values.unsqueeze(1)], 1)

        def boundary(u: Point, x: Tensor) -> Tensor:
            return u(x[:2]) - x[2]

        return [
            PointwiseResidual(model, self.at, self.inner, len(self.inner) ** -0.5),
            PointwiseResidual(model, boundary, outer, (BOUNDARY / len(outer)) ** 0.5),
        ]

    def loss(self, model: nn.Module) -> Tensor:
        """For everyone else."""
        x = self.inner.clone().requires_grad_()
        u = model(x)[:, 0]
        first = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        second = [torch.autograd.grad(first[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
        inner = self.batched(x, u, first, torch.stack(second, 1)).square().mean()
        return 0.5 * (inner + BOUNDARY * (model(self.outer)[:, 0] - self.values).square().mean())


def random_points(count: int) -> Tensor:
    """In the unit square."""
    return torch.rand(count, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def lattice(count: int) -> Tensor:
    """``count ** 2`` points of the unit square."""
    line = torch.linspace(0, 1, count, dtype=torch.float64)
    return torch.cartesian_prod(line, line)


def poisson() -> Equation:
    """``-u_xx - u_yy = 2 pi^2 sin(pi x) sin(pi y)`` on the unit square, zero outside; 900 + 120 points."""

    def at(u: Point, x: Tensor) -> Tensor:
        laplacian = hessian(lambda z: u(z)[0])(x).diagonal().sum()
        return laplacian + 2 * math.pi**2 * torch.sin(math.pi * x).prod()

    def batched(x: Tensor, u: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return second.sum(1) + 2 * math.pi**2 * torch.sin(math.pi * x).prod(1)

    t = random_points(30)[:, :1]
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    outer = torch.cat([torch.cat(pair, 1) for pair in ((t, zero), (t, one), (zero, t), (one, t))])
    grid = lattice(101)
    exact = torch.sin(math.pi * grid).prod(1)
    return Equation("poisson", random_points(900), outer, torch.zeros(120).double(), at, batched, grid, exact)


VISCOSITY = 0.05


def burgers() -> Equation:
    """``u_t + u u_x = 0.05 u_xx`` for x in (-1, 1) and t in (0, 1), from ``-sin(pi x)``, zero at the ends.

    900 + 180 points; the exact solution is by Cole and Hopf, with 100 points of Gauss-Hermite quadrature.
    """

    def at(u: Point, x: Tensor) -> Tensor:
        slope = grad(lambda z: u(z)[0])(x)
        second = grad(lambda z: grad(lambda y: u(y)[0])(z)[0])(x)[0]
        return slope[1] + u(x)[0] * slope[0] - VISCOSITY * second

    def batched(x: Tensor, u: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return first[:, 1] + u * first[:, 0] - VISCOSITY * second[:, 0]

    def stretched(points: Tensor) -> Tensor:
        return points * torch.tensor([2.0, 1.0]).double() - torch.tensor([1.0, 0.0]).double()

    t = random_points(60)[:, :1]
    start = torch.cat([2 * t - 1, torch.zeros_like(t)], 1)
    ends = [torch.cat([torch.full_like(t, side), t], 1) for side in (-1.0, 1.0)]
    outer = torch.cat([start, *ends])
    values = torch.cat([-torch.sin(math.pi * start[:, 0]), torch.zeros(120).double()])
    grid = stretched(lattice(101))
    return Equation(
        "burgers", stretched(random_points(900)), outer, values, at, batched, grid, cole_hopf(grid[:, 0], grid[:, 1])
    )


def cole_hopf(x: Tensor, t: Tensor) -> Tensor:
    """Of Burgers' equation from ``-sin(pi x)``; Basdevant et al. (1986), Computers and Fluids 14, equation 2.5."""
    import numpy

    nodes, weights = (torch.tensor(a) for a in numpy.polynomial.hermite.hermgauss(100))
    y = x.unsqueeze(1) - (4 * VISCOSITY * t).sqrt().unsqueeze(1) * nodes
    weight = weights * torch.exp(-torch.cos(math.pi * y) / (2 * math.pi * VISCOSITY))
    return -(torch.sin(math.pi * y) * weight).sum(1) / weight.sum(1)


EQUATIONS = {"poisson": poisson, "burgers": burgers}


def network(seed: int) -> nn.Module:
    """2-32-32-1, tanh, in torch's initialisation."""
    torch.manual_seed(seed)
    layers = nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    return nn.Sequential(*layers).double()


class MuonAndAdamW:
    """Torch's Muon for the hidden matrices, and AdamW for everything else, as Muon's authors have it."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        first, *hidden, last = [p for p in model.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if p.ndim == 1]
        self.muon = torch.optim.Muon(hidden, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW([first, last, *others], lr=lr, weight_decay=0.0)
        self.param_groups = self.muon.param_groups + self.adamw.param_groups

    def step(self) -> None:
        self.muon.step()
        self.adamw.step()


def lbfgs(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(
        model.parameters(), tolerance_grad=0, tolerance_change=0, history_size=100, line_search_fn="strong_wolfe"
    )


# Method -> what makes its optimizer from the model and a setting, and the settings.
METHODS: dict[str, tuple[Callable[..., Any], list[dict[str, Any]]]] = {
    "GaussNewton": (lambda m, **options: GaussNewton(m, **options), [{}]),
    "GaussNewton, unscaled, no acceleration": (
        lambda m, **options: GaussNewton(m, scaled=False, acceleration=False, **options),
        [{}],
    ),
    "GaussNewton, SPRING": (
        lambda m, **options: GaussNewton(m, damping_rule=None, **options),
        [{"lr": lr, "damping": 1e-2, "spring": 0.9} for lr in (0.1, 0.3)],
    ),
    "torch LBFGS, strong Wolfe": (lbfgs, [{}]),
    "SOAP": (lambda m, lr: SOAP(m.parameters(), lr=lr), [{"lr": lr} for lr in (3e-3, 1e-2)]),
    "torch AdamW": (
        lambda m, lr: torch.optim.AdamW(m.parameters(), lr=lr, weight_decay=0.0),
        [{"lr": lr} for lr in (3e-3, 1e-2)],
    ),
    "torch Muon": (MuonAndAdamW, [{"lr": lr} for lr in (3e-3, 1e-2)]),
}


@dataclass(frozen=True)
class Curve:
    """The error over time.

    Attributes:
        seconds: Of CPU, at each point of the curve.
        errors: There.
        steps: In all.
    """

    seconds: list[float]
    errors: list[float]
    steps: int

    def at(self, seconds: float) -> float:
        """The error at a time."""
        return next((e for s, e in zip(self.seconds[::-1], self.errors[::-1], strict=True) if s <= seconds), math.nan)


def run(equation: Equation, model: nn.Module, optimizer: Any, seconds: float) -> Curve:
    """Train for some seconds, with a learning rate that falls to zero like a cosine where a method has one."""
    curve, spent, steps = Curve([], [], 0), 0.0, 0
    rates = [group["lr"] for group in optimizer.param_groups]
    whole = isinstance(optimizer, torch.optim.LBFGS) or (isinstance(optimizer, GaussNewton) and optimizer.rule)
    while spent < seconds:
        start = time.process_time()
        if isinstance(optimizer, GaussNewton):
            optimizer.step(lambda: equation.residuals(model))
        elif isinstance(optimizer, torch.optim.LBFGS):

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = equation.loss(model)
                loss.backward()
                return loss

            optimizer.step(closure)
        else:
            model.zero_grad()
            equation.loss(model).backward()
            optimizer.step()
        steps += 1
        spent += time.process_time() - start
        if not whole:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * max(0.5 * (1 + math.cos(math.pi * min(spent / seconds, 1.0))), 1e-3)
        if not curve.seconds or spent - curve.seconds[-1] > 0.02 * seconds:
            curve.seconds.append(spent)
            curve.errors.append(equation.error(model))
    curve.seconds.append(spent)
    curve.errors.append(equation.error(model))
    return Curve(curve.seconds, curve.errors, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", default=",".join(EQUATIONS))
    parser.add_argument("--seconds", type=float, default=20.0, help="of CPU for each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=";".join(METHODS), help="methods, separated by semicolons")
    options: Any = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.problems.split(","):
        equation = EQUATIONS[name]()
        print(f"\n### {name}, seed {options.seed}: relative error\n")
        print(f"| method | setting | after {options.seconds / 2:g} s | after {options.seconds:g} s | steps |")
        print("| --- | --- | --- | --- | --- |")
        for method in options.only.split(";"):
            (make, grid), curves = METHODS[method], []
            for settings in grid:
                model = network(options.seed)
                with suppress(SolverError):  # diverged
                    curves.append((run(equation, model, make(model, **settings), options.seconds), settings))
            if not curves:
                print(f"| {method} | all {len(grid)} | diverged | diverged | |", flush=True)
                continue
            curve, settings = min(curves, key=lambda pair: pair[0].errors[-1])
            shown = ", ".join(f"{key}={value:g}" for key, value in settings.items())
            half, end = curve.at(options.seconds / 2), curve.errors[-1]
            print(f"| {method} | {shown} | {half:.1e} | {end:.1e} | {curve.steps} |", flush=True)


if __name__ == "__main__":
    main()

"""Physics-informed networks to high accuracy: steps and seconds to an error, methods beside one another.

    python -m tests.benchmarks.pinn [--problems poisson,burgers] [--seconds 20] [--seeds 3] [--only "GaussNewton;SOAP"]

Networks in float64; the loss is half the mean square of the residual of the equation plus a weight times half the mean
square on the boundary, on fixed points, or on points that are drawn at each step. The error is ``|u - u*| / |u*|`` on
other points. Methods that need a gradient alone get the same residuals, with derivatives by reverse mode over the
batch. Seconds are of CPU, evaluation excluded; every setting of the grids below is run to the end, and the one with the
smallest median error over the seeds is shown, with the median of the seconds and steps to each error. With ``--runs`` a
finished run is kept in a file and not run again while the code is the same. Without options: the published problems, a
minute for a run.

``2d 257``, ``2d 9873``, ``5d 449``, ``5d 10065`` and ``10d 118145`` are those of Dangel, Mueller and Zeinhofer (2024),
https://arxiv.org/abs/2405.15603, but for one thing: points that change are drawn at each step.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from precond import SOAP, SSBFGS, GaussNewton, PointwiseResidual, SSBroyden, directional_derivatives, laplacian
from solvers import SolverError
from tests.benchmarks.fingerprint import fingerprint

Point = Callable[[Tensor], Tensor]
ERRORS = (1e-3, 1e-4, 1e-5, 1e-6)


class Sine(nn.Module):
    """As SIREN has it, without its frequency."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


@dataclass(frozen=True)
class Equation:
    """A boundary value problem, and the network that is trained on it.

    Attributes:
        at: Residual at a point, of ``u(point) -> (1,)``.
        batched: The same from points ``(N, d)``, ``u (N,)``, first ``(N, d)`` and pure second derivatives ``(N, d)``.
        exact: The solution at points ``(N, d)``.
        inner: Draws points where the equation holds.
        outer: Draws points where values are given.
        test: Points for the error.
        widths: Of the hidden layers.
        boundary: Weight of the boundary.
        redrawn: Whether points are drawn at each step.
        activation: Between the layers.
    """

    at: Callable[[Point, Tensor], Tensor]
    batched: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    exact: Callable[[Tensor], Tensor]
    inner: Callable[[torch.Generator], Tensor]
    outer: Callable[[torch.Generator], Tensor]
    test: Tensor
    widths: tuple[int, ...] = (32, 32)
    boundary: float = 1.0
    redrawn: bool = False
    activation: Callable[[], nn.Module] = nn.Tanh

    def network(self, seed: int) -> nn.Sequential:
        """In torch's initialisation."""
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        width = self.test.shape[1]
        for wide in self.widths:
            layers += [nn.Linear(width, wide), self.activation()]
            width = wide
        return nn.Sequential(*layers, nn.Linear(width, 1)).double()

    def error(self, model: nn.Module) -> float:
        """Relative, in the root mean square."""
        with torch.no_grad():
            exact = self.exact(self.test)
            return float((model(self.test)[:, 0] - exact).norm() / exact.norm())


@dataclass
class Points:
    """The points of a run, the same for every method of a seed."""

    equation: Equation
    seed: int
    generator: torch.Generator = field(init=False)
    inner: Tensor = field(init=False)
    outer: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(7 + self.seed)
        self.draw()

    def draw(self) -> None:
        """New points."""
        self.inner, self.outer = self.equation.inner(self.generator), self.equation.outer(self.generator)

    def residuals(self, model: nn.Module) -> list[PointwiseResidual]:
        """For Gauss-Newton."""
        dim = self.outer.shape[1]
        outer = torch.cat([self.outer, self.equation.exact(self.outer).unsqueeze(1)], 1)

        def boundary(u: Point, x: Tensor) -> Tensor:
            return u(x[:dim]) - x[dim]

        return [
            PointwiseResidual(model, self.equation.at, self.inner, len(self.inner) ** -0.5),
            PointwiseResidual(model, boundary, outer, (self.equation.boundary / len(outer)) ** 0.5),
        ]

    def loss(self, model: nn.Module) -> Tensor:
        """For everyone else."""
        x = self.inner.clone().requires_grad_()
        u = model(x)[:, 0]
        first = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        second = [torch.autograd.grad(first[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.shape[1])]
        inner = self.equation.batched(x, u, first, torch.stack(second, 1)).square().mean()
        outer = (model(self.outer)[:, 0] - self.equation.exact(self.outer)).square().mean()
        return 0.5 * (inner + self.equation.boundary * outer)


def cube(count: int, dim: int) -> Callable[[torch.Generator], Tensor]:
    """In the unit cube."""
    return lambda generator: torch.rand(count, dim, generator=generator, dtype=torch.float64)


def faces(count: int, dim: int) -> Callable[[torch.Generator], Tensor]:
    """On its faces, in turn."""

    def draw(generator: torch.Generator) -> Tensor:
        points = cube(count, dim)(generator)
        row = torch.arange(count)
        points[row, row % dim] = (row // dim % 2).double()
        return points

    return draw


def lattice(count: int) -> Tensor:
    """``count ** 2`` points of the unit square."""
    line = torch.linspace(0, 1, count, dtype=torch.float64)
    return torch.cartesian_prod(line, line)


def poisson(dim: int, inner: int, outer: int, cosines: bool = False, **options: Any) -> Equation:
    """``-laplacian(u) = f`` on the unit cube; the solution is a product of sines, or a sum of cosines, of ``pi x``."""

    def exact(x: Tensor) -> Tensor:
        return torch.cos(math.pi * x).sum(-1) if cosines else torch.sin(math.pi * x).prod(-1)

    def source(x: Tensor) -> Tensor:
        return (1 if cosines else dim) * math.pi**2 * exact(x)

    def at(u: Point, x: Tensor) -> Tensor:
        return laplacian(u, x) + source(x)

    def batched(x: Tensor, u: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return second.sum(1) + source(x)

    test = lattice(101) if dim == 2 else cube(10_000, dim)(torch.Generator().manual_seed(99))
    return Equation(at, batched, exact, cube(inner, dim), faces(outer, dim), test, **options)


def harmonic() -> Equation:
    """``laplacian(u) = 0`` in the unit cube of ten dimensions; the solution is ``x1 x2 + x3 x4 + ... + x9 x10``."""

    def at(u: Point, x: Tensor) -> Tensor:
        return laplacian(u, x)

    def batched(x: Tensor, u: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return second.sum(1)

    def exact(x: Tensor) -> Tensor:
        return (x[..., ::2] * x[..., 1::2]).sum(-1)

    test = cube(10_000, 10)(torch.Generator().manual_seed(99))
    return Equation(at, batched, exact, cube(3000, 10), faces(1000, 10), test, (256, 256, 128, 128), redrawn=True)


VISCOSITY = 0.05


def burgers() -> Equation:
    """``u_t + u u_x = 0.05 u_xx`` for x in (-1, 1) and t in (0, 1), from ``-sin(pi x)``, zero at the ends.

    900 + 180 points; the exact solution is by Cole and Hopf, with 100 points of Gauss-Hermite quadrature.
    """

    def at(u: Point, x: Tensor) -> Tensor:
        value, slope, second = directional_derivatives(u, x, torch.tensor([1.0, 0.0], dtype=x.dtype))
        rate = directional_derivatives(u, x, torch.tensor([0.0, 1.0], dtype=x.dtype), 1)[1]
        return rate + value * slope - VISCOSITY * second

    def batched(x: Tensor, u: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return first[:, 1] + u * first[:, 0] - VISCOSITY * second[:, 0]

    def stretched(points: Tensor) -> Tensor:
        return points * torch.tensor([2.0, 1.0]).double() - torch.tensor([1.0, 0.0]).double()

    def outer(generator: torch.Generator) -> Tensor:
        t = cube(60, 1)(generator)
        start = torch.cat([2 * t - 1, torch.zeros_like(t)], 1)
        return torch.cat([start, *(torch.cat([torch.full_like(t, side), t], 1) for side in (-1.0, 1.0))])

    return Equation(
        at, batched, cole_hopf, lambda g: stretched(cube(900, 2)(g)), outer, stretched(lattice(101)), boundary=100.0
    )


def cole_hopf(points: Tensor) -> Tensor:
    """Of Burgers' equation from ``-sin(pi x)``; Basdevant et al. (1986), Computers and Fluids 14, equation 2.5."""
    import numpy

    x, t = points.unbind(1)
    nodes, weights = (torch.tensor(a) for a in numpy.polynomial.hermite.hermgauss(100))
    y = x.unsqueeze(1) - (4 * VISCOSITY * t).sqrt().unsqueeze(1) * nodes
    weight = weights * torch.exp(-torch.cos(math.pi * y) / (2 * math.pi * VISCOSITY))
    return -(torch.sin(math.pi * y) * weight).sum(1) / weight.sum(1)


EQUATIONS: dict[str, Callable[[], Equation]] = {
    "poisson": lambda: poisson(2, 900, 120, boundary=100.0),
    "burgers": burgers,
    # published
    "2d 257": lambda: poisson(2, 900, 120, widths=(64,)),
    "2d 9873": lambda: poisson(2, 900, 120, widths=(64, 64, 48, 48)),
    "5d 449": lambda: poisson(5, 3000, 500, cosines=True, widths=(64,), redrawn=True),
    "5d 10065": lambda: poisson(5, 3000, 500, cosines=True, widths=(64, 64, 48, 48), redrawn=True),
    "10d 118145": harmonic,
    # small ones of other kinds
    "1d": lambda: poisson(1, 64, 2, widths=(24,)),
    "2d small": lambda: poisson(2, 200, 60, widths=(40,)),
    "2d weighted": lambda: poisson(2, 200, 60, widths=(16, 16), boundary=100.0),
    "2d sine": lambda: poisson(2, 200, 60, widths=(24,), activation=Sine),
    "2d redrawn": lambda: poisson(2, 200, 60, widths=(40,), redrawn=True),
    "5d redrawn": lambda: poisson(5, 600, 120, cosines=True, widths=(48,), redrawn=True),
    "5d deep": lambda: poisson(5, 400, 100, cosines=True, widths=(16, 16), redrawn=True),
    "5d sine": lambda: poisson(5, 300, 80, cosines=True, widths=(24,), redrawn=True, boundary=100.0, activation=Sine),
    "10d redrawn": lambda: poisson(10, 800, 200, cosines=True, widths=(24,), redrawn=True),
}


PUBLISHED = "2d 257,2d 9873,5d 449,5d 10065,10d 118145,burgers"
COMPARED = ("GaussNewton", "SSBroyden", "SSBFGS, window=100", "torch LBFGS, strong Wolfe", "SOAP")


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
    "GaussNewton, scaled=True": (lambda m, **options: GaussNewton(m, scaled=True, **options), [{}]),
    "GaussNewton, scaled=False": (lambda m, **options: GaussNewton(m, scaled=False, **options), [{}]),
    "GaussNewton, unscaled, no acceleration": (
        lambda m, **options: GaussNewton(m, scaled=False, acceleration=False, **options),
        [{}],
    ),
    "GaussNewton, SPRING": (
        lambda m, **options: GaussNewton(m, damping_rule=None, **options),
        [{"lr": lr, "damping": 1e-2, "spring": 0.9} for lr in (0.1, 0.3)],
    ),
    "SSBroyden": (lambda m, **options: SSBroyden(m.parameters(), **options), [{}]),
    "SSBFGS": (lambda m, **options: SSBFGS(m.parameters(), **options), [{}]),
    "SSBFGS, window=100": (lambda m, **options: SSBFGS(m.parameters(), window=100, **options), [{}]),
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
        steps: Taken by then.
    """

    seconds: list[float]
    errors: list[float]
    steps: list[int]

    def to(self, error: float) -> tuple[float, float]:
        """Seconds and steps to an error; infinite if it was not reached."""
        for seconds, found, steps in zip(self.seconds, self.errors, self.steps, strict=True):
            if found <= error:
                return seconds, steps
        return math.inf, math.inf


def step(optimizer: Any, model: nn.Module, points: Points, closures: bool) -> None:
    """One step of whatever loop the optimizer has."""
    if points.equation.redrawn:
        points.draw()

    def closure() -> Tensor:
        model.zero_grad()
        loss = points.loss(model)
        loss.backward()
        return loss

    if isinstance(optimizer, GaussNewton):
        optimizer.step(lambda: points.residuals(model))
    elif closures:
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def run(equation: Equation, seed: int, make: Callable[[nn.Module], Any], seconds: float, until: float = 0.0) -> Curve:
    """Train for some seconds, with a learning rate that falls to zero like a cosine where a method has one.

    Args:
        equation: The problem.
        seed: Of the network and the points.
        make: Makes the optimizer.
        seconds: Of CPU.
        until: An error at which a method without a learning rate stops.
    """
    points, model = Points(equation, seed), equation.network(seed)
    optimizer = make(model)
    curve, spent, steps = Curve([], [], []), 0.0, 0
    rates = [group["lr"] for group in optimizer.param_groups]
    closures = isinstance(optimizer, (torch.optim.LBFGS, SSBFGS, SSBroyden))
    whole = closures or (isinstance(optimizer, GaussNewton) and optimizer.rule)
    while spent < seconds:
        start = time.process_time()
        try:
            step(optimizer, model, points, closures)
        except SolverError:  # diverged
            return Curve([*curve.seconds, seconds], [*curve.errors, math.inf], [*curve.steps, steps])
        steps += 1
        spent += time.process_time() - start
        if not whole:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * max(0.5 * (1 + math.cos(math.pi * min(spent / seconds, 1.0))), 1e-3)
        if not curve.seconds or spent - curve.seconds[-1] > 0.01 * seconds or spent >= seconds:
            curve.seconds.append(spent)
            curve.errors.append(equation.error(model))
            curve.steps.append(steps)
            if whole and curve.errors[-1] <= until:
                break
    return curve


def kept(path: Path | None, key: dict[str, Any], compute: Callable[[], Curve]) -> Curve:
    """A run, from a file of one JSON object a line if it is there; otherwise it is made and appended."""
    if path is not None and path.exists():
        for line in path.read_text().splitlines():
            found = json.loads(line)
            if found.pop("curve", None) and found == json.loads(json.dumps(key)):
                return Curve(**json.loads(line)["curve"])
    curve = compute()
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(key | {"curve": vars(curve)}) + "\n")
    return curve


def shown(curves: list[Curve], error: float) -> str:
    """Median seconds and steps to an error."""
    seconds, steps = (median(values) for values in zip(*(curve.to(error) for curve in curves), strict=True))
    return f"{seconds:.1f} / {steps:g}" if seconds < math.inf else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", default=PUBLISHED, help=f"of {', '.join(EQUATIONS)}")
    parser.add_argument("--seconds", type=float, default=60.0, help="of CPU for each run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default=";".join(COMPARED), help="methods, separated by semicolons")
    parser.add_argument("--until", type=float, default=1e-6, help="the error at which methods without a rate stop")
    parser.add_argument("--runs", type=Path, help="a file of finished runs")
    options: Any = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(options.seeds)
    for name in options.problems.split(","):
        equation = EQUATIONS[name]()
        count = sum(p.numel() for p in equation.network(0).parameters())
        print(f"\n### {name}, {count:,} parameters, {options.seconds:g} s, seeds 0 to {options.seeds - 1}\n")
        print("| method | setting |", " | ".join(f"{e:.0e}" for e in ERRORS), "| at the end, each seed | steps |")
        print("| --- | --- |", " --- |" * len(ERRORS), "--- | --- |")
        for method in options.only.split(";"):
            make, grid = METHODS[method]
            found: list[tuple[float, list[Curve], dict[str, Any]]] = []
            for settings in grid:
                curves = []
                for seed in seeds:
                    key = {"problem": name, "method": method, "settings": settings, "seed": seed}
                    key |= {"seconds": options.seconds, "until": options.until, "code": fingerprint("pinn")}
                    made = partial(run, equation, seed, partial(make, **settings), options.seconds, options.until)
                    curves.append(kept(options.runs, key, made))
                found.append((median(c.errors[-1] for c in curves), curves, settings))
            _, curves, settings = min(found, key=lambda entry: entry[0])
            setting = ", ".join(f"{key}={value:g}" for key, value in settings.items())
            cells = [shown(curves, e) for e in ERRORS]
            ends = " ".join(f"{curve.errors[-1]:.1e}" for curve in curves)
            steps = int(median(curve.steps[-1] for curve in curves))
            print(f"| {method} | {setting} |", " | ".join(cells), f"| {ends} | {steps} |", flush=True)


if __name__ == "__main__":
    main()

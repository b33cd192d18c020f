"""Convex problems to high accuracy: multinomial logistic regression on the raw features of scikit-learn's data.

    python -m tests.benchmarks.convex [--seconds 20]

Mean cross entropy plus ``ridge / 2`` times the sum of squares, ridge 1e-4, float64, from zero, until the norm of the
gradient is below 1e-8. Prints Markdown: steps, seconds of CPU, the norm that was reached, and the distance to the
minimiser that a dense Newton iteration, written out here, finds. Runs are taken one after the other in one process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from precond import LevenbergMarquardt, Newton

RIDGE = 1e-4
GOAL = 1e-8


@dataclass(frozen=True)
class Logistic:
    """Logistic regression.

    Attributes:
        name: Of the data.
        x: Features ``(N, d)``.
        y: Classes ``(N,)``.
    """

    name: str
    x: Tensor
    y: Tensor

    def model(self) -> nn.Linear:
        """At zero."""
        model = nn.Linear(self.x.shape[1], int(self.y.max()) + 1, dtype=torch.float64)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        return model

    def loss(self, model: nn.Linear) -> Tensor:
        """What is minimised."""
        squares = torch.stack([p.square().sum() for p in model.parameters()]).sum()
        return nn.functional.cross_entropy(model(self.x), self.y) + 0.5 * RIDGE * squares


def load(name: str) -> Logistic:
    """``"breast_cancer"`` or ``"digits"``, as scikit-learn has them."""
    from sklearn import datasets

    data = getattr(datasets, f"load_{name}")()
    return Logistic(name, torch.tensor(data.data, dtype=torch.float64), torch.tensor(data.target))


@dataclass(frozen=True)
class Solution:
    """What a method found.

    Attributes:
        steps: Or evaluations, where the method says no more.
        seconds: Of CPU.
        norm: Of the gradient.
        weights: The parameters ``(P,)``.
    """

    steps: int
    seconds: float
    norm: float
    weights: Tensor


def solve(problem: Logistic, make: Callable[[nn.Linear], torch.optim.Optimizer], seconds: float) -> Solution:
    """Steps until the gradient is small, or the time is up."""
    model = problem.model()
    optimizer = make(model)
    start, steps, norm = time.process_time(), 0, float("inf")
    while norm > GOAL and time.process_time() - start < seconds:
        if isinstance(optimizer, Newton):
            optimizer.step(lambda: problem.loss(model))
        else:

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = problem.loss(model)
                loss.backward()
                return loss

            optimizer.step(closure)
        steps += 1
        norm = gradient_norm(problem, model)
    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    return Solution(steps, time.process_time() - start, norm, weights)


def gradient_norm(problem: Logistic, model: nn.Linear) -> float:
    """At the model's parameters, not at those before its last step."""
    slopes = torch.autograd.grad(problem.loss(model), list(model.parameters()))
    return float(torch.cat([g.reshape(-1) for g in slopes]).norm())


def dense_newton(problem: Logistic) -> Solution:
    """Damped Newton written from the definition, with the Hessian of softmax regression in closed form."""
    x = torch.cat([problem.x, torch.ones(len(problem.x), 1, dtype=torch.float64)], 1)
    classes, d = int(problem.y.max()) + 1, x.shape[1]
    target = torch.eye(classes, dtype=torch.float64)[problem.y]

    def value(w: Tensor) -> float:
        return float(
            (torch.logsumexp(x @ w.mT, 1) - (x @ w.mT * target).sum(1)).mean() + 0.5 * RIDGE * w.square().sum()
        )

    w, damping, reached, spent = torch.zeros(classes, d, dtype=torch.float64), 1e-3, 0, 0.0
    start = time.process_time()
    for steps in range(25):
        p = (x @ w.mT).softmax(1)
        gradient = ((p - target).mT @ x / len(x) + RIDGE * w).reshape(-1)
        if gradient.norm() < GOAL and not reached:  # the rest is for the digits of the minimiser
            reached, spent = steps, time.process_time() - start
        if reached and steps == reached + 3:
            break
        hessian = torch.zeros(classes, d, classes, d, dtype=torch.float64)
        for i in range(classes):
            for j in range(classes):
                weight = p[:, i] * (float(i == j) - p[:, j]) / len(x)
                hessian[i, :, j] = x.mT @ (x * weight.unsqueeze(1))
        hessian = hessian.view(classes * d, -1) + RIDGE * torch.eye(classes * d, dtype=torch.float64)
        while True:
            move = torch.linalg.solve(hessian + damping * torch.eye(len(hessian), dtype=torch.float64), -gradient)
            if value(w + move.view_as(w)) <= value(w) + 1e-14 or damping > 1e6:
                break
            damping *= 3
        w, damping = w + move.view_as(w), damping / 3
    flat = torch.cat([w[:, :-1].reshape(-1), w[:, -1]])  # as nn.Linear has them
    return Solution(reached, spent, float(gradient.norm()), flat)


def lbfgs(model: nn.Linear) -> torch.optim.Optimizer:
    """Torch's; a step is up to 20 iterations."""
    exact = {"tolerance_grad": 0.0, "tolerance_change": 0.0}
    return torch.optim.LBFGS(model.parameters(), history_size=100, line_search_fn="strong_wolfe", **exact)


METHODS: dict[str, Callable[[nn.Linear], torch.optim.Optimizer]] = {
    "`Newton(damping=1e-3, damping_rule=LevenbergMarquardt())`": lambda m: Newton(
        m.parameters(), damping=1e-3, damping_rule=LevenbergMarquardt()
    ),
    "torch LBFGS, strong Wolfe, 20 iterations a step": lbfgs,
    "torch AdamW, lr 1e-2": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.0),
    "torch AdamW, lr 1e-1": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-1, weight_decay=0.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of CPU for each method")
    options: Any = parser.parse_args()
    torch.set_num_threads(1)
    for name in ("breast_cancer", "digits"):
        problem = load(name)
        reference = dense_newton(problem)
        print(f"\n### {name}: {len(problem.x)} examples, {len(reference.weights)} parameters\n")
        print("| method | steps | seconds | norm of the gradient | distance to the minimiser |\n|---|---|---|---|---|")
        print(
            f"| dense Newton, in closed form | {reference.steps} | {reference.seconds:.2f} | {reference.norm:.0e} | - |"
        )
        for label, make in METHODS.items():
            found = solve(problem, make, options.seconds)
            distance = float((found.weights - reference.weights).abs().max())
            print(f"| {label} | {found.steps} | {found.seconds:.2f} | {found.norm:.0e} | {distance:.0e} |", flush=True)


if __name__ == "__main__":
    main()

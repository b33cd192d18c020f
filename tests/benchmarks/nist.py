"""The nonlinear regression problems of NIST's Statistical Reference Datasets, beside SciPy.

27 problems with certified parameters (public domain, https://www.itl.nist.gov/div898/strd/nls/nls_main.shtml), each
from two starts, the first one farther away. The measure is the number of right digits of the worst parameter,
``-log10 max |b - b*| / |b*|``, at most 11, as many as are certified. Run it by

    python -m tests.benchmarks.nist
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from precond import least_squares

Model = Callable[[Tensor, Tensor], Tensor]
CERTIFIED = 11


def _misra1b(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * (1 - (1 + b[1] * x / 2) ** -2)


def _exponentials(b: Tensor, x: Tensor) -> Tensor:
    return sum(b[i] * torch.exp(-b[i + 1] * x) for i in (0, 2, 4))  # type: ignore[return-value]


def _peaks(b: Tensor, x: Tensor) -> Tensor:
    bells = (b[i] * torch.exp(-((x - b[i + 1]) ** 2) / b[i + 2] ** 2) for i in (2, 5))
    return b[0] * torch.exp(-b[1] * x) + sum(bells)


def _saturation(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * (1 - torch.exp(-b[1] * x))


def _cubics(b: Tensor, x: Tensor) -> Tensor:
    return (b[0] + b[1] * x + b[2] * x**2 + b[3] * x**3) / (1 + b[4] * x + b[5] * x**2 + b[6] * x**3)


def _enso(b: Tensor, x: Tensor) -> Tensor:
    def wave(cosine: Tensor, sine: Tensor, period: Tensor | float) -> Tensor:
        angle = 2 * math.pi * x / period
        return cosine * torch.cos(angle) + sine * torch.sin(angle)

    return b[0] + wave(b[1], b[2], 12.0) + wave(b[4], b[5], b[3]) + wave(b[7], b[8], b[6])


def _chwirut(b: Tensor, x: Tensor) -> Tensor:
    return torch.exp(-b[0] * x) / (b[1] + b[2] * x)


MODELS: dict[str, Model] = {
    "Bennett5": lambda b, x: b[0] * (b[1] + x) ** (-1 / b[2]),
    "BoxBOD": _saturation,
    "Chwirut1": _chwirut,
    "Chwirut2": _chwirut,
    "DanWood": lambda b, x: b[0] * x ** b[1],
    "ENSO": _enso,
    "Eckerle4": lambda b, x: b[0] / b[1] * torch.exp(-0.5 * ((x - b[2]) / b[1]) ** 2),
    "Gauss1": _peaks,
    "Gauss2": _peaks,
    "Gauss3": _peaks,
    "Hahn1": _cubics,
    "Kirby2": lambda b, x: (b[0] + b[1] * x + b[2] * x**2) / (1 + b[3] * x + b[4] * x**2),
    "Lanczos1": _exponentials,
    "Lanczos2": _exponentials,
    "Lanczos3": _exponentials,
    "MGH09": lambda b, x: b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3]),
    "MGH10": lambda b, x: b[0] * torch.exp(b[1] / (x + b[2])),
    "MGH17": lambda b, x: b[0] + b[1] * torch.exp(-x * b[3]) + b[2] * torch.exp(-x * b[4]),
    "Misra1a": _saturation,
    "Misra1b": _misra1b,
    "Misra1c": lambda b, x: b[0] * (1 - (1 + 2 * b[1] * x) ** -0.5),
    "Misra1d": lambda b, x: b[0] * b[1] * x / (1 + b[1] * x),
    "Nelson": lambda b, x: b[0] - b[1] * x[0] * torch.exp(-b[2] * x[1]),
    "Rat42": lambda b, x: b[0] / (1 + torch.exp(b[1] - b[2] * x)),
    "Rat43": lambda b, x: b[0] / (1 + torch.exp(b[1] - b[2] * x)) ** (1 / b[3]),
    "Roszman1": lambda b, x: b[0] - b[1] * x - torch.atan(b[2] / (x - b[3])) / math.pi,
    "Thurber": _cubics,
}


@dataclass(frozen=True)
class Regression:
    """One problem.

    Attributes:
        name: Its name.
        difficulty: ``"lower"``, ``"average"`` or ``"higher"``.
        starts: Two starts, the harder one first.
        certified: Certified parameters.
        deviations: Their certified standard deviations.
        sum_of_squares: The certified sum of squared residuals.
        x: Predictors.
        y: Responses (logarithms of them, where the model is one of these).
    """

    name: str
    difficulty: str
    starts: tuple[Tensor, Tensor]
    certified: Tensor
    deviations: Tensor
    sum_of_squares: float
    x: Tensor
    y: Tensor

    def residuals(self, b: Tensor) -> Tensor:
        """Model less data."""
        return MODELS[self.name](b, self.x) - self.y

    def digits(self, b: Tensor) -> float:
        """Right digits of the worst parameter."""
        error = float(((b - self.certified) / self.certified).abs().max())
        return 0.0 if not error < 1 else min(-math.log10(max(error, 1e-16)), CERTIFIED)


def problems() -> dict[str, Regression]:
    """All 27, by name."""
    stored = json.loads((Path(__file__).parent / "nist_strd.json").read_text())
    out = {}
    for name, entry in stored.items():
        y, *x = (torch.tensor(column, dtype=torch.float64) for column in entry["data"])
        starts = tuple(torch.tensor(start, dtype=torch.float64) for start in entry["starts"])
        out[name] = Regression(
            name,
            entry["difficulty"],
            starts,
            torch.tensor(entry["certified"], dtype=torch.float64),
            torch.tensor(entry["deviations"], dtype=torch.float64),
            entry["sum_of_squares"],
            x[0] if len(x) == 1 else torch.stack(x),
            y.log() if name == "Nelson" else y,
        )
    return out


def by_scipy(problem: Regression, start: Tensor) -> tuple[float, int]:
    """Digits and evaluations of ``scipy.optimize.least_squares`` with the same derivatives and tolerances."""
    from scipy.optimize import least_squares as reference

    def jacobian(b):  # type: ignore[no-untyped-def]
        return torch.func.jacfwd(problem.residuals)(torch.as_tensor(b)).numpy()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = reference(
                lambda b: problem.residuals(torch.as_tensor(b)).numpy(),
                start.numpy(),
                jac=jacobian,
                x_scale="jac",
                ftol=1e-15,
                xtol=1e-10,
                gtol=1e-10,
                max_nfev=200 * (len(start) + 1),
            )
        except ValueError:  # residuals that are not finite
            return 0.0, 0
    return problem.digits(torch.as_tensor(found.x)), int(found.nfev)


def main() -> None:
    """Print a row for each problem."""
    totals = {name: [0, 0] for name in ("ours", "SciPy")}
    print("problem    level    start  digits  evaluations  SciPy's  evaluations")
    for problem in problems().values():
        for number, start in enumerate(problem.starts):
            found = least_squares(problem.residuals, start)
            own, theirs = problem.digits(found.x), by_scipy(problem, start)
            totals["ours"][number] += own >= 6
            totals["SciPy"][number] += theirs[0] >= 6
            print(
                f"{problem.name:10} {problem.difficulty:8} {number + 1:5}  {own:6.1f}  {found.nfev:11}"
                f"  {theirs[0]:7.1f}  {theirs[1]:11}"
            )
    for name, (hard, easy) in totals.items():
        print(f"{name}: six digits in {hard} of 27 from the first start, {easy} of 27 from the second")


if __name__ == "__main__":
    main()

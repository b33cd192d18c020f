"""Laplace approximations of a digit classifier: ``python -m tests.benchmarks.laplace_digits --seeds 5``.

After Immer, Korzepa and Bauer, "Improving predictions of Bayesian neural nets via local linearization" (AISTATS 2021,
https://arxiv.org/abs/2008.08400): does the posterior predict better through the linearised network than through sampled
networks, and what does its structure matter? One prior precision trains a network and shapes its posterior; it is
chosen from a grid, for each row by itself, once by the evidence and once by the likelihood of validation data.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from laplace import Laplace
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_calibration_error

from curvature.laplace import GGNBackend

HIDDEN = 50
PRECISIONS = (0.01, 0.1, 1.0, 10.0, 100.0)
#: What the posterior is over, and how it is kept.
POSTERIORS = (("all", "full"), ("all", "ekfac"), ("all", "kron"), ("all", "diag"), ("last_layer", "full"))
#: Of the predictions: through the linearised network ("glm") or through networks that are drawn ("nn").
DRAWS = {"glm": 1000, "nn": 100}
PLAIN = "plain network"

Data = tuple[Tensor, Tensor]
#: Prediction, subset of weights, structure.
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Scores:
    """Of predicted probabilities: mean negative log likelihood, accuracy, expected calibration error (15 bins)."""

    nll: float
    accuracy: float
    ece: float

    @classmethod
    def of(cls, probabilities: Tensor, labels: Tensor) -> Scores:
        """Of probabilities ``(N, C)`` for labels ``(N,)``; none counts as less than 1e-12."""
        chosen = probabilities.gather(1, labels.unsqueeze(1)).clamp(min=1e-12)
        return cls(
            -float(chosen.log().mean()),
            float((probabilities.argmax(1) == labels).double().mean()),
            float(multiclass_calibration_error(probabilities, labels, probabilities.shape[1], n_bins=15)),
        )


@dataclass(frozen=True)
class Trial:
    """A prediction with one prior precision.

    Attributes:
        precision: Of the prior.
        evidence: Log marginal likelihood of the training data.
        validation: On the validation data.
        test: On the test data.
    """

    precision: float
    evidence: float
    validation: Scores
    test: Scores


#: How the prior precision is chosen: what is made as large as possible.
CRITERIA: dict[str, Callable[[Trial], float]] = {
    "evidence": lambda trial: trial.evidence,
    "validation": lambda trial: -trial.validation.nll,
}


def split(seed: int) -> tuple[Data, Data, Data]:
    """Digits for training (70 %), validation and test (15 % each), pixels in [0, 1]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data / 16), torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    ends = round(0.7 * len(x)), round(0.85 * len(x))
    train, validation, test = (order[part] for part in (slice(ends[0]), slice(*ends), slice(ends[1], None)))
    return (x[train], y[train]), (x[validation], y[validation]), (x[test], y[test])


def trained(data: Data, precision: float, seed: int, hidden: int = HIDDEN, steps: int = 1000) -> nn.Module:
    """The network 64-hidden-10, tanh, with the largest posterior density that Adam finds."""
    torch.manual_seed(seed)
    x, y = data
    model = nn.Sequential(nn.Linear(x.shape[1], hidden), nn.Tanh(), nn.Linear(hidden, 10)).to(x.dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        prior = 0.5 * precision * sum(p.square().sum() for p in model.parameters())
        loss = nn.functional.cross_entropy(model(x), y, reduction="sum") + prior
        (loss / len(x)).backward()
        optimizer.step()
        scheduler.step()
    return model.eval()


def trials(
    seed: int,
    precisions: Sequence[float] = PRECISIONS,
    posteriors: Sequence[tuple[str, str]] = POSTERIORS,
    hidden: int = HIDDEN,
) -> dict[Key, list[Trial]]:
    """Every prediction with every prior precision, for one split of the data and one start of the network.

    The plain network has no evidence of its own: that of the first posterior chooses for it.
    """
    train, validation, test = split(seed)
    loader = DataLoader(TensorDataset(*train), batch_size=256)
    x, labels, border = torch.cat([validation[0], test[0]]), (validation[1], test[1]), len(validation[0])
    found: dict[Key, list[Trial]] = {}

    def note(key: Key, precision: float, evidence: float, probabilities: Tensor) -> None:
        parts = probabilities[:border], probabilities[border:]
        scores = [Scores.of(p, y) for p, y in zip(parts, labels, strict=True)]
        found.setdefault(key, []).append(Trial(precision, evidence, *scores))

    for precision in precisions:
        model = trained(train, precision, seed, hidden)
        for index, (subset, structure) in enumerate(posteriors):
            la: Any = Laplace(model, "classification", subset, structure, prior_precision=precision, backend=GGNBackend)
            la.fit(loader)
            evidence = float(la.log_marginal_likelihood())
            if index == 0:
                with torch.no_grad():
                    note((PLAIN, "", ""), precision, evidence, model(x).softmax(1))
            for prediction, draws in DRAWS.items():
                generator = torch.Generator().manual_seed(seed)
                samples = la.predictive_samples(x, pred_type=prediction, n_samples=draws, generator=generator)
                note((prediction, subset, structure), precision, evidence, samples.mean(0))
    return found


def table(runs: Sequence[dict[Key, list[Trial]]], criterion: str) -> str:
    """Test scores in Markdown, means and standard errors over the seeds."""
    names = {PLAIN: PLAIN, "glm": "linearised", "nn": "sampled networks"}
    where = {"all": "all weights", "last_layer": "last layer", "": "-"}
    lines = [
        "| prediction | posterior | structure | negative log likelihood | accuracy | calibration error | precisions |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key in sorted(runs[0], key=lambda key: list(names).index(key[0])):
        chosen = [max(run[key], key=CRITERIA[criterion]) for run in runs]
        columns = [mean_and_error([getattr(trial.test, field.name) for trial in chosen]) for field in fields(Scores)]
        precisions = " ".join(f"{trial.precision:g}" for trial in chosen)
        prediction, subset, structure = key
        labels = [names[prediction], where[subset], f"`{structure}`" if structure else "-"]
        lines.append("| " + " | ".join([*labels, *columns, precisions]) + " |")
    return "\n".join(lines)


def mean_and_error(values: Sequence[float]) -> str:
    """The mean, and the standard error of it where there are several values."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"


def main() -> None:
    """Print a table for each way to choose the prior precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    runs = []
    for seed in range(parser.parse_args().seeds):
        runs.append(trials(seed))
        print(f"seed {seed} done", flush=True)
    for criterion in CRITERIA:
        print(f"\n### Prior precision by {criterion}\n\n{table(runs, criterion)}", flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning)  # of laplace-torch, about its defaults
    main()

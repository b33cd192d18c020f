"""Does the evidence choose a prior that predicts well? ``python -m tests.benchmarks.laplace_calibration``.

A digit classifier that was trained as usual, with a little weight decay; a posterior afterwards, whose one prior
precision is tuned by the evidence, or by the likelihood of validation data. Scores of the test data, linearised, with
the probit approximation.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from typing import Any

import torch
from laplace import Laplace
from torch.utils.data import DataLoader, TensorDataset

from curvature.laplace import GGNBackend
from tests.benchmarks.laplace_digits import Scores, split, trained

#: Precision of the prior in training: a weight decay of 1e-4 times the mean loss.
TRAINED = 0.1
POSTERIORS = (("all", "kron"), ("all", "diag"), ("last_layer", "full"))
METHODS = ("marglik", "gridsearch")


def scores(seed: int) -> dict[str, tuple[float, Scores]]:
    """Prior precision and scores of every way, for one split and one start."""
    train, validation, test = split(seed)
    model = trained(train, TRAINED, seed)
    loader, held_out = (DataLoader(TensorDataset(*part), batch_size=256) for part in (train, validation))
    with torch.no_grad():
        found = {"plain network": (TRAINED, Scores.of(model(test[0]).softmax(1), test[1]))}
    for subset, structure in POSTERIORS:
        la: Any = Laplace(model, "classification", subset, structure, backend=GGNBackend)
        la.fit(loader)
        for method in METHODS:
            options = {"val_loader": held_out, "grid_size": 13, "log_prior_prec_min": -2, "log_prior_prec_max": 4}
            la.optimize_prior_precision(method=method, **(options if method == "gridsearch" else {"n_steps": 200}))
            key = f"{subset}, `{structure}`, prior by {'evidence' if method == 'marglik' else 'validation data'}"
            found[key] = float(la.prior_precision), Scores.of(la(test[0]), test[1])
    return found


def main() -> None:
    """Print the means over the seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    warnings.filterwarnings("ignore", category=UserWarning)
    runs = [scores(seed) for seed in range(parser.parse_args().seeds)]
    print("| | prior precision | negative log likelihood | accuracy | calibration error |")
    print("| --- | --- | --- | --- | --- |")
    for key in runs[0]:
        priors = " ".join(f"{run[key][0]:.2g}" for run in runs)
        columns = [statistics.mean(getattr(run[key][1], name) for run in runs) for name in ("nll", "accuracy", "ece")]
        print(f"| {key} | {priors} | {' | '.join(f'{column:.3f}' for column in columns)} |")


if __name__ == "__main__":
    main()

"""Uncertainty in ten lines: what a network knows about digits that are turned on their side.

A classifier of upright digits is shown turned ones. The further they are turned, the more often it is wrong, and the
plain network is sure all the same. A Laplace approximation of its last layer on the Gauss-Newton matrix, fitted after
training by laplace-torch with the backend of this library, knows better: its negative log likelihood is less than half,
and its calibration error falls. The price is paid on upright digits, where it is too modest. How much of the
posterior's structure is kept matters there: the full matrix is best, the Kronecker forms are close, the diagonal is
worst.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from laplace import Laplace
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvature.laplace import GGNBackend

ANGLES = (0, 15, 30, 45, 60)


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 10) -> float:
    """Mean distance of confidence and accuracy, over bins of the confidence."""
    confidence, chosen = probabilities.max(1)
    index = (confidence * bins).ceil().long().clamp(1, bins)
    gaps = [
        (index == b).double().mean() * ((chosen == labels).double() - confidence)[index == b].mean().abs()
        for b in index.unique()
    ]
    return float(sum(gaps))


def main(out: Path) -> None:
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16), torch.tensor(digits.target)
    train, unseen = slice(0, 1000), slice(1200, None)

    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[train]), y[train]).backward()
        optimizer.step()

    turned = {}
    for angle in ANGLES:
        images = rotate(digits.images[unseen] / 16, angle, axes=(1, 2), reshape=False, order=1)
        turned[angle] = torch.tensor(images).flatten(1)
    labels = y[unseen]

    predictions = {"plain network": {a: model(images).softmax(1).detach() for a, images in turned.items()}}
    loader = DataLoader(TensorDataset(x[train], y[train]), batch_size=250)
    for structure in ("diag", "kron", "ekfac", "full"):
        posterior = Laplace(model, "classification", "last_layer", structure, backend=GGNBackend)
        posterior.fit(loader)
        posterior.optimize_prior_precision(method="marglik")
        predictions[structure] = {a: posterior(images, link_approx="probit") for a, images in turned.items()}

    losses: dict[str, list[float]] = {}
    errors: dict[str, list[float]] = {}
    for name, found in predictions.items():
        losses[name] = [float(-found[a].gather(1, labels[:, None]).log().mean()) for a in ANGLES]
        errors[name] = [calibration_error(found[a], labels) for a in ANGLES]
        accuracy = [float((found[a].argmax(1) == labels).double().mean()) for a in ANGLES]
        print(
            f"{name:13s} negative log likelihood {losses[name][0]:.3f} upright, {losses[name][-1]:.2f} at 60 degrees;"
        )
        print(
            f"{'':13s} calibration error {errors[name][0]:.3f} and {errors[name][-1]:.2f}, accuracy {accuracy[0]:.3f}"
        )
    for structure in ("diag", "kron", "ekfac", "full"):
        assert losses[structure][-1] < 0.5 * losses["plain network"][-1], "turned digits are no longer a surprise"
        assert all(e < p for e, p in zip(errors[structure][1:], errors["plain network"][1:], strict=True))
    assert losses["full"][0] < min(losses["kron"][0], losses["ekfac"][0]) < losses["diag"][0], "structure pays"

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name in predictions:
        style = {"color": "black", "linestyle": "--"} if name == "plain network" else {"linestyle": "-"}
        if name == "ekfac":
            style = {"linestyle": ":"}  # it lies on kron
        left.plot(ANGLES, losses[name], marker="o", markersize=4, label=name, **style)
        right.plot(ANGLES, errors[name], marker="o", markersize=4, label=name, **style)
    left.set(title="negative log likelihood of the label", xlabel="degrees turned", yscale="log")
    shown = (0.3, 1, 3, 10)
    left.set_yticks(shown, [f"{tick:g}" for tick in shown])
    left.minorticks_off()
    right.set(title="calibration error", xlabel="degrees turned", ylim=(0, 1))
    for ax in (left, right):
        ax.set_xticks(ANGLES)
        ax.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.savefig(out / "rotation.png", dpi=110)


if __name__ == "__main__":
    main(Path(__file__).parent)

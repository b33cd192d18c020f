"""The spectrum of a trained network: a few large eigenvalues, one for each class but one, and a bulk near zero.

A small convolutional network learns the handwritten digits. Its Hessian has 1898 eigenvalues. Nine of them stand out,
as many as there are classes less one (Sagun et al., 2017; Papyan, 2019); nearly all others are far smaller,
some of them negative. The Gauss-Newton matrix, which leaves out how the network bends, has the same outliers and
nothing negative: near a minimum it is all of the Hessian that matters.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import curvature
import solvers
from curvature import plots

CLASSES = 10


def main(out: Path) -> None:
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    train, held_out = slice(0, 1500), slice(1500, None)

    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64, CLASSES)),
    )
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(8):
        for batch in torch.randperm(1500).split(128):
            optimizer.zero_grad()
            loss_fn(model(x[batch]), y[batch]).backward()
            optimizer.step()
    accuracy = (model(x[held_out]).argmax(1) == y[held_out]).double().mean()
    print(f"accuracy on digits it has not seen: {accuracy:.3f}")
    assert accuracy > 0.7, "it has not learned"

    data = (x[train], y[train])
    matrices = {
        "Hessian": curvature.hessian(model, loss_fn, data),
        "Gauss-Newton": curvature.ggn(model, loss_fn, data, structure="full"),
    }
    top = {name: solvers.eigsh(matrix, k=20, rtol=1e-3) for name, matrix in matrices.items()}
    lowest = solvers.eigsh(matrices["Hessian"], k=1, which="SA", rtol=1e-2)
    density = solvers.spectral_density(matrices["Hessian"], samples=4, steps=60)

    H, G = top["Hessian"].values, top["Gauss-Newton"].values
    gaps = H[:-1] / H[1:]
    print("largest eigenvalues:", [f"{value:.2f}" for value in H[:12].tolist()])
    print(f"gap behind the {CLASSES - 1}th: {gaps[CLASSES - 2]:.2f}; smallest eigenvalue {lowest.values[0]:.3f}")
    assert gaps[CLASSES - 2] == gaps[4:].max(), "the spectrum breaks behind the ninth eigenvalue"
    assert torch.allclose(H[: CLASSES - 1], G[: CLASSES - 1], rtol=0.05), "the outliers are those of Gauss-Newton"
    assert lowest.values[0] < 0, "the Hessian is indefinite"
    assert -lowest.values[0] < 0.1 * H[0], "but not by much"

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    plots.density(density, left, label="eigenvalue of the Hessian")
    plots.eigenvalues(top["Hessian"], right, log=True, label="eigenvalue")
    right.plot(range(1, len(G) + 1), G, "x", color="C1")
    right.axvline(CLASSES - 0.5, color="C2", linestyle="--", linewidth=1)
    right.legend([*right.containers, *right.lines[-2:]], ["Hessian", "Gauss-Newton", "classes - 1"], frameon=False)
    left.set_title("density: a bulk at zero, and outliers")
    right.set_title("the largest eigenvalues")
    figure.savefig(out / "spectrum.png", dpi=110)


if __name__ == "__main__":
    main(Path(__file__).parent)

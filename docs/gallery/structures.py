"""Hessian against Gauss-Newton against K-FAC: what each approximation keeps, block by block.

A network small enough for dense algebra, in float64. From left to right: the Hessian; the Gauss-Newton matrix, which
leaves out the curvature of the network itself; its blocks on the diagonal, one for each layer; and these blocks as
Kronecker products. K-FAC keeps the pattern inside a layer and loses its finer structure; EKFAC corrects the spectrum.
The distances are exact, and no estimate is closer than EKFAC's among those with its eigenbasis.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import SymLogNorm
from sklearn.datasets import load_digits
from torch import Tensor, nn

import curvature


def main(out: Path) -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images).reshape(-1, 4, 2, 4, 2).mean((2, 4)).flatten(1) / 16  # 4 x 4 pixels
    data = (images[:500], torch.tensor(digits.target[:500]))
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 10)).double()
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        loss_fn(model(data[0]), data[1]).backward()
        optimizer.step()

    given = (model, loss_fn, data)
    matrices: dict[str, Tensor] = {"Hessian": curvature.hessian(*given).to_dense()}
    for name, structure in {
        "Gauss-Newton": "dense",
        "its layers": "layer",
        "K-FAC": "kfac",
        "EKFAC": "ekfac",
        "diagonal": "diagonal",
    }.items():
        matrices[name] = curvature.ggn(*given, structure=structure, kind="exact").to_dense()

    G = matrices["Gauss-Newton"]
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in (model[0], model[2], model[4])]
    starts = [0, sizes[0], sizes[0] + sizes[1]]
    distances = {name: float((matrix - G).norm() / G.norm()) for name, matrix in matrices.items()}
    by_layer: dict[str, list[float]] = {}
    for name in ("K-FAC", "EKFAC", "diagonal"):
        spans = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        by_layer[name] = [float((matrices[name][s, s] - G[s, s]).norm() / G[s, s].norm()) for s in spans]
    print("distance to the Gauss-Newton matrix, relative to its norm")
    for name, distance in distances.items():
        print(f"  {name:14s} {distance:.3f}   {[round(value, 3) for value in by_layer.get(name, [])]}")

    assert torch.linalg.eigvalsh(G).min() > -1e-10, "the Gauss-Newton matrix is positive semi-definite"
    assert torch.linalg.eigvalsh(matrices["Hessian"]).min() < -1e-3, "the Hessian is not"
    for kfac, ekfac, diagonal in zip(*(by_layer[name] for name in ("K-FAC", "EKFAC", "diagonal")), strict=True):
        assert ekfac < kfac < diagonal, "in every layer EKFAC is closer than K-FAC, and K-FAC than the diagonal"
    assert distances["its layers"] < distances["EKFAC"] < distances["K-FAC"] < distances["diagonal"]

    shown = ("Hessian", "Gauss-Newton", "its layers", "K-FAC", "EKFAC", "diagonal")
    figure, axes = plt.subplots(2, 3, figsize=(9.5, 6.6), layout="constrained")
    scale = float(G.abs().max())
    for ax, name in zip(axes.flat, shown, strict=True):
        picture = ax.imshow(
            matrices[name].numpy(), cmap="RdBu_r", norm=SymLogNorm(scale * 1e-3, vmin=-scale, vmax=scale)
        )
        for edge in starts[1:]:
            ax.axhline(edge - 0.5, color="black", linewidth=0.4)
            ax.axvline(edge - 0.5, color="black", linewidth=0.4)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_title(name if name == "Gauss-Newton" else f"{name}, {distances[name]:.2f} away", fontsize="medium")
    ticks = [sign * 10.0**power for sign in (-1, 1) for power in (-3, -2, -1)]  # those nearer to zero would overlap
    bar = figure.colorbar(picture, ax=axes, shrink=0.7, label="entry", ticks=sorted([0.0, *ticks]))
    bar.ax.set_yticklabels([f"{tick:g}" for tick in sorted([0.0, *ticks])])
    bar.ax.minorticks_off()
    figure.savefig(out / "structures.png", dpi=80)


if __name__ == "__main__":
    main(Path(__file__).parent)

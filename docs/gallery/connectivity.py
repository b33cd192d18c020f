"""Linear mode connectivity, of whole networks and of their layers.

Three networks learn the digits. A and B begin at the same weights and see other batches; C begins elsewhere. On the
straight way from A to B the loss stays as low as at its ends: one basin (Frankle et al., 2020). Between A and C stands
a barrier. Layer by layer there is none, even there: if one layer alone goes from A to C the loss rises steadily, and
never above the line between the ends (Adilova et al., 2023). But a layer of C does not fit into A, whose units are in
another order: at the end of the way the loss is many times that of either network.
"""

from __future__ import annotations

import copy
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import curvature


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(64, 10))


def main(out: Path) -> None:
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    loss_fn = nn.CrossEntropyLoss()

    def train(model: nn.Module, seed: int) -> nn.Module:
        order = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(600):
            batch = torch.randint(1500, (64,), generator=order)
            optimizer.zero_grad()
            loss_fn(model(x[batch]), y[batch]).backward()
            optimizer.step()
        return model

    start = network(0)
    a, b, c = train(copy.deepcopy(start), 1), train(copy.deepcopy(start), 2), train(network(1), 2)
    data = (x[:1500], y[:1500])
    paths = {
        "A to B, one start": curvature.interpolation(a, b, loss_fn, data, layerwise=True),
        "A to C, two starts": curvature.interpolation(a, c, loss_fn, data, layerwise=True),
    }
    near, far = paths.values()
    for name, path in paths.items():
        by_layer = max(path.barriers().values())
        print(f"{name}: barrier {path.barrier:.4f}, the highest of a single layer {by_layer:.4f}")
    assert near.barrier < 0.01 < 0.5 < far.barrier, "one basin, or two"
    assert max(far.barriers().values()) < 0.01, "layer by layer there is no barrier"
    ends = {layer: float(values["loss"][-1]) for layer, values in far.from_a.items()}
    print("loss of A with one layer of C:", {layer: round(value, 2) for layer, value in ends.items()})
    own = max(float(far.values[0]), float(far.values[-1]))  # ends near 0.002; the losses of the mixtures from 1 to 10
    assert min(ends.values()) > 20 * own, "but a layer of C does not fit into A"

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name, path in paths.items():
        left.plot(path.t, path.values, ".-", label=name)
    left.set(xlabel="share of the other network", ylabel="loss", title="the whole network")
    for number, values in enumerate(far.from_a.values(), start=1):
        right.plot(far.t, values["loss"], ".-", label=f"layer {number}")
    right.set(xlabel="share of network C in that layer", title="one layer alone, from A to C")
    for ax in (left, right):
        ax.legend(frameon=False)
        ax.set_ylim(bottom=0)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "connectivity.png", dpi=110)


if __name__ == "__main__":
    main(Path(__file__).parent)

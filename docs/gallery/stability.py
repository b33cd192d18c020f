"""The edge of stability: gradient descent sharpens the network until it can just go on; K-FAC has another edge.

Full-batch gradient descent with learning rate lr is stable where the largest eigenvalue of the Hessian, the sharpness,
is below 2 / lr. In training it rises to that edge and stays there, whatever the learning rate (Cohen et al., 2021).
K-FAC steps along P g, so what counts is the largest eigenvalue of P H. With the same learning rate of 1 the sharpness
goes on rising, to twice what gradient descent could survive, while the preconditioned one stays below the edge.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import curvature
from precond import KFAC

STEPS, EVERY = 1200, 40


def main(out: Path) -> None:
    digits = load_digits()
    x = torch.tensor(digits.data[:300] / 16, dtype=torch.float32)
    y = nn.functional.one_hot(torch.tensor(digits.target[:300]), 10).float()
    loss_fn = nn.MSELoss()

    def network() -> nn.Module:
        torch.manual_seed(0)
        layers = (nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
        return nn.Sequential(*layers)

    curves: dict[str, list[float]] = {}
    rates = {"lr = 0.5": 0.5, "lr = 1": 1.0}
    for name, lr in rates.items():
        model, found = network(), None
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        curves[name] = []
        for step in range(STEPS + 1):
            if step % EVERY == 0:
                found = curvature.dynamics(model, loss_fn, (x, y), optimizer, previous=found, rtol=1e-2)
                curves[name].append(found.sharpness)
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
        late = torch.tensor(curves[name][-5:]).mean()
        print(f"gradient descent, {name}: sharpness {late:.2f}, edge {2 / lr:.2f}")
        assert abs(late * lr / 2 - 1) < 0.15, "the sharpness stays at 2 / lr"

    model, plain, found, lr = network(), None, None, 1.0
    kfac = KFAC(
        *(model, loss_fn),
        lr=lr,
        momentum=0.0,
        damping=0.1,
        kl_clip=None,
        fisher="exact",
        curvature_ema=0.0,
        inverse_update_period=1,
    )
    raw: list[float] = []
    inside: list[float] = []
    times = range(10, 301, 10)
    for step in range(times[-1] + 1):
        kfac.zero_grad()
        loss_fn(model(x), y).backward()
        if step in times:
            plain = curvature.dynamics(model, loss_fn, (x, y), lr=lr, previous=plain, rtol=1e-2)
            found = curvature.dynamics(model, loss_fn, (x, y), kfac, previous=found, rtol=1e-2)
            raw.append(plain.eigenvalue)
            inside.append(found.eigenvalue)
        kfac.step()
    kfac.detach()
    print(found)
    print(f"K-FAC, lr = {lr:g}: sharpness {raw[-1]:.2f}, preconditioned {max(inside):.2f}, edge {2 / lr:.2f}")
    assert raw[-1] > 2 * (2 / lr), "the sharpness is twice what gradient descent of this learning rate could survive"
    assert max(inside) < 2 / lr, "what counts for K-FAC stays below the edge"

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for index, (name, lr) in enumerate(rates.items()):
        left.plot(range(0, STEPS + 1, EVERY), curves[name], color=f"C{index}", label=name)
        left.axhline(2 / lr, color=f"C{index}", linestyle="--", linewidth=1)
    left.set(title="gradient descent stops at 2 / lr (dashed)", xlabel="step", ylabel="largest eigenvalue")
    right.plot(times, raw, color="C1", label="of H")
    right.plot(times, inside, color="C2", label="of P H")
    right.axhline(2 / lr, color="C2", linestyle="--", linewidth=1, label="2 / lr")
    right.set(title="K-FAC, lr = 1: its edge is that of P H", xlabel="step")
    for ax in (left, right):
        ax.legend(frameon=False)
        ax.set_ylim(bottom=0)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "stability.png", dpi=110)


if __name__ == "__main__":
    main(Path(__file__).parent)

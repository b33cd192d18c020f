"""The models to be trained: an autoencoder and a classifier on the 1797 handwritten digits of scikit-learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn

TRAINING_IMAGES = 1437  # 80%; the rest is held out


@dataclass(frozen=True)
class Data:
    """Training and held-out examples."""

    x: Tensor
    y: Tensor
    held_out_x: Tensor
    held_out_y: Tensor


@dataclass(frozen=True)
class Task:
    """A model, a loss, and the target at which it counts as trained.

    Attributes:
        name: Name in tables and figures.
        make_model: A freshly initialised model; draws from the global random state.
        loss_fn: The loss module.
        load: The data.
        batch_size: Examples per step.
        steps: Steps of every optimizer.
        target: Loss on all training data to be reached.
        evaluation_period: Steps between evaluations of that loss.
        measure: Name of what ``score`` returns.
        score: Quality on held-out data, from outputs and targets.
    """

    name: str
    make_model: Callable[[], nn.Module]
    loss_fn: nn.Module
    load: Callable[[], Data]
    batch_size: int
    steps: int
    target: float
    evaluation_period: int
    measure: str
    score: Callable[[Tensor, Tensor], float]


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images ``(1797, 64)`` in [0, 1] and labels ``(1797,)``, shuffled the same way each time."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]


def labelled() -> Data:
    """Images and their labels."""
    x, y = digits()
    n = TRAINING_IMAGES
    return Data(x[:n], y[:n], x[n:], y[n:])


def unlabelled() -> Data:
    """Images as their own targets."""
    x, _ = digits()
    n = TRAINING_IMAGES
    return Data(x[:n], x[:n], x[n:], x[n:])


def dense_net(widths: list[int], linear: set[int]) -> nn.Sequential:
    """Dense layers with tanh between them, except after the layers numbered in ``linear``; Glorot initialisation."""
    layers: list[nn.Module] = []
    for index, (d_in, d_out) in enumerate(pairwise(widths)):
        layer = nn.Linear(d_in, d_out)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
        layers += [layer] if index in linear else [layer, nn.Tanh()]
    return nn.Sequential(*layers)


def autoencoder() -> nn.Module:
    """64-128-64-32-12-6 and back, linear code and output."""
    return dense_net([64, 128, 64, 32, 12, 6, 12, 32, 64, 128, 64], linear={4, 9})


def classifier() -> nn.Module:
    """64-128-64-32-10."""
    return dense_net([64, 128, 64, 32, 10], linear={3})


def mean_squared_error(z: Tensor, y: Tensor) -> float:
    """Mean over all pixels."""
    return float((z - y).square().mean())


def accuracy(z: Tensor, y: Tensor) -> float:
    """Share of labels that are right."""
    return float((z.argmax(-1) == y).float().mean())


TASKS = (
    Task("autoencoder", autoencoder, nn.MSELoss(), unlabelled, 512, 600, 0.022, 5, "error", mean_squared_error),
    Task("classifier", classifier, nn.CrossEntropyLoss(), labelled, 256, 300, 0.01, 1, "accuracy", accuracy),
)

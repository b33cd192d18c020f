"""What the tests of the laplace-torch backends share: models in its conventions, and matrices from the definition."""

from __future__ import annotations

import copy
from collections import UserDict
from dataclasses import replace
from typing import Any

import torch
from laplace.utils import FeatureExtractor
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from curvature.laplace import EFBackend, GGNBackend
from tests.curvature import dense_reference as dense
from tests.curvature.problems import F64, PROBLEMS, Problem, classes, mlp, normal

#: Models whose input is one tensor, with the losses of laplace-torch.
ONE_TENSOR = [
    "mlp_ce",
    "mlp_mse",
    "linear_on_sequences",
    "frozen_parts",
    "module_used_twice",
    "functional_uses",
    "bare_parameters",
    "unknown_uses",
    "cnn",
    "residual_eval",
    "layer_norm_over_two_axes",
    "encoder_pre_norm",
    "language_model",
    "embeddings",
    "stored_transposed",
]


def summed(name: str) -> Problem:
    """A problem with its loss as laplace-torch has it, a sum."""
    problem = PROBLEMS[name]()
    return problem.with_loss(dense.summed(problem.loss_fn))


def likelihood(problem: Problem) -> str:
    return "regression" if isinstance(problem.loss_fn, nn.MSELoss) else "classification"


def backend_of(problem: Problem, kind: type, **options: Any) -> Any:
    """A backend with the problem's loss, ``ignore_index`` and all, and its class axis."""
    backend = kind(problem.model, likelihood(problem), **({"class_dim": problem.class_dim} | options))
    backend.lossfunc = problem.loss_fn
    return backend


def definition(problem: Problem, kind: type) -> Tensor:
    """The full matrix of all the data in laplace-torch's scale."""
    factor = 0.5 if likelihood(problem) == "regression" else 1.0
    matrix = {GGNBackend: dense.ggn, EFBackend: dense.empirical_fisher}[kind]
    return factor * matrix(problem)


def data_size(problem: Problem) -> int:
    return sum(len(y) for _, y in problem.data)


def last_layer(model: nn.Module, x: Tensor) -> FeatureExtractor:
    """laplace-torch's view of a model's last layer."""
    extractor = FeatureExtractor(copy.deepcopy(model))
    extractor(x)
    return extractor


def loader_of(x: Tensor, y: Tensor, batch_size: int = 5) -> DataLoader:
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def toy(kind: str = "classification", examples: int = 12) -> tuple[nn.Module, Tensor, Tensor]:
    """A small network with data, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model, x = mlp().double(), normal(examples, 4)
        return model, x, classes(examples, of=3) if kind == "classification" else normal(examples, 3)


class FromMapping(nn.Module):
    """Takes one mapping and reads its attributes, as models behind a tokenizer do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, batch: Any) -> Tensor:
        assert isinstance(batch, UserDict)
        return self.net(batch["scale"] * batch["inputs"])


def mapping_of(x: Tensor, y: Tensor) -> UserDict[str, Tensor]:
    return UserDict(scale=torch.full((1,), 2.0, dtype=F64), inputs=x, labels=y)


class Mappings(Dataset):
    """A data set of mappings."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


def mapping_loader(x: Tensor, y: Tensor, batch_size: int = 5) -> DataLoader:
    def collate(pairs: list[tuple[Tensor, Tensor]]) -> UserDict[str, Tensor]:
        return mapping_of(*(torch.stack(column) for column in zip(*pairs, strict=True)))

    return DataLoader(Mappings(x, y), batch_size=batch_size, collate_fn=collate)


def frozen(problem: Problem, *names: str) -> Problem:
    """A problem with some parameters frozen."""
    model = copy.deepcopy(problem.model)
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return replace(problem, model=model)

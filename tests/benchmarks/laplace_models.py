"""Small models for ``laplace_support.py``, one for each thing that a backend may not expect."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.curvature.problems import Problem, classes, normal

BATCH = 3
#: A row that is judged by a derivative.
NOISE = "gradient of the evidence in the noise"
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.LSTM, nn.MultiheadAttention, nn.Embedding)


class FromMapping(nn.Module):
    """Takes one mapping, as laplace-torch hands it over, and gives logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: Any) -> Tensor:
        out = self.inner(batch["input_ids"])
        return out if isinstance(out, Tensor) else out.logits


class ToMapping(nn.Module):
    """The other way round, for the reference."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner({"input_ids": x})


@dataclass
class Case:
    """A model with five examples.

    Attributes:
        model: In float64 and in eval mode, without zeros that would hide a mistake.
        x: Inputs.
        y: Targets.
        mapping: Hand the inputs over as mappings.
        likelihood: As laplace-torch calls it.
        subset: Of the weights.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    mapping: bool = False
    likelihood: str = "classification"
    subset: str = "all"
    reference: Problem = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.model = self.model.double().eval()
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            if tensor.is_floating_point():
                tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).abs()
        model = ToMapping(self.model) if self.mapping else self.model
        if self.subset == "last_layer":
            model = _only_last(model)
        loss = nn.CrossEntropyLoss(reduction="sum")
        self.reference = Problem(model, loss, [(self.x, self.y)], self.class_dim)

    @property
    def class_dim(self) -> int | None:
        """The axis of the classes, where there are more than two."""
        return -1 if self.y.dim() > 1 and not self.y.is_floating_point() else None

    def loader(self) -> Any:
        """Batches of three and two."""
        if not self.mapping:
            return DataLoader(TensorDataset(self.x, self.y), batch_size=BATCH)
        pairs = [{"input_ids": x, "labels": y} for x, y in zip(self.x, self.y, strict=True)]
        return DataLoader(pairs, batch_size=BATCH)  # type: ignore[arg-type]

    def uses(self, name: str) -> int:
        """By how many modules a parameter is owned."""
        parameters = self.reference.model.named_parameters(remove_duplicate=False)
        return sum(p is self.reference.model.get_parameter(name) for _, p in parameters)

    def in_no_layer(self, name: str) -> bool:
        """Whether a parameter belongs to no layer that has Kronecker factors."""
        owner = self.reference.model.get_submodule(name.rpartition(".")[0])
        return not isinstance(owner, LAYERS)


def _only_last(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).requires_grad_(False)
    *_, last = model.children()
    last.requires_grad_(True)
    return model


class Attention(nn.Module):
    """Self-attention by the fused kernel, on projections of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).squeeze(1).mean(1))


class Multihead(nn.Module):
    """Self-attention by the module of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    """The last state of an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Tokens(nn.Module):
    """Tokens to one vector of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(6, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).tanh().sum(1))


class Scaled(nn.Module):
    """A perceptron with a factor for each hidden unit."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.scale, self.head = nn.Linear(4, 5), nn.Parameter(torch.ones(5)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scale * self.hidden(x).tanh())


class Mean(nn.Module):
    """Over positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    return model


def frozen(kind: str) -> nn.Module:
    """Without the weight, or without the bias, of the first layer."""
    model = mlp()
    getattr(model[0], kind).requires_grad_(False)
    return model


def lora_gpt2() -> nn.Module:
    """Low-rank adapters of a GPT-2 of one block that classifies sequences."""
    import peft
    import transformers

    config = transformers.GPT2Config(
        n_embd=8,
        n_layer=1,
        n_head=2,
        vocab_size=20,
        n_positions=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config.num_labels = 3
    adapters = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    return FromMapping(peft.get_peft_model(transformers.GPT2ForSequenceClassification(config), adapters))


def on(shape: tuple[int, ...], model: Callable[[], nn.Module]) -> Callable[[], Case]:
    """A case with inputs of a shape and three classes, built under a fixed seed."""
    return seeded(lambda: Case(model(), normal(5, *shape), classes(5, of=3)))


def seeded(make: Callable[[], Case]) -> Callable[[], Case]:
    def build() -> Case:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return make()

    return build


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 6, shape)


CASES: dict[str, Callable[[], Case]] = {
    "MLP": on((4,), mlp),
    "last layer": seeded(lambda: Case(mlp(), normal(5, 4), classes(5, of=3), subset="last_layer")),
    "Linear over positions": on((3, 4), lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Mean(), nn.Linear(5, 3))),
    "Conv1d": on((2, 5), lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3))),
    "Conv2d": on((2, 4, 4), lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))),
    "Conv2d, grouped": on(
        (2, 4, 4), lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    ),
    "Conv3d": on((1, 3, 3, 3), lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))),
    "in-place ReLU": on((4,), lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))),
    "LayerNorm": on((4,), lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))),
    "BatchNorm, eval": on((4,), lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))),
    "Embedding": seeded(lambda: Case(Tokens(), tokens(5, 4), classes(5, of=3))),
    "attention by `F.scaled_dot_product_attention`": on((3, 4), Attention),
    "`nn.MultiheadAttention`": on((3, 4), Multihead),
    "LSTM": on((3, 4), Recurrent),
    "tied weights": on((4,), tied),
    "frozen weight, trained bias": on((4,), lambda: frozen("weight")),
    "frozen bias, trained weight": on((4,), lambda: frozen("bias")),
    "bare parameter": on((4,), Scaled),
    "LoRA on GPT-2, mappings": seeded(lambda: Case(lora_gpt2(), tokens(5, 4), classes(5, of=3), mapping=True)),
    "mappings": seeded(lambda: Case(FromMapping(mlp()), normal(5, 4), classes(5, of=3), mapping=True)),
    "token outputs `(M, T, C)`": seeded(lambda: Case(mlp(), normal(5, 2, 4), classes(5, 2, of=3))),
    NOISE: seeded(lambda: Case(mlp(), normal(5, 4), normal(5, 3), likelihood="regression")),
}

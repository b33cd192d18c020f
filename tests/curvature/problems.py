"""Small models with data and a loss, one factory per trap; everything is seeded and in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode

F64 = torch.float64


@dataclass(frozen=True)
class Problem:
    """A model, a loss and batches ``(x, y)``."""

    model: nn.Module
    loss_fn: Any
    data: list[tuple[Any, Tensor]]
    class_dim: int | None = None

    def with_loss(self, loss_fn: nn.Module) -> Problem:
        return replace(self, loss_fn=loss_fn)


PROBLEMS: dict[str, Callable[[], Problem]] = {}


def problem(factory: Callable[[], Problem]) -> Callable[[], Problem]:
    """Register a factory; its model is built under a fixed seed, nudged off its initial values, in float64."""

    def build() -> Problem:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = factory()
            made.model.double()
            for tensor in [*made.model.parameters(), *made.model.buffers()]:
                if tensor.is_floating_point():
                    tensor.data += 0.1 * torch.randn_like(tensor).abs()
        return made

    PROBLEMS[factory.__name__] = build
    return build


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


def classes(*shape: int, of: int) -> Tensor:
    return torch.randint(0, of, shape)


def two_batches(*shape: int, of: int = 3, sizes: tuple[int, int] = (3, 2)) -> list[tuple[Any, Tensor]]:
    return [(normal(n, *shape), classes(n, of=of)) for n in sizes]


class KeepFloat64(TorchFunctionMode):
    """RMS norms, rotations and losses compute in float32 whatever the model's dtype is; here in float64, for digits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        narrows = func is Tensor.float or (func is Tensor.to and torch.float32 in args)
        if narrows and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


class Fn(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# Losses on a plain network -------------------------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


@problem
def mlp_ce() -> Problem:
    return Problem(mlp(), nn.CrossEntropyLoss(), two_batches(4))


@problem
def mlp_ce_sum() -> Problem:
    return Problem(mlp(), nn.CrossEntropyLoss(reduction="sum"), two_batches(4))


@problem
def mlp_ce_all_options() -> Problem:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0], dtype=F64), label_smoothing=0.2, ignore_index=1)
    x = [normal(4, 4), normal(3, 4)]
    return Problem(mlp(), loss, [(x[0], torch.tensor([0, 1, 2, 2])), (x[1], torch.tensor([1, 2, 0]))])


@problem
def mlp_ce_probabilities() -> Problem:
    data: list[tuple[Any, Tensor]] = [(normal(n, 4), normal(n, 3).softmax(-1)) for n in (3, 2)]
    return Problem(mlp(), nn.CrossEntropyLoss(label_smoothing=0.1), data)


@problem
def mlp_mse() -> Problem:
    return Problem(mlp(), nn.MSELoss(), [(normal(n, 4), normal(n, 3)) for n in (3, 2)])


@problem
def mlp_mse_one_number() -> Problem:
    """Outputs without a class axis: every entry is an example."""
    model = nn.Sequential(mlp(), Fn(lambda z: z.sum(-1)))
    return Problem(model, nn.MSELoss(reduction="sum"), [(normal(n, 4), normal(n)) for n in (3, 2)])


@problem
def mlp_bce() -> Problem:
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([0.5, 2.0, 4.0], dtype=F64))
    return Problem(mlp(), loss, [(normal(n, 4), classes(n, 3, of=2).double()) for n in (3, 2)])


# Dense layers in unusual places ---------------------------------------------------------------------------------------


@problem
def linear_on_sequences() -> Problem:
    """Linears on 3-D inputs, with in-place activations; positions have losses of their own."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 4, bias=False), nn.ReLU(True), mlp())
    data: list[tuple[Any, Tensor]] = [(normal(n, 3, 3), classes(n, 3, of=3)) for n in (3, 2)]
    return Problem(model, nn.CrossEntropyLoss(), data, class_dim=-1)


@problem
def linear_on_images() -> Problem:
    """A Linear with bias on a 4-D input, then pooling: positions share one loss."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), Fn(lambda x: x.mean((1, 2))), mlp())
    return Problem(model, nn.CrossEntropyLoss(), two_batches(2, 3, 3))


@problem
def positions_meet_in_the_loss() -> Problem:
    """A loss on (N, C, T), PyTorch's order, of a model that mixes the positions."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Fn(lambda x: x.mT), nn.Linear(2, 2), Fn(lambda x: x.mT), mlp())
    model.append(Fn(lambda x: x.mT))
    data: list[tuple[Any, Tensor]] = [(normal(n, 2, 4), classes(n, 2, of=3)) for n in (3, 2)]
    return Problem(model, nn.CrossEntropyLoss(), data, class_dim=1)


@problem
def flattened_by_the_model() -> Problem:
    """Outputs (N T, C) of a model that mixes the T positions."""
    model = nn.Sequential(Fn(lambda x: x + x.mean(1, keepdim=True)), nn.Linear(4, 4), nn.Tanh())
    model.extend([Fn(lambda x: (x + x.cumsum(1)).flatten(0, 1)), mlp()])
    data: list[tuple[Any, Tensor]] = [(normal(n, 2, 4), classes(2 * n, of=3)) for n in (3, 2)]
    return Problem(model, nn.CrossEntropyLoss(ignore_index=1), data)


@problem
def positions_picked_by_a_mask() -> Problem:
    """Outputs of some positions only: their number is a multiple of the batch, but they are not spread evenly."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 4), mlp()

        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            h = self.inner(x).tanh()
            return self.outer((h + h.mean(1, keepdim=True))[keep])

    keep = torch.tensor([[True, True, True], [True, False, False]])
    return Problem(Model(), nn.CrossEntropyLoss(), [((normal(2, 3, 4), keep), classes(4, of=3))])


class FrozenParts(nn.Module):
    """A frozen weight with a trained bias and the reverse, and a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(2, 2)
        self.norm = nn.LayerNorm(4)
        self.a.weight.requires_grad_(False)
        self.b.bias.requires_grad_(False)
        self.norm.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.norm(self.b(self.a(x).tanh())).tanh())


@problem
def frozen_parts() -> Problem:
    return Problem(FrozenParts(), nn.CrossEntropyLoss(), two_batches(4))


@problem
def module_used_twice() -> Problem:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.shared(x)).tanh()
            return self.head(self.norm(self.shared(h)) + h)

    return Problem(Model(), nn.CrossEntropyLoss(), two_batches(4))


@problem
def used_with_and_without_positions() -> Problem:
    """One matrix on (N, T, d) and on (N, d), and a bias shared by two layers."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
            self.other = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            h = self.shared(x).tanh().mean(1)
            h = self.shared(h).tanh()
            return self.head(F.linear(h, self.other, self.shared.bias))

    return Problem(Model(), nn.CrossEntropyLoss(), two_batches(2, 4))


class Functional(nn.Module):
    """Parameters as people use them without modules."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Parameter(torch.randn(4, 4))
        self.right = nn.Parameter(torch.randn(4, 4))
        self.transposed = nn.Parameter(torch.randn(4, 4))
        self.conv1d_weight, self.conv1d_bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
        self.packed = nn.Parameter(torch.randn(8, 4))
        self.chunked = nn.Parameter(torch.randn(8, 4))
        self.rows_and_columns = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.linear).tanh()
        x = (x @ self.right).tanh()
        x = torch.matmul(x, self.transposed.t()).tanh()
        x = torch.addmm(self.conv1d_bias, x, self.conv1d_weight).tanh()
        x = F.linear(x, self.packed[:4]) * F.linear(x, weight=self.packed[4:]).sigmoid()
        q, k = self.chunked.chunk(2)
        x = F.linear(x, q) + F.linear(x, k.T)
        return F.linear(x.tanh(), self.rows_and_columns[:, :3].t()) + self.rows_and_columns[3, :3]


@problem
def functional_uses() -> Problem:
    return Problem(Functional(), nn.CrossEntropyLoss(), two_batches(4))


# Bare parameters ------------------------------------------------------------------------------------------------------


class BareParameters(nn.Module):
    """A scale, a positional table, a class token and looked-up positions before an attention-like mixing."""

    def __init__(self, tokens: int = 3, d: int = 4) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(()))
        self.table = nn.Parameter(torch.randn(tokens + 1, d))
        self.token = nn.Parameter(torch.randn(1, 1, d))
        self.positions = nn.Embedding(tokens + 1, d)
        self.per_channel = nn.Parameter(torch.randn(1, d, 1))
        self.head = nn.Linear(d, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = x + self.table
        x = x + self.positions(torch.arange(x.shape[1]))
        x = self.scale * x.tanh() - self.shift
        x = (x.mT * self.per_channel).mT
        return self.head((x + x.cumsum(1)).tanh().mean(1))


@problem
def bare_parameters() -> Problem:
    return Problem(BareParameters(), nn.CrossEntropyLoss(), two_batches(3, 4))


@problem
def bare_parameters_where_batch_equals_length() -> Problem:
    """The number of examples is that of the positions: shapes alone cannot tell the axes apart."""
    return Problem(BareParameters(), nn.CrossEntropyLoss(), [(normal(4, 3, 4), classes(4, of=3))])


class UnknownUses(nn.Module):
    """Parameters in operations no rule covers, some next to uses that one does."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale, self.both = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4, 4))
        self.bias = nn.Parameter(torch.randn(4))
        self.normed = parametrizations.weight_norm(nn.Linear(4, 4))
        self.left = nn.Parameter(torch.randn(4))
        self.right = nn.Parameter(torch.randn(4))
        self.inplace = nn.Parameter(torch.randn(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.exp(self.log_scale) * x
        x = F.linear(x, self.both, self.bias) + x @ self.both.square()
        x = self.normed(x.tanh()) + (1 - self.left) * (self.left * self.right)
        x[:, 1:].add_(self.inplace[1:])
        return self.head(x.tanh())


@problem
def unknown_uses() -> Problem:
    return Problem(UnknownUses(), nn.CrossEntropyLoss(), two_batches(4))


class Hidden(torch.autograd.Function):
    """A kernel of one's own: functions modes do not see it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grads[0] @ weight.mT, x.mT @ grads[0]


class HiddenUses(nn.Module):
    """A parameter used by an unseen kernel only, and one also used in plain sight."""

    def __init__(self) -> None:
        super().__init__()
        self.only, self.also, self.head = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = Hidden.apply(x, self.only).tanh()
        return self.head(Hidden.apply(self.also(x).tanh(), self.also.weight).tanh())


@problem
def hidden_uses() -> Problem:
    return Problem(HiddenUses(), nn.CrossEntropyLoss(), two_batches(4))


class Detached(nn.Module):
    """Uses through which no gradient flows do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale, self.head = nn.Linear(4, 4), nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x).tanh() * self.scale
        with torch.no_grad():
            view = self.layer.weight[:]
            teacher = self.layer(x)
        return self.head(
            F.linear(h, self.layer.weight.detach()) + F.linear(h, view) + h * self.scale.detach() + teacher
        )


@problem
def detached_uses() -> Problem:
    return Problem(Detached(), nn.CrossEntropyLoss(), two_batches(4))


# Inputs ---------------------------------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    """Two inputs, the second with an axis of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 4), nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head((self.left(left) + self.right(right).mean(1)).tanh())


@problem
def two_inputs() -> Problem:
    data: list[tuple[Any, Tensor]] = [((normal(n, 4), normal(n, 3, 2)), classes(n, of=3)) for n in (3, 2)]
    return Problem(TwoInputs(), nn.CrossEntropyLoss(), data)


@problem
def mapping_inputs() -> Problem:
    data: list[tuple[Any, Tensor]] = [
        ({"left": normal(n, 4), "right": normal(n, 3, 2)}, classes(n, of=3)) for n in (3, 2)
    ]
    return Problem(TwoInputs(), nn.CrossEntropyLoss(), data)


# Convolutions and norms -----------------------------------------------------------------------------------------------


@problem
def cnn() -> Problem:
    """Stride, dilation, groups, padding, in-place activations, pooling."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, (2, 3), padding="same", dilation=2, groups=2),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", groups=4, bias=False),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    return Problem(model, nn.CrossEntropyLoss(), two_batches(2, 7, 8))


@problem
def conv_1d_and_3d() -> Problem:
    """A fully convolutional model with a loss per position, and a 3-D convolution."""
    model = nn.Sequential(
        nn.Conv3d(1, 2, (1, 2, 2), padding=(0, 1, 0)),
        Fn(lambda x: x.flatten(2).tanh()),
        nn.Conv1d(2, 2, 3, stride=2, groups=2),
        nn.Conv1d(2, 3, 1),
    )
    data: list[tuple[Any, Tensor]] = [(normal(n, 1, 2, 2, 2), classes(n, 2, of=3)) for n in (2, 1)]
    return Problem(model, nn.CrossEntropyLoss(), data, class_dim=1)


class Residual(nn.Module):
    """Convolutions, batch norms, an in-place sum as in torchvision, and the other norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.group, self.instance = nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)
        self.rms, self.head = nn.RMSNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(x))
        out += x
        x = F.silu(self.instance(self.group(out)))
        return self.head(self.rms(x.mean((2, 3))))


@problem
def residual_eval() -> Problem:
    return Problem(Residual().eval(), nn.CrossEntropyLoss(), two_batches(2, 3, 3))


@problem
def residual_train() -> Problem:
    """Batch norm in train mode: every output depends on every example."""
    return Problem(Residual(), nn.CrossEntropyLoss(), two_batches(2, 3, 3))


@problem
def layer_norm_over_two_axes() -> Problem:
    model = nn.Sequential(
        nn.Linear(2, 2), nn.LayerNorm((3, 2)), nn.Flatten(1), nn.BatchNorm1d(6).eval(), nn.Linear(6, 3)
    )
    return Problem(model, nn.CrossEntropyLoss(), two_batches(3, 2))


# Attention ------------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A stock encoder with a pooled head; ``time_major`` models see (T, N, d)."""

    def __init__(self, norm_first: bool, time_major: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            4, 2, 6, dropout=0.0, norm_first=norm_first, batch_first=not time_major, activation="gelu"
        )
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head, self.time = nn.Linear(4, 3), 0 if time_major else 1

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(self.time))


@problem
def encoder_pre_norm() -> Problem:
    return Problem(Encoder(norm_first=True), nn.CrossEntropyLoss(), two_batches(3, 4, sizes=(2, 1)))


@problem
def encoder_post_norm_eval() -> Problem:
    return Problem(Encoder(norm_first=False).eval(), nn.CrossEntropyLoss(), two_batches(3, 4, sizes=(2, 1)))


@problem
def encoder_time_major() -> Problem:
    """Inputs (T, N, d), pooled outputs (N, C)."""
    data: list[tuple[Any, Tensor]] = [(normal(2, n, 4), classes(n, of=3)) for n in (4, 3)]
    return Problem(Encoder(norm_first=True, time_major=True), nn.CrossEntropyLoss(), data)


@problem
def encoder_time_major_square() -> Problem:
    """As many positions as examples."""
    data: list[tuple[Any, Tensor]] = [(normal(3, 3, 4), classes(3, of=3))]
    return Problem(Encoder(norm_first=True, time_major=True), nn.CrossEntropyLoss(), data)


class Attention(nn.Module):
    """Cross-attention with all its extra parameters; queries are learned."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.attention = nn.MultiheadAttention(
            4, 2, kdim=3, vdim=5, add_bias_kv=True, add_zero_attn=True, batch_first=batch_first
        )
        self.query, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = self.query(q)
        if self.batch_first:
            return self.head(self.attention(q, k, v)[0])
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        return self.head(self.attention(q, k, v, need_weights=False)[0].transpose(0, 1))


def _attention(batch_first: bool) -> Problem:
    data: list[tuple[Any, Tensor]] = [
        ((normal(n, 2, 4), normal(n, 3, 3), normal(n, 3, 5)), classes(n, 2, of=3)) for n in (2, 1)
    ]
    return Problem(Attention(batch_first), nn.CrossEntropyLoss(), data, class_dim=-1)


@problem
def cross_attention() -> Problem:
    return _attention(True)


@problem
def cross_attention_inside_time_major() -> Problem:
    return _attention(False)


@problem
def attention_without_batch() -> Problem:
    """One sequence (T, d): its leading axis counts positions, and they interact."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.attention, self.head = nn.Linear(4, 4), nn.MultiheadAttention(4, 2), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            return self.head(x + self.attention(x, x, x)[0])

    return Problem(Model(), nn.CrossEntropyLoss(), [(normal(3, 4), classes(3, of=3))])


class LanguageModel(nn.Module):
    """Causal, with learned positions, a padding token and a head tied to the embedding."""

    def __init__(self, vocabulary: int = 5, length: int = 4, d: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, d, padding_idx=0)
        self.positions = nn.Embedding(length, d)
        self.q, self.k, self.v = (nn.Linear(d, d, bias=False) for _ in range(3))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        h = self.norm(x)
        x = x + F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h), is_causal=True)
        return self.head(x)


@problem
def language_model() -> Problem:
    """Padding (0) is ignored by the loss; the number of tokens differs from batch to batch."""
    first = torch.tensor([[1, 2, 2, 4], [3, 1, 0, 0]]), torch.tensor([[2, 2, 4, 1], [1, 0, 0, 0]])
    data: list[tuple[Any, Tensor]] = [first, (torch.tensor([[4, 4, 1]]), torch.tensor([[4, 1, 0]]))]
    return Problem(LanguageModel(), nn.CrossEntropyLoss(ignore_index=0), data, class_dim=-1)


@problem
def embeddings() -> Problem:
    """A table with repeated ids, a padding row that is present, and a frozen second table."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.frozen, self.head = nn.Embedding(5, 3, padding_idx=-2), nn.Embedding(5, 3), nn.Linear(3, 3)
            self.frozen.weight.requires_grad_(False)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head((self.table(ids) + self.frozen(ids)).tanh().sum(1))

    ids = torch.tensor([[1, 1, 4, 0], [3, 3, 3, 2], [0, 4, 0, 4]])
    return Problem(Model(), nn.CrossEntropyLoss(), [(ids, classes(3, of=3)), (ids[:1].clone(), classes(1, of=3))])


@problem
def channels_last() -> Problem:
    """Weights and activations whose memory is not in the order of their axes."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2), nn.ReLU(True), nn.Conv2d(4, 2, 1, bias=False), nn.Flatten(), nn.Linear(8, 3)
    )
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    data: list[tuple[Any, Tensor]] = [
        (normal(n, 2, 3, 3).to(memory_format=torch.channels_last), classes(n, of=3)) for n in (3, 2)
    ]
    return Problem(model, nn.CrossEntropyLoss(), data)


@problem
def stored_transposed() -> Problem:
    """A parameter that is not contiguous, whole and in parts."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.packed = nn.Parameter(torch.randn(4, 5).t()), nn.Parameter(torch.randn(4, 6).t())

        def forward(self, x: Tensor) -> Tensor:
            x = F.linear(x, self.weight).tanh()[:, :4]
            return F.linear(x, self.packed[:3]) + F.linear(x, self.packed[3:]) * 2

    return Problem(Model(), nn.CrossEntropyLoss(), two_batches(4))

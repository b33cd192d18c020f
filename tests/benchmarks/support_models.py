"""Small models of many families, each with a loss and data: the rows of :mod:`tests.benchmarks.support_table`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from curvature.losses import AutogradLoss
from tests.curvature.problems import (
    PROBLEMS,
    Attention,
    BareParameters,
    Encoder,
    Fn,
    FrozenParts,
    Functional,
    Hidden,
    LanguageModel,
    Residual,
    classes,
    normal,
)


@dataclass(frozen=True)
class Case:
    """A model with a loss and batches.

    Attributes:
        model: In the mode in which it is evaluated.
        loss_fn: The loss.
        data: Batches ``(x, y)``; ``y`` is one tensor, or a pair for losses of more.
        class_dim: Where the classes lie, if not along the last axis of two.
        output: Picks the output, where it is not a tensor.
        plain: The same function in operations that autograd can differentiate, where those of the model cannot be.
        meets: Whether examples meet in statistics of the batch.
        masked: Whether some terms are ignored, which the reference of Kronecker factors does not know.
    """

    model: nn.Module
    loss_fn: Any
    data: list[tuple[Any, Any]]
    class_dim: int | None = None
    output: Callable[[Any], Any] | None = None
    plain: nn.Module | None = None
    masked: bool = False
    meets: bool = False


#: (family, name) -> maker.
MODELS: dict[tuple[str, str], Callable[[], Case]] = {}
CE = nn.CrossEntropyLoss
F64 = torch.float64


def row(family: str, name: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Register a row; its model is made under a fixed seed."""

    def register(make: Callable[[], Case]) -> Callable[[], Case]:
        def made() -> Case:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                default = torch.get_default_dtype()
                torch.set_default_dtype(F64)
                try:
                    return make()
                finally:
                    torch.set_default_dtype(default)

        assert (family, name) not in MODELS, name
        MODELS[family, name] = made
        return made

    return register


class Net(nn.Module):
    """A function of inputs and of parts: parameters, modules and buffers."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, (nn.Module, nn.Parameter)):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, *x: Any) -> Any:
        return self.function(self, *x)


class Names(nn.Module):
    """Another function of a model's parameters, under their names."""

    def __init__(self, net: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function, self.__dict__["net"] = function, net

    def forward(self, *x: Any) -> Any:
        return self.function(self, *x)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """Those of the model."""
        return self.net.named_parameters(*args, **kwargs)


def weight(*shape: int, dtype: torch.dtype = F64) -> nn.Parameter:
    """A bare parameter."""
    return nn.Parameter(0.5 * torch.randn(*shape, dtype=dtype))


def labels(*shape: int, of: int = 3, sizes: tuple[int, ...] = (3, 2)) -> list[tuple[Any, Any]]:
    """Normal inputs and classes, in batches."""
    return [(normal(n, *shape), classes(n, of=of)) for n in sizes]


def numbers(*shape: int, to: tuple[int, ...], sizes: tuple[int, ...] = (3, 2)) -> list[tuple[Any, Any]]:
    """Normal inputs and targets, in batches."""
    return [(normal(n, *shape), normal(n, *to)) for n in sizes]


def classifier(family: str, name: str, *shape: int, **options: Any) -> Callable[[Callable[[], nn.Module]], Any]:
    """Register a model of inputs ``(N, *shape)`` with three classes."""

    def register(make: Callable[[], nn.Module]) -> Any:
        return row(family, name)(lambda: Case(make(), CE(), labels(*shape), **options))

    return register


def regression(family: str, name: str, *shape: int, to: tuple[int, ...] = (2,), **options: Any) -> Any:
    """Register a model of inputs ``(N, *shape)`` with targets ``(N, *to)``."""

    def register(make: Callable[[], nn.Module]) -> Any:
        return row(family, name)(lambda: Case(make(), nn.MSELoss(), numbers(*shape, to=to), **options))

    return register


def mlp(d: int = 3, out: int = 3, *last: nn.Module) -> nn.Sequential:
    """Two layers."""
    return nn.Sequential(nn.Linear(d, 4), nn.Tanh(), nn.Linear(4, out), *last)


# Losses ---------------------------------------------------------------------------------------------------------------


def loss(name: str, make: Callable[[], Any], target: Callable[[int], Any], *last: nn.Module, **options: Any) -> None:
    """Register a loss on two layers."""
    masked = options.pop("masked", False)
    data: Any = lambda: [(normal(n, 3), target(n)) for n in (3, 2)]  # noqa: E731
    row("losses", name)(lambda: Case(mlp(3, 3, *last), make(), data(), masked=masked, **options))


def soft(n: int) -> Tensor:
    """Probabilities of classes."""
    return normal(n, 3).softmax(-1)


def bits(n: int) -> Tensor:
    """Zeros and ones."""
    return classes(n, 3, of=2).double()


def focal(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy, weighted by how hard an example is."""
    log_p = output.log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
    return (-(2 - log_p.exp()) * log_p).mean()


def quantile(output: Tensor, target: Tensor) -> Tensor:
    """Pinball loss, smoothed."""
    return (0.3 * (target - output) + F.softplus(output - target)).mean(-1).mean()


def contrast(output: Tensor, target: Tensor) -> Tensor:
    """Every example against all others of its batch."""
    z = F.normalize(output, dim=-1)
    return F.cross_entropy(z @ z.mT - 9 * torch.eye(len(z), dtype=z.dtype), target % len(z))


W3 = torch.tensor([0.5, 2.0, 1.0], dtype=F64)
LOG, PROB = nn.LogSoftmax(-1), nn.Sigmoid()
loss("MSELoss", nn.MSELoss, lambda n: normal(n, 3))
loss("MSELoss, sum", partial(nn.MSELoss, reduction="sum"), lambda n: normal(n, 3))
loss("L1Loss", nn.L1Loss, lambda n: normal(n, 3))
loss("HuberLoss", partial(nn.HuberLoss, delta=0.7), lambda n: normal(n, 3))
loss("SmoothL1Loss", partial(nn.SmoothL1Loss, beta=0.7), lambda n: normal(n, 3))
loss("CrossEntropyLoss", CE, lambda n: classes(n, of=3))
loss("CrossEntropyLoss, sum", partial(CE, reduction="sum"), lambda n: classes(n, of=3))
loss("CrossEntropyLoss, class weights", lambda: CE(weight=W3), lambda n: classes(n, of=3))
loss("CrossEntropyLoss, label smoothing", partial(CE, label_smoothing=0.2), lambda n: classes(n, of=3))
loss("CrossEntropyLoss, some ignored", partial(CE, ignore_index=1), lambda n: torch.tensor([0, 1, 2])[:n], masked=True)
loss("CrossEntropyLoss, class probabilities", CE, soft)
loss("CrossEntropyLoss, as a function", lambda: F.cross_entropy, lambda n: classes(n, of=3))
loss("NLLLoss", nn.NLLLoss, lambda n: classes(n, of=3), LOG)
loss("NLLLoss, class weights", lambda: nn.NLLLoss(weight=W3), lambda n: classes(n, of=3), LOG)
loss("KLDivLoss", partial(nn.KLDivLoss, reduction="batchmean"), soft, LOG)
loss("BCELoss", nn.BCELoss, bits, PROB)
loss("BCEWithLogitsLoss", nn.BCEWithLogitsLoss, bits)
loss("BCEWithLogitsLoss, pos_weight", lambda: nn.BCEWithLogitsLoss(pos_weight=W3), bits)
loss("PoissonNLLLoss", nn.PoissonNLLLoss, bits)
loss("PoissonNLLLoss of rates", partial(nn.PoissonNLLLoss, log_input=False), bits, nn.Softplus())
loss("GaussianNLLLoss, given variances", nn.GaussianNLLLoss, lambda n: (normal(n, 3), normal(n, 3).exp()))
loss("HingeEmbeddingLoss", nn.HingeEmbeddingLoss, lambda n: 2 * bits(n) - 1)
loss("SoftMarginLoss", nn.SoftMarginLoss, lambda n: 2 * bits(n) - 1)
loss("MultiLabelSoftMarginLoss", nn.MultiLabelSoftMarginLoss, bits)
loss("MultiMarginLoss", nn.MultiMarginLoss, lambda n: classes(n, of=3))
loss("MultiLabelMarginLoss", nn.MultiLabelMarginLoss, lambda n: torch.tensor([0, 2, -1]).expand(n, 3))
loss("focal, AutogradLoss", lambda: AutogradLoss(focal, reduction="mean"), lambda n: classes(n, of=3))
loss("focal, a plain function", lambda: focal, lambda n: classes(n, of=3))
loss("quantile, AutogradLoss", lambda: AutogradLoss(quantile, reduction="mean"), lambda n: normal(n, 3))


@row("losses", "contrastive, a plain function")
def _contrastive() -> Case:
    return Case(mlp(), contrast, labels(3, sizes=(4,)))


@row("losses", "GaussianNLLLoss, the model's variances")
def _heteroscedastic() -> Case:
    model = Net(lambda m, x: (m.mean(x), m.spread(x).exp()), mean=mlp(3, 2), spread=nn.Linear(3, 2))
    return Case(model, nn.GaussianNLLLoss(), numbers(3, to=(2,)), output=lambda result: result)


def several(name: str, given: Any, outputs: int) -> None:
    """Register a loss of several tensors, wrapped in a function of an output and a target."""

    def make() -> Case:
        model = Net(lambda m, x: tuple(m.net(part) for part in x.unbind(1)), net=mlp(3, 3, nn.Tanh()))
        y = torch.tensor([1, -1, -1, 1])
        return Case(model, given, [(normal(4, outputs, 3), y)], output=lambda result: result)

    row("losses", name)(make)


several("CosineEmbeddingLoss, in a function", lambda z, y: F.cosine_embedding_loss(*z, y), 2)
several("MarginRankingLoss, in a function", lambda z, y: F.margin_ranking_loss(*z, y.double()[:, None], 0.5), 2)
several("TripletMarginLoss, in a function", lambda z, y: F.triplet_margin_loss(*z), 3)
several(
    "TripletMarginWithDistanceLoss, in a function", lambda z, y: F.triplet_margin_with_distance_loss(*z, margin=2.0), 3
)


@row("losses", "CTCLoss, in a function")
def _ctc() -> Case:
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), LOG)
    lengths = torch.tensor([4, 4])
    ctc: Any = lambda z, y: F.ctc_loss(z.transpose(0, 1), y, lengths, torch.tensor([2, 2]))  # noqa: E731
    return Case(net, ctc, [(normal(2, 4, 2), torch.tensor([[1, 2], [2, 1]]))])


@row("losses", "a penalty of weights in the loss")
def _penalty() -> Case:
    model = mlp()
    penalised: Any = lambda z, y: F.cross_entropy(z, y) + model[0].weight.square().sum()  # noqa: E731
    return Case(model, AutogradLoss(penalised, reduction="mean"), labels(3))


# Vision ---------------------------------------------------------------------------------------------------------------


@classifier("vision", "LeNet", 1, 8, 8)
def _lenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 3, 2), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(3, 3)),
    )


@classifier("vision", "convolutions with stride, dilation, groups, circular padding", 2, 7, 8)
def _cnn() -> nn.Module:
    return PROBLEMS["cnn"]().model


@classifier("vision", "MobileNet block: depthwise separable, expanded", 2, 4, 4)
def _mobile() -> nn.Module:
    block = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 2, 1))
    return Net(lambda m, x: m.head((x + m.block(x)).mean((2, 3))), block=block, head=nn.Linear(2, 3))


@classifier("vision", "ResNet blocks, norms in evaluation mode", 2, 3, 3)
def _resnet() -> nn.Module:
    return Residual().eval()


@row("vision", "ResNet blocks, batch norm in train mode")
def _resnet_train() -> Case:
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3), nn.ReLU(), nn.Flatten(), mlp(9))
    return Case(model, CE(), labels(2, 4, sizes=(4,)), meets=True)


@classifier("vision", "squeeze and excitation", 3, 4, 4)
def _squeeze() -> nn.Module:
    gate = nn.Sequential(nn.Linear(3, 2), nn.SiLU(), nn.Linear(2, 3), nn.Sigmoid())
    return Net(
        lambda m, x: m.head((m.conv(x) * m.gate(x.mean((2, 3)))[..., None, None]).mean((2, 3))),
        **{"conv": nn.Conv2d(3, 3, 3), "gate": gate, "head": nn.Linear(3, 3)},
    )


@classifier("vision", "ConvNeXt block: layer scale, channels last", 3, 4, 4)
def _convnext() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.norm(m.conv(x).permute(0, 2, 3, 1))
        return m.head((x + (m.scale * m.down(F.gelu(m.up(h)))).permute(0, 3, 1, 2)).mean((2, 3)))

    parts = {"norm": nn.LayerNorm(3), "up": nn.Linear(3, 4), "down": nn.Linear(4, 3), "head": nn.Linear(3, 3)}
    return Net(forward, conv=nn.Conv2d(3, 3, 3, padding=1, groups=3), scale=weight(3), **parts)


@classifier("vision", "vision transformer", 1, 4, 4)
def _vit() -> nn.Module:
    patches = nn.Sequential(nn.Conv2d(1, 4, 2, stride=2), nn.Flatten(2), Fn(lambda x: x.mT))
    return nn.Sequential(patches, BareParameters(4, 4))


@classifier("vision", "transformer block with a class token", 3, 4)
def _class_token() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.cat([m.token.expand(len(x), 1, 4), x], 1) + m.positions
        return m.head(m.block(h)[:, 0])

    block = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True, norm_first=True)
    return Net(forward, token=weight(1, 1, 4), positions=weight(4, 4), block=block, head=nn.Linear(4, 3))


@classifier("vision", "MLP-mixer block", 3, 4)
def _mixer() -> nn.Module:
    return Net(
        lambda m, x: m.head((m.channels(x + m.tokens(x.mT).tanh().mT)).tanh().mean(1)),
        **{"tokens": nn.Linear(3, 3), "channels": nn.Linear(4, 4), "head": nn.Linear(4, 3)},
    )


@classifier("vision", "shifted windows with a table of relative positions", 4, 4)
def _windows() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x.roll(1, 1).reshape(-1, 2, 2, 4)
        q, k = m.qk(h).chunk(2, -1)
        attention = (q @ k.mT + m.bias[m.index]).softmax(-1)
        return m.head((attention @ h).reshape(x.shape).roll(-1, 1).mean(1))

    index = torch.tensor([[1, 2], [0, 1]])
    return Net(forward, qk=nn.Linear(4, 6), bias=weight(3), index=index, head=nn.Linear(4, 3))


@row("vision", "U-Net, a class for each pixel")
def _unet() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        down = m.enter(x).tanh()
        return m.head(torch.cat([down, m.up(m.inner(F.max_pool2d(down, 2)).tanh())], 1))

    parts = {"enter": nn.Conv2d(1, 2, 1), "inner": nn.Conv2d(2, 2, 1), "head": nn.Conv2d(4, 3, 1)}
    model = Net(forward, up=nn.ConvTranspose2d(2, 2, 2, stride=2), **parts)
    return Case(model, CE(), [(normal(n, 1, 2, 2), classes(n, 2, 2, of=3)) for n in (2, 1)], class_dim=1)


@regression("vision", "super-resolution by pixel shuffle", 1, 2, 2, to=(1, 4, 4))
def _pixels() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 4, 1), nn.PixelShuffle(2))


@classifier("vision", "spatial transformer (grid_sample)", 1, 4, 4)
def _spatial() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        theta = m.where(x.flatten(1)).tanh().reshape(-1, 2, 3)
        return m.head(F.grid_sample(x, F.affine_grid(theta, [len(x), 1, 3, 3], False), align_corners=False).flatten(1))

    return Net(forward, where=nn.Linear(16, 6), head=nn.Linear(9, 3))


@classifier("vision", "Conv1d and Conv3d", 1, 2, 3, 3)
def _conv3d() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Flatten(2), nn.Conv1d(2, 2, 2), nn.ELU(), nn.Flatten(), nn.Linear(6, 3))
    )


@classifier("vision", "group norm and weight standardisation", 2, 4, 4)
def _standardised() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        w = m.conv.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return m.head(m.norm(F.conv2d(x, w, m.conv.bias)).relu().mean((2, 3)))

    return Net(forward, conv=nn.Conv2d(2, 4, 3), norm=nn.GroupNorm(2, 4), head=nn.Linear(4, 3))


@classifier("vision", "Siamese pairs", 2, 4)
def _siamese() -> nn.Module:
    return Net(
        lambda m, x: m.head((m.net(x[:, 0]) - m.net(x[:, 1])).square()), net=nn.Linear(4, 4), head=nn.Linear(4, 3)
    )


@classifier("vision", "DenseNet block", 2, 3, 3)
def _dense() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        for conv in (m.first, m.second):
            x = torch.cat([x, conv(x).relu()], 1)
        return m.head(x.mean((2, 3)))

    parts = {"first": nn.Conv2d(2, 2, 3, padding=1), "second": nn.Conv2d(4, 2, 1), "head": nn.Linear(6, 3)}
    return Net(forward, **parts)


# Language -------------------------------------------------------------------------------------------------------------


def ids(*shape: int, of: int = 5) -> Tensor:
    """Tokens."""
    return classes(*shape, of=of)


def texts(length: int = 3, sizes: tuple[int, ...] = (3, 2)) -> list[tuple[Any, Any]]:
    """Tokens with a class."""
    return [(ids(n, length), classes(n, of=3)) for n in sizes]


def reader(name: str, length: int = 3) -> Callable[[Callable[[], nn.Module]], Any]:
    """Register a model that classifies texts."""

    def register(make: Callable[[], nn.Module]) -> Any:
        return row("language", name)(lambda: Case(make(), CE(), texts(length)))

    return register


@row("language", "bags of embeddings (EmbeddingBag)")
def _bag() -> Case:
    model = nn.Sequential(nn.EmbeddingBag(5, 4, mode="mean"), nn.Tanh(), nn.Linear(4, 3))
    plain = Net(lambda m, x: m.rest(m.bag.weight[x].mean(1)), bag=model[0], rest=model[1:])
    return Case(model, CE(), texts(), plain=plain)


@row("language", "bags of embeddings with offsets, weighted sums")
def _offsets() -> Case:
    model = Net(lambda m, i, o, w: m.head(m.bag(i, o, w).tanh()), bag=nn.EmbeddingBag(5, 3, mode="sum"))
    model.head = nn.Linear(3, 3)
    x, where = (ids(7), torch.tensor([0, 2, 6]), normal(7)), torch.tensor([0, 0, 1, 1, 1, 1, 2])
    plain = Net(lambda m, i, o, w: m.head(spread(m.bag.weight[i] * w[:, None], where, 3).tanh()), bag=model.bag)
    plain.head = model.head
    return Case(model, CE(), [(x, classes(3, of=3))], plain=plain)


@reader("text CNN, maxima over time", 4)
def _text_cnn() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.conv(m.table(x).mT).amax(-1).tanh()),
        **{"table": nn.Embedding(5, 3), "conv": nn.Conv1d(3, 4, 2), "head": nn.Linear(4, 3)},
    )


@row("language", "causal model, head tied to the embedding, padding ignored")
def _causal() -> Case:
    first = torch.tensor([[1, 2, 4], [3, 1, 0]]), torch.tensor([[2, 4, 1], [1, 0, 0]])
    return Case(LanguageModel(), CE(ignore_index=0), [first], class_dim=-1, masked=True)


@classifier("language", "encoder, norm first", 3, 4)
def _pre_norm() -> nn.Module:
    return Encoder(norm_first=True)


@classifier("language", "encoder, norm last, in evaluation mode", 3, 4)
def _post_norm() -> nn.Module:
    return Encoder(norm_first=False).eval()


@row("language", "encoder, time first")
def _time_major() -> Case:
    data: list[tuple[Any, Any]] = [(normal(2, n, 4), classes(n, of=3)) for n in (4, 3)]
    return Case(Encoder(norm_first=True, time_major=True), CE(), data)


@row("language", "cross-attention with all its parameters (MultiheadAttention)")
def _cross() -> Case:
    x = (normal(2, 2, 4), normal(2, 3, 3), normal(2, 3, 5))
    return Case(Attention(True), CE(), [(x, classes(2, 2, of=3))], class_dim=-1)


@row("language", "encoder and decoder (nn.Transformer)")
def _seq2seq() -> Case:
    inner = nn.Transformer(2, 1, 1, 1, 3, dropout=0.0, batch_first=True)
    model = Net(lambda m, s, t: m.head(m.inner(m.table(s), m.table(t))), table=nn.Embedding(5, 2), inner=inner)
    model.head = nn.Linear(2, 3)
    return Case(model, CE(), [((ids(2, 3), ids(2, 2)), classes(2, 2, of=3))], class_dim=-1)


def rotate(x: Tensor) -> Tensor:
    """Rotary positions, along the second axis from the end."""
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


@classifier("language", "LLaMA block: RMSNorm, rotary positions, SwiGLU", 3, 4)
def _llama() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.norm(x)
        x = x + F.scaled_dot_product_attention(rotate(m.q(h)), rotate(m.k(h)), m.v(h), is_causal=True)
        return m.head((x + m.down(F.silu(m.gate(x)) * m.up(x)))[:, -1])

    layers = {name: nn.Linear(4, 4, bias=False) for name in ("q", "k", "v", "gate", "up", "down")}
    return Net(forward, norm=nn.RMSNorm(4), head=nn.Linear(4, 3), **layers)


@classifier("language", "grouped queries, ALiBi", 3, 4)
def _grouped() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.q(x).unflatten(-1, (2, 2)).transpose(1, 2), m.k(x)[:, None], m.v(x)[:, None]
        bias = -(torch.arange(3)[:, None] - torch.arange(3)).abs() * m.slope.exp()[:, None, None]
        h = (q @ k.mT + bias).softmax(-1) @ v
        return m.head(h.transpose(1, 2).flatten(2).mean(1))

    parts = {"q": nn.Linear(4, 4), "k": nn.Linear(4, 2), "v": nn.Linear(4, 2), "head": nn.Linear(4, 3)}
    return Net(forward, slope=weight(2), **parts)


@classifier("language", "linear attention (Performer)", 3, 3)
def _performer() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = F.elu(m.q(x)) + 1, F.elu(m.k(x)) + 1, m.v(x)
        h = torch.einsum("ntk,nkv->ntv", q, torch.einsum("ntk,ntv->nkv", k, v)) / (q * k.sum(1, True)).sum(-1, True)
        return m.head(h.mean(1))

    return Net(forward, **{name: nn.Linear(3, 3) for name in ("q", "k", "v", "head")})


@classifier("language", "one layer used at every depth (ALBERT)", 4)
def _albert() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + m.norm(m.shared(x)).tanh()
        return m.head(x)

    return Net(forward, shared=nn.Linear(4, 4), norm=nn.LayerNorm(4), head=nn.Linear(4, 3))


@classifier("language", "FNet: Fourier transforms for attention", 3, 4)
def _fnet() -> nn.Module:
    return Net(
        lambda m, x: m.head((x + m.up(torch.fft.fft2(x).real).tanh()).mean(1)), up=nn.Linear(4, 4), head=nn.Linear(4, 3)
    )


@classifier("language", "LoRA on frozen layers", 4)
def _lora() -> nn.Module:
    base = mlp(4).requires_grad_(False)
    return Net(
        lambda m, x: m.base(x) + m.up(m.down(x)), base=base, down=nn.Linear(4, 2, bias=False), up=nn.Linear(2, 3)
    )


@reader("prompt tuning of a frozen encoder")
def _prompt() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.encoder(torch.cat([m.prompt.expand(len(x), -1, -1), m.table(x)], 1))

    frozen = {"table": nn.Embedding(5, 4).requires_grad_(False), "encoder": Encoder(True).requires_grad_(False)}
    return Net(forward, prompt=weight(2, 4), **frozen)


@reader("embeddings with padding, frozen table beside")
def _tables() -> nn.Module:
    return Net(
        lambda m, x: m.head((m.table(x) + m.frozen(x)).tanh().sum(1)),
        table=nn.Embedding(5, 3, padding_idx=2),
        frozen=nn.Embedding(5, 3).requires_grad_(False),
        head=nn.Linear(3, 3),
    )


@row("language", "embeddings with sparse gradients")
def _sparse() -> Case:
    parts = {"table": nn.Embedding(5, 3, sparse=True), "head": nn.Linear(3, 3)}
    plain = Net(lambda m, x: m.head(m.table.weight[x].tanh().sum(1)), **parts)
    return Case(Net(lambda m, x: m.head(m.table(x).tanh().sum(1)), **parts), CE(), texts(), plain=plain)


# Graphs ---------------------------------------------------------------------------------------------------------------

EDGES = torch.tensor([[0, 1, 2, 3, 0, 2], [1, 2, 3, 0, 2, 0]])
NODES = torch.tensor([0, 2, 1, 1])


def nodes(name: str) -> Callable[[Callable[[], nn.Module]], Any]:
    """Register a model of ``(x, edges)`` that classifies nodes."""

    def register(make: Callable[[], nn.Module]) -> Any:
        return row("graphs", name)(lambda: Case(make(), CE(), [((normal(4, 3), EDGES), NODES)]))

    return register


def spread(values: Tensor, at: Tensor, n: int) -> Tensor:
    """Sum of the values at each node."""
    return torch.zeros(n, *values.shape[1:], dtype=values.dtype).index_add(0, at, values)


@row("graphs", "GCN with an adjacency matrix")
def _gcn() -> Case:
    model = Net(lambda m, x, a: m.head(a @ m.inner(a @ x).tanh()), inner=nn.Linear(3, 4), head=nn.Linear(4, 3))
    a = torch.zeros(4, 4, dtype=F64)
    a[EDGES[0], EDGES[1]] = 0.5
    return Case(model, CE(), [((normal(4, 3), a + torch.eye(4, dtype=F64)), NODES)])


@nodes("GraphSAGE, sums by index_add")
def _sage() -> nn.Module:
    return Net(
        lambda m, x, e: m.head((m.own(x) + m.other(spread(x[e[0]], e[1], len(x)))).tanh()),
        **{"own": nn.Linear(3, 4), "other": nn.Linear(3, 4, bias=False), "head": nn.Linear(4, 3)},
    )


@nodes("graph attention (GAT)")
def _gat() -> nn.Module:
    def forward(m: Any, x: Tensor, e: Tensor) -> Tensor:
        h = m.inner(x)
        a = F.leaky_relu(torch.cat([h[e[0]], h[e[1]]], -1) @ m.attention).exp()
        return m.head(spread(a[:, None] * h[e[0]], e[1], 4) / spread(a, e[1], 4)[:, None])

    return Net(forward, inner=nn.Linear(3, 4), attention=weight(8), head=nn.Linear(4, 3))


@nodes("GIN with a learned epsilon")
def _gin() -> nn.Module:
    return Net(lambda m, x, e: m.net((1 + m.eps) * x + spread(x[e[0]], e[1], 4)), eps=weight(1), net=mlp())


@row("graphs", "list of edges first, messages from features of edges")
def _messages() -> Case:
    def forward(m: Any, e: Tensor, x: Tensor, f: Tensor) -> Tensor:
        return m.head(x + spread(m.message(torch.cat([x[e[0]], f], -1)).tanh(), e[1], 4))

    model = Net(forward, message=nn.Linear(5, 3), head=nn.Linear(3, 3))
    return Case(model, CE(), [((EDGES, normal(4, 3), normal(6, 2)), NODES)])


@row("graphs", "several graphs in a batch, pooled by an index")
def _pooled() -> Case:
    model = Net(lambda m, x, where: m.head(spread(m.inner(x).tanh(), where, 3)), inner=nn.Linear(3, 4))
    model.head = nn.Linear(4, 3)
    return Case(model, CE(), [((normal(7, 3), torch.tensor([0, 0, 1, 1, 1, 2, 2])), classes(3, of=3))])


@classifier("graphs", "sets: sums (DeepSets)", 3, 2)
def _sets() -> nn.Module:
    return Net(lambda m, x: m.outer(m.inner(x).tanh().sum(1)), inner=nn.Linear(2, 4), outer=nn.Linear(4, 3))


@classifier("graphs", "points: maxima (PointNet)", 4, 3)
def _points() -> nn.Module:
    return Net(lambda m, x: m.outer(m.inner(x).tanh().amax(1)), inner=nn.Linear(3, 4), outer=nn.Linear(4, 3))


@row("graphs", "knowledge graph embeddings (DistMult)")
def _distmult() -> Case:
    model = Net(lambda m, t: (m.node(t[:, 0]) * m.kind(t[:, 1]) * m.node(t[:, 2])).sum(-1), node=nn.Embedding(4, 3))
    model.kind = nn.Embedding(2, 3)
    return Case(model, nn.BCEWithLogitsLoss(), [(classes(n, 3, of=2), bits(n)[:, 0]) for n in (3, 2)])


@row("graphs", "matrix factorisation with biases")
def _factorisation() -> Case:
    def forward(m: Any, t: Tensor) -> Tensor:
        return (m.user(t[:, 0]) * m.item(t[:, 1])).sum(-1) + m.bias(t[:, 0])[:, 0] + m.mean

    model = Net(forward, user=nn.Embedding(4, 2), item=nn.Embedding(3, 2), bias=nn.Embedding(4, 1), mean=weight(1))
    return Case(model, nn.MSELoss(), [(classes(n, 2, of=3), normal(n)) for n in (3, 2)])


# Physics --------------------------------------------------------------------------------------------------------------


@row("physics", "PINN: residual of Poisson's equation, by derivatives in forward")
def _pinn() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.requires_grad_() if x.is_leaf else x
            u = m.net(x)
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        return bend + u

    data = [(normal(n, 1), normal(n, 1)) for n in (3, 2)]
    return Case(Net(forward, net=nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))), nn.MSELoss(), data)


@regression("physics", "PINN by torch.func, vmap over points", 2, to=(1,))
def _pinn_func() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        def bend(point: Tensor) -> Tensor:
            return torch.func.hessian(lambda p: m.net(p).sum())(point).diagonal().sum()

        return vmap(bend)(x)[:, None]

    return Net(forward, net=mlp(2, 1))


@regression("physics", "Hamiltonian network", 2)
def _hamiltonian() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(m.net(x).sum(), x, create_graph=True)
        return torch.stack([slope[:, 1], -slope[:, 0]], 1)

    return Net(forward, net=mlp(2, 1))


@regression("physics", "neural ODE, Runge-Kutta", 2)
def _ode() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            a = m.field(x)
            b = m.field(x + 0.25 * a)
            x = x + 0.5 * b
        return x

    return Net(forward, field=mlp(2, 2))


@regression("physics", "neural SDE on given noise", 2, 2)
def _sde() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        state, noise = x.unbind(1)
        return state + 0.1 * m.drift(state) + 0.3 * m.diffusion.exp() * noise

    return Net(forward, drift=mlp(2, 2), diffusion=weight(2))


@row("physics", "DeepONet: branch and trunk")
def _deeponet() -> Case:
    model = Net(lambda m, u, x: (m.branch(u) * m.trunk(x)).sum(-1, keepdim=True), branch=mlp(3, 3), trunk=mlp(1, 3))
    return Case(model, nn.MSELoss(), [((normal(n, 3), normal(n, 1)), normal(n, 1)) for n in (3, 2)])


@regression("physics", "Fourier neural operator, complex weights", 4, to=(4,))
def _fno() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        kernel = torch.view_as_complex(m.kernel)
        h = torch.fft.irfft(torch.fft.rfft(x) * kernel, 4) + m.local(x)
        return m.head(h.tanh())

    return Net(forward, kernel=weight(3, 2), local=nn.Linear(4, 4), head=nn.Linear(4, 4))


@regression("physics", "complex parameters", 3)
def _complex() -> nn.Module:
    return Net(lambda m, x: torch.view_as_real(x.to(m.w.dtype) @ m.w).sum(-1), w=weight(3, 2, dtype=torch.complex128))


@regression("physics", "SIREN", 2)
def _siren() -> nn.Module:
    return Net(lambda m, x: m.outer((3 * m.inner(x)).sin()), inner=nn.Linear(2, 4), outer=nn.Linear(4, 2))


@regression("physics", "Fourier features, fixed", 2)
def _features() -> nn.Module:
    return Net(
        lambda m, x: m.net(torch.cat([(x @ m.omega).sin(), (x @ m.omega).cos()], -1)), omega=normal(2, 2), net=mlp(4, 2)
    )


@regression("physics", "invariant under rotations: distances", 3, 2)
def _invariant() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        i, j = torch.triu_indices(3, 3, 1)
        return m.net((x[:, i] - x[:, j]).square().sum(-1))

    return Net(forward, net=mlp(3, 2))


@regression("physics", "fixed point, unrolled (DEQ)", 2)
def _deq() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(4):
            z = (0.3 * m.inner(z) + m.enter(x)).tanh()
        return m.head(z)

    return Net(forward, inner=nn.Linear(2, 2), enter=nn.Linear(2, 2), head=nn.Linear(2, 2))


@regression("physics", "a linear solve with learned matrix", 2)
def _solve() -> nn.Module:
    return Net(lambda m, x: torch.linalg.solve(3 * torch.eye(2).to(x) + m.matrix, x.mT).mT, matrix=weight(2, 2))


@regression("physics", "matrix exponential", 2)
def _exponential() -> nn.Module:
    return Net(lambda m, x: x @ torch.linalg.matrix_exp(m.generator - m.generator.mT), generator=weight(2, 2))


@regression("physics", "splines on edges (KAN)", 2)
def _kan() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        basis = (-(x[..., None] - m.centers).square()).exp()
        return torch.einsum("nik,oik->no", basis, m.coefficients) + F.silu(x) @ m.base

    return Net(forward, centers=torch.linspace(-1, 1, 3), coefficients=weight(2, 2, 3), base=weight(2, 2))


@regression("physics", "radial basis functions (cdist)", 2)
def _radial() -> nn.Module:
    return Net(lambda m, x: m.head((-torch.cdist(x, m.centers)).exp()), centers=weight(3, 2), head=nn.Linear(3, 2))


# Recurrent ------------------------------------------------------------------------------------------------------------


def recurrent(name: str, inner: Callable[[], nn.Module], width: int = 3) -> None:
    """Register a recurrent network of which the last output is classified."""
    model: Any = lambda: Net(lambda m, x: m.head(m.inner(x)[0][:, -1]), inner=inner(), head=nn.Linear(width, 3))  # noqa: E731
    row("recurrent", name)(lambda: Case(model(), CE(), labels(3, 2)))


recurrent("RNN, tanh", lambda: nn.RNN(2, 3, batch_first=True))
recurrent("RNN, ReLU, no bias", lambda: nn.RNN(2, 3, batch_first=True, nonlinearity="relu", bias=False))
recurrent("LSTM", lambda: nn.LSTM(2, 3, batch_first=True))
recurrent("LSTM, two layers in both directions", lambda: nn.LSTM(2, 2, 2, batch_first=True, bidirectional=True), 4)
recurrent("LSTM with projections", lambda: nn.LSTM(2, 4, batch_first=True, proj_size=3))
recurrent("GRU", lambda: nn.GRU(2, 3, batch_first=True))


def cells(name: str, cell: Callable[[], nn.Module], pair: bool = False) -> None:
    """Register a cell that is called in a loop."""

    def forward(m: Any, x: Tensor) -> Tensor:
        state: Any = None
        for step in x.unbind(1):
            state = m.cell(step, state)
        return m.head(state[0] if pair else state)

    row("recurrent", name)(lambda: Case(Net(forward, cell=cell(), head=nn.Linear(3, 3)), CE(), labels(3, 2)))


cells("RNNCell in a loop", lambda: nn.RNNCell(2, 3))
cells("GRUCell in a loop", lambda: nn.GRUCell(2, 3))
cells("LSTMCell in a loop", lambda: nn.LSTMCell(2, 3), pair=True)


@row("recurrent", "packed sequences of several lengths")
def _packed() -> Case:
    def forward(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return m.head(m.inner(packed)[1][-1])

    model = Net(forward, inner=nn.GRU(2, 3, batch_first=True), head=nn.Linear(3, 3))
    return Case(model, CE(), [((normal(3, 4, 2), torch.tensor([2, 4, 1])), classes(3, of=3))])


@row("recurrent", "packed and padded again, a class for each position")
def _padded() -> Case:
    def forward(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return m.head(pad_packed_sequence(m.inner(packed)[0], batch_first=True)[0])

    model = Net(forward, inner=nn.LSTM(2, 2, batch_first=True), head=nn.Linear(2, 3))
    y = torch.tensor([[0, 1, -100], [2, 2, 1]])
    return Case(model, CE(), [((normal(2, 3, 2), torch.tensor([2, 3])), y)], class_dim=-1, masked=True)


@row("recurrent", "LSTM, a class for each position")
def _tagger() -> Case:
    model = Net(lambda m, x: m.head(m.inner(x)[0]), inner=nn.LSTM(2, 2, batch_first=True), head=nn.Linear(2, 3))
    return Case(model, CE(), [(normal(2, 3, 2), classes(2, 3, of=3))], class_dim=-1)


@classifier("recurrent", "a cell of bare matrices", 3, 2)
def _bare_cell() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = (x[:, 0] @ m.enter).tanh()
        for step in x[:, 1:].unbind(1):
            h = (step @ m.enter + h @ m.again + m.bias).tanh()
        return h @ m.leave

    return Net(forward, enter=weight(2, 3), again=weight(3, 3), bias=weight(3), leave=weight(3, 3))


@classifier("recurrent", "frozen reservoir (echo state)", 3, 2)
def _reservoir() -> nn.Module:
    inner = nn.RNN(2, 4, batch_first=True).requires_grad_(False)
    return Net(lambda m, x: m.head(m.inner(x)[0][:, -1]), inner=inner, head=nn.Linear(4, 3))


@classifier("recurrent", "minimal GRU, a scan by cumulative sums", 3, 2)
def _scan() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        log_keep = -F.softplus(m.gate(x)).cumsum(1)
        return m.head(((-log_keep).exp() * m.value(x)).cumsum(1)[:, -1] * log_keep[:, -1].exp())

    return Net(forward, gate=nn.Linear(2, 3), value=nn.Linear(2, 3), head=nn.Linear(3, 3))


# Mixtures of experts --------------------------------------------------------------------------------------------------


def experts(name: str, forward: Callable[..., Tensor]) -> None:
    """Register a mixture of two experts."""
    parts: Any = lambda: {"gate": nn.Linear(3, 2), "e": nn.ModuleList([mlp(), mlp()])}  # noqa: E731
    row("mixture of experts", name)(lambda: Case(Net(forward, **parts()), CE(), labels(3, sizes=(4, 3))))


def _hard(m: Any, x: Tensor) -> Tensor:
    p = m.gate(x).softmax(-1)
    best, out = p.argmax(-1), torch.zeros(len(x), 3, dtype=x.dtype)
    for k, expert in enumerate(m.e):
        picked = (best == k).nonzero()[:, 0]
        out = out.index_add(0, picked, expert(x[picked]) * p[picked, k, None])
    return out


experts("soft", lambda m, x: (m.gate(x).softmax(-1)[:, None] * torch.stack([e(x) for e in m.e], -1)).sum(-1))
experts("the best one, examples routed by an index", _hard)
experts(
    "the best one, outputs picked by gather",
    lambda m, x: (
        torch.stack([e(x) for e in m.e], 1).gather(1, m.gate(x).argmax(-1)[:, None, None].expand(-1, 1, 3))[:, 0]
        * m.gate(x).softmax(-1).amax(-1, keepdim=True)
    ),
)


@classifier("mixture of experts", "experts stacked in one tensor (einsum)", 3)
def _stacked_experts() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.einsum("ni,eio->neo", x, m.enter).tanh()
        return torch.einsum("neo,eoc,ne->nc", h, m.leave, m.gate(x).softmax(-1))

    return Net(forward, enter=weight(2, 3, 3), leave=weight(2, 3, 3), gate=nn.Linear(3, 2))


@row("mixture of experts", "mixture density network")
def _density() -> Case:
    def nll(z: Tensor, y: Tensor) -> Tensor:
        logits, mean, log_s = z.chunk(3, -1)
        return -(logits.log_softmax(-1) - 0.5 * ((y - mean) / log_s.exp()).square() - log_s).logsumexp(-1).mean()

    data = [(normal(n, 3), normal(n, 1)) for n in (3, 2)]
    return Case(mlp(3, 6), AutogradLoss(nll, reduction="mean"), data)


# State space ----------------------------------------------------------------------------------------------------------


@classifier("state space", "diagonal, by a scan", 3, 2)
def _diagonal_space() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 3, dtype=x.dtype)
        for step in x.unbind(1):
            h = m.rate.sigmoid() * h + m.enter(step)
        return m.head(h)

    return Net(forward, rate=weight(3), enter=nn.Linear(2, 3), head=nn.Linear(3, 3))


@classifier("state space", "S4D: complex poles, convolution by FFT", 4)
def _s4() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        pole = torch.complex(-m.decay.exp(), m.angle)
        kernel = (torch.view_as_complex(m.gain)[:, None] * (pole[:, None] * torch.arange(4)).exp()).sum(0).real
        h = torch.fft.irfft(torch.fft.rfft(x, 8) * torch.fft.rfft(kernel, 8), 8)[:, :4]
        return m.head(h.tanh())

    return Net(forward, decay=weight(2), angle=weight(2), gain=weight(2, 2), head=nn.Linear(4, 3))


@classifier("state space", "selective (Mamba): gates, short convolution", 3, 2)
def _mamba() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        u = F.silu(m.conv(m.enter(x).mT)[..., :3].mT)
        step = F.softplus(m.step(u))
        B, C = m.select(u).chunk(2, -1)
        h = torch.zeros(len(x), 3, 2, dtype=x.dtype)
        for t in range(3):
            h = (step[:, t, :, None] * -m.log_a.exp()).exp() * h + (step[:, t] * u[:, t])[..., None] * B[:, t, None]
        return m.head((h * C[:, -1, None]).sum(-1) + m.skip * u[:, -1])

    parts = {"enter": nn.Linear(2, 3), "step": nn.Linear(3, 3), "select": nn.Linear(3, 4), "head": nn.Linear(3, 3)}
    conv = nn.Conv1d(3, 3, 2, padding=1, groups=3)
    return Net(forward, conv=conv, log_a=weight(3, 2), skip=weight(3), **parts)


@classifier("state space", "linear recurrent unit, by powers", 3, 2)
def _lru() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        keep = (-m.nu.exp()).exp()
        powers = keep ** torch.arange(2, -1, -1, dtype=x.dtype)[:, None]
        return m.head((m.enter(x) * powers).sum(1) * (1 - keep.square()).sqrt())

    return Net(forward, nu=weight(3), enter=nn.Linear(2, 3), head=nn.Linear(3, 3))


@classifier("state space", "RWKV: exponential averages", 3, 2)
def _rwkv() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        k, v = m.k(x).exp(), m.v(x)
        top = bottom = torch.zeros_like(v[:, 0])
        for t in range(3):
            top, bottom = (-m.w.exp()).exp() * top + k[:, t] * v[:, t], (-m.w.exp()).exp() * bottom + k[:, t]
        return m.head(m.r(x[:, -1]).sigmoid() * top / bottom)

    parts = {name: nn.Linear(2, 3) for name in ("k", "v", "r")}
    return Net(forward, w=weight(3), head=nn.Linear(3, 3), **parts)


# Ensembles ------------------------------------------------------------------------------------------------------------


@classifier("ensembles", "stacked members, torch.func.vmap", 3)
def _stacked() -> nn.Module:
    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.params = nn.ParameterDict()
            values, _ = torch.func.stack_module_state([mlp(), mlp()])
            for name, value in values.items():
                self.params[name.replace(".", "_")] = nn.Parameter(value.detach())
            self.base = [mlp().to("meta")]

        def forward(self, x: Tensor) -> Tensor:
            values = {name.replace("_", "."): p for name, p in self.params.items()}
            return vmap(lambda p: functional_call(self.base[0], p, (x,)))(values).mean(0)

    return Stacked()


@classifier("ensembles", "members along an axis (bmm)", 3)
def _bmm() -> nn.Module:
    return Net(
        lambda m, x: torch.baddbmm(m.c, torch.baddbmm(m.b, x.expand(2, -1, -1), m.v).tanh(), m.w).mean(0),
        **{"v": weight(2, 3, 4), "b": weight(2, 1, 4), "w": weight(2, 4, 3), "c": weight(2, 1, 3)},
    )


@classifier("ensembles", "BatchEnsemble: rank one factors", 3)
def _batch_ensemble() -> nn.Module:
    return Net(
        lambda m, x: m.head(((x[:, None] * m.r) @ m.shared * m.s).tanh()).mean(1),
        **{"r": weight(2, 3), "s": weight(2, 4), "shared": weight(3, 4), "head": nn.Linear(4, 3)},
    )


@classifier("ensembles", "mean of modules", 3)
def _mean() -> nn.Module:
    return Net(lambda m, x: torch.stack([e(x) for e in m.e]).mean(0), e=nn.ModuleList([mlp(), mlp()]))


@classifier("ensembles", "hypernetwork, weights of each example", 3)
def _hyper() -> nn.Module:
    return Net(lambda m, x: torch.einsum("nci,ni->nc", m.maker(x).reshape(-1, 3, 3), x), maker=nn.Linear(3, 9))


@classifier("ensembles", "hypernetwork, functional_call on made weights", 3)
def _made() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        w = m.maker(m.code).reshape(3, 3)
        return functional_call(m.body, {"weight": w}, (x,))

    return Net(forward, maker=nn.Linear(2, 9), code=weight(2), body=nn.Linear(3, 3).requires_grad_(False))


# Autoencoders ---------------------------------------------------------------------------------------------------------


def autoencoder(name: str, forward: Callable[..., Tensor], **more: Any) -> None:
    """Register an autoencoder of four numbers."""

    def make() -> Case:
        model = Net(forward, enter=nn.Linear(4, 3), leave=nn.Linear(3, 4), **{k: v() for k, v in more.items()})
        x = [normal(n, 4) for n in (3, 2)]
        return Case(model, nn.MSELoss(), [(x_b, x_b) for x_b in x])

    row("autoencoders", name)(make)


def _quantised(m: Any, x: Tensor) -> Tensor:
    h = m.enter(x)
    code = m.book[(h[:, None] - m.book).square().sum(-1).argmin(-1)]
    return m.leave(h + (code - h).detach()) + 0 * m.leave(code)


autoencoder("plain", lambda m, x: m.leave(m.enter(x).tanh()))
autoencoder("decoder tied, transposed", lambda m, x: F.linear(m.enter(x).tanh(), m.enter.weight.t()) + m.leave.bias)
autoencoder(
    "sparse: the largest two", lambda m, x: m.leave(m.enter(x) * (m.enter(x) >= m.enter(x).topk(2).values[:, -1:]))
)
autoencoder("vector quantised, straight through", _quantised, book=lambda: weight(3, 3))
autoencoder(
    "masked: visible half alone", lambda m, x: m.leave(m.enter(x * torch.tensor([1.0, 1.0, 0.0, 0.0]).to(x)).tanh())
)
autoencoder(
    "variational, sampling in forward",
    lambda m, x: m.leave(m.enter(x) + m.spread(x).exp() * torch.randn(len(x), 3, dtype=x.dtype)),
    spread=lambda: nn.Linear(4, 3),
)


@row("autoencoders", "variational, noise among the inputs")
def _vae() -> Case:
    model = Net(lambda m, x, e: m.leave(m.enter(x) + m.spread(x).exp() * e), enter=nn.Linear(4, 2))
    model.spread, model.leave = nn.Linear(4, 2), nn.Linear(2, 4)
    return Case(model, nn.BCEWithLogitsLoss(), [((normal(3, 4), normal(3, 2)), classes(3, 4, of=2).double())])


@regression("autoencoders", "transposed convolutions", 1, 4, 4, to=(1, 4, 4))
def _conv_ae() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 2, stride=2), nn.Tanh(), nn.ConvTranspose2d(2, 1, 2, stride=2))


@row("autoencoders", "denoising score matching (diffusion), time embedded")
def _diffusion() -> Case:
    model = Net(lambda m, x, t: m.net(torch.cat([x, m.time(t)], -1)), net=mlp(4, 2), time=nn.Embedding(3, 2))
    return Case(model, nn.MSELoss(), [((normal(n, 2), classes(n, of=3)), normal(n, 2)) for n in (3, 2)])


# Normalising flows ----------------------------------------------------------------------------------------------------


def flow(name: str, forward: Callable[..., Tensor], **parts: Any) -> None:
    """Register a flow of two numbers that returns ``(u, log |det|)``; its loss is the negative log-likelihood."""

    def nll(z: Tensor, y: Tensor) -> Tensor:
        return (0.5 * z[:, :-1].square().sum(-1) - z[:, -1]).mean()

    def make() -> Case:
        model = Net(forward, **{k: v() for k, v in parts.items()})
        return Case(model, AutogradLoss(nll, reduction="mean"), numbers(2, to=(1,)))

    row("normalising flows", name)(make)


def _coupling(m: Any, x: Tensor) -> Tensor:
    s, t = m.net(x[:, :1]).chunk(2, -1)
    return torch.cat([x[:, :1], x[:, 1:] * s.tanh().exp() + t, s.tanh()], -1)


def _planar(m: Any, x: Tensor) -> Tensor:
    h = (x @ m.w + m.b).tanh()
    return torch.cat([x + h[:, None] * m.u, (1 + (1 - h**2) * (m.w @ m.u)).abs().log()[:, None]], -1)


def _triangular(m: Any, x: Tensor) -> Tensor:
    L = m.lower.tril(-1) + m.lower.diagonal().exp().diag()
    return torch.cat([x @ L.mT, m.lower.diagonal().sum().expand(len(x), 1)], -1)


def _masked(m: Any, x: Tensor) -> Tensor:
    h = F.linear(x, m.enter * torch.ones(2, 2).to(x).tril(-1), m.bias)
    return torch.cat([x * h.exp(), h.sum(-1, keepdim=True)], -1)


def _glow(m: Any, x: Tensor) -> Tensor:
    return torch.cat([x @ m.mix.mT, torch.linalg.slogdet(m.mix)[1].expand(len(x), 1)], -1)


flow("affine coupling (RealNVP)", _coupling, net=lambda: mlp(1, 2))
flow("planar", _planar, w=lambda: weight(2), b=lambda: weight(1), u=lambda: weight(2))
flow("triangular with an exponential diagonal", _triangular, lower=lambda: weight(2, 2))
flow("masked autoregressive", _masked, enter=lambda: weight(2, 2), bias=lambda: weight(2))
flow("invertible mixing (Glow), slogdet", _glow, mix=lambda: weight(2, 2))


# Ways to write a model ------------------------------------------------------------------------------------------------

WAYS = "ways to write a model"


@row(WAYS, "weight norm")
def _weight_norm() -> Case:
    def written_out(m: Any, x: Tensor) -> Tensor:  # the second derivative of PyTorch's function is another
        g, v = m.net[0].parametrizations.weight.original0, m.net[0].parametrizations.weight.original1
        return m.net[1:](F.linear(x, g * v / v.square().sum(1, keepdim=True).sqrt(), m.net[0].bias))

    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3))
    return Case(model, CE(), labels(3), plain=Names(model, written_out))


@classifier(WAYS, "spectral norm, in evaluation mode", 3)
def _spectral() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3)).eval()


@classifier(WAYS, "spectral norm, in train mode", 3)
def _spectral_train() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3))


@classifier(WAYS, "orthogonal weights", 3)
def _orthogonal() -> nn.Module:
    return nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3)), nn.Tanh(), nn.Linear(3, 3))


@classifier(WAYS, "symmetric weights (parametrize)", 3)
def _symmetric() -> nn.Module:
    inner = nn.Linear(3, 3)
    parametrize.register_parametrization(inner, "weight", Fn(lambda w: w.triu() + w.triu(1).mT))
    return nn.Sequential(inner, nn.Tanh(), nn.Linear(3, 3))


@classifier(WAYS, "checkpointed", 3)
def _checkpointed() -> nn.Module:
    return Net(lambda m, x: m.head(checkpoint(m.inner, x, use_reentrant=False)), inner=mlp(3, 4), head=nn.Linear(4, 3))


@row(WAYS, "checkpointed, reentrant")
def _reentrant() -> Case:
    parts = {"enter": nn.Linear(3, 3), "inner": mlp(3, 4), "head": nn.Linear(4, 3)}
    model = Net(lambda m, x: m.head(checkpoint(m.inner, m.enter(x), use_reentrant=True)), **parts)
    return Case(model, CE(), labels(3), plain=Net(lambda m, x: m.head(m.inner(m.enter(x))), **parts))


@row(WAYS, "compiled (torch.compile)")
def _compiled() -> Case:
    plain = mlp()
    return Case(torch.compile(plain, backend="aot_eager"), CE(), labels(3), plain=plain)  # type: ignore[arg-type]


@row(WAYS, "traced (torch.jit)")
def _traced() -> Case:
    plain = mlp()
    return Case(torch.jit.trace(plain, normal(3, 3)), CE(), labels(3), plain=plain)


@row(WAYS, "frozen graph (torch.fx)")
def _fx() -> Case:
    return Case(torch.fx.symbolic_trace(mlp()), CE(), labels(3))


@classifier(WAYS, "functional_call", 3)
def _functional() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return functional_call(m.net, dict(m.net.named_parameters()), (x,))

    return Net(forward, net=mlp())


@classifier(WAYS, "functions on bare matrices", 4)
def _bare() -> nn.Module:
    return Functional()


@classifier(WAYS, "bare parameters beside layers", 3, 4)
def _bare_parameters() -> nn.Module:
    return BareParameters()


@classifier(WAYS, "an autograd function of one's own", 4)
def _own() -> nn.Module:
    return Net(lambda m, x: m.head(Hidden.apply(x, m.w).tanh()), w=weight(4, 4), head=nn.Linear(4, 3))


class Once(torch.autograd.Function):
    """A cube whose backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


@row(WAYS, "an autograd function that is differentiable once")
def _once() -> Case:
    parts = {"inner": nn.Linear(3, 3), "head": nn.Linear(3, 3)}
    plain = Net(lambda m, x: m.head(m.inner(x) ** 3), **parts)
    return Case(Net(lambda m, x: m.head(Once.apply(m.inner(x))), **parts), CE(), labels(3), plain=plain)


@classifier(WAYS, "activations and sums in place", 3)
def _in_place() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.inner(x).tanh_().clone()
        h[:, 0] = x[:, 1]
        h[:, 1] *= 2
        h += x
        return m.head(F.relu_(h))

    return Net(forward, inner=nn.Linear(3, 3), head=nn.Linear(3, 3))


@classifier(WAYS, "frozen parts, unused layers", 4)
def _frozen() -> nn.Module:
    return FrozenParts()


@classifier(WAYS, "one layer on sequences and on vectors", 2, 4)
def _twice() -> nn.Module:
    return Net(lambda m, x: m.head(m.inner(m.inner(x).tanh().mean(1))), inner=nn.Linear(4, 4), head=nn.Linear(4, 3))


@classifier(WAYS, "one weight in two modules", 3)
def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    return model


@classifier(WAYS, "dropout in evaluation mode", 3)
def _dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Tanh(), nn.Linear(4, 3)).eval()


@classifier(WAYS, "dropout in train mode", 3)
def _dropout_train() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Tanh(), nn.Linear(4, 3))


@classifier(WAYS, "control flow that depends on data", 3)
def _control() -> nn.Module:
    return Net(lambda m, x: m.a(x) if x[0].sum() > 0 else m.b(x).tanh(), a=nn.Linear(3, 3), b=nn.Linear(3, 3))


@classifier(WAYS, "nn.Bilinear", 2, 3)
def _bilinear() -> nn.Module:
    return Net(lambda m, x: m.head(m.pair(x[:, 0], x[:, 1]).tanh()), pair=nn.Bilinear(3, 3, 2), head=nn.Linear(2, 3))


@classifier(WAYS, "PReLU and softplus of learned sharpness", 3)
def _prelu() -> nn.Module:
    return Net(
        lambda m, x: m.head(F.softplus(m.act(m.inner(x)) * m.sharp) / m.sharp),
        **{
            "inner": nn.Linear(3, 4),
            "act": nn.PReLU(4),
            "sharp": nn.Parameter(torch.tensor(1.5)),
            "head": nn.Linear(4, 3),
        },
    )


@classifier(WAYS, "cosine similarities to learned directions", 3)
def _cosine() -> nn.Module:
    return Net(
        lambda m, x: 4 * F.linear(F.normalize(m.inner(x), dim=-1), F.normalize(m.w, dim=-1)),
        **{"inner": nn.Linear(3, 4), "w": weight(3, 4)},
    )


@classifier(WAYS, "monotone: exponentials of weights", 3)
def _monotone() -> nn.Module:
    return Net(
        lambda m, x: F.linear(F.linear(x, m.v.exp()).tanh(), m.w.exp(), m.b),
        v=weight(4, 3),
        w=weight(3, 4),
        b=weight(3),
    )


@classifier(WAYS, "a Kronecker product of weights", 4)
def _kronecker() -> nn.Module:
    return Net(
        lambda m, x: m.head((x @ torch.kron(m.a, m.b)).tanh()), a=weight(2, 2), b=weight(2, 2), head=nn.Linear(4, 3)
    )


@classifier(WAYS, "quantised weights, straight through", 3)
def _straight() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        w = m.inner.weight
        return m.head(F.linear(x, w + ((4 * w).round() / 4 - w).detach(), m.inner.bias).tanh())

    return Net(forward, inner=nn.Linear(3, 4), head=nn.Linear(4, 3))


@classifier(WAYS, "channels last in memory", 2, 3, 3)
def _channels_last() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(2, 4, 2), nn.ReLU(True), nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(8, 3))
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


@row(WAYS, "a mapping of inputs, an object with logits")
def _mapping() -> Case:
    class Outputs:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(2, 3)

        def forward(self, left: Tensor, right: Tensor) -> Outputs:
            return Outputs((self.a(left) + self.b(right)).tanh())

    data: list[tuple[Any, Any]] = [({"left": normal(n, 3), "right": normal(n, 2)}, classes(n, of=3)) for n in (3, 2)]
    return Case(Keywords(), CE(), data, output=lambda result: result.logits)


@row(WAYS, "outputs (N T, C), examples flattened by the model")
def _flattened() -> Case:
    problem = PROBLEMS["flattened_by_the_model"]()
    return Case(problem.model, CE(), [(x, y) for x, y in problem.data])


@regression(WAYS, "one number for each example, outputs (N,)", 3, to=())
def _one_number() -> nn.Module:
    return nn.Sequential(mlp(3, 1), nn.Flatten(0))

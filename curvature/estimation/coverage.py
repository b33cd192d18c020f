"""Which curvature every trainable parameter gets, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from curvature.estimation.batch_loss import terms_of
from curvature.estimation.collector import Collector
from curvature.estimation.dataset import record
from curvature.estimation.text_table import block_label, equal_but_numbers, text_table
from curvature.layers import MODULES
from curvature.layers.block import Block, BlockPart
from curvature.losses import BatchDim, ClassDim, Terms, UnknownLossError, loss_for, loss_over_data
from curvature.losses.loss import check_loss
from curvature.losses.signals import Signals
from curvature.model import arguments
from curvature.model.data import Data, Output, batches, to_device
from curvature.model.parameters import Parameters
from curvature.model.settings import untouched
from curvature.model.trees import tensors_in
from curvature.structures.estimator import Curvature, CurvatureEstimator, Form
from curvature.structures.kfac import KroneckerFisher

#: How the reason ends for a parameter whose gradients no rule takes apart.
BY_AUTOGRAD = ": gradients by autograd"


@dataclass(frozen=True)
class Row:
    """One trainable parameter.

    Attributes:
        parameter: Its name.
        shape: Its shape.
        block: Name of the block it belongs to (several, where segments of it are used apart).
        structure: ``"kronecker"``, ``"eigenbasis"``, ``"unit"``, ``"diagonal"``, ..., or ``"unused"``.
        size: Numbers the structure stores for the block.
        why: The operations that used it, or why no rule serves.
    """

    parameter: str
    shape: tuple[int, ...]
    block: str
    structure: str
    size: int
    why: str

    @property
    def ruled(self) -> bool:
        """Whether its curvature comes from a layer rule."""
        return self.structure not in ("unused", "ignored") and not self.why.endswith(BY_AUTOGRAD)


@dataclass(frozen=True)
class Coverage:
    """The table of all trainable parameters; iterate over its rows, or print it, with equal layers in one line.

    Attributes:
        rows: One row per parameter, in ``named_parameters()`` order.
        loss: What is known about the loss.
        seen: Whether a forward pass was recorded; otherwise the rows are what the module types promise.
    """

    rows: tuple[Row, ...]
    loss: str
    seen: bool

    def __iter__(self) -> Iterator[Row]:
        """The rows."""
        return iter(self.rows)

    def __len__(self) -> int:
        """Number of parameters tensors."""
        return len(self.rows)

    def __getitem__(self, name: str) -> Row:
        """The row of one parameter."""
        for row in self.rows:
            if row.parameter == name:
                return row
        raise KeyError(f"no trainable parameter {name!r}; there are {', '.join(row.parameter for row in self.rows)}.")

    @property
    def covered(self) -> float:
        """Fraction of the trainable numbers that have a block by a layer rule."""
        total = sum(math.prod(row.shape) for row in self.rows)
        ruled = sum(math.prod(row.shape) for row in self.rows if row.ruled)
        return ruled / total if total else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"loss": self.loss, "seen": self.seen, "covered": self.covered, "rows": [asdict(r) for r in self.rows]}

    def __str__(self) -> str:
        """A table of the blocks, in which layers that differ in nothing but their number share a line."""
        items = [(block_label(label), cells) for label, *cells in _lines(self.rows)]
        found = equal_but_numbers([(label, tuple(cells)) for label, cells in items])
        body = []
        for label, places in found:
            shapes, structure, size, why = items[places[0]][1]
            body.append((label, shapes, structure, size if len(places) == 1 else f"{len(places)} x {size}", why))
        lines = [text_table(("parameters", "shapes", "structure", "numbers kept", "why"), body, right=[3])]
        how = "as used in a recorded pass" if self.seen else "by module types; data= shows their use"
        if self.seen and all(row.structure in ("unused", "ignored") for row in self.rows):
            how = "nothing seen yet"
        lines.append(f"{len(self.rows)} parameters, {self.covered:.0%} of the numbers by a layer rule ({how}).")
        lines.append(f"Loss: {self.loss}")
        return "\n".join(lines)


@arguments.checked(
    loss_fn=check_loss,
    data=arguments.optional(arguments.data),
    curvature=arguments.optional(arguments.a(Curvature, "a curvature such as KroneckerFisher()")),
)
def coverage(
    model: nn.Module,
    loss_fn: Any,
    data: Data | None = None,
    *,
    curvature: Curvature | None = None,
    params: Any = None,
    output: Output | None = None,
    class_dim: ClassDim = None,
    batch_dim: BatchDim = None,
) -> Coverage:
    """The table of every trainable parameter: its block, structure and size, and why.

    Args:
        model: Any module.
        loss_fn: The loss module; the table says which kinds of curvature it allows.
        data: A batch ``(x, y)`` or batches, of which the first is passed through the model and back, as an estimate
            does, to see how it uses its parameters and whether the rules explain their gradients. Without data the
            table says what the types of the modules promise.
        curvature: What would be estimated; :class:`~curvature.KroneckerFisher` by default.
        params: Restriction of the parameters.
        output: Picks the output tensor where the model does not return a tensor.
        class_dim: Class axis of the output where the shapes leave it open.
        batch_dim: Axis of the output that counts the examples, where it is not the first; by key for a sum of losses.

    Example:
        >>> from torch import nn
        >>> print(coverage(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), nn.MSELoss()))
        parameters     shapes  structure  numbers kept  why
        -------------  ------  ---------  ------------  ---------
        0.weight+bias  2x3+2   kronecker            20  Linear
        1.weight+bias  2+2     unit                  8  LayerNorm
        4 parameters, 100% of the numbers by a layer rule (by module types; data= shows their use).
        Loss: MSELoss: exact, mc, empirical
    """
    parameters = Parameters(model, params)
    spec = (curvature or KroneckerFisher()).on(model)
    if data is None:
        rows = _promised(model, parameters, spec)
    else:
        collector = Collector(parameters, spec.estimator, joint=spec.joint)
        with torch.inference_mode(False), untouched(model):
            for x, y in batches(data)():  # up to one in which a target counts
                x, y = to_device(x, parameters.device), to_device(y, parameters.device)
                result, recorder = record(model, parameters, x, y, batch_dim=batch_dim)
                terms = _terms(loss_fn, result, x, y, output, class_dim, batch_dim)
                if terms is None or not terms.empty:
                    break
            if terms is not None:
                collector.survey(recorder, terms.output, Signals.of(terms, "empirical", batch=recorder.batch))
        rows = table(parameters, collector)
    return Coverage(tuple(rows), describe_loss(loss_fn), data is not None)


def _lines(rows: tuple[Row, ...]) -> Iterator[tuple[str, str, str, str, str]]:
    """Name, shapes, structure, size and reason of each block; of each parameter, where those of a block differ."""
    blocks: dict[str, list[Row]] = {}
    for row in rows:
        blocks.setdefault(row.parameter if row.block == "-" else row.block, []).append(row)
    for name, found in blocks.items():
        whole = "+".join(row.parameter for row in found) == name
        alike = len({(row.structure, row.size, row.why) for row in found}) == 1
        for part in [found] if whole and alike else [[row] for row in found]:
            shapes = "+".join("x".join(map(str, row.shape)) or "scalar" for row in part)
            label = "+".join(row.parameter for row in part)
            yield label, shapes, part[0].structure, f"{part[0].size:,}", part[0].why


def describe_loss(loss_fn: Any) -> str:
    """Which kinds of curvature a loss allows."""
    name = type(loss_fn).__name__ if isinstance(loss_fn, nn.Module) else getattr(loss_fn, "__name__", repr(loss_fn))
    try:
        loss_for(loss_fn)
    except UnknownLossError:
        return f"{name}: empirical only in training (AutogradLoss or register_loss adds exact and mc)"
    return f"{name}: exact, mc, empirical"


def table(parameters: Parameters, collector: Collector) -> list[Row]:
    """Rows from what a collector has seen."""
    rows = []
    for name, p in parameters.items():
        mine = [e for e in collector.estimators.values() if name in e.block.names]
        if not mine:
            rows.append(Row(name, tuple(p.shape), "-", "unused", 0, "no pass used it: no curvature"))
            continue
        used = [collector.operations.get(e.block.name, ("used before it was loaded",)) for e in mine]
        reason = collector.plan.without_rule.get(name)
        notes = [note for e in mine if (note := collector.notes.get(e.block.name))]
        notes += [f"positions: {chosen}" for e in mine if (chosen := collector.sharing.get(e.block.name))]
        why = ", ".join(dict.fromkeys(chain(*used, notes) if reason is None else chain([reason], notes)))
        why += "" if reason is None else BY_AUTOGRAD
        names, structures = ", ".join(e.block.name for e in mine), "/".join(dict.fromkeys(e.structure for e in mine))
        size = sum(_stored(e, operations) for e, operations in zip(mine, used, strict=True))
        rows.append(Row(name, tuple(p.shape), names, structures, size, why))
    return rows


def _terms(
    loss_fn: Any, result: Any, x: Any, y: Any, output: Output | None, class_dim: ClassDim, batch_dim: BatchDim
) -> Terms | None:
    """Terms of the loss; where it is unknown or cannot be told apart here, of all that the model returned."""
    try:
        terms = terms_of(loss_over_data(loss_fn), result, x, y, output, class_dim, batch_dim=batch_dim)
    except (TypeError, ValueError):
        if (output, class_dim, batch_dim) != (None, None, None):
            raise
        seen = [t.reshape(-1) for t in tensors_in(result) if t.requires_grad]
        if not seen:
            return None
        everything = torch.cat(seen).unsqueeze(0)
        terms = loss_for(nn.MSELoss()).terms(everything, torch.zeros_like(everything))
    return terms if terms.output.requires_grad else None


# Parameters of a module that one operation uses together.
_PAIRS = (("weight", "bias"), ("in_proj_weight", "in_proj_bias"))


@dataclass(frozen=True)
class Promise:
    """A block as the type of the module that owns its parameters promises it.

    Attributes:
        block: The block.
        form: How samples reach it.
        operation: The module, or ``None`` for bare parameters, whose use decides.
        one_hot: Whether its inputs are one-hot rows, as those of an embedding.
    """

    block: Block
    form: Form
    operation: str | None
    one_hot: bool


def promised(
    model: nn.Module, parameters: Mapping[str, torch.Tensor], joint: bool
) -> Iterator[tuple[Promise, dict[str, torch.Tensor]]]:
    """The blocks of a model that nobody has run, with their parameters by name.

    Args:
        model: The model.
        parameters: Those that count.
        joint: Whether weight and bias of a layer form one block.
    """
    names = {id(p): name for name, p in parameters.items()}
    done: set[str] = set()
    own: dict[str, torch.Tensor]
    for module in model.modules():
        own = {key: p for key, p in module.named_parameters(recurse=False) if id(p) in names}
        kind = _kind(module)
        for key, p in own.items():
            if names[id(p)] in done:
                continue  # tied: its first owner speaks
            pair = next((pair for pair in _PAIRS if key in pair and set(pair) <= set(own)), None)
            pairs = {k: own[k] for k in pair} if pair and kind and joint else {key: p}
            found: dict[str, torch.Tensor] = {names[id(q)]: q for q in pairs.values()}
            block = Block("+".join(found), _parts(module, found, kind))
            one_hot = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
            form: Form = "outer" if kind == "kronecker" else "per_sample"
            done |= found.keys()
            yield Promise(block, form, type(module).__name__ if kind else None, one_hot), found


def _promised(model: nn.Module, parameters: Parameters, spec: Curvature) -> list[Row]:
    """Rows from the types of the modules that own the parameters."""
    rows: dict[str, Row] = {}
    for promise, together in promised(model, parameters, spec.joint):
        estimator = spec.estimator(promise.block, promise.form)
        why = promise.operation or "bare parameter; its use decides, see data="
        size = _stored(estimator, ("embedding",) if promise.one_hot else ())
        for name, p in together.items():
            rows[name] = Row(name, tuple(p.shape), promise.block.name, estimator.structure, size, why)
    return [rows[name] for name in parameters]


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, nn.MultiheadAttention):
        return "kronecker"
    kind = type(module)
    return next((MODULES[base] for base in kind.__mro__ if base in MODULES and kind.forward is base.forward), None)


def _parts(module: nn.Module, own: Mapping[str, torch.Tensor], kind: str | None) -> tuple[BlockPart, ...]:
    """The shapes of a block of these parameters."""

    def part(key: str, p: torch.Tensor, shape: tuple[int, ...]) -> BlockPart:
        return BlockPart(key, 0, (p.numel(),), (0,), shape)

    if kind is None:
        return tuple(part(key, p, (p.numel(),)) for key, p in own.items())
    if kind != "kronecker":
        return tuple(part(key, p, (p.numel(), 1)) for key, p in own.items())
    groups = getattr(module, "groups", 1)
    parts = []
    for key, p in own.items():
        d_out, d_in = (p.shape[0], p.numel() // p.shape[0]) if p.dim() > 1 else (p.numel(), 1)
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            d_out, d_in = d_in, d_out
        elif "ConvTranspose" in type(module).__name__ and p.dim() > 1:
            d_out, d_in = d_in * groups, d_out // groups
        parts.append(part(key, p, (d_out, d_in) if groups == 1 else (groups, d_out // groups, d_in)))
    return tuple(parts)


def _stored(estimator: CurvatureEstimator, operations: tuple[str, ...]) -> int:
    """Numbers kept; the input factor of an embedding is diagonal."""
    if set(operations) == {"embedding"} and estimator.structure == "kronecker":
        d_out, d_in = estimator.block.shape
        return d_out**2 + d_in
    return estimator.stored

"""What each parameter of a model does: by the modules that own it, or by its uses in a recorded pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from curvature.estimation.dataset import record
from curvature.layers import MODULES
from curvature.layers.recorder import Recorder
from curvature.layers.site import ElementwiseSite, OuterSite, Ref, Site
from curvature.model.data import Data, batches, resolve_output, to_device
from curvature.model.graph_nodes import below
from curvature.model.parameters import Parameters
from curvature.model.settings import untouched
from curvature.model.trees import tensors_in

Role = Literal["matrix", "experts", "embedding", "head", "norm", "bias", "vector"]
ROLES: tuple[Role, ...] = get_args(Role)

_NORMS = (
    *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm),
    nn.modules.batchnorm._NormBase,  # batch and instance norms
)
_NORM_CALLS = {"layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm"}
#: Functions without a rule that multiply by matrices, or pick rows.
_PRODUCTS = {
    *(
        "einsum",
        "bmm",
        "baddbmm",
        "addbmm",
        "matmul",
        "mm",
        "mv",
        "addmm",
        "tensordot",
        "linear",
        "bilinear",
        "chain_matmul",
    ),
    *("__matmul__", "__rmatmul__", "grouped_mm", "_grouped_mm", "scaled_grouped_mm"),
    *(f"conv{transposed}{d}d" for transposed in ("", "_transpose") for d in (1, 2, 3)),
}
_PICKS = {"__getitem__", "index_select", "gather", "take", "take_along_dim", "embedding", "embedding_bag"}


def slim(p: Tensor) -> bool:
    """Whether a tensor is a vector or number, axes of length one aside."""
    return p.numel() == max(p.shape, default=1)


def roles_by_type(model: nn.Module, parameters: Parameters) -> dict[str, Role]:
    """Roles as far as the types of modules, and ties between them, tell; a head mostly remains a ``"matrix"``.

    Args:
        model: The model.
        parameters: Its trainable parameters.
    """
    names = {id(p): name for name, p in parameters.items()}
    found: dict[str, set[Role]] = {}
    for module in model.modules():
        for key, p in module.named_parameters(recurse=False):
            if id(p) in names and (role := _by_owner(module, key, p)) is not None:
                found.setdefault(names[id(p)], set()).add(role)
    for name in (names[id(p)] for p in _heads_by_type(model) if id(p) in names):
        found.setdefault(name, set()).add("head")
    return {name: _strongest(roles) for name, roles in found.items()}


def knows_head(model: nn.Module) -> bool:
    """Whether the types of modules tell which matrix makes the outputs."""
    return any(True for _ in _heads_by_type(model)) or _tied(model)


def roles_by_use(model: nn.Module, parameters: Parameters, data: Data) -> tuple[dict[str, Role], dict[str, set[str]]]:
    """Roles by the uses in one forward pass.

    Args:
        model: The model; buffers and random streams stay as they are.
        parameters: Its trainable parameters.
        data: A batch ``(x, y)``, or batches, of which the first counts.

    Returns:
        The roles, and the uses of those parameters that nobody can read a role off.
    """
    x, y = next(batches(data)())
    with torch.inference_mode(False), untouched(model, together=True):
        x, y = to_device(x, parameters.device), to_device(y, parameters.device)
        result, recorder = record(model, parameters, x, y)
        heads = _heads_by_use(result, recorder)
    uses: dict[str, set[Role]] = {}
    unread: dict[str, set[str]] = {}
    for site in recorder.sites:
        for ref in site.refs:
            role = _of_site(site, ref, parameters[ref.name])
            if role is None:
                unread.setdefault(ref.name, set()).add(site.operation)
            else:
                uses.setdefault(ref.name, set()).add("head" if ref.name in heads and role == "matrix" else role)
    for name, calls in recorder.unknown.items():
        if found := {role for call in calls if (role := _of_call(call, parameters[name])) is not None}:
            uses.setdefault(name, set()).update(found)
        else:
            unread.setdefault(name, set()).update(calls)
    roles = {name: _strongest(found) for name, found in uses.items()}
    return roles, {name: calls for name, calls in unread.items() if name not in roles}


def _strongest(roles: set[Role]) -> Role:
    """One role of several: a weight that is tied to an embedding is one; a matrix that is also scaled is a matrix."""
    order: tuple[Role, ...] = ("embedding", "head", "experts", "matrix", "norm", "bias", "vector")
    return next(role for role in order if role in roles)


# By type


def _by_owner(module: nn.Module, key: str, p: Tensor) -> Role | None:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if isinstance(module, _NORMS):
        return "norm"
    multiplies = _multiplies(module) or _affine(module)
    if slim(p):
        return "bias" if multiplies and "bias" in key else "vector"
    return "matrix" if _multiplies(module) or (multiplies and key == "weight") else None


def _affine(module: nn.Module) -> bool:
    """Whether a module has the parameters of a linear layer, such as Hugging Face's ``Conv1D``."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not (isinstance(weight, Tensor) and isinstance(bias, Tensor)):
        return False
    return weight.dim() == 2 and bias.dim() == 1 and bias.shape[0] in weight.shape


def _multiplies(module: nn.Module) -> bool:
    kinds = tuple(cls for cls, kind in MODULES.items() if kind == "kronecker")
    return isinstance(module, (*kinds, nn.MultiheadAttention, nn.modules.conv._ConvNd))


def _heads_by_type(model: nn.Module) -> Iterator[Tensor]:
    """Weights of the modules that make the outputs, where the model says so or is a plain sequence."""
    if isinstance(model, nn.Sequential):
        last = [m for m in model if any(True for _ in m.parameters())][-1:]
        yield from (p for m in last if _multiplies(m) for p in m.parameters(recurse=False) if not slim(p))
    get = getattr(model, "get_output_embeddings", None)  # of Hugging Face's models
    head = get() if callable(get) else None
    if isinstance(head, nn.Module):
        yield from (p for p in head.parameters(recurse=False) if not slim(p))


def _tied(model: nn.Module) -> bool:
    """Whether a matrix is both an embedding and a linear layer."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    others = [m for m in model.modules() if _multiplies(m) and not isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    return any(id(p) in tables for m in others for p in m.parameters(recurse=False))


# By use


def _of_site(site: Site, ref: Ref, p: Tensor) -> Role | None:
    if site.operation.startswith("embedding"):
        return "embedding"
    if isinstance(site, OuterSite):
        if ref is site.bias:
            return "bias" if slim(p) or not ref.whole else "vector"
        if slim(p):
            return "vector"
        return "experts" if p.dim() == 3 and not ref.whole else "matrix"
    if site.operation in _NORM_CALLS:
        return "norm"
    if slim(p):
        return "vector"
    # A parameter that meets no activation, as a weight that is scaled first, shows its role elsewhere.
    return "vector" if isinstance(site, ElementwiseSite) and site.layout.batched else None


def _of_call(call: str, p: Tensor) -> Role | None:
    if slim(p):
        return "vector"
    if call in _PICKS:
        return "embedding"
    return None if call not in _PRODUCTS else "experts" if p.dim() == 3 and not call.startswith("conv") else "matrix"


def _heads_by_use(result: Any, recorder: Recorder) -> set[str]:
    """Weights of products that the model returns as they are, or bent entry by entry.

    An output that adds up several products, as the last state of a residual network, has no head.
    """
    try:
        outputs: Iterable[Tensor] = [resolve_output(result)]
    except TypeError:
        found = [t for t in tensors_in(result) if t.requires_grad]
        outputs = [t for t in found if t.dim()] or found
    made_by: dict[Any, list[Site]] = {}
    for site in recorder.sites:
        if isinstance(site, OuterSite):
            made_by.setdefault(site.edge.node, []).append(site)

    def ends(node: Any) -> bool:  # all but what lays outputs side by side
        return node in made_by or type(node).__name__ not in ("CatBackward0", "StackBackward0")

    heads = set()
    for node in filter(ends, below((get_gradient_edge(t) for t in outputs if t.requires_grad), ends)):
        reached = {site.weight.name for site in _makers(node, made_by) if site.weight is not None}
        if len(reached) == 1:
            heads |= reached
    return heads


def _makers(node: Any, made_by: dict[Any, list[Site]]) -> list[Site]:
    """The products that a node of the graph depends on without another product in between."""
    return [site for one in below([node], made_by) for site in made_by.get(one, ())]

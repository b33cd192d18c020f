"""Fitted posteriors as files of plain tensors, and back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from laplace import DiagLaplace, FullLaplace, KronLaplace
from laplace.baselaplace import ParametricLaplace
from laplace.curvature import CurvatureInterface
from laplace.lllaplace import LLLaplace
from laplace.subnetlaplace import SubnetLaplace
from laplace.utils.enums import Likelihood
from laplace.utils.feature_extractor import FeatureReduction
from laplace.utils.matrix import Kron
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from curvature.estimation.checkpoint import CheckpointError, digest
from curvature.laplace.backends.ggn import EFBackend, GGNBackend
from curvature.laplace.backends.hessian import HessianBackend
from curvature.laplace.factors.decomposed import BlockKronDecomposed
from curvature.laplace.factors.kron import BlockKron
from curvature.laplace.parametric import archive
from curvature.laplace.parametric.low_rank import LowRankDiagonal, LowRankDiagPosterior
from curvature.laplace.parametric.posterior import EKFACLaplace, LowRankPosterior

_KIND = "a posterior"
_BACKENDS: dict[str, type[CurvatureInterface]] = {
    kind.__name__: kind for kind in (GGNBackend, EFBackend, HessianBackend)
}
#: Attributes that are copied as they are.
_NUMBERS = ("mean", "loss", "_prior_mean", "_prior_precision", "_sigma_noise", "n_data", "n_outputs")
_OPTIONS = ("temperature", "enable_backprop", "dict_key_x", "dict_key_y", "_asdl_fisher_kwargs", "damping")
#: Attributes that not every posterior has.
_NOTES = ("output_axes", "class_axis", "lowest_value", "lowest_vector")


def save(la: ParametricLaplace, path: str | os.PathLike[str]) -> None:
    """Write a fitted posterior to a safetensors file: tensors, and JSON for its structure and hyperparameters.

    The file holds only the weights that the posterior is over (its mean); keep the model's own file for the rest. It
    holds all sums, so a posterior that can be fitted to more data still can after :func:`load`.

    Args:
        la: Fitted posterior: ``"full"``, ``"diag"``, ``"kron"``, ``"kfac"``, ``"ekfac"``, ``"low_rank"``,
            ``"low_rank_diag"``, of all parameters, the last layer, or a subnetwork.
        path: The file; its folder must exist. A file of that name is replaced at once, or not at all.

    Raises:
        TypeError: For another kind of posterior, or options other than numbers and strings.
        ValueError: If the posterior is not fitted.
    """
    archive.write(path, _KIND, state_of(la))


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    backend: type[CurvatureInterface] | None = None,
    *,
    restore: bool = False,
) -> Any:
    """Read a file of :func:`save`: a posterior that predicts the same, bit for bit, on the same kind of machine.

    As after ``fit``, the model is in evaluation mode. Nothing in the file is executed.

    Args:
        path: The file.
        model: The model, with the weights that the posterior was fitted at.
        backend: Needed where the posterior was fitted with a backend that is not of this package.
        restore: Write the posterior's mean into the model's parameters first (with a last layer, into those of the
            posterior's own copy), where the model has been trained on.

    Returns:
        A posterior of the class it had.

    Raises:
        CheckpointError: If the file is damaged, or belongs to a model with other parameters or other values.
        ValueError: If the backend is not known.
    """
    device = next(model.parameters()).device
    state = archive.read(path, _KIND, device)
    la = posterior_of(state, model, backend)
    if digest(_others(la)) != state["others"]:
        raise CheckpointError(
            "the model has other values than the one the posterior was fitted to in its buffers, or in the parameters "
            "that the posterior is not over. Load the model's weights first."
        )
    own = _own(la)
    if restore:
        with torch.no_grad():
            for p, values in zip(own, la.mean.split([p.numel() for p in own]), strict=True):
                p.copy_(values.view_as(p))
    far = (la.mean - parameters_to_vector(own).detach()).abs().max().item()
    if far != 0:  # a NaN too
        raise CheckpointError(
            f"the model's parameters are not those that the posterior was fitted at; they differ by up to {far:.3g}. "
            "Load the model's weights first, or pass restore=True to write the posterior's mean into them."
        )
    la.model.eval()
    return la


def state_of(la: Any) -> dict[str, Any]:
    """A fitted posterior as nested dicts of tensors, numbers and strings; see :func:`save`."""
    key, kinds = getattr(la, "_key", None), _posteriors()
    if kinds.get(key) is not type(la):
        known = ", ".join(sorted({structure for _, structure in kinds}))
        raise TypeError(f"{type(la).__name__} is no posterior that can be saved; those with {known} are.")
    if la.n_data == 0:
        raise ValueError(f"this {type(la).__name__} is not fitted, so there is nothing to save. Call fit() first.")
    own = {id(p) for p in _own(la)}
    network, likelihood = _network(la), Likelihood(la.likelihood).value
    kwargs = {name: value for name, value in la._backend_kwargs.items() if name not in ("last_layer", "process_group")}
    return {
        "key": key,
        "likelihood": likelihood,
        "backend": {"name": la._backend_cls.__name__, "kwargs": kwargs, "drawn": getattr(la.backend, "sampled", None)},
        "parameters": _described(p for p in network.named_parameters() if id(p[1]) in own),
        "others": digest(_others(la)),
        "numbers": {name: getattr(la, name) for name in _NUMBERS},
        "options": {name: getattr(la, name) for name in _OPTIONS if hasattr(la, name)},
        "notes": {name: getattr(la, name) for name in _NOTES if getattr(la, name, None) is not None},
        "subset": _subset(la),
        "curvature": _curvature(la),
    }


def posterior_of(state: Mapping[str, Any], model: nn.Module, backend: type[CurvatureInterface] | None = None) -> Any:
    """The posterior of :func:`state_of`, around its mean, whatever the values of the model's parameters.

    Raises:
        CheckpointError: If the model has other parameters than those that the posterior is over.
        ValueError: If the backend is not known.
    """
    found = _posteriors().get(tuple(state["key"]))
    if found is None:
        raise CheckpointError(f"no posterior is known for {state['key']}: the file was written by a newer version.")
    name, kwargs = state["backend"]["name"], dict(state["backend"]["kwargs"])
    if "max_factor" in kwargs:  # as files of version 0.1 have it
        kwargs["max_dim"] = kwargs.pop("max_factor")
    kind = backend or _BACKENDS.get(name)
    if kind is None:
        raise ValueError(f"the posterior was fitted with {name}, which is not of this package: pass backend={name}.")
    options: dict[str, Any] = {"enable_backprop": True} if state["options"]["enable_backprop"] else {}
    options |= {"backend": kind, "backend_kwargs": kwargs} | state["subset"]
    if options.get("last_layer_name") not in (None, *dict(model.named_modules())):
        raise CheckpointError(
            f"the posterior is over the layer {options['last_layer_name']!r}, which the model has not."
        )
    if "subnetwork_indices" in options:
        options["subnetwork_indices"] = options["subnetwork_indices"].cpu()  # laplace-torch asks for that type
    la = found(model, state["likelihood"], **options)
    _check_model(la, state)
    for attribute, value in (state["numbers"] | state["options"] | state.get("notes", {})).items():
        setattr(la, attribute, value)
    if state["backend"]["drawn"] is not None:
        la.backend.sampled = state["backend"]["drawn"]
    la.model.output_size = la.n_outputs  # as laplace-torch has it
    _set_curvature(la, state["curvature"])
    return la


def _posteriors() -> dict[Any, Any]:
    """The posteriors of laplace-torch and of this package whose curvature is known, by their keys."""
    kinds: list[Any] = [FullLaplace, DiagLaplace, KronLaplace, LowRankPosterior]
    for kind in kinds:  # which grows
        kinds.extend(kind.__subclasses__())
    return {k._key: k for k in kinds if "_key" in vars(k) and k.__module__.split(".")[0] in ("laplace", "curvature")}


def _check_model(la: Any, state: Mapping[str, Any]) -> None:
    own = {id(p) for p in _own(la)}
    here = _described(p for p in _network(la).named_parameters() if id(p[1]) in own)
    there = {name: tuple(described) for name, described in state["parameters"].items()}
    different = [
        f"{name} ({there.get(name, 'none')} there, {here.get(name, 'none')} here)"
        for name in there | here
        if there.get(name) != here.get(name)
    ]
    if different or list(here) != list(there):
        raise CheckpointError(
            "the posterior belongs to a model with other trainable parameters: "
            f"{', '.join(different[:5]) or 'they come in another order'}."
        )


def _network(la: Any) -> nn.Module:
    """The model, or the copy of it that a posterior of the last layer works with."""
    network: nn.Module = la.model.model if _of_last_layer(la) else la.model
    return network


def _own(la: Any) -> list[Tensor]:
    """The parameters whose values are the mean."""
    return list(la.model.last_layer.parameters()) if _of_last_layer(la) else la.params


def _of_last_layer(la: Any) -> bool:
    return isinstance(la, LLLaplace)


def _others(la: Any) -> list[Tensor]:
    """Parameters and buffers outside the posterior."""
    own = {id(p) for p in _own(la)}
    return [t for t in (*_network(la).parameters(), *_network(la).buffers()) if id(t) not in own]


def _described(parameters: Any) -> dict[str, tuple[str, str]]:
    return {name: ("x".join(map(str, p.shape)), str(p.dtype).removeprefix("torch.")) for name, p in parameters}


def _subset(la: Any) -> dict[str, Any]:
    """Arguments of the constructor that say which parameters count."""
    if isinstance(la, SubnetLaplace):
        return {"subnetwork_indices": la.backend.subnetwork_indices}
    if isinstance(la, LLLaplace):
        reduction = la.model.feature_reduction
        name = None if reduction is None else FeatureReduction(reduction).value
        return {"last_layer_name": la.model._last_layer_name, "feature_reduction": name}
    return {}


def _curvature(la: Any) -> Any:
    kind = type(la)
    if issubclass(kind, KronLaplace):
        H = la.H_facs.state_dict() if isinstance(la.H_facs, BlockKron) else {"kfacs": la.H_facs.kfacs}
        return H | {"eigen": la.H.state_dict()} if issubclass(kind, EKFACLaplace) else H
    if issubclass(kind, LowRankDiagPosterior):
        return vars(la.H)
    return dict(zip(("vectors", "values"), la.H, strict=True)) if issubclass(kind, LowRankPosterior) else la.H


def _set_curvature(la: Any, saved: Any) -> None:
    kind = type(la)
    if issubclass(kind, KronLaplace):
        la.H_facs = Kron(saved["kfacs"]) if "kfacs" in saved else BlockKron.from_state(saved)
        exact = issubclass(kind, EKFACLaplace)
        la.H = BlockKronDecomposed.from_state(la.H_facs.tensors, saved["eigen"]) if exact else _decomposed(la)
    elif issubclass(kind, LowRankDiagPosterior):
        la.H = LowRankDiagonal(**saved)
    else:
        la.H = (saved["vectors"], saved["values"]) if issubclass(kind, LowRankPosterior) else saved


def _decomposed(la: Any) -> Any:
    return la.H_facs.decompose(damping=la.damping)

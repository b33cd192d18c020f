"""What the numbers of a report belong to: mode, precision, device, data, software."""

from __future__ import annotations

import platform

import torch
from torch import nn

from curvature.reports.results import NoiseResult, Setting
from curvature.reports.sections.study import Study
from solvers import __version__


def setting(study: Study, lr: float | None, noise: NoiseResult | None) -> Setting:
    """The setting of a study; the gradients of single examples, where they are known, count the examples."""
    model, parameters = study.given[0], study.problem.parameters
    device = parameters.device
    named = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return Setting(
        mode=mode_of(model),
        dtype=", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters.values()})),
        device=f"{device}{named}",
        examples=study.examples if noise is None else noise.examples,
        data=study.fingerprint,
        kinds=_kinds(study),
        versions={"precond": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
        lr=lr,
    )


def mode_of(model: nn.Module) -> str:
    """Whether it is "eval" or "train"; where modules differ, how many are in train mode."""
    training = [module.training for module in model.modules()]
    if all(training) or not any(training):
        return "train" if training[0] else "eval"
    return f"{'train' if training[0] else 'eval'}, {sum(training)} of {len(training)} modules in train mode"


def _kinds(study: Study) -> dict[str, str]:
    """Class of the module that owns the parameters of each layer."""
    owners = {parameter.rpartition(".")[0] for parameter in study.problem.parameters}
    modules = {name: module for name, module in study.problem.model.named_modules() if name in owners}
    kinds = {name or type(modules[""]).__name__: type(module).__name__ for name, module in modules.items()}
    return {layer: kinds[layer] for layer in study.layers if layer in kinds}

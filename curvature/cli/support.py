"""Supported features, read off the code: ``python -m curvature.cli.support`` prints the page ``docs/support.md``.

The part of the page from :data:`RUN` on comes from scripts that run models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, get_args

import torch
from torch import nn

from curvature.layers import MODULES, REPLACEMENTS, RULES
from curvature.layers.block import Block, BlockPart
from curvature.losses import NoCurvatureError, SumOfLosses, loss_for
from curvature.losses.loss import registered
from curvature.losses.signals import KINDS
from curvature.matrices.covariance import CENTERED
from curvature.matrices.hessian import HessianStructure
from curvature.matrices.request import StructureName
from curvature.structures.blocks import BLOCKS
from curvature.structures.estimator import Form

_INTRODUCTION = """\
# What is supported

Made from the code by `python -m curvature.cli.support`, down to what was found by
[running models](#models-that-were-run); tests hold page and code together. What a model of yours gets, parameter by
parameter, is told by `curvature.coverage(model, loss_fn, data)`.
"""

#: Heading of the part of the page that other scripts make.
RUN = "## Models that were run"

_LAYERS = """\
## Layers and structures

The estimate of a layer's block in each structure of `curvature.fisher`, `curvature.ggn` and of optimizers. Every one is
there for the kinds {kinds}. Weight and bias are one block.
"""

_FUNCTIONS = """\
Layers are recognised by the functions they call, so the same holds without modules. Grouped by rule:
"""

_REPLACED = """\
- on data sets, where they run step by step: {functions}. In training their insides are not seen, and their parameters
  fall back to autograd.
"""

_ELSEWHERE = """\
**Anything else falls back to autograd**, and is right: parameters used by other functions (`einsum`, `exp`, custom
kernels), used in two ways that do not fit one block, or by operations on several of them at once (spectral norm,
parametrisations). They get the estimate of the last row, from gradients that autograd gives: one backward pass per
batch for `mc`, one per example for `exact` and `empirical` on data sets, in training too where that takes no more than
32, and otherwise one with random signs. Operations that mix examples (batch norm in train mode, tables looked up once
for all) take the same way. Matrix-free products need no rule at all.
"""

_MATRICES = """\
## Matrices and structures

`ggn` is as `fisher` of kind `exact` or `mc`; the covariance that is not centered as the `empirical` one.
"""

_LOSSES = """\
## Losses and kinds

An error says what to do where a kind is missing. Weighted sums of these, on one or several outputs, are
`curvature.losses.SumOfLosses`; any twice-differentiable loss per example is `curvature.losses.AutogradLoss`, and on
data sets functions and modules of unknown type are taken as such by themselves. In training these have their empirical
Fisher; what is no mean or sum over examples has its Hessian on one batch.

The Fisher is that of the model's own distribution, whatever the targets: another matrix than `ggn` for `BCELoss`, for
rates under `PoissonNLLLoss`, and for variances that the model returns beside its means under `GaussianNLLLoss`; all
there is for `NLLLoss` (of log-probabilities) and `L1Loss`, which are linear in the output. A loss that is no likelihood
has none, and optimizers take its Gauss-Newton matrix. Under `GaussianNLLLoss` the Gauss-Newton matrix in mean and
variance is indefinite: products are there, with a warning, and structures are refused. Where a loss is finite and its
second derivative is not (a probability that is exactly 0 or 1 under `BCELoss`, a norm at 0), the error names it.
"""


def markdown() -> str:
    """The page."""
    kinds = ", ".join(f"`{kind}`" for kind in KINDS)
    parts = [
        _INTRODUCTION,
        _LAYERS.format(kinds=kinds),
        _layers(),
        _FUNCTIONS,
        _functions() + _replaced(),
        _ELSEWHERE,
        _MATRICES,
    ]
    parts += [_matrices(), _LOSSES, _losses()]
    return "\n".join(parts)


def estimates(shape: tuple[int, ...], parts: int, form: Form) -> tuple[str, ...]:
    """The estimate of each structure for a block of this shape.

    Args:
        shape: Of each part.
        parts: How many parameters the block joins.
        form: ``"outer"`` for layers ``y = W a``.
    """
    numel = torch.Size(shape).numel()
    block = Block("block", tuple(BlockPart(f"p{i}", 0, (numel,), (0,), shape) for i in range(parts)))
    return tuple(curvature().estimator(block, form).structure for curvature in BLOCKS.values())


def _layers() -> str:
    found = {
        "kronecker": estimates((3, 4), 1, "outer"),
        "unit": estimates((3, 1), 2, "per_sample"),
        "diagonal": estimates((3,), 1, "per_sample"),
    }
    ours = [module for module in MODULES if getattr(nn, module.__name__, None) is module]
    names = {kind: [m.__name__ for m in ours if MODULES[m] == kind] for kind in found}
    names["kronecker"].append("MultiheadAttention")
    names["diagonal"].append("bare parameters")
    rows = [[", ".join(sorted(names[kind])), *found[kind]] for kind in found]
    rows.append(["anything else, by autograd", *found["diagonal"]])
    return _table(["layer", *(f"`{name}`" for name in BLOCKS)], rows)


def _functions() -> str:
    by_rule: dict[str, list[str]] = {}
    for function, rule in RULES.items():
        if rule.__module__.startswith("curvature.layers."):
            name = function.__name__.strip("_")
            found = by_rule.setdefault(rule.__module__.rpartition(".")[2], [])
            if name not in found:
                found.append(name)
    return "".join(f"- {rule}: {', '.join(f'`{name}`' for name in names)}\n" for rule, names in sorted(by_rule.items()))


def _replaced() -> str:
    return _REPLACED.format(functions=", ".join(f"`{function.__name__}`" for function in REPLACEMENTS))


def _matrices() -> str:
    hessian, all_of_them = get_args(HessianStructure), get_args(StructureName)
    rows = [["`hessian`", *("yes" if name in hessian else "" for name in all_of_them)]]
    rows += [[f"`fisher`, `{kind}`", *("yes" for _ in all_of_them)] for kind in KINDS]
    rows.append(["`gradient_covariance`", *("yes" if name in CENTERED else "" for name in all_of_them)])
    return _table(["", *(f"`{name}`" for name in all_of_them)], rows)


def _losses() -> str:
    rows = []
    for module in sorted(registered(), key=lambda m: m.__name__):
        if module is not SumOfLosses and module.__module__.startswith("torch.nn"):
            known = {kind: kind == "empirical" or _has(module, fisher=True) for kind in KINDS}
            found = [_has(module, fisher=False), *known.values()]
            rows.append([f"`{module.__name__}`", *("yes" if there else "" for there in found)])
    return _table(["", "`ggn`", *(f"`fisher`, `{kind}`" for kind in KINDS)], rows)


def _has(module: type[nn.Module], fisher: bool) -> bool:
    """Whether a loss has a second derivative, or a Fisher information, asked on outputs that suit all of them."""
    z = torch.full((2, 3), 0.5)
    given: tuple[Any, ...] = (torch.tensor([0, 1]),) if module in (nn.CrossEntropyLoss, nn.NLLLoss) else (z,)
    given = (*given, z) if module is nn.GaussianNLLLoss else given
    try:
        terms = loss_for(module()).terms(z.log_softmax(-1) if module is nn.NLLLoss else z, *given)
        (terms.fisher() if fisher else terms).sqrt_column(0)
    except NoCurvatureError:
        return False
    return True


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(markdown(), end="")

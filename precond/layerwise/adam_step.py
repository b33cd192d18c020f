"""Adam's step for some parameters of a layer-based method, such as tables of embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from precond.step.options import check_betas
from precond.step.trust_region import peak_lr
from solvers.outcome.arguments import number
from solvers.precision import widen

#: Entries of the state of such a parameter.
MEAN, SQUARES, STEP = "mean", "squares", "step"


@dataclass(frozen=True)
class AdamStep:
    r"""In ``structures=``: layers that take Adam's step in place of one by their curvature.

    .. math:: m \leftarrow \beta_1 m + (1 - \beta_1)\, g, \qquad s \leftarrow \beta_2 s + (1 - \beta_2)\, g \odot g,
        \qquad p \leftarrow p - \eta\, \frac{\bar\eta_A}{\bar\eta}\,
        \frac{m / (1 - \beta_1^t)}{\sqrt{s / (1 - \beta_2^t)} + \epsilon}

    with the learning rate :math:`\eta` of the group and the reference rate :math:`\bar\eta` of its bound
    (:class:`~precond.TrustRegion`; the group's largest rate where it has none, 0.1 where that is 0), so that entries
    move by about :math:`\bar\eta_A` in a step at that rate, and in proportion at others. These moves have no other
    momentum; they are not within ``kl_clip``, and have no part in it. Weight decay is that of the group.

    Rows of an embedding that few examples use have a small curvature, below any damping, so a natural gradient hardly
    moves them; a step relative to the gradients of each entry does. ``KFAC``, ``EKFAC`` and ``TNT`` give it to the
    weights of ``nn.Embedding`` and ``nn.EmbeddingBag`` of models in which no other module has one of them. Where the
    head has the table of the tokens, as in GPT-2, all tables have curvature: those of the positions would outrun it. A
    product with a table in a ``forward`` of one's own is not seen. ``structures={"embed": {}}`` gives a table
    curvature, and ``{"table": AdamStep()}`` the step to a parameter of one's own.

    Args:
        lr: :math:`\bar\eta_A`.
        betas: Decay of the averages of gradients and of their squares.
        eps: Added to the root.

    Raises:
        ValueError: If a number is out of range.

    References:
        Kingma and Ba (2015), algorithm 1, https://arxiv.org/abs/1412.6980
    """

    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        """Validate the arguments."""
        number("lr of an AdamStep", self.lr, low=0)
        check_betas("betas of an AdamStep", self.betas)
        number("eps of an AdamStep", self.eps, low=0, open_low=True)

    def begin(self, p: Tensor) -> dict[str, Any]:
        """The state of a parameter before its first step."""
        zeros = torch.zeros_like(widen(p.detach()))
        return {MEAN: zeros, SQUARES: zeros.clone(), STEP: 0}

    def direction(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any], idle: bool) -> Tensor:
        """Direction for a gradient; the state gets new entries, unless the step is idle.

        Args:
            p: The parameter.
            g: Its gradient.
            state: Of the parameter.
            group: Options of its group.
            idle: Whether the step does not count.
        """
        if SQUARES not in state:
            state.update(self.begin(p))
        if idle:
            return torch.zeros_like(g)
        first, second = self.betas
        wide, step = widen(g), state[STEP] + 1
        mean = state[MEAN].lerp(wide, 1 - first)
        squares = (state[SQUARES] * second).addcmul(wide, wide, value=1 - second)
        state.update({MEAN: mean, SQUARES: squares, STEP: step})
        root = (squares / (1 - second**step)).sqrt_().add_(self.eps)
        factor = self.lr / _reference(group) / (1 - first**step)
        return (mean / root * factor).to(g.dtype)


def _reference(group: dict[str, Any]) -> float:
    """The learning rate at which entries move by that of the step."""
    return float(peak_lr(group) if group["kl_lr"] is None else group["kl_lr"]) or AdamStep.lr


def embeddings(model: nn.Module) -> list[str]:
    """Names of a model's tables of embeddings, trainable or not; none where one of them is more than a table."""
    owners: dict[int, list[tuple[str, bool]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, p in module.named_parameters(recurse=False):
            is_table = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and key == "weight"
            owners.setdefault(id(p), []).append((f"{prefix}.{key}" if prefix else key, is_table))
    kinds = [{is_table for _, is_table in uses} for uses in owners.values()]
    return [] if {True, False} in kinds else [uses[0][0] for uses in owners.values() if uses[0][1]]

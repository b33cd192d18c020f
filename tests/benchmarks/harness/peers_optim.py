"""Training steps by other libraries, each refreshed every ``interval`` steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from registry import register
from torch import Tensor, nn


class _NoRange(contextlib.ContextDecorator):
    """In the place of marks for a GPU's profiler, which ASDL sets and a build for processors does not have."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> _NoRange:
        return self

    def __exit__(self, *_: object) -> None: ...


def without_marks() -> None:
    torch.cuda.nvtx.range = _NoRange


def plain(w: Any, *optimizers: Any) -> Callable[[], Tensor]:
    """A step of the plain training loop."""

    def step() -> Tensor:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss: Tensor = w.loss()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return loss.detach()

    return step


@register("SGD", "optim", fixed=True)
def sgd(w: Any, interval: int = 1, lr: float = 1e-4) -> Any:
    return plain(w, torch.optim.SGD(w.params, lr=lr, momentum=0.9))


@register("AdamW", "optim", fixed=True)
def _(w: Any, interval: int = 1, lr: float = 1e-4) -> Any:
    return plain(w, torch.optim.AdamW(w.params, lr=lr))


@register("torch Muon", "optim", fixed=True)
def _(w: Any, interval: int = 1, lr: float = 1e-4) -> Any:
    matrices = [m.weight for m in w.model.modules() if isinstance(m, nn.Linear)]
    rest = [p for p in w.params if all(p is not q for q in matrices)]
    return plain(w, torch.optim.Muon(matrices, lr=lr), torch.optim.AdamW(rest, lr=lr))


def _pytorch_optimizer(name: str, cls: str, options: Callable[[int], dict[str, Any]]) -> None:
    @register(f"pytorch-optimizer {name}", "optim")
    def _(w: Any, interval: int = 1, lr: float = 1e-4) -> Any:
        import pytorch_optimizer

        return plain(w, getattr(pytorch_optimizer, cls)(w.params, lr=lr, **options(interval)))


_pytorch_optimizer("SOAP", "SOAP", lambda k: {"precondition_frequency": k})
_pytorch_optimizer("Kron", "Kron", lambda k: {"pre_conditioner_update_probability": 1.0 / k})
_pytorch_optimizer(
    "Shampoo",
    "ScalableShampoo",
    lambda k: {"start_preconditioning_step": 1, "preconditioning_compute_steps": k, "statistics_compute_steps": k},
)


@register("SINGD dense, by its authors", "optim")
def _(w: Any, interval: int = 1, lr: float = 1e-4) -> Any:
    from singd.optim.optimizer import SINGD

    average = "batch+sequence" if w.tokens else "batch"
    dense = ("dense", "dense")
    options = {"structures": dense, "kfac_like": False, "warn_unsupported": False}
    return plain(w, SINGD(w.model, lr=lr, momentum=0.9, damping=1e-3, T=interval, loss_average=average, **options))


def _asdl(name: str, kind: str) -> None:
    @register(name, "optim")
    def _(w: Any, interval: int = 1, lr: float = 1e-4) -> Any:
        import asdl.precondition

        without_marks()
        optimizer = torch.optim.SGD(w.params, lr=lr, momentum=0.9)
        config = asdl.precondition.PreconditioningConfig(
            data_size=w.terms, damping=1e-3, ema_decay=0.05, preconditioner_upd_interval=interval
        )
        maker = asdl.precondition.KfacGradientMaker(w.model, config, fisher_type=kind, loss_type="cross_entropy")

        def step() -> Tensor:
            optimizer.zero_grad()
            out = maker.setup_model_call(w.model, w.x)
            if w.tokens:
                out = out.flatten(0, 1)
                maker.setup_logits_repr(out)
            maker.setup_loss_call(F.cross_entropy, out, w.flat_y)
            _, loss = maker.forward_and_backward()
            optimizer.step()
            return loss.detach()

        return step


_asdl("ASDL K-FAC (mc)", "fisher_mc")
_asdl("ASDL K-FAC (empirical)", "fisher_emp")

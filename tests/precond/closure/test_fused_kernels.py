"""Do methods that differentiate twice train models whose kernels can be differentiated once?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from curvature.model.pullback import NoSecondDerivativeError
from precond import PSGD, AdaHessian, CurveBall, GaussNewton, HessianFree, Newton, Sophia

X, Y = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1, 1, 0])
LOSS = nn.CrossEntropyLoss()


class Attention(nn.Module):
    """One layer of attention; its weights are asked for where the fused kernel is not to be used."""

    def __init__(self, plain: bool, again: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)
        self.plain, self.again = plain, again
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=self.plain)[0]

        seen = checkpoint(attend, x, use_reentrant=False) if self.again else attend(x)
        return self.head(seen.mean(1))


class Bag(nn.Module):
    def __init__(self, plain: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.bag, self.head, self.plain = nn.EmbeddingBag(4, 4), nn.Linear(4, 2), plain
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        index = x[..., 0].abs().long() % 4
        return self.head((self.bag.weight[index].mean(1) if self.plain else self.bag(index)).tanh())


MAKE: dict[str, Any] = {
    "Sophia": lambda m: Sophia(m.parameters(), lr=0.1),
    "AdaHessian": lambda m: AdaHessian(m.parameters(), lr=0.1),
    "PSGD": lambda m: PSGD(m.parameters(), lr=0.1, criterion="hessian"),
    "Newton": lambda m: Newton(m.parameters(), lr=0.1, mode="absolute", damping=1.0),
    "HessianFree": lambda m: HessianFree(m, LOSS),
    "CurveBall": lambda m: CurveBall(m, LOSS),
    "GaussNewton": lambda m: GaussNewton(m, solver="cg"),
}


def train(name: str, model: nn.Module, steps: int = 2) -> list[Tensor]:
    optimizer = MAKE[name](model)
    if name == "GaussNewton":
        closure = lambda: (model(X) - nn.functional.one_hot(Y).double()).reshape(-1)  # noqa: E731
    elif name in ("HessianFree", "CurveBall"):
        loss_fn = optimizer.loss_fn
        closure = lambda: loss_fn(model(X), Y)  # noqa: E731
    else:
        closure = lambda: nn.functional.cross_entropy(model(X), Y)  # noqa: E731
    for _ in range(steps):
        optimizer.step(closure)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", MAKE)
def test_fused_attention(name: str) -> None:
    plain, fused = train(name, Attention(plain=True)), train(name, Attention(plain=False))
    torch.testing.assert_close(fused, plain)
    assert not torch.equal(plain[0], next(Attention(plain=True).parameters()))


@pytest.mark.parametrize("name", ["Sophia", "HessianFree"])
def test_fused_attention_that_is_computed_again(name: str) -> None:
    torch.testing.assert_close(train(name, Attention(False, again=True)), train(name, Attention(plain=True)))


@pytest.mark.parametrize("name", ["AdaHessian", "HessianFree"])
def test_bags_of_embeddings(name: str) -> None:
    torch.testing.assert_close(train(name, Bag(plain=False)), train(name, Bag(plain=True)))


def test_the_kernels_of_the_loop_are_its_own_again() -> None:
    model = Attention(plain=False)
    Sophia(model.parameters()).step(lambda: LOSS(model(X), Y))
    assert _fused(model)
    assert torch.backends.cuda.flash_sdp_enabled()


def _fused(model: Attention) -> bool:
    waiting = [LOSS(model(X), Y).grad_fn]
    while waiting:
        node = waiting.pop()
        if "FlashAttention" in node.name():
            return True
        waiting += [before for before, _ in node.next_functions if before is not None]
    return False


@pytest.mark.parametrize("name", ["Sophia", "Newton", "HessianFree"])
def test_a_kernel_without_a_second_derivative_is_named(name: str) -> None:
    class Distances(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centers = nn.Parameter(torch.randn(2, 4).double())

        def forward(self, x: Tensor) -> Tensor:
            return torch.cdist(x[:, 0], self.centers)

    with pytest.raises(NoSecondDerivativeError, match=r"only once \(_cdist_backward\)"):
        train(name, Distances())


class Squared(torch.autograd.Function):
    """A kernel of one's own: torch takes the derivative of its backward for zero, and says nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradients[0]


@pytest.mark.parametrize("name", ["Sophia", "Newton", "HessianFree"])
def test_a_custom_function_without_a_second_derivative_is_refused(name: str) -> None:
    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 3).double(), nn.Linear(3, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(Squared.apply(self.inner(x[:, 0])))

    with pytest.raises(NoSecondDerivativeError, match=r"only once .*once_differentiable.*such as KFAC or SOAP"):
        train(name, Squares())

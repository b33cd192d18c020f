"""Are the factors of SINGD those of the paper's updates, in every structure?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precond import SINGD, SINGDFisher
from tests.precond import layer_references as ref

DAMPING, LR, BETA, ALPHA = 0.05, 0.05, 0.2, 0.6
LOSS = nn.CrossEntropyLoss()
STRUCTURES = ["dense", "diagonal", "block", "triangular"]


def projected(M: Tensor, structure: str) -> Tensor:
    """The paper's projection, on whole matrices, entry by entry."""
    out = torch.zeros_like(M)
    for i in range(len(M)):
        for j in range(len(M)):
            if structure == "dense" or i == j or (structure == "block" and i // 3 == j // 3):
                out[i, j] = M[i, j]
            elif structure == "triangular" and i > j:
                out[i, j] = 2 * M[i, j]
    return out


class Factors:
    """K (inputs) and L (output gradients) of one layer."""

    def __init__(self, d_in: int, d_out: int, structure: str, coupled: bool) -> None:
        self.K, self.L = torch.eye(d_in).double(), torch.eye(d_out).double()
        self.mK, self.mL = torch.zeros(d_in, d_in).double(), torch.zeros(d_out, d_out).double()
        self.structure, self.coupled = structure, coupled

    def move(self, A: Tensor, B: Tensor) -> None:
        K, L = self.K, self.L
        HK, HL = K.T @ A @ K, L.T @ B @ L

        # What the structure does not hold is never seen by the traces, which are the same.
        def wanted(H: Tensor, own: Tensor, H_other: Tensor, other: Tensor) -> Tensor:
            weight = H_other.trace() / len(other) if self.coupled else 1.0
            shift = DAMPING * ((other.T @ other).trace() / len(other) if self.coupled else 1.0)
            return projected(weight * H + shift * own.T @ own - torch.eye(len(own)).double(), self.structure) / 2

        self.mK = ALPHA * self.mK + wanted(HK, K, HL, L)
        self.mL = ALPHA * self.mL + wanted(HL, L, HK, K)
        self.K = K - self.rate(self.mK) * K @ self.mK
        self.L = L - self.rate(self.mL) * L @ self.mL

    @staticmethod
    def rate(m: Tensor) -> float:
        return BETA / max(1.0, torch.linalg.matrix_norm(m, float("inf")).item())


def by_the_book(data: list[ref.Batch], structure: str, coupled: bool) -> Any:
    net = ref.mlp(6, 5, 4, 3)
    shapes = [(7, 5), (6, 4), (5, 3)]
    layers = [Factors(*shape, structure, coupled) for shape in shapes]
    params = list(net.parameters())
    for x, y in data:
        inputs, outputs, h = [], [], x
        for module in net:
            if isinstance(module, nn.Linear):
                inputs.append(torch.cat([h.detach(), torch.ones(len(x), 1).double()], 1))
                h = module(h)
                outputs.append(h)
            else:
                h = module(h)
        grads = torch.autograd.grad(LOSS(h, y), [*params, *outputs])
        with torch.no_grad():
            for k, layer in enumerate(layers):
                g = grads[6 + k] * len(x)
                layer.move(inputs[k].T @ inputs[k] / len(x), g.T @ g / len(x))
                G = torch.cat([grads[2 * k], grads[2 * k + 1][:, None]], 1)
                D = layer.L @ layer.L.T @ G @ layer.K @ layer.K.T
                params[2 * k] -= LR * D[:, :-1]
                params[2 * k + 1] -= LR * D[:, -1]
        yield ref.flat(params)


def follows_the_book(data: Any, structure: Any, coupled: bool) -> None:
    """A small network takes the steps of the formulas on some batches."""
    net = ref.mlp(6, 5, 4, 3)
    fisher = SINGDFisher("empirical", block_size=3, factor_lr=BETA, factor_momentum=ALPHA, coupled=coupled)
    optimizer = SINGD(net, LOSS, lr=LR, kl_clip=None, structure=structure, damping=DAMPING, fisher=fisher, momentum=0.0)
    ref.assert_follows(net, optimizer, by_the_book(data, structure, coupled), data, LOSS)


@pytest.mark.parametrize("coupled", [True, False], ids=["singd", "ikfac"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_twenty_steps_are_those_of_the_formulas(structure: Any, coupled: bool) -> None:
    follows_the_book(ref.batches(20), structure, coupled)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_batches_of_few_and_of_many_examples_take_turns(structure: Any) -> None:
    """As a last batch that is short: of few rows K-FAC's factors wait as these, which are no blocks."""
    data = [(x[:n], y[:n]) for n, (x, y) in zip((2, 12, 1, 12, 3), ref.batches(5), strict=True)]
    follows_the_book(data, structure, True)


@pytest.mark.parametrize("structure", ["dense", "triangular"])
def test_ikfac_tends_to_the_damped_inverses_of_kfac(structure: Any) -> None:
    net, data = ref.mlp(6, 3), ref.batches(1) * 100
    fisher = SINGDFisher("empirical", coupled=False, factor_lr=0.3)
    optimizer = SINGD(net, LOSS, lr=0.0, structure=structure, damping=0.3, fisher=fisher)
    ref.train(net, optimizer, data, LOSS)
    (estimator,) = (p.estimator for p in optimizer.preconditioners.values())
    inverse: Any = estimator.operator()
    a = torch.cat([data[0][0], torch.ones(12, 1).double()], 1)
    expected = torch.linalg.inv(a.T @ a / 12 + 0.3 * torch.eye(7).double())
    torch.testing.assert_close(inverse.factors[1].to_dense(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_huge_damping_tends_to_the_inverse_of_the_damping(structure: Any) -> None:
    net, data = ref.net(), ref.batches(1) * 60
    fisher = SINGDFisher(block_size=2, initial=1e-7, factor_lr=0.5)
    optimizer = SINGD(net, LOSS, lr=0.0, structure=structure, damping=1e8, fisher=fisher)
    ref.train(net, optimizer, data, LOSS)
    for name in ("inner", "out"):
        P = optimizer.preconditioners[f"{name}.weight+{name}.bias"].inverse
        assert P is not None
        torch.testing.assert_close(P.to_dense() * 1e8, torch.eye(P.shape[0]).double(), rtol=1e-5, atol=1e-5)


def test_smaller_structures_keep_fewer_numbers() -> None:
    sizes = {}
    for structure in STRUCTURES:
        net = ref.mlp(6, 5, 3)
        optimizer = SINGD(net, LOSS, lr=0.1, structure=structure, fisher=SINGDFisher(block_size=3))  # type: ignore[arg-type]
        ref.train(net, optimizer, ref.batches(1), LOSS)
        estimator: Any = optimizer.preconditioners["0.weight+0.bias"].estimator
        sizes[structure] = sum(factor.numel() for factor in estimator.factors)
        moments = [mean.value.numel() for pair in estimator.moments.sides.values() for mean in pair]
        assert sum(moments) == sizes[structure]  # nothing larger is formed on the way
    assert sizes == {"dense": 25 + 49, "diagonal": 5 + 7, "block": 2 * 9 + 3 * 9, "triangular": 25 + 49}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(x)))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_both_sides_of_a_tied_matrix_count(structure: Any) -> None:
    torch.manual_seed(0)
    net = Tied()
    fisher = SINGDFisher("empirical", block_size=2, factor_lr=0.1)
    optimizer = SINGD(net, LOSS, lr=0.0, structure=structure, fisher=fisher)
    x, y = torch.arange(10) % 7, (torch.arange(10) * 3) % 7
    LOSS(net(x), y).backward()
    optimizer.step()
    (estimator,) = (p.estimator for p in optimizer.preconditioners.values())
    # The first step from L = K = 1: H are the factors themselves.
    a = torch.tanh(net.table(x)).detach()
    z = net.head(a)
    g = (z.softmax(-1) - torch.eye(7).double()[y]).detach()
    back = (g @ net.head.weight * (1 - a**2)).detach()
    one_hot = torch.eye(7).double()[x]
    pairs = [(g.T @ g / 10, a.T @ a / 10), (one_hot.T @ one_hot / 10, back.T @ back / 10)]
    total = sum(left.trace() / 7 * right for left, right in pairs) + (1e-3 - 1) * torch.eye(4).double()

    def project(M: Tensor) -> Tensor:
        keep = {"dense": torch.ones(4, 4), "diagonal": torch.eye(4), "block": torch.block_diag(*[torch.ones(2, 2)] * 2)}
        return M.tril() + M.tril(-1) if structure == "triangular" else M * keep[structure].double()

    m = project(total) / 2
    K = torch.eye(4).double() - 0.1 / max(1.0, torch.linalg.matrix_norm(m, float("inf")).item()) * m
    torch.testing.assert_close(estimator.operator().factors[1].to_dense(), K @ K.T)  # type: ignore[attr-defined]


def test_grouped_convolutions_have_factors_for_each_group() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(24, 3)).double()
    x = torch.randn(5, 4, 6, dtype=torch.float64)
    y = torch.arange(5) % 3
    for structure in STRUCTURES:
        optimizer = SINGD(net, LOSS, lr=0.01, structure=structure, fisher=SINGDFisher(block_size=4))  # type: ignore[arg-type]
        ref.train(net, optimizer, [(x, y)] * 3, LOSS)
        inverse = optimizer.preconditioners["0.weight+0.bias"].inverse
        assert inverse is not None and inverse.in_shape == (2, 3, 7)
        dense = inverse.to_dense()
        torch.testing.assert_close(dense, dense.T)
        assert torch.linalg.eigvalsh(dense).min() > 0 and not dense[:21, 21:].any()
        optimizer.detach()


@pytest.mark.parametrize("structure", ["block", "triangular"])
@pytest.mark.parametrize("stop", [4, 5])
def test_a_resumed_run_continues_bit_for_bit(structure: Any, stop: int) -> None:
    data = ref.batches(9)

    def make(model: nn.Module) -> SINGD:
        fisher = SINGDFisher(block_size=2)
        return SINGD(model, LOSS, lr=0.05, structure=structure, fisher=fisher, curvature_update_period=2)

    ref.assert_resumes(make, data, LOSS, stop)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"structure is one of dense, diagonal, block, triangular, not 'toeplitz'"):
        SINGD(ref.net(), LOSS, lr=0.1, structure="toeplitz")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"factor_lr must be in \(0, 1\), or a factor may become singular; got 1.0"):
        SINGD(ref.net(), LOSS, lr=0.1, fisher=SINGDFisher(factor_lr=1.0))
    net = Tied()
    optimizer = SINGD(net, LOSS, lr=0.1, fisher=SINGDFisher(coupled=False))
    with pytest.raises(ValueError, match=r"table.weight is used from both sides.*Use SINGD with coupled=True"):
        ref.train(net, optimizer, [(torch.arange(5), torch.arange(5))], LOSS)

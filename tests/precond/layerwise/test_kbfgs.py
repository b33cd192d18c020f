"""Does K-BFGS keep its inverses up to date as the paper does, from a second pass that leaves no trace?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import KroneckerBFGS
from curvature.structures.kbfgs import KroneckerBFGSEstimator, bfgs, double_damped
from precond import KBFGS
from tests.precond import layer_references as ref

DAMPING, EMA, LR = 0.05, 0.8, 0.1
LOSS = nn.CrossEntropyLoss()


def observed(net: nn.Sequential, x: Tensor, y: Tensor) -> list[dict[str, Tensor]]:
    """Per linear layer: inputs with a one, outputs, and the gradients of each example's loss in the outputs."""
    h = net[0](x)
    a = torch.tanh(h)
    z = net[2](a)
    gh, gz = torch.autograd.grad(nn.functional.cross_entropy(z, y, reduction="sum"), [h, z])
    one = torch.ones(len(x), 1).double()
    return [
        {"a": torch.cat([x, one], 1), "h": h.detach(), "g": gh},
        {"a": torch.cat([a.detach(), one], 1), "h": z.detach(), "g": gz},
    ]


class Factors:
    """The two inverses of one layer by the book."""

    def __init__(self) -> None:
        self.t = 0.0
        self.A: Any = None
        self.HA: Any = None
        self.HB: Any = None
        self.s: Any = 0.0
        self.y: Any = 0.0

    def before(self, a: Tensor, units: int) -> None:
        nu = DAMPING**0.5
        new = a.T @ a / len(a)
        self.A = new if self.A is None else (EMA * self.t * self.A + new) / (EMA * self.t + 1)
        self.t = EMA * self.t + 1
        eye = torch.eye(a.shape[1]).double()
        if self.HA is None:
            self.HA, self.HB = torch.linalg.inv(self.A + nu * eye), torch.eye(units).double()
        else:
            s = self.HA @ a.mean(0)
            self.HA = self.updated(self.HA, s, self.A @ s + nu * s)

    def after(self, s: Tensor, y: Tensor) -> None:
        # The scale of an average of pairs does not matter: BFGS is invariant, and so is the damping.
        self.s, self.y = EMA * self.s + (1 - EMA) * s, EMA * self.y + (1 - EMA) * y
        s, y = self.s, self.y
        yHy = y @ self.HB @ y
        if s @ y < 0.2 * yHy:
            theta = 0.8 * yHy / (yHy - s @ y)
            s = theta * s + (1 - theta) * self.HB @ y
        nu = DAMPING**0.5
        if s @ y < nu * (s @ s):
            theta = (1 - nu) * (s @ s) / (s @ s - s @ y)
            y = theta * y + (1 - theta) * s
        self.HB = self.updated(self.HB, s, y)

    @staticmethod
    def updated(H: Tensor, s: Tensor, y: Tensor) -> Tensor:
        V = torch.eye(len(s)).double() - torch.outer(s, y) / (s @ y)
        return V @ H @ V.T + torch.outer(s, s) / (s @ y)


def by_the_book(data: list[ref.Batch], period: int = 1) -> Any:
    net = ref.mlp(6, 5, 3)
    layers = [Factors(), Factors()]
    params = list(net.parameters())
    for step, (x, y) in enumerate(data):
        grads = torch.autograd.grad(LOSS(net(x), y), params)
        old = observed(net, x, y)
        due = step % period == 0
        with torch.no_grad():
            for k, layer in enumerate(layers):
                if due:
                    layer.before(old[k]["a"], old[k]["h"].shape[1])
                D = layer.HB @ torch.cat([grads[2 * k], grads[2 * k + 1][:, None]], 1) @ layer.HA
                params[2 * k] -= LR * D[:, :-1]
                params[2 * k + 1] -= LR * D[:, -1]
        new = observed(net, x, y)
        if due:
            for k, layer in enumerate(layers):
                layer.after(*((new[k][name] - old[k][name]).mean(0) for name in ("h", "g")))
        yield ref.flat(params)


@pytest.mark.parametrize("period", [1, 3])
def test_twenty_steps_are_those_of_the_formulas(period: int) -> None:
    net, data = ref.mlp(6, 5, 3), ref.batches(20)
    optimizer = KBFGS(
        net, LOSS, lr=LR, damping=DAMPING, kl_clip=None, curvature_ema=EMA, momentum=0.0, curvature_update_period=period
    )
    ref.assert_follows(net, optimizer, by_the_book(data, period), data, LOSS)
    estimator: Any = optimizer.preconditioners["0.weight+0.bias"].estimator
    assert (estimator.HB - torch.eye(5)).abs().max() > 0.05  # the output factor has learned something


def test_bfgs_satisfies_the_secant_equation_and_stays_positive(generator: torch.Generator) -> None:
    H = torch.eye(6, dtype=torch.float64).expand(2, 6, 6)
    for _ in range(50):
        s, y = torch.randn(2, 2, 6, generator=generator, dtype=torch.float64)
        s, y = double_damped(H, s, y, 0.2, 0.1)
        H = bfgs(H, s, y)
        torch.testing.assert_close((H @ y.unsqueeze(-1)).squeeze(-1), s, rtol=1e-7, atol=1e-9)
        assert torch.equal(H, H.mT) and torch.linalg.eigvalsh(H).min() > 0


@pytest.mark.parametrize("shift", [0.01, 0.5, 1.0, 3.0])
def test_both_bounds_hold_and_what_satisfies_them_stays(generator: torch.Generator, shift: float) -> None:
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    H = root @ root.T + 0.1 * torch.eye(5).double()
    touched = 0
    for _ in range(200):
        s, y = torch.randn(2, 5, generator=generator, dtype=torch.float64)
        y = y + 3 * s
        damped_s, damped_y = double_damped(H, s, y, 0.2, shift)
        assert damped_s @ y >= 0.2 * (y @ H @ y) * (1 - 1e-12)
        assert damped_s @ damped_y >= shift * (damped_s @ damped_s) * (1 - 1e-12)
        if s @ y >= 0.2 * (y @ H @ y):
            assert torch.equal(damped_s, s)
        if damped_s @ y >= shift * (damped_s @ damped_s):
            assert torch.equal(damped_y, y)
        else:
            touched += 1
    assert 0 < touched < 200 or shift == 0.01


def test_the_input_factor_tends_to_the_damped_inverse() -> None:
    """On one batch again and again, with the mean as the only direction, H_A satisfies its secant equation."""
    net, data = ref.mlp(6, 5, 3), ref.batches(1) * 5
    optimizer = KBFGS(net, LOSS, lr=0.0, damping=DAMPING)
    ref.train(net, optimizer, data, LOSS)
    estimator: Any = optimizer.preconditioners["0.weight+0.bias"].estimator
    a = torch.cat([data[0][0], torch.ones(12, 1).double()], 1)
    exact = torch.linalg.inv(a.T @ a / 12 + DAMPING**0.5 * torch.eye(7).double())
    torch.testing.assert_close(estimator.HA, exact)


class Dropped(nn.Module):
    """Dropout and batch statistics: what a second pass must not disturb, or draw anew."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.dropout(torch.relu(self.norm(self.first(x))), training=self.training))


def test_the_second_pass_draws_the_same_dropout_and_leaves_no_trace() -> None:
    torch.manual_seed(0)
    model, plain = Dropped(), Dropped()
    plain.load_state_dict(model.state_dict())
    data = ref.batches(3)
    optimizer = KBFGS(model, LOSS, lr=0.0)
    outcomes = []
    for net, opt in ((model, optimizer), (plain, torch.optim.SGD(plain.parameters(), lr=0.0))):
        torch.manual_seed(1)
        ref.train(net, opt, data, LOSS)
        outcomes.append([torch.rand(3), *(b.clone() for b in net.buffers()), *(p.grad for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
    for name in ("first", "last"):
        estimator: Any = optimizer.preconditioners[f"{name}.weight+{name}.bias"].estimator
        # Nothing moved, so the same masks give the same outputs and gradients.
        s, y = estimator.s.value, estimator.y.value
        assert max(s.abs().max(), y.abs().max()) < 1e-12


@pytest.mark.parametrize("stop", [4, 5])
def test_a_resumed_run_continues_bit_for_bit(stop: int) -> None:
    data = ref.batches(10)

    def make(model: nn.Module) -> KBFGS:
        return KBFGS(model, LOSS, lr=0.05, curvature_update_period=2)

    ref.assert_resumes(make, data, LOSS, stop)


def test_another_optimizer_may_move_the_parameters() -> None:
    """The pair of a step is the same whether step() moves or another optimizer does, later."""
    data, found, learnt = ref.batches(4), [], False
    for split in (False, True):
        net = ref.net()
        optimizer = KBFGS(net, LOSS, lr=0.1, momentum=0.0, kl_clip=None)
        plain = torch.optim.SGD(net.parameters(), lr=0.1)
        for x, y in data:
            optimizer.zero_grad()
            LOSS(net(x), y).backward()
            if split:
                optimizer.precondition()
                plain.step()
                for estimator in (block.estimator for block in optimizer.preconditioners.values()):
                    if isinstance(estimator, KroneckerBFGSEstimator) and estimator.s.value is not None:
                        assert not estimator.s.value.requires_grad  # no graph is kept
                        learnt = True
            else:
                optimizer.step()
        found.append(ref.flat(net.parameters()))
    assert torch.equal(*found) and learnt


def test_accumulated_batches_are_one_batch() -> None:
    (x, y), *_ = ref.batches(1)
    factors = []
    for parts in ([slice(0, 12)], [slice(0, 5), slice(5, 12)]):
        net = ref.net()
        optimizer = KBFGS(net, LOSS, lr=0.5)
        for part in parts:
            (LOSS(net(x[part]), y[part]) * len(y[part]) / len(y)).backward()
        optimizer.step()
        factors.append([p.estimator.HB for p in optimizer.preconditioners.values() if hasattr(p.estimator, "HB")])
    assert len(factors[0]) == 2
    for one, several in zip(*factors, strict=True):
        torch.testing.assert_close(one, several, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("flatten", [False, True])
def test_a_loss_on_a_rearranged_output_is_repeated_from_its_gradient(flatten: bool) -> None:
    net = nn.Linear(2, 3).double()
    optimizer = KBFGS(net, LOSS, lr=0.1)
    x = torch.randn(4, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.arange(20).reshape(4, 5) % 3
    z = net(x)
    (LOSS(z.flatten(0, 1), y.flatten()) if flatten else LOSS(z.movedim(-1, 1), y)).backward()
    optimizer.step()
    estimator = optimizer.preconditioners["weight+bias"].estimator
    assert isinstance(estimator, KroneckerBFGSEstimator) and estimator.y.value is not None
    assert estimator.y.value.abs().max() > 1e-4


def test_huge_damping_leaves_the_gradient_divided_by_it() -> None:
    net, plain, data = ref.net(), ref.net(), ref.batches(3)
    ref.train(
        net,
        KBFGS(net, LOSS, lr=1e15, damping=1e16, curvature=KroneckerBFGS(initial=None), momentum=0.0, kl_clip=None),
        data,
        LOSS,
    )
    ref.train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), data, LOSS)
    torch.testing.assert_close(ref.flat(net.parameters()), ref.flat(plain.parameters()), rtol=1e-6, atol=1e-7)


def test_refusals() -> None:
    with pytest.raises(
        ValueError, match=r"damping must be positive: the matrix that KBFGS inverts is singular. Got 0.0"
    ):
        KBFGS(ref.net(), LOSS, lr=0.1, damping=0.0)
    with pytest.raises(ValueError, match=r"mu must be in \(0, 1\), got 1.5"):
        KBFGS(ref.net(), LOSS, lr=0.1, curvature=KroneckerBFGS(mu=1.5))
    with pytest.raises(ValueError, match="KBFGS minimises"):
        KBFGS(ref.net(), LOSS, lr=0.1, maximize=True)
    with pytest.raises(ValueError, match=r"evaluates the loss once more.*Identity is of unknown type"):
        KBFGS(ref.net(), nn.Identity(), lr=0.1)

"""Layers that only some examples reach, or in another order: every row counts to the example it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import precond
from curvature import DiagonalFisher, GramFisher, KroneckerFisher, LayerFisher, TensorNormal, UnitFisher
from precond import PreconditionedOptimizer
from solvers import Cholesky, Eigh, FactoredTikhonov, Tikhonov, Woodbury

N, LOSS = 10, nn.CrossEntropyLoss()


class Routed(nn.Module):
    """A layer before, experts that take the rows a router sends them, and a layer behind."""

    def __init__(self, experts: int = 2) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(3, 3), nn.Linear(3, 3)
        self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x).tanh()
        return self.out(self.route(x, x.argsort(1)))

    def route(self, x: Tensor, gate: Tensor) -> Tensor:
        raise NotImplementedError


class TopOne(Routed):
    """Each row goes to one expert."""

    def route(self, x: Tensor, gate: Tensor) -> Tensor:
        h = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            rows = (gate[:, 0] % len(self.experts) == e).nonzero().squeeze(1)
            h[rows] += expert(x[rows]).tanh()
        return h


class TopTwo(Routed):
    """Each row goes to two of three experts, with weights."""

    def __init__(self) -> None:
        super().__init__(3)

    def route(self, x: Tensor, gate: Tensor) -> Tensor:
        h = torch.zeros_like(x)
        weights = x.softmax(1)
        for e, expert in enumerate(self.experts):
            rows, slot = (gate[:, :2] == e).nonzero(as_tuple=True)
            h = h.index_add(0, rows, expert(x[rows]).tanh() * weights[rows, slot, None])
        return h


class OneExpertTwice(Routed):
    """Rows are sent twice through one layer, all at once, sorted by what they hold."""

    def __init__(self) -> None:
        super().__init__(1)

    def route(self, x: Tensor, gate: Tensor) -> Tensor:
        twice = torch.cat([x, x.square()])
        order = twice[:, 0].argsort()
        rows = order % len(x)
        return torch.zeros_like(x).index_add(0, rows, self.experts[0](twice[order]).tanh())


class SharedUses(Routed):
    """One layer takes some rows in one call and others in another."""

    def __init__(self) -> None:
        super().__init__(1)

    def route(self, x: Tensor, gate: Tensor) -> Tensor:
        some = x[:, 0] > 0
        h = x.clone()
        h[some] = self.experts[0](x[some]).tanh()
        return torch.cat([h[some], self.experts[0](h[~some]).square()])[
            some.logical_not().argsort(stable=True).argsort()
        ]


class Scattered(Routed):
    """A mask picks the rows and puts them back."""

    def route(self, x: Tensor, gate: Tensor) -> Tensor:
        some = (x[:, 0] > 0).unsqueeze(1).expand_as(x)
        picked = self.experts[0](x.masked_select(some).reshape(-1, x.shape[1]))
        return x.masked_scatter(some, picked.tanh()) + self.experts[1](x)


class Bare(Routed):
    """Bare parameters, a norm and a table, on the rows that a mask picks."""

    def __init__(self) -> None:
        super().__init__(0)
        self.scale, self.shift = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(()))
        self.norm, self.table = nn.LayerNorm(3), nn.Embedding(4, 3)

    def route(self, x: Tensor, gate: Tensor) -> Tensor:
        some = x[:, 0] > 0
        h = x.clone()
        h[some] = (self.norm(x[some]) * self.scale + self.table(gate[some, 0]) + self.shift).tanh()
        return h


class NoRule(Routed):
    """A parameter in an operation without a rule."""

    def __init__(self) -> None:
        super().__init__(0)
        self.weight = nn.Parameter(torch.tensor([0.3, -0.2, 0.5]))

    def route(self, x: Tensor, gate: Tensor) -> Tensor:
        some = x[:, 0] > 0
        h = x.clone()
        h[some] = torch.logaddexp(x[some], self.weight)
        return h


class Closed(Routed):
    """A gate that is closed in the first batch, before examples meet behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = 0.0

    def route(self, x: Tensor, gate: Tensor) -> Tensor:
        h = x + self.gate * self.experts[0](x.mean(0)).tanh()
        self.gate = 1.0
        return h + self.experts[1](x).tanh()


class Tokens(Routed):
    """Positions of sequences, flattened, go to experts; the loss is on the mean."""

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        rows = self.inp(x).tanh().reshape(-1, 3)
        return self.out(TopOne.route(self, rows, rows.argsort(1)).reshape(n, -1, 3).mean(1))


class PositionsFirst(Routed):
    """Sequences with their positions first, pooled over these."""

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.experts[0](self.inp(x.transpose(0, 1)).tanh()).tanh().mean(0))


class Images(nn.Module):
    """A convolution on the images that a mask picks, in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(1, 2, 2, groups=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(len(x), 1, 3, 2)
        some = (x[:, 0, 0, 0] > 0).nonzero().squeeze(1).flip(0)
        return self.out(torch.zeros(len(x), 4, dtype=x.dtype).index_add(0, some, self.conv(x[some]).flatten(1).tanh()))


class BeforeNorm(TopOne):
    """A batch norm between the experts and the loss, in train mode: every row hears of every example through it."""

    everywhere = False  # each expert on all rows, with the others multiplied by zero

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def route(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.norm(self.sent(x, gate))

    def sent(self, x: Tensor, gate: Tensor) -> Tensor:
        if not self.everywhere:
            return super().route(x, gate)
        mine = [(gate[:, 0] % len(self.experts) == e).unsqueeze(1) for e in range(len(self.experts))]
        return sum(expert(x).tanh() * rows for expert, rows in zip(self.experts, mine, strict=True))  # type: ignore[return-value]


class BehindNorm(BeforeNorm):
    """A batch norm before the experts."""

    def route(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.sent(self.norm(x), gate)


class BeforeTwoNorms(BeforeNorm):
    """Experts before a norm of images and one without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm2d(3), nn.BatchNorm1d(3, affine=False)

    def route(self, x: Tensor, gate: Tensor) -> Tensor:
        h = self.sent(x, gate)
        h = self.norm(torch.stack([h, h.sin()], -1).unsqueeze(-1)).tanh()
        return self.last(h.flatten(2).sum(-1))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "before": BeforeNorm,
    "behind": BehindNorm,
    "before two": BeforeTwoNorms,
}
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "top one": (TopOne, (3,)),
    "top two": (TopTwo, (3,)),
    "one expert twice": (OneExpertTwice, (3,)),
    "shared uses": (SharedUses, (3,)),
    "scattered": (Scattered, (3,)),
    "bare": (Bare, (3,)),
    "no rule": (NoRule, (3,)),
    "closed": (Closed, (3,)),
    "tokens": (Tokens, (4, 3)),
    "positions first": (PositionsFirst, (4, 3)),
    "images": (Images, (6,)),
}


def made(name: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A model and two batches."""
    build, shape = MODELS[name]
    g = torch.Generator().manual_seed(3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build().double()
    data = [
        (torch.randn(N, *shape, dtype=torch.float64, generator=g), torch.randint(3, (N,), generator=g)) for _ in "ab"
    ]
    return model, data


METHODS: dict[str, Callable[..., PreconditionedOptimizer]] = {
    "KFAC": lambda m, kind: precond.KFAC(m, LOSS, lr=0.1, fisher=kind),
    "KFAC, reduce": lambda m, kind: precond.KFAC(m, LOSS, lr=0.1, fisher=KroneckerFisher(kind, sharing="reduce")),
    "EKFAC": lambda m, kind: precond.EKFAC(m, LOSS, lr=0.1, fisher=kind),
    "TNT": lambda m, kind: precond.TNT(m, LOSS, lr=0.1, fisher=kind),
    "layer": lambda m, kind: precond.NaturalGradient(m, LOSS, lr=0.1, fisher=kind, structure="layer"),
    "diagonal": lambda m, kind: precond.NaturalGradient(m, LOSS, lr=0.1, fisher=kind, structure="diagonal"),
    "dense": lambda m, kind: precond.NaturalGradient(m, LOSS, lr=0.1, fisher=kind, structure="dense"),
    "SENG": lambda m, kind: precond.SENG(m, LOSS, lr=0.1, fisher=kind, damping=0.1),
    "SMW": lambda m, kind: precond.SMWNaturalGradient(m, LOSS, lr=0.1, fisher=kind, structure="layer"),
    "SINGD": lambda m, kind: precond.SINGD(m, LOSS, lr=0.1, fisher=kind),
}


def moved(name: str, method: str, kind: str, order: Tensor, batches: int) -> Tensor:
    """Where some steps lead, with the examples of each batch in an order."""
    model, data = made(name)
    optimizer = METHODS[method](model, kind)
    start = nn.utils.parameters_to_vector(model.parameters()).detach()
    for x, y in data[:batches]:
        optimizer.zero_grad()
        LOSS(model(x[order]), y[order]).backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach() - start


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_steps_do_not_depend_on_the_order_of_the_examples(name: str, method: str) -> None:
    # EKFAC's second step sees the basis of the first, in which directions that no row had are arbitrary.
    batches = 1 if method == "EKFAC" else 2
    for kind in ("exact", "empirical"):
        one = moved(name, method, kind, torch.arange(N), batches)
        other = moved(name, method, kind, torch.tensor([3, 7, 1, 9, 0, 6, 5, 8, 2, 4]), batches)
        assert one.norm() > 1e-4
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10 * float(one.norm()))


@pytest.mark.parametrize("method", ["EKFAC", "TNT", "layer", "dense", "SENG", "SMW", "KFAC, reduce"])
@pytest.mark.parametrize("name", NORMS)
def test_owners_are_found_through_batch_norms(name: str, method: str) -> None:
    """With more examples than get a backward pass each; the statistics of the batch count as given."""
    many = 40
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(many, 3, dtype=torch.float64, generator=g), torch.randint(3, (many,), generator=g)
    for kind in ("exact", "empirical"):
        ends = []
        for order in (torch.arange(many), torch.randperm(many, generator=g)):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = NORMS[name]().double()
            start = nn.utils.parameters_to_vector(model.parameters()).detach()
            optimizer = METHODS[method](model, kind)
            LOSS(model(x[order]), y[order]).backward()
            optimizer.step()
            assert "random signs" not in str(optimizer.coverage())
            optimizer.detach()
            ends.append(nn.utils.parameters_to_vector(model.parameters()).detach() - start)
        torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-9 * float(ends[0].norm()))


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("name", NORMS)
def test_experts_before_a_norm_learn_what_they_learn_on_all_rows(name: str, kind: str) -> None:
    """Each expert on its rows, or on all rows with the others multiplied by zero: one function, one curvature."""

    many = 40
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(many, 3, dtype=torch.float64, generator=g), torch.randint(3, (many,), generator=g)
    found = []
    for everywhere in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: Any = NORMS[name]().double()
        model.everywhere = everywhere
        optimizer = precond.NaturalGradient(model, LOSS, lr=0.0, fisher=kind, structure="layer")
        LOSS(model(x), y).backward()
        optimizer.step()
        found.append({n: p.estimator.operator().to_dense() for n, p in optimizer.preconditioners.items()})
        optimizer.detach()
    assert found[0].keys() == found[1].keys()
    for block, other in zip(found[0].values(), found[1].values(), strict=True):
        torch.testing.assert_close(block, other, rtol=1e-10, atol=1e-14)


def gradients_of_examples(model: nn.Module, x: Tensor, y: Tensor, kind: str) -> dict[str, Tensor]:
    """``{parameter: (signals, n, numel)}``, each by a backward pass of its own."""
    out: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    z = model(x)
    p = z.detach().softmax(1)
    for n in range(len(x)):
        if kind == "exact":
            signals = [p[n, c].sqrt() * (nn.functional.one_hot(torch.tensor(c), 3) - p[n]) for c in range(3)]
        else:
            signals = [p[n] - nn.functional.one_hot(y[n], 3)]
        for signal in signals:
            found = torch.autograd.grad(z[n], list(model.parameters()), signal, retain_graph=True, allow_unused=True)
            for (name, q), g in zip(model.named_parameters(), found, strict=True):
                out[name].append(torch.zeros(q.numel(), dtype=q.dtype) if g is None else g.reshape(-1))
    return {name: torch.stack(rows).reshape(len(x), -1, rows[0].numel()) for name, rows in out.items()}


def expected_block(rows: Tensor, shape: tuple[int, ...], structure: str) -> Tensor:
    """The estimate from gradients ``(m, numel)``: the dense block, or what the structure keeps of it."""
    dense = rows.mT @ rows / N
    if structure == "tnt" and len(shape) == 2 and 2 not in shape[1:]:
        G = rows.reshape(-1, *shape)
        L, R = torch.einsum("nij,nkj->ik", G, G) / N, torch.einsum("nij,nik->jk", G, G) / N
        return torch.kron(L, R) / L.trace()
    if structure == "diagonal" or (len(shape) == 1 and structure in ("unit", "tnt")):
        return dense.diagonal().diag()
    if structure in ("unit", "tnt"):
        unit = torch.arange(len(dense)) // shape[-1]
        return dense * (unit.unsqueeze(0) == unit.unsqueeze(1))
    return dense


STRUCTURES: dict[str, tuple[Any, Any, Any]] = {
    "layer": (LayerFisher, Tikhonov(0.1), Eigh()),
    "unit": (UnitFisher, Tikhonov(0.1), Eigh()),
    "diagonal": (DiagonalFisher, Tikhonov(0.1), Eigh()),
    "gram": (GramFisher, Tikhonov(0.1), Woodbury()),
    "tnt": (TensorNormal, FactoredTikhonov(0.1), Cholesky()),
}


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_those_of_gradients_of_single_examples(name: str, kind: str) -> None:
    for structure, (curvature, damping, solver) in STRUCTURES.items():
        model, data = made(name)
        optimizer = PreconditionedOptimizer(
            model, LOSS, curvature=curvature(kind), damping=damping, solver=solver, lr=0.0, curvature_ema=0.0
        )
        for x, y in data:
            optimizer.zero_grad()
            LOSS(model(x), y).backward()
            optimizer.step()
        optimizer.detach()
        rows = gradients_of_examples(model, *data[-1], kind)
        shapes = {name: p.shape for name, p in model.named_parameters()}
        seen: set[str] = set()
        for preconditioner in optimizer.preconditioners.values():
            block = preconditioner.estimator.block
            seen |= set(block.names)
            pairs = zip(*(rows[m].flatten(0, 1).unbind() for m in block.names), strict=True)
            own = [
                block.read({m: g.reshape(shapes[m]) for m, g in zip(block.names, one, strict=True)}).reshape(-1)
                for one in pairs
            ]
            expected = expected_block(torch.stack(own), tuple(block.shape), structure)
            got = preconditioner.estimator.operator().to_dense().reshape(expected.shape)
            assert expected.abs().max() > 1e-12
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))
        assert seen == set(rows)


def test_samples_of_a_router_are_those_of_the_layers_on_all_rows() -> None:
    """Experts on their rows, and on all rows with the others multiplied by zero, are one function."""

    routed, [(x, y), _] = made("top one")

    class Everywhere(BeforeNorm):
        everywhere = True

        def route(self, x: Tensor, gate: Tensor) -> Tensor:
            return self.sent(x, gate)

    everywhere = Everywhere().double()
    everywhere.load_state_dict(routed.state_dict(), strict=False)
    del everywhere.norm
    found = []
    for model in (routed, everywhere):
        optimizer = precond.NaturalGradient(model, LOSS, lr=0.0, fisher="mc", structure="layer")
        LOSS(model(x), y).backward()
        optimizer.step()
        found.append({n: p.estimator.operator().to_dense() for n, p in optimizer.preconditioners.items()})
    assert found[0].keys() == found[1].keys()
    for name, block in found[0].items():
        torch.testing.assert_close(block, found[1][name], rtol=1e-10, atol=1e-14)


def test_coverage_tells_where_signs_are_drawn() -> None:
    """With many examples in which a parameter has no rows of its own, signals for each would cost too much."""
    model, [(x, y), _] = made("no rule")
    optimizer = precond.KFAC(model, LOSS, lr=0.0, fisher="empirical")
    for numbers, told in [((N,), False), ((60,), True), ((60, N), True), ((N, 60), True), ((N, N), False)]:
        optimizer.zero_grad()
        for number in numbers:
            LOSS(model(x.repeat(6, 1)[:number]), y.repeat(6)[:number]).backward()
        optimizer.step()
        assert ("random signs" in optimizer.coverage()["weight"].why) == told
        assert "random signs" not in optimizer.coverage()["inp.weight"].why

"""Do rows that serve all examples count once for each example whose signals reach them?"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
from curvature import EigenbasisFisher, InputKronecker, KroneckerFisher
from curvature.estimation import shared_rows
from curvature.estimation.shared_rows import SharedRows
from curvature.losses import SumOfLosses
from precond import KBFGS, KFAC, TNT
from tests.curvature.loops import assert_same, fisher, statistics, watching

# Few enough for training to send the signals of one example at a time, which leaves nothing to chance.
D, T, CLASSES = 3, 4, 2
#: How the rows meet the examples; of the last two the pass does not show it.
SHOWN = ["add", "in place", "scaled", "twice", "concatenated", "folded", "steps first", "bias of scores"]
MEETINGS = [*SHOWN, "product", "gathered"]
LENGTHS = [2, 4, 3, 1]
SPLITS = [[4], [2, 2], [1, 3], [1, 1, 1, 1]]


class Positions(nn.Module):
    """Adds rows of a table of positions, through a layer, to embedded tokens; one look at the table or one each."""

    def __init__(self, meeting: str = "add", each: bool = False, looks_back: bool = False) -> None:
        super().__init__()
        self.meeting, self.each, self.looks_back = meeting, each, looks_back
        self.tokens, self.table = nn.Embedding(7, D), nn.Embedding(T + 1, D)
        self.mixed = nn.Linear(D, D)
        self.head = nn.Linear(2 * D if meeting == "concatenated" else D, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        n, t = tokens.shape
        x = self.tokens(tokens)
        p = self.mixed(self.table(torch.arange(t).expand(n if self.each else 1, t)))
        if self.meeting == "in place":
            x += p if self.each else p[0]
        elif self.meeting == "scaled":
            x = torch.sub(x, p, alpha=0.5)
        elif self.meeting == "twice":
            x = torch.tanh(x + p) - p.relu()
        elif self.meeting == "concatenated":
            x = torch.cat([x, p.expand(n, t, D)], dim=-1)
        elif self.meeting == "folded":  # two windows of an example in one axis
            halves, p = x.view(2 * n, t // 2, D), p[:, : t // 2]
            x = (halves + (p.repeat_interleave(2, 0) if self.each else p)).view(n, t, D)
        elif self.meeting == "steps first":
            x = (x.transpose(0, 1) + p.transpose(0, 1)).transpose(0, 1)
        elif self.meeting == "bias of scores":
            scores = x @ x.transpose(1, 2) + p[..., :1] * p[..., 1:2].exp()
            x = scores.tril() @ x
        elif self.meeting == "product":
            x = x * p
        elif self.meeting == "gathered":
            x = x + (p if self.each else p[0][torch.arange(t).expand(n, t)])
        else:
            x = x + p
        x = torch.tanh(x)
        if self.looks_back:
            x = x.cumsum(1)
        return self.head(x).transpose(1, 2)


def made(meeting: str = "add", each: bool = False, looks_back: bool = False) -> Positions:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Positions(meeting, each, looks_back).double()


def batch(lengths: list[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    n = len(lengths)
    x = torch.randint(0, 7, (n, T), generator=generator)
    y = torch.randint(0, CLASSES, (n, T), generator=generator)
    return x, y.where(torch.arange(T) < torch.tensor(lengths).unsqueeze(1), -100)


def cut(data: tuple[Tensor, Tensor], sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(tensor.split(sizes) for tensor in data), strict=True))


def trained(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], structure: str = "kfac", kind: str = "exact"
) -> dict[str, Tensor]:
    """Statistics of a step that accumulates the batches of one mean loss."""
    loss_fn = nn.CrossEntropyLoss()
    optimizer = watching(model, loss_fn, structure, kind)
    total = sum(int((y >= 0).sum()) for _, y in batches)
    for x, y in batches:
        (loss_fn(model(x), y) * (y >= 0).sum() / total).backward()
    optimizer.step()
    return statistics(optimizer)


@pytest.mark.parametrize("looks_back", [False, True])
@pytest.mark.parametrize("meeting", MEETINGS)
def test_one_look_is_a_look_for_each_example(meeting: str, looks_back: bool) -> None:
    """K-FAC of a data set, however it is cut; later positions may hear of earlier ones."""
    data, loss_fn = batch(LENGTHS), nn.CrossEntropyLoss()
    expected = fisher(made(meeting, True, looks_back), loss_fn, data, kind="exact")
    for sizes in SPLITS:
        assert_same(fisher(made(meeting, False, looks_back), loss_fn, cut(data, sizes), kind="exact"), expected)


@pytest.mark.parametrize("meeting", MEETINGS)
def test_accumulation_in_training(meeting: str) -> None:
    data = batch(LENGTHS)
    expected = trained(made(meeting, True, True), [data])
    for sizes in SPLITS:
        assert_same(trained(made(meeting, False, True), cut(data, sizes)), expected)


@pytest.mark.parametrize(
    "curvature_",
    [
        KroneckerFisher("empirical"),
        KroneckerFisher("exact", sharing="reduce"),
        EigenbasisFisher("exact"),
        InputKronecker("empirical"),
        KroneckerFisher("exact", bias="separate"),
    ],
    ids=["empirical", "reduce", "ekfac", "foof", "separate"],
)
def test_structures(curvature_: Any) -> None:
    data, loss_fn = batch(LENGTHS), nn.CrossEntropyLoss()
    expected = fisher(made("add", True), loss_fn, data, structure=curvature_)
    for sizes in SPLITS:
        assert_same(fisher(made(), loss_fn, cut(data, sizes), structure=curvature_), expected)


@pytest.mark.parametrize("structure, kind", [("kfac", "empirical"), ("ekfac", "exact"), ("ekfac", "empirical")])
def test_kinds_in_training(structure: str, kind: str) -> None:
    data = batch(LENGTHS)
    expected = trained(made("add", True), [data], structure, kind)
    for sizes in SPLITS:
        assert_same(trained(made(), cut(data, sizes), structure, kind), expected)


@pytest.mark.parametrize("looks_back", [False, True])
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_the_factor_of_the_table_by_loops(looks_back: bool, sizes: list[int]) -> None:
    """Each pair of an example and a position that a signal reaches, with draws as with all terms."""
    x, y = data = batch(LENGTHS)
    model = made("add", True, looks_back)
    counts = torch.zeros(T + 1).double()
    for n in range(len(x)):
        rows = model.table.weight[:T].detach().clone().requires_grad_()
        z = torch.tanh(model.tokens(x[n]) + model.mixed(rows))
        z = z.cumsum(0) if looks_back else z
        loss = nn.functional.cross_entropy(model.head(z), y[n], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, rows)
        counts[:T] += gradient.abs().amax(-1) > 0
    expected = counts / counts.sum()
    loss_fn, shared = nn.CrossEntropyLoss(), made("add", False, looks_back)
    batches = cut(data, sizes)
    drawn: Any = curvature.fisher(
        shared, loss_fn, batches, kind="mc", structure="kfac", generator=torch.Generator().manual_seed(0)
    )
    found = {place.block.name: block for place, block in zip(drawn.places, drawn.blocks, strict=True)}
    _, A = found["table.weight"].factors  # an embedding's block is (d, size): B (x) A
    torch.testing.assert_close(A.to_dense().diagonal(), expected, rtol=1e-12, atol=0)
    optimizer = watching(shared, loss_fn, "kfac", "mc")
    for bx, by in batches:
        (loss_fn(shared(bx), by) * (by >= 0).sum() / (y >= 0).sum()).backward()
    optimizer.step()
    _, A = optimizer.preconditioners["table.weight"].estimator.operator().factors  # type: ignore[attr-defined]
    torch.testing.assert_close(A.to_dense().diagonal(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", [KFAC, TNT, KBFGS])
def test_steps(method: Any) -> None:
    """Methods that read inputs move both models alike."""
    data, loss_fn = batch(LENGTHS), nn.CrossEntropyLoss()
    moved = []
    for each in (True, False):
        model = made("add", each)
        options = {} if method is KBFGS else {"fisher": "exact"}
        optimizer = method(model, loss_fn, lr=0.1, **options)
        for _ in range(2):
            optimizer.zero_grad()
            loss_fn(model(data[0]), data[1]).backward()
            optimizer.step()
        moved.append({name: p.detach().clone() for name, p in model.named_parameters()})
    start = dict(made().named_parameters())
    assert all(not torch.equal(p, start[name]) for name, p in moved[0].items())
    assert_same(moved[1], moved[0])


def test_several_losses_on_one_pass() -> None:
    """Examples that the losses count between them count once."""
    x, y = batch(LENGTHS)
    first, second = y.clone(), y.clone()
    first[1], second[:, 2:] = -100, -100
    found = []
    for each in (True, False):
        model, loss_fn = made("add", each), nn.CrossEntropyLoss()
        optimizer = watching(model, loss_fn)
        z = model(x)
        (loss_fn(z, first) + loss_fn(z, second)).backward()
        optimizer.step()
        found.append(statistics(optimizer))
    assert_same(found[1], found[0])


class TwoOutputs(Positions):
    def forward(self, tokens: Tensor) -> Any:
        z = super().forward(tokens)
        return {"here": z, "back": z.flip(2)}


@pytest.mark.parametrize("training", [False, True])
def test_a_sum_of_losses(training: bool) -> None:
    """Each loss has a mask of its own."""
    x, y = batch(LENGTHS)
    other = y.roll(1, 0)
    loss_fn = SumOfLosses({"here": (1.0, nn.CrossEntropyLoss()), "back": (0.5, nn.CrossEntropyLoss())})
    found = []
    for each in (True, False):
        torch.manual_seed(0)
        model = TwoOutputs("add", each, looks_back=True).double()
        if training:
            optimizer = watching(model, loss_fn, "kfac", "empirical")
            loss_fn(model(x), {"here": y, "back": other}).backward()
            optimizer.step()
            found.append(statistics(optimizer))
        else:
            found.append(fisher(model, loss_fn, (x, {"here": y, "back": other}), kind="exact"))
    assert_same(found[1], found[0])


class Unrolled(nn.Module):
    """Two steps of a cell from a state that holds no example, unless it is made of one."""

    def __init__(self, made_of_inputs: bool) -> None:
        super().__init__()
        self.made_of_inputs = made_of_inputs
        self.cell, self.head = nn.Linear(D, D), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state = x * 0 + 1 if self.made_of_inputs else x.new_ones(len(x), D)
        return self.head(torch.tanh(self.cell(torch.tanh(self.cell(state) + x))))


@pytest.mark.parametrize("training", [False, True])
def test_states_of_examples_that_are_masked_out(training: bool) -> None:
    """Rows of one example each are no table, also where nothing reaches some of them."""
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, loss_fn = torch.tensor([0, -100, 1, -100]), nn.CrossEntropyLoss()
    found = []
    for made_of_inputs in (True, False):
        torch.manual_seed(0)
        model = Unrolled(made_of_inputs).double()
        for sizes in ([4], [1, 3]):
            batches = cut((x, y), sizes)
            found.append(trained(model, batches) if training else fisher(model, loss_fn, batches, kind="exact"))
    for other in found[1:]:
        assert_same(other, found[0])


@pytest.mark.parametrize("masked", [True, False])
def test_a_sum_that_is_seen_takes_no_pass_of_its_own(monkeypatch: Any, masked: bool) -> None:
    passes, looks = [], []
    pull_back, init = shared_rows.pull_back, SharedRows.__init__

    def counted(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        passes.extend(t for t in outputs if isinstance(t, Tensor))
        return pull_back(outputs, *args, **kwargs)

    def noted(self: SharedRows, output: Tensor, sites: Any, signals: Any) -> None:
        looks.extend(sites)
        init(self, output, sites, signals)

    monkeypatch.setattr(shared_rows, "pull_back", counted)
    monkeypatch.setattr(SharedRows, "__init__", noted)
    trained(made(), [batch([1, 3] * 20) if masked else batch([T] * 4)], kind="mc")
    assert not passes and bool(looks) == masked
    trained(made("product"), [batch([1, 3] * 2) if masked else batch([T] * 4)], kind="mc")
    assert len(passes) == 4 * masked


def test_full_and_cut_batches() -> None:
    """A batch without a mask counts as one of the same terms beside others."""
    data = batch([T, T, 2, 3])
    expected = trained(made("add", True), [data])
    for sizes in SPLITS:
        assert_same(trained(made(), cut(data, sizes)), expected)


@pytest.mark.parametrize("kind", ["mc", "empirical"])
def test_no_graph_is_kept(kind: str) -> None:
    model, loss_fn = made(), nn.CrossEntropyLoss()
    optimizer = watching(model, loss_fn, "kfac", kind)
    x, y = batch(LENGTHS)
    z = model(x)
    seen = weakref.ref(z)
    loss_fn(z, y).backward()
    optimizer.step()
    del z
    gc.collect()
    assert seen() is None

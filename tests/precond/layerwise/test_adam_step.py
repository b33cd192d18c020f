"""Tables of embeddings take Adam's step in layer-based methods, and the rest of the model does not notice."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precond import EKFAC, KFAC, SINGD, TNT, AdamStep, LevenbergMarquardt, Momentum, QuadraticModel, TrustRegion


class Words(nn.Module):
    """A table whose rows are summed, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4)
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(self.words(ids).sum(1))


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def batches(n: int) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [
        (torch.randint(7, (12, 3), generator=draw), torch.randint(3, (12,), generator=draw)) for _ in range(n)
    ]  # two rows are never used


def model() -> Words:
    torch.manual_seed(0)
    return Words().double()


def train(net: Words, optimizer: Any, steps: int = 6, first: int = 0, scheduler: Any = None) -> list[Tensor]:
    """The gradients of the table."""
    seen = []
    for x, y in batches(first + steps)[first:]:
        optimizer.zero_grad()
        nn.CrossEntropyLoss()(net(x), y).backward()
        seen.append(net.words.weight.grad.clone())
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return seen


@pytest.mark.parametrize(
    ("momentum", "nesterov", "reference", "options"),
    [
        (0.9, True, 0.1, {}),
        (0.8, False, 0.05, {"weight_decay": 0.2, "kl_clip": TrustRegion(1e-2, lr=0.05)}),
        (0.0, False, 0.2, {"kl_clip": None, "maximize": True}),
    ],
)
def test_a_table_moves_by_the_definition(
    momentum: float, nesterov: bool, reference: float, options: dict[str, Any]
) -> None:
    net = model()
    table = net.words.weight.detach().clone()
    own = AdamStep(lr=0.03, betas=(0.7, 0.8), eps=1e-5)
    optimizer = KFAC(
        net,
        nn.CrossEntropyLoss(),
        lr=0.2,
        momentum=Momentum(momentum, nesterov) if momentum else 0.0,
        structures={"words": own},
        **options,
    )
    factors = [1.0, 0.5, 0.25, 2.0, 1.0, 0.1, 1.0]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: factors[k])
    gradients = train(net, optimizer, scheduler=scheduler)

    mean, square = torch.zeros_like(table), torch.zeros_like(table)
    for k, g in enumerate(gradients):
        mean, square = 0.7 * mean + 0.3 * g, 0.8 * square + 0.2 * g**2
        move = mean / (1 - 0.7 ** (k + 1)) / ((square / (1 - 0.8 ** (k + 1))).sqrt() + 1e-5) * (0.03 / reference)
        lr = 0.2 * factors[k]
        table = table * (1 - lr * options.get("weight_decay", 0.0)) + (1 if "maximize" in options else -1) * lr * move
    torch.testing.assert_close(net.words.weight.detach(), table, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", [KFAC, EKFAC, TNT])
def test_all_others_move_as_if_there_were_no_table(method: Any) -> None:
    """Neither does the table take a part of the bound, nor are there statistics of it."""
    net, other = model(), model()
    optimizer = method(net, nn.CrossEntropyLoss(), lr=0.1)
    without = method(other, nn.CrossEntropyLoss(), lr=0.1, params=other.layers.parameters())
    assert list(optimizer.parameters) == list(without.parameters)
    for x, y in batches(5):
        for each, opt in ((net, optimizer), (other, without)):
            opt.zero_grad()
            nn.CrossEntropyLoss()(each(x), y).backward()
            opt.step()
        with torch.no_grad():
            other.words.weight.copy_(net.words.weight)
    assert equal([p.detach() for p in net.parameters()], [p.detach() for p in other.parameters()])
    assert optimizer.metrics()["bound"] == without.metrics()["bound"] > 0
    row = next(row for row in optimizer.coverage() if row.parameter == "words.weight")
    assert (row.structure, row.block, row.size) == ("diagonal", "words.weight", 36) and "AdamStep" in row.why


def test_who_takes_it() -> None:
    net, loss = model(), nn.CrossEntropyLoss()
    every = [name for name, _ in net.named_parameters()]
    assert "words.weight" not in KFAC(net, loss).parameters
    for structures in ({nn.Embedding: {}}, {"words": "diagonal"}, {"*.weight": {}}, {net.words: "kfac"}):
        assert list(KFAC(net, loss, structures=structures).parameters) == every
    assert list(SINGD(net, loss, lr=0.1).parameters) == every
    judged: Any
    for judged in ({"step_size": QuadraticModel()}, {"damping_rule": LevenbergMarquardt()}):
        assert list(KFAC(net, loss, lr=1.0, damping=1e-2, **judged).parameters) == every
        with pytest.raises(ValueError, match="an AdamStep in structures= does not belong; leave it out"):
            KFAC(net, loss, lr=1.0, damping=1e-2, structures={"words": AdamStep()}, **judged)
    # tables alone as well, in the model or among what is trained
    table = nn.Embedding(4, 3)
    assert list(KFAC(table, nn.MSELoss()).adam_steps) == [table.weight]
    assert not KFAC(net, loss, params=["words.weight"]).tracked()
    tied = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    tied[1].weight = tied[0].weight
    assert list(KFAC(tied, loss).parameters) == ["0.weight"]  # a matrix as well
    whole = nn.ModuleDict({"tokens": tied[0], "positions": nn.Embedding(3, 4), "head": tied[1]})
    assert list(KFAC(whole, loss).parameters) == ["tokens.weight", "positions.weight"]  # which do not outrun the tokens
    assert list(KFAC(whole, loss, structures={"positions": AdamStep()}).parameters) == ["tokens.weight"]
    bag = nn.Sequential(nn.EmbeddingBag(6, 4), nn.Linear(4, 6, bias=False))
    assert list(KFAC(bag, loss).parameters) == ["1.weight"]
    for wrong in ({"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": 0.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} of an AdamStep"):
            AdamStep(**wrong)


def test_a_resumed_run_goes_on_and_a_copy_does() -> None:
    net = model()
    optimizer = KFAC(net, nn.CrossEntropyLoss())
    train(net, optimizer, 3)
    again = copy.deepcopy(net)
    resumed = KFAC(again, nn.CrossEntropyLoss())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin, second = copy.deepcopy((net, optimizer))
    for each, opt in ((net, optimizer), (again, resumed), (twin, second)):
        train(each, opt, 3, first=3)
    for each in (again, twin):
        assert equal([p.detach() for p in each.parameters()], [p.detach() for p in net.parameters()])


def test_a_table_goes_on_with_the_curvature_that_its_state_has() -> None:
    net = model()
    before = KFAC(net, nn.CrossEntropyLoss(), structures={nn.Embedding: {}})
    train(net, before, 2)
    again = copy.deepcopy(net)
    after = KFAC(again, nn.CrossEntropyLoss())
    after.load_state_dict(before.state_dict())
    asked = KFAC(copy.deepcopy(net), nn.CrossEntropyLoss(), structures={nn.Embedding: AdamStep()})
    with pytest.warns(UserWarning, match="block words.weight is not taken over, because its parameters take Adam's"):
        asked.load_state_dict(before.state_dict())
    assert set(asked.preconditioners) == set(before.preconditioners) - {"words.weight"}
    for each, optimizer in ((net, before), (again, after)):
        train(each, optimizer, 2, first=2)
    assert equal([p.detach() for p in again.parameters()], [p.detach() for p in net.parameters()])


def test_a_step_in_which_tables_alone_have_a_gradient() -> None:
    """The bound has nothing to measure; momenta of the others keep their lengths."""
    net = model()
    optimizer = KFAC(net, nn.CrossEntropyLoss())
    train(net, optimizer, 2)
    x, y = batches(1)[0]
    rest = [p for name, p in net.named_parameters() if name != "words.weight"]
    optimizer.zero_grad()
    nn.CrossEntropyLoss()(net(x), y).backward()
    for p in rest:
        p.grad = None
    before, kept = net.words.weight.detach().clone(), [p.detach().clone() for p in rest]
    optimizer.step()
    assert not torch.equal(net.words.weight, before) and equal([p.detach() for p in rest], kept)
    assert all("length" in optimizer.state[p] for p in rest)
    train(net, optimizer, 1)


def test_a_copy_where_tables_alone_are_left_to_train() -> None:
    net = model()
    optimizer = KFAC(net, nn.CrossEntropyLoss())
    train(net, optimizer, 2)
    for name, p in net.named_parameters():
        p.requires_grad_(name == "words.weight")
    twin, second = copy.deepcopy((net, optimizer))
    for each, opt in ((net, optimizer), (twin, second)):
        train(each, opt, 2, first=2)
    assert equal([p.detach() for p in twin.parameters()], [p.detach() for p in net.parameters()])


def test_names_of_tables_are_no_patterns() -> None:
    tables = {"x?": nn.Embedding(5, 3), "xy": nn.Linear(3, 3), "price[usd]": nn.Embedding(5, 3)}
    assert list(KFAC(nn.ModuleDict(tables), nn.CrossEntropyLoss()).parameters) == ["xy.weight", "xy.bias"]


def test_a_table_that_was_replaced_is_missed() -> None:
    net = model()
    optimizer = KFAC(net, nn.CrossEntropyLoss())
    train(net, optimizer, 1)
    net.words = nn.Embedding(9, 4).double()
    with pytest.raises(RuntimeError, match=r"was made for words\.weight, which the model no longer has"):
        train(net, optimizer, 1)


@pytest.mark.parametrize(
    "options", [{"kl_clip": TrustRegion(1e-2, of="direction")}, {"kl_clip": None}, {"kl_clip": None, "lr": 0.0}]
)
def test_tables_follow_the_learning_rate(options: Any) -> None:
    moves = []
    for rate in (0.02, 0.01):
        net = model()
        optimizer = KFAC(net, nn.CrossEntropyLoss(), **options)
        optimizer.param_groups[0]["lr"] = rate
        before = net.words.weight.detach().clone()
        train(net, optimizer, 1)
        moves.append(net.words.weight.detach() - before)
    assert bool(moves[0].any())
    torch.testing.assert_close(moves[0], 2 * moves[1])


def test_zero_gradients_at_a_zero_rate_leave_the_average_as_it_was() -> None:
    """As ``torch.distributed.checkpoint`` steps to create the state."""
    net = model()
    optimizer = KFAC(net, nn.CrossEntropyLoss())
    train(net, optimizer, 2)
    state = optimizer.state[net.words.weight]
    squares, step = state["squares"].clone(), state["step"]
    rate = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = 0.0
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = rate
    assert torch.equal(state["squares"], squares) and optimizer.state[net.words.weight]["step"] == step == 2


def test_squares_that_overflow_are_refused() -> None:
    net = model().float()
    optimizer = KFAC(net, nn.CrossEntropyLoss())
    x, y = batches(1)[0]
    nn.CrossEntropyLoss()(net(x), y).backward()
    net.words.weight.grad[0, 0] = 1e25
    before = net.words.weight.detach().clone()
    with pytest.warns(RuntimeWarning, match="KFAC skips a step"):
        optimizer.step()
    assert torch.equal(net.words.weight, before) and "squares" not in optimizer.state[net.words.weight]

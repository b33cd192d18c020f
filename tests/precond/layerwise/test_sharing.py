"""Does every pass choose by itself how the positions of a layer are treated, and say so?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from curvature import EigenbasisFisher, KroneckerFisher
from precond import EKFAC, KFAC

F64 = torch.float64


class Pooled(nn.Module):
    """Patches of a line of 8 numbers, attention, a mean over the patches, a head."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv1d(1, 4, 2, stride=2)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, 0.0, "gelu", batch_first=batch_first)
        self.head, self.batch_first = nn.Linear(4, 3), batch_first
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x.unsqueeze(1)).mT
        out = self.layer(tokens if self.batch_first else tokens.transpose(0, 1))
        return self.head(out.mean(1 if self.batch_first else 0))


class Tagger(nn.Module):
    """A class for each position, as rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).flatten(0, 1)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 8, generator=generator, dtype=F64), torch.randint(3, (6,), generator=generator)


def factors(model: nn.Module, parts: list[tuple[Any, ...]], **options: Any) -> dict[str, Tensor]:
    """The estimates after one step of several backward passes; a part is inputs and a target."""
    loss_fn, fisher = nn.CrossEntropyLoss(), options.pop("fisher", "empirical")
    optimizer = KFAC(model, loss_fn, fisher=fisher, **options)
    number = sum(len(part[-1]) for part in parts)
    for *x, y in parts:
        (loss_fn(model(*x), y) * (len(y) / number)).backward()
    optimizer.step()
    return {name: p.estimator.operator().to_dense() for name, p in optimizer.preconditioners.items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.allclose(left[n], right[n], rtol=1e-9, atol=1e-14) for n in left)


def test_a_pooling_model_is_reduced_and_a_tagger_is_not() -> None:
    x, y = data()
    auto, expand, reduce = (factors(Pooled(), [(x, y)], sharing=s) for s in (None, "expand", "reduce"))
    assert same(auto, reduce) and not same(auto, expand)
    x, y = x[:4, :, None].expand(4, 8, 4) + torch.arange(4.0, dtype=F64), torch.arange(32) % 3
    auto, expand, reduce = (factors(Tagger(), [(x, y)], sharing=s) for s in (None, "expand", "reduce"))
    assert same(auto, expand) and not same(auto, reduce)


class Reads(TorchDispatchMode):
    """Counts the numbers that are read from the device."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def reads(sharing: str, positions: int, **options: Any) -> int:
    """Numbers that the backward pass of a second step reads, the library's own work included."""
    model, loss_fn = Tagger(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss_fn, sharing=sharing, **options)  # type: ignore[arg-type]
    x, y = torch.ones(4, positions, 4, dtype=F64), torch.zeros(4 * positions, dtype=torch.long)
    for _ in range(2):
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        with Reads() as count:
            loss.backward()
        optimizer.step()
    return count.number


@pytest.mark.parametrize("fisher", ["empirical", "mc", "exact"])
def test_whether_positions_are_aggregated_is_read_where_a_block_chooses_by_it_and_once(fisher: str) -> None:
    """Where each example has one term there is nothing to read."""
    none, fixed, chosen = (reads(*case, fisher=fisher) for case in (("expand", 1), ("expand", 8), ("auto", 8)))
    assert fixed == none and chosen == fixed + 1, "there are two blocks"


class Encoded(nn.Module):
    """Classes of each of four positions, ``(N, 4, 3)``, after attention among them; or those of the first alone."""

    def __init__(self, first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.TransformerEncoderLayer(2, 1, 6, 0.0, "gelu", batch_first=True), nn.Linear(2, 3)
        self.first = first
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x.unflatten(1, (4, 2)))
        return self.head(out[:, 0] if self.first else out)


def test_one_position_is_one_loss_however_it_is_picked() -> None:
    """Inside the model, outside of it, or by ignoring all others."""
    x, y = data()
    ignoring = torch.cat([y[:, None], torch.full((6, 3), -100)], 1)
    found = []
    for first, pick, target in (
        (True, lambda z: z, y),
        (False, lambda z: z[:, 0], y),
        (False, lambda z: z.mT, ignoring),
    ):
        model, loss_fn = Encoded(first), nn.CrossEntropyLoss()
        optimizer = KFAC(model, loss_fn, fisher="empirical")
        loss_fn(pick(model(x)), target).backward()
        optimizer.step()
        assert optimizer.coverage()["layer.linear1.weight"].why.endswith("positions: reduce")
        found.append({name: p.estimator.operator().to_dense() for name, p in optimizer.preconditioners.items()})
    inside, outside, ignored = found
    assert same(outside, ignored)
    for name in (
        "layer.self_attn.in_proj",
        "layer.norm2",
        "head",
    ):  # of others, inputs of positions without effect count
        block = f"{name}_weight+{name}_bias" if "proj" in name else f"{name}.weight+{name}.bias"
        torch.testing.assert_close(inside[block], outside[block], rtol=1e-9, atol=1e-14)


class TwoHeads(nn.Module):
    """Classes of each of four positions, ``(N, 3, 4)``, and of their mean."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.tokens, self.pooled = nn.Linear(2, 5), nn.Linear(5, 3), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.body(x.unflatten(1, (4, 2))).tanh()
        return self.tokens(out).mT, self.pooled(out.mean(1))


def of_two_losses(order: str, fisher: str = "empirical", **options: Any) -> tuple[dict[str, Tensor], str]:
    """The estimates, and what the table says of the body; letters call the losses, and add them up, in this order."""
    (x, y), model, loss_fn = data(), TwoHeads(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss_fn, fisher=fisher, **options)
    tokens, pooled = model(x)
    losses = [loss_fn(tokens, y[:, None].expand(6, 4)) if c == "t" else loss_fn(pooled, y) for c in order]
    torch.stack(losses).sum().backward()
    optimizer.step()
    found = {name: p.estimator.operator().to_dense() for name, p in optimizer.preconditioners.items()}
    return found, optimizer.coverage()["body.weight"].why


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_losses_of_a_pass_have_one_choice_whatever_their_order(fisher: str) -> None:
    one, other, expand = (
        of_two_losses(o, fisher, **s) for o, s in (("tp", {}), ("pt", {}), ("pt", {"sharing": "expand"}))
    )
    assert same(one[0], other[0]) and same(one[0], expand[0])
    assert one[1] == other[1] and one[1].endswith("positions: expand")
    assert of_two_losses("pp", fisher)[1].endswith("positions: reduce")


def test_a_loss_that_comes_too_late_for_the_choice_is_refused() -> None:
    (x, y), model, loss_fn = data(), TwoHeads(), nn.CrossEntropyLoss()
    KFAC(model, loss_fn, fisher="empirical")
    tokens, pooled = model(x)
    loss_fn(pooled, y).backward(retain_graph=True)
    with pytest.raises(ValueError, match="two losses of one forward pass ask for different Kronecker factors of body"):
        loss_fn(tokens, y[:, None].expand(6, 4)).backward()


def test_micro_batches_add_up() -> None:
    x, y = data()
    assert same(factors(Pooled(), [(x, y)]), factors(Pooled(), [(x[:2], y[:2]), (x[2:], y[2:])]))


def test_positions_first_are_the_same_model() -> None:
    x, y = data()
    assert same(factors(Pooled(), [(x, y)]), factors(Pooled(batch_first=False), [(x, y)]))


def test_an_ignored_example_has_no_part() -> None:
    x, y = data()
    ignored = torch.cat([y[:4], torch.full((2,), -100)])
    assert same(factors(Pooled(), [(x, ignored)]), factors(Pooled(), [(x[:4], y[:4])]))


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("cut", ["whole", "halves", "chunks", "steps"])
def test_a_part_that_several_losses_see_counts_once_in_any_precision(cut: str, cast: bool) -> None:
    model, loss_fn = Pooled().bfloat16(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss_fn, lr=0.0, fisher="empirical")
    x, y = data()
    z = model(x.bfloat16())
    parts = {
        "whole": lambda: [(z[:], y)],
        "halves": lambda: [(z[:3], y[:3]), (z[3:], y[3:])],
        "chunks": lambda: zip(z.split(2), y.split(2), strict=True),
        "steps": lambda: [(z.view(3, 2, 3)[:, k], y.view(3, 2)[:, k]) for k in range(2)],
    }
    seen = [(part.float() if cast else part, target) for _ in range(2) for part, target in parts[cut]()]
    torch.stack([loss_fn(*one) for one in seen]).sum().backward()
    optimizer.step()
    assert optimizer.coverage()["patches.weight"].why.endswith("positions: reduce")


@pytest.mark.parametrize("method", [KFAC, EKFAC])
def test_the_table_says_what_was_chosen(method: Any) -> None:
    model, loss_fn = Pooled(), nn.CrossEntropyLoss()
    optimizer = method(model, loss_fn)
    x, y = data()
    loss_fn(model(x), y).backward()
    optimizer.step()
    table = optimizer.coverage()
    assert table["patches.weight"].why == "convolution, positions: reduce"
    assert table["layer.linear1.weight"].why.endswith("positions: reduce")
    assert table["head.weight"].why == "linear"  # one position


def test_an_object_keeps_its_own_and_contradictions_are_refused() -> None:
    model, loss_fn = Pooled(), nn.CrossEntropyLoss()
    assert KFAC(model, loss_fn).curvature == KroneckerFisher("mc", sharing="auto")
    assert KFAC(model, loss_fn, fisher=KroneckerFisher("exact")).curvature == KroneckerFisher("exact")
    own = EigenbasisFisher("mc", sharing="reduce")
    assert EKFAC(model, loss_fn, fisher=own).curvature == own
    with pytest.raises(ValueError, match="sharing is 'auto', but 'reduce'"):
        EKFAC(model, loss_fn, fisher=own, sharing="auto")
    with pytest.raises(ValueError, match="sharing must be 'expand', 'reduce' or 'auto', got 'both'"):
        KFAC(model, loss_fn, sharing="both")  # type: ignore[arg-type]

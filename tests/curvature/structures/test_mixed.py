"""Structures chosen part by part: every block is what it is where its structure is the only one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
from curvature import EigenbasisFisher, KroneckerFisher, Mixed
from curvature.estimation.collector import Collector
from curvature.model.parameters import Parameters
from precond import Cholesky, FactoredTikhonov, PreconditionedOptimizer
from solvers import BlockDiagonal
from tests.curvature.loops import batch, fisher, statistics


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4))
        self.shift = nn.Parameter(torch.randn(4))
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.encoder(x) + self.shift).tanh())


@pytest.fixture
def model() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().double()


LOSS = nn.CrossEntropyLoss()


def rules(model: Net) -> dict[Any, Any]:
    return {"*": "kfac", nn.LayerNorm: "diagonal", model.head: "layer", "encoder.*": "ekfac", "middle": "unit"}


# Block name -> the structure that the rules above give it.
EXPECTED = {
    "encoder.0.weight+encoder.0.bias": "ekfac",
    "encoder.1.weight+encoder.1.bias": "diagonal",
    "encoder.3.weight+encoder.3.bias": "ekfac",
    "shift": "kfac",
    "middle.weight+middle.bias": "unit",
    "head.weight+head.bias": "layer",
}


@pytest.mark.parametrize("kind", ["exact", "empirical", "mc"])
def test_each_block_is_that_of_its_structure(model: Net, kind: Any) -> None:
    x, y = batch(6)
    data = [(x[:4], y[:4]), (x[4:], y[4:])]

    def blocks(structure: Any) -> dict[str, Tensor]:
        return fisher(model, LOSS, data, kind=kind, structure=structure, generator=torch.Generator().manual_seed(5))

    mixed = blocks(rules(model))
    assert set(mixed) == set(EXPECTED)
    for name, structure in EXPECTED.items():
        torch.testing.assert_close(mixed[name], blocks(structure)[name], rtol=1e-10, atol=1e-14)


def test_one_pass_structures_see_the_data_once(model: Net) -> None:
    """EKFAC takes a second pass, whose draws are others; K-FAC's must be those of its only pass."""
    mixed = fisher(model, LOSS, batch(6), kind="mc", structure={"*": "kfac", model.head: "ekfac"})
    alone = fisher(model, LOSS, batch(6), kind="mc", structure="kfac")
    name = "middle.weight+middle.bias"
    torch.testing.assert_close(mixed[name], alone[name], rtol=1e-12, atol=0)
    assert Mixed({"*": "kfac", "head": "ekfac"}).passes == 2 and Mixed({"*": "kfac"}).passes == 1


def structures(model: nn.Module, given: dict[Any, Any]) -> dict[str, str]:
    table = curvature.coverage(model, LOSS, batch(2), curvature=Mixed(given))
    return {row.parameter: row.structure for row in table}


def test_a_module_goes_before_a_class_a_class_before_a_name_a_name_before_the_default(model: Net) -> None:
    given: dict[Any, Any] = {model.encoder[0]: "layer", nn.Linear: "unit", "encoder.*": "diagonal", "*": "kfac"}
    found = structures(model, given)
    assert found["encoder.0.weight"] == "dense"
    assert found["encoder.3.weight"] == found["head.bias"] == "unit"
    assert found["encoder.1.weight"] == "diagonal"
    assert (
        structures(model, {"*": "kfac", model.encoder: "layer", model.encoder[3]: "unit"})["encoder.3.bias"] == "unit"
    )
    assert structures(model, {"*": "kfac", nn.Sequential: "layer", nn.Linear: "unit"})["encoder.3.bias"] == "unit"
    assert structures(model, {"encoder.3": "layer", "encoder.*": "unit", "*": "kfac"})["encoder.3.bias"] == "unit"
    assert structures(model, {"encoder.*": "unit", "encoder.3": "layer", "*": "kfac"})["encoder.3.bias"] == "dense"
    assert structures(model, {"encoder": "layer", "*": "kfac"})["encoder.1.bias"] == "dense"  # everything inside
    assert structures(model, {"shift": "layer", "*": "kfac"})["shift"] == "dense"


def test_structures_with_options(model: Net) -> None:
    given = {"*": KroneckerFisher(max_dim=4), "encoder.*": EigenbasisFisher(sharing="reduce")}
    operator: Any = curvature.fisher(model, LOSS, batch(5), structure=given)
    alone: Any = curvature.fisher(model, LOSS, batch(5), structure="kfac", max_dim=4)
    assert isinstance(operator, BlockDiagonal)
    torch.testing.assert_close(operator.to_dense()[-35:, -35:], alone.to_dense()[-35:, -35:])


def test_what_does_not_fit_is_refused(model: Net) -> None:
    x = batch(3)
    with pytest.raises(ValueError, match=r"nothing in Net fits Conv2d, 'decoder.\*', the module Linear\. A rule is"):
        curvature.fisher(
            model, LOSS, x, structure={"*": "kfac", nn.Conv2d: "unit", "decoder.*": "unit", nn.Linear(1, 1): "unit"}
        )
    with pytest.raises(ValueError, match=r"no rule fits shift, encoder.1.weight, encoder.1.bias\. Add a default"):
        curvature.fisher(model, LOSS, x, structure={nn.Linear: "kfac"})
    with pytest.raises(ValueError, match=r"head.weight\+head.bias form one block, but have different structures"):
        curvature.fisher(model, LOSS, x, structure={"*": "kfac", "head.bias": "diagonal"})
    with pytest.raises(ValueError, match=r"structure of a rule must be one of .*, got 'full' for LayerNorm"):
        Mixed({"*": "kfac", nn.LayerNorm: "full"})
    with pytest.raises(ValueError, match=r"LayerNorm asks for kind='exact' with samples=1, but all structures"):
        Mixed({"*": "kfac", nn.LayerNorm: KroneckerFisher("exact")})
    with pytest.raises(ValueError, match="give bias= to all of them alike"):
        Mixed({"*": "kfac", "head": KroneckerFisher(bias="separate")})
    with pytest.raises(ValueError, match=r"the structure of 'head' must be a name or a Curvature, got 3"):
        Mixed({"head": 3})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="needs a rule at least"):
        Mixed({})
    with pytest.raises(RuntimeError, match="must be applied to a model first"):
        Collector(Parameters(model), Mixed({"*": "kfac"}).estimator).collect(*_a_pass(model, x))


def _a_pass(model: nn.Module, data: tuple[Tensor, Tensor]) -> Any:
    parameters = Parameters(model)
    z, recorder = curvature.estimation.dataset.record(model, parameters, data[0])
    terms = curvature.losses.loss_for(LOSS).terms(z, data[1])
    return recorder, z, curvature.losses.signals.Signals(terms, "empirical")


def test_a_tied_parameter_counts_under_all_of_its_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    model, x = Tied(), (torch.tensor([1, 2]), torch.tensor([0, 4]))

    def structure(given: Any) -> str:
        return curvature.coverage(model, LOSS, x, curvature=Mixed(given))["embed.weight"].structure

    assert structure({"*": "kfac", model.head: "diagonal"}) == "diagonal"
    assert structure({"*": "kfac", model.embed: "diagonal", nn.Linear: "unit"}) == "diagonal"
    with pytest.raises(ValueError, match=r"embed.weight is head.weight as well, and the rules .* fit it equally"):
        structure({model.embed: "kfac", model.head: "diagonal"})


def optimizer_for(model: Net, kind: Any = "exact") -> PreconditionedOptimizer:
    return PreconditionedOptimizer(
        model, LOSS, curvature=Mixed(rules(model), kind), damping=FactoredTikhonov(1e-2), solver=Cholesky(), lr=0.03
    )


def test_training_sees_what_the_data_set_gives(model: Net) -> None:
    x, y = batch(6)
    expected = fisher(model, LOSS, (x, y), kind="exact", structure=rules(model))
    optimizer = optimizer_for(model)
    LOSS(model(x), y).backward()
    optimizer.step()
    for name, block in statistics(optimizer).items():
        torch.testing.assert_close(block, expected[name], rtol=1e-9, atol=1e-14)


def test_training_resumes_and_copies(model: Net) -> None:
    x, y = batch(12)

    def train(model: nn.Module, optimizer: PreconditionedOptimizer, steps: int) -> Tensor:
        for _ in range(steps):
            optimizer.zero_grad()
            LOSS(model(x), y).backward()
            optimizer.step()
        with torch.no_grad():
            return LOSS(model(x), y)

    optimizer = optimizer_for(model, "mc")
    first = train(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    twin_model, twin = copy.deepcopy((model, optimizer))
    again = copy.deepcopy(model)
    resumed = optimizer_for(again, "mc")
    resumed.load_state_dict(saved)
    expected = train(model, optimizer, 3)
    assert torch.equal(train(again, resumed, 3), expected)
    assert torch.equal(train(twin_model, twin, 3), expected)
    assert expected < first


def test_a_parameter_that_came_later_is_refused(model: Net) -> None:
    optimizer = optimizer_for(model)
    late = nn.Linear(3, 3).double()
    model.head = nn.Sequential(model.head, late)  # type: ignore[assignment]
    optimizer.add_param_group({"params": list(late.parameters())})
    x, y = batch(4)
    with pytest.raises(
        RuntimeError, match=r"head.0.weight, head.0.bias came to the model after the rules were applied"
    ):
        LOSS(model(x), y).backward()

"""Batches in which no target counts add nothing and break nothing, wherever they stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
from curvature.laplace import LinearizedLaplace
from curvature.losses import SumOfLosses


class Pooled(nn.Module):
    """A mean over the tokens of a text; there are none in an empty one, and the mean is NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(6, 3), nn.Linear(3, 3)

    def forward(self, ids: Tensor) -> Tensor:
        kept = (ids > 0).unsqueeze(-1)
        return self.head((self.table(ids) * kept).sum(1) / kept.sum(1)).tanh()


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Pooled().double()


def good() -> list[Any]:
    torch.manual_seed(1)
    return [(torch.randint(1, 6, (n, 4)), torch.randint(3, (n,))) for n in (3, 2)]


def empty(nan: bool) -> tuple[Tensor, Tensor]:
    """Two examples without target; the second may be an empty text."""
    ids = torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0] if nan else [5, 4, 3, 2]])
    return ids, torch.tensor([-100, -100])


def with_empty(place: int, nan: bool) -> list[Any]:
    data = good()
    data.insert(place, empty(nan))
    return data


Door = Callable[[nn.Module, nn.Module, Any], Tensor]


def named(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in found.values()])


def report_of(model: nn.Module, loss_fn: nn.Module, data: Any) -> Tensor:
    found = curvature.report(model, loss_fn, data, sections=["eigenvalues", "distances"], k=2)
    assert found.loss is not None and not found.refused
    return torch.tensor([found.loss.value, *(pair.value for pair in found.eigenvalues["ggn"].largest)])


def monitored(model: nn.Module, loss_fn: nn.Module, data: Any) -> Tensor:
    row = curvature.Monitor(model, loss_fn, data, max_fraction=None).measure()
    return torch.tensor([row["loss"], row["sharpness"], row["trace"]])


DOORS: dict[str, Door] = {
    "hessian": lambda *given: curvature.hessian(*given).to_dense(),
    "hessian by layers": lambda *given: curvature.hessian(*given, structure="layer").to_dense(),
    "ggn": lambda *given: curvature.ggn(*given).to_dense(),
    "low_rank": lambda *given: curvature.ggn(*given, structure="low_rank").to_dense(),
    "sampled": lambda *given: curvature.fisher(*given, kind="mc").to_dense(),
    **{
        f"{structure}, {kind}": lambda *given, structure=structure, kind=kind: curvature.fisher(  # type: ignore[misc]
            *given, structure=structure, kind=kind
        ).to_dense()
        for structure, kind in (("layer", "exact"), ("kfac", "mc"), ("ekfac", "exact"), ("diagonal", "empirical"))
    },
    "covariance": lambda *given: curvature.gradient_covariance(*given, structure="dense").to_dense(),
    "report": report_of,
    "Monitor": monitored,
    "Laplace": lambda *given: LinearizedLaplace(*given).curvature.to_dense(),
}


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("door", DOORS)
def test_they_add_nothing(door: str, place: int) -> None:
    given = model(), nn.CrossEntropyLoss()
    expected = DOORS[door](*given, good())
    for nan in (False, True):
        torch.testing.assert_close(DOORS[door](*given, with_empty(place, nan)), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_their_examples_have_a_place_and_no_influence(place: int, nan: bool) -> None:
    net, loss_fn = model(), nn.CrossEntropyLoss()
    C, query = curvature.ggn(net, loss_fn, good(), structure="ekfac"), good()[0]
    expected = curvature.influence(net, loss_fn, good(), query, curvature=C).scores
    at = (0, 3, 5)[place]
    expected = torch.cat([expected[:, :at], torch.zeros(3, 2, dtype=expected.dtype), expected[:, at:]], 1)
    data = with_empty(place, nan)
    torch.testing.assert_close(curvature.influence(net, loss_fn, data, query, curvature=C).scores, expected)
    torch.testing.assert_close(curvature.influence(net, loss_fn, query, data, curvature=C).scores, expected.T)
    found = curvature.influence(net, loss_fn, data, query, curvature=C, by_position=True)
    torch.testing.assert_close(found.scores, expected)
    own = curvature.self_influence(net, loss_fn, data, curvature=C)
    assert own.shape == (7,) and not own[at : at + 2].any() and (own > 0).sum() == 5


@pytest.mark.parametrize("nan", [False, True])
def test_gradients_of_their_examples_are_zero(nan: bool) -> None:
    given = model(), nn.CrossEntropyLoss()
    for rows in (curvature.per_sample_gradients(*given, empty(nan)), curvature.per_sample_norms(*given, empty(nan))):
        assert all(len(value) == 2 and not value.any() for value in rows.values())
    squares = named(curvature.gradient_second_moment(*given, good()))
    torch.testing.assert_close(named(curvature.gradient_second_moment(*given, with_empty(0, nan))), squares * 5 / 7)


def test_the_table_looks_at_a_batch_that_counts() -> None:
    given = model(), nn.CrossEntropyLoss()
    assert str(curvature.coverage(*given, with_empty(0, True))) == str(curvature.coverage(*given, good()))


def test_class_weights_of_zero_count_nothing_either() -> None:
    net = model()
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.0, 2.0]).double())
    x = good()[0][0]
    data = [(x, torch.tensor([0, 2, 1])), (x[:2], torch.tensor([1, 1]))]
    got, expected = (curvature.ggn(net, loss_fn, d, structure="layer").to_dense() for d in (data, data[:1]))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("door", [door for door in DOORS if door not in ("report", "Laplace")])
def test_data_without_any_target_are_refused(door: str) -> None:
    with pytest.raises(ValueError, match="No term of the loss counts"):
        DOORS[door](model(), nn.CrossEntropyLoss(), [empty(False), empty(False)])


def test_sums_of_losses() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model()

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            z = self.inner(ids)
            return z, 2 * z

    loss_fn = SumOfLosses({0: (1.0, nn.CrossEntropyLoss()), 1: (0.5, nn.CrossEntropyLoss())})
    data = [(x, (y, y)) for x, y in good()]
    nothing, half = empty(False), (good()[0][0], (good()[0][1], torch.full((3,), -100)))
    expected = curvature.ggn(Two(), loss_fn, data).to_dense()
    for place in range(3):
        more = [*data[:place], (nothing[0], (nothing[1], nothing[1])), *data[place:]]
        torch.testing.assert_close(curvature.ggn(Two(), loss_fn, more).to_dense(), expected)
        torch.testing.assert_close(
            curvature.ggn(Two(), loss_fn, more, structure="layer").to_dense(),
            curvature.ggn(Two(), loss_fn, data, structure="layer").to_dense(),
        )
    with pytest.raises(ValueError, match="No term of the loss counts"):  # its mean is 0/0, and so is the sum
        curvature.ggn(Two(), loss_fn, half).to_dense()


class Listed(list[Any]):
    """Batches with a data set, as laplace-torch asks for one."""

    def __init__(self, batches: list[Any]) -> None:
        super().__init__(batches)
        self.dataset = range(sum(len(y) for _, y in batches))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize(
    ("backend", "structure"),
    [("GGN", "diag"), ("GGN", "kfac"), ("EF", "full"), ("Hessian", "full"), ("Hessian", "diag")],
)
def test_fits_of_laplace_torch(backend: str, structure: str, place: int) -> None:
    laplace = pytest.importorskip("laplace")
    from curvature.laplace import EFBackend, GGNBackend, HessianBackend

    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    torch.manual_seed(0)
    data = [(torch.randn(n, 3).double(), torch.randint(3, (n,))) for n in (4, 2)]
    nothing = torch.randn(2, 3).double(), torch.tensor([-100, -100])
    found = []
    for batches in (data, [*data[:place], nothing, *data[place:]]):
        posterior = laplace.Laplace(
            net,
            "classification",
            subset_of_weights="all",
            hessian_structure=structure,
            backend={"GGN": GGNBackend, "EF": EFBackend, "Hessian": HessianBackend}[backend],
        )
        posterior.fit(Listed(batches))
        H = posterior.H
        found.append((H if isinstance(H, Tensor) else H.to_matrix(), torch.as_tensor(posterior.loss)))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("structure", ["full", "kfac", "diagonal"])
def test_batches_without_an_example_are_left_out(structure: str, place: int) -> None:
    data = good()
    data.insert(place, (torch.zeros(0, 4, dtype=torch.long), torch.zeros(0, dtype=torch.long)))
    found, expected = (
        curvature.ggn(model(), nn.CrossEntropyLoss(), given, structure=structure).to_dense() for given in (data, good())
    )
    assert torch.equal(found, expected)

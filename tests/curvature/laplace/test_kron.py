"""Are the Kronecker factors for laplace-torch those of the definition, and is their algebra that of the matrix?"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("laplace")

from laplace.curvature import CurvlinopsEF, CurvlinopsGGN
from laplace.utils import Kron

from curvature.laplace import BlockKron, BlockKronDecomposed, EFBackend, GGNBackend
from curvature.laplace.factors.sums import PartSums
from tests.curvature import dense_reference as dense
from tests.curvature.laplace.problems import (
    ONE_TENSOR,
    backend_of,
    data_size,
    definition,
    last_layer,
    likelihood,
    summed,
    toy,
)
from tests.curvature.problems import F64, PROBLEMS, LanguageModel, Problem, classes, mlp, normal

BOTH = [GGNBackend, EFBackend]
KINDS = {GGNBackend: "exact", EFBackend: "empirical"}
KINDS_OF_CURVLINOPS = {GGNBackend: CurvlinopsGGN, EFBackend: CurvlinopsEF}
#: Problems whose Linears and convolutions are modules that are called.
LAYERED = [
    "mlp_ce",
    "mlp_mse",
    "linear_on_sequences",
    "module_used_twice",
    "bare_parameters",
    "cnn",
    "residual_eval",
    "encoder_pre_norm",
    "embeddings",
]


def close(got: Tensor, expected: Tensor) -> None:
    assert expected.norm() > 0
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10 * float(expected.abs().max()))


def whole(problem: Problem, kind: type, **options: Any) -> BlockKron:
    """The factors of all batches, added up as ``fit`` does."""
    total: Any = Kron.init_from_model([p for p in problem.model.parameters() if 1 <= p.dim() <= 4], "cpu", F64)
    backend = backend_of(problem, kind)
    for x, y in problem.data:
        total += backend.kron(x, y, N=data_size(problem), **options)[1]
    assert isinstance(total, BlockKron)
    return total


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("name", LAYERED)
def test_layers_have_the_factors_of_the_definition(name: str, kind: type, sharing: str) -> None:
    problem = summed(name)
    factor = 0.5 if likelihood(problem) == "regression" else 1.0
    got = whole(problem, kind, kfac_approx=sharing).to_matrix()
    where = dense.flat_indices(problem.model)
    factors = dense.kfac(problem, KINDS[kind], sharing, joint=False)
    assert factors
    for layer, (B, A) in factors.items():
        index, block = dense.kfac_block(problem.model, layer, factor * B, A, joint=False)
        if f"{layer}.weight" in where:
            close(got[index[:, None], index], block)
        if f"{layer}.bias" in where:
            bias = where[f"{layer}.bias"]
            close(got[bias[:, None], bias], factor * torch.block_diag(*B))


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(
    "name", ["residual_eval", "encoder_pre_norm", "bare_parameters", "unknown_uses", "frozen_parts"]
)
def test_other_parameters_have_their_exact_blocks(name: str, kind: type) -> None:
    problem = summed(name)
    exact, matrix = definition(problem, kind), whole(problem, kind).to_matrix()
    small: Any = None
    backend = backend_of(problem, kind, max_dense=1)
    for x, y in problem.data:
        small = backend.kron(x, y, N=data_size(problem))[1] + small
    diagonal = small.to_matrix()
    alone = {name for block, sums in small.sums.items() if isinstance(sums, PartSums) for name in block.names}
    layers = {id(p) for m in problem.model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) for p in m.parameters()}
    checked = 0
    for parameter, index in dense.flat_indices(problem.model).items():
        i = index.flatten()
        block = exact[i][:, i]
        other = id(problem.model.get_parameter(parameter)) not in layers and "in_proj" not in parameter
        if other and index.dim() <= 1 and block.norm() > 1e-20:  # some have no influence but rounding
            close(matrix[i][:, i], block)
            if parameter in alone:
                close(diagonal[i][:, i], torch.diag(block.diagonal()))
            checked += 1
    assert checked


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("name", [*ONE_TENSOR, "conv_1d_and_3d"])
def test_every_parameter_has_an_entry_whatever_the_batches(name: str, kind: type) -> None:
    """Also with positions that are masked in some batches only."""
    problem = summed(name)
    apart = whole(problem, kind)
    trainable = dense.trainable(problem.model)
    assert len(apart) == len(apart.kfacs) == len(trainable)
    assert (apart.examples, apart.size) == (data_size(problem), data_size(problem))
    one_by_one: Any = None
    backend = backend_of(problem, kind)
    for x, y in problem.data:
        if len(x) == len(y):
            for n in range(len(x)):
                one_by_one = backend.kron(x[n : n + 1], y[n : n + 1], N=data_size(problem))[1] + one_by_one
        else:  # the leading axis of the inputs does not count examples
            one_by_one = backend.kron(x, y, N=data_size(problem))[1] + one_by_one
    keep = torch.ones(len(apart.diag()), dtype=torch.bool)
    if name == "language_model":
        # A table of positions is looked up once per batch: which examples reach which of its rows is not known.
        keep[dense.flat_indices(problem.model)["positions.weight"].flatten()] = False
    close(apart.to_matrix()[keep][:, keep], one_by_one.to_matrix()[keep][:, keep])


@pytest.mark.parametrize("kinds", list(KINDS_OF_CURVLINOPS.items()))
@pytest.mark.parametrize("name", ["mlp_ce", "mlp_mse"])
def test_agreement_with_curvlinops(name: str, kinds: tuple[type, type]) -> None:
    problem = summed(name)
    x, y = problem.data[0]
    ours, theirs = (kind(problem.model, likelihood(problem)).kron(x, y, N=7) for kind in kinds)
    close(ours[0], theirs[0])
    close(ours[1].to_matrix(), theirs[1].to_matrix())
    for mine, other in zip(ours[1].kfacs, theirs[1].kfacs, strict=True):
        assert [f.shape for f in mine] == [f.shape for f in other]
        # Constants may move between the two factors of a product.
        close(torch.kron(*mine) if len(mine) == 2 else mine[0], torch.kron(*other) if len(other) == 2 else other[0])


@pytest.mark.parametrize("kinds", list(KINDS_OF_CURVLINOPS.items()))
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_agreement_with_curvlinops_on_convolutions(sharing: str, kinds: tuple[type, type]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = normal(5, 2, 4, 4), classes(5, of=3)
    ours, theirs = (kind(model, "classification").kron(x, y, N=5, kfac_approx=sharing)[1] for kind in kinds)
    close(ours.to_matrix(), theirs.to_matrix())


def test_one_example_of_a_linear_layer_is_exact() -> None:
    model, x, y = toy()
    backend = GGNBackend(model, "classification")
    full, kron = backend.full(x[:1], y[:1])[1], backend.kron(x[:1], y[:1], N=1)[1].to_matrix()
    start = 0
    for p in model.parameters():
        i = slice(start, start + p.numel())
        close(kron[i, i], full[i, i])
        start += p.numel()


def test_size_of_the_data_set_and_further_data() -> None:
    """A batch counts M / N in the second factor; what goes beyond a pass over N examples adds its own N."""
    model, x, y = toy()
    backend = GGNBackend(model, "classification")

    def kron(rows: slice, N: int) -> BlockKron:
        return backend.kron(x[rows], y[rows], N=N)[1]

    complete = kron(slice(12), 12)
    weight = slice(0, 20)
    close(kron(slice(12), 3).to_matrix()[weight, weight], 4 * complete.to_matrix()[weight, weight])
    close(kron(slice(12), 3).to_matrix()[20:25, 20:25], complete.to_matrix()[20:25, 20:25])
    first, second = kron(slice(0, 5), 5), kron(slice(5, 8), 7) + kron(slice(8, 12), 7)
    assert (first + second).size == 12
    close((first + second).to_matrix(), complete.to_matrix())
    close((2.5 * complete).to_matrix(), 2.5 * complete.to_matrix())
    close((complete * torch.tensor(0.5, dtype=F64)).to_matrix(), 0.5 * complete.to_matrix())
    with pytest.raises(ValueError, match="cannot add Kron to a BlockKron"):
        complete + Kron(complete.kfacs)
    with pytest.raises(ValueError, match="cannot add BlockKron"):
        complete + GGNBackend(mlp().double()[:1], "classification").kron(x, y, N=12)[1]


def matrices(name: str = "residual_eval") -> tuple[BlockKron, Tensor, Tensor]:
    """Factors, their matrix, and for each entry of the flat vector the number of its parameter."""
    problem = summed(name)
    kron = whole(problem, GGNBackend)
    owner = [torch.full((p.numel(),), i) for i, p in enumerate(dense.trainable(problem.model).values())]
    return kron, kron.to_matrix(), torch.cat(owner)


@pytest.mark.parametrize("name", ["mlp_ce", "residual_eval", "cnn", "language_model", "embeddings", "frozen_parts"])
def test_algebra_is_that_of_the_matrix(name: str, generator: torch.Generator) -> None:
    kron, matrix, owner = matrices(name)
    close(matrix, matrix.T)
    close(kron.diag(), matrix.diagonal())
    vectors = torch.randn(3, 2, len(matrix), dtype=F64, generator=generator)
    close(kron.bmm(vectors), vectors @ matrix)
    close(kron.bmm(vectors[0]), vectors[0] @ matrix)
    close(kron.bmm(vectors[0, 0]), vectors[0, 0] @ matrix)
    decomposed = kron.decompose()
    assert isinstance(decomposed, BlockKronDecomposed) and len(decomposed) == len(kron)
    close(decomposed.to_matrix(), matrix)
    deltas = torch.rand(len(kron), dtype=F64, generator=generator) + 0.1
    for delta in (deltas, deltas[:1], deltas[0]):
        posterior, expected = 1.7 * decomposed + delta, 1.7 * matrix
        expected = expected + torch.diag(
            delta.expand(len(kron))[owner] if delta.dim() == 0 or len(delta) == 1 else delta[owner]
        )
        close(posterior.to_matrix(), expected)
        close(posterior.to_matrix(-1), torch.linalg.inv(expected))
        close(posterior.logdet(), torch.logdet(expected))
        close(posterior.diag(-1), torch.linalg.inv(expected).diagonal())
        close(posterior.bmm(vectors, -1), torch.linalg.solve(expected, vectors.mT).mT)
        half = posterior.bmm(torch.eye(len(matrix), dtype=F64), -0.5)
        close(half @ half, torch.linalg.inv(expected))
        close(posterior.inv_square_form(vectors), vectors @ torch.linalg.solve(expected, vectors.mT))
    close(((decomposed + deltas) * 2.0).to_matrix(), 2 * (decomposed + deltas).to_matrix())
    with pytest.raises(ValueError, match="Invalid shape"):
        decomposed + torch.ones(len(kron) + 1)
    with pytest.raises(ValueError, match="one real number"):
        decomposed * torch.ones(2)
    with pytest.raises(ValueError, match="exponent=1"):
        kron.bmm(vectors, -1)


def test_singular_factors_have_no_finite_determinant() -> None:
    kron = matrices("frozen_parts")[0]  # has a layer that is never used
    assert kron.logdet() == -torch.inf


@pytest.mark.parametrize("damping", [False, True])
def test_gradients_in_noise_and_prior(damping: bool) -> None:
    """Those of the log-determinant agree with finite differences, for each number and through products."""
    decomposed = matrices("residual_eval")[0].decompose(damping=damping)

    def value(scale: Tensor, deltas: Tensor) -> Tensor:
        return (decomposed * (1 / scale.square()) + deltas).logdet()

    scale = torch.tensor(0.7, dtype=F64, requires_grad=True)
    deltas = (torch.rand(len(decomposed), dtype=F64) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(value, (scale, deltas))


def test_damping_adds_roots_to_both_factors_and_survives_scaling() -> None:
    model, x, y = toy()
    kron = GGNBackend(model, "classification").kron(x, y, N=12)[1]
    posterior = kron.decompose(damping=True) * 4.0 + torch.tensor([0.25], dtype=F64)
    B, A = kron.kfacs[0]
    expected = torch.kron(2 * B + 0.5 * torch.eye(len(B)), 2 * A + 0.5 * torch.eye(len(A)))
    close(posterior.to_matrix()[:20, :20], expected)
    close(posterior.to_matrix()[20:25, 20:25], 4 * kron.kfacs[1][0] + 0.25 * torch.eye(5))
    close(posterior.logdet(), torch.logdet(posterior.to_matrix()))


@pytest.mark.parametrize("name", ["residual_eval", "cnn", "language_model"])
def test_saved_factors_are_the_same(name: str, tmp_path: Any) -> None:
    kron, matrix, _ = matrices(name)
    torch.save(kron.state_dict(), tmp_path / "kron.pt")
    loaded = BlockKron.from_state(torch.load(tmp_path / "kron.pt", weights_only=True))
    assert torch.equal(loaded.to_matrix(), matrix)
    assert torch.equal((loaded + kron).to_matrix(), (kron + kron).to_matrix())
    for other in (pickle.loads(pickle.dumps(kron)), copy.deepcopy(kron)):
        assert torch.equal(other.to_matrix(), matrix)


def test_factors_in_the_form_of_laplace_torch() -> None:
    """Where there is such a form its own class gives the same matrix; elsewhere it refuses."""
    kron, matrix, _ = matrices("encoder_pre_norm")
    close(Kron(kron.kfacs).to_matrix(), matrix)
    for name in ("embeddings", "stored_transposed"):  # transposed, with a diagonal factor
        kron, matrix, _ = matrices(name)
        close(Kron(kron.kfacs).to_matrix(), matrix)
    grouped = matrices("cnn")[0]
    with pytest.raises((ValueError, RuntimeError, AttributeError)):
        Kron(grouped.kfacs).decompose().logdet()


def test_large_factors_are_kept_as_diagonals() -> None:
    model, x, y = toy()
    full = GGNBackend(model, "classification").kron(x, y, N=12)[1].kfacs
    part = GGNBackend(model, "classification", max_dim=4).kron(x, y, N=12)[1].kfacs
    close(part[0][0], full[0][0].diagonal())
    close(part[0][1], full[0][1].diagonal())  # four inputs and a one
    close(part[2][0], full[2][0])
    close(part[2][1], full[2][1].diagonal())


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("bias", [True, False])
def test_last_layer_in_closed_form(task: str, bias: bool) -> None:
    """What follows from the features alone is what signals through the model give."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 6, bias=bias)).double()
    x = normal(7, 4)
    y = classes(7, of=6) if task == "classification" else normal(7, 6)
    for max_dim in (100, 3):
        backend = GGNBackend(last_layer(model, x), task, last_layer=True, max_dim=max_dim)
        general = GGNBackend(last_layer(model, x), task, last_layer=True, max_dim=max_dim)
        general._closed_form = lambda x, y: None  # type: ignore[method-assign]
        for N in (7, 9):
            got, expected = backend.kron(x, y, N=N), general.kron(x, y, N=N)
            close(got[0], expected[0])
            close(got[1].to_matrix(), expected[1].to_matrix())
            assert list(got[1].sums) == list(expected[1].sums)  # so batches of both kinds add up
        close(backend.diag(x, y)[1], general.diag(x, y)[1])


def test_attention_and_its_parts_have_blocks() -> None:
    problem = PROBLEMS["encoder_pre_norm"]()
    kron = whole(problem.with_loss(dense.summed(problem.loss_fn)), GGNBackend)
    shapes = {
        name: [tuple(f.shape) for f in F] for name, F in zip(dense.trainable(problem.model), kron.kfacs, strict=True)
    }
    packed = next(name for name in shapes if name.endswith("in_proj_weight"))
    assert shapes[packed] == [(12, 12), (4, 4)]
    assert all(len(found) in (1, 2) for found in shapes.values())


def test_a_table_of_positions_counts_once_per_example() -> None:
    """Though it is looked up once per batch; sequences of two lengths, so that its rows differ in frequency."""
    torch.manual_seed(0)
    model = LanguageModel().double()
    long, short = classes(2, 4, of=5), classes(3, 2, of=5)
    backend = GGNBackend(model, "classification")
    together = backend.kron(long, long, N=5)[1] + backend.kron(short, short, N=5)[1]
    rows = [part[n : n + 1] for part in (long, short) for n in range(len(part))]
    apart = sum((backend.kron(row, row, N=5)[1] for row in rows[1:]), backend.kron(rows[0], rows[0], N=5)[1])
    close(together.to_matrix(), apart.to_matrix())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", BOTH)
def test_adapters_of_a_language_model(kind: type) -> None:
    """Low-rank adapters (LoRA) in mappings: the only layers there that curvlinops serves as well.

    The head reads the class token, so that no position counts which this does not look at: queries of the last layer,
    padding. There they do, so here there are none of these.
    """
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=20, num_labels=3, **sizes))
    adapters = peft.LoraConfig(r=2, target_modules=["query", "value"], layers_to_transform=[0], task_type="SEQ_CLS")
    inner = peft.get_peft_model(bert, adapters).double().eval()
    for name, p in inner.named_parameters():
        if "lora_B" in name:  # zero at first, which hides the gradients of the others
            p.data.normal_(0, 0.1)

    class FromBatch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, batch: Any) -> Tensor:
            return self.inner(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    model = FromBatch()
    ids, y = torch.randint(1, 20, (5, 4)), classes(5, of=3)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": y}
    ours, theirs = (b(model, "classification").kron(batch, y, N=5)[1] for b in (kind, KINDS_OF_CURVLINOPS[kind]))
    close(ours.to_matrix(), theirs.to_matrix())

"""Are the Kronecker factors those of the definition, and the block exact where theory says so?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
from curvature.structures.kfac import nearest_kronecker
from solvers import Diagonal, Kronecker, LinearOperator
from tests.curvature import dense_reference as dense
from tests.curvature.estimates import estimate
from tests.curvature.problems import F64, PROBLEMS, Encoder, Fn, LanguageModel, Problem, classes, mlp, normal

# Problems whose Linears and convolutions are modules that are called.
LAYERED = [
    "mlp_ce",
    "mlp_ce_sum",
    "mlp_ce_all_options",
    "mlp_ce_probabilities",
    "mlp_mse",
    "mlp_mse_one_number",
    "mlp_bce",
    "linear_on_sequences",
    "linear_on_images",
    "positions_meet_in_the_loss",
    "module_used_twice",
    "two_inputs",
    "mapping_inputs",
    "bare_parameters",
    "cnn",
    "conv_1d_and_3d",
    "residual_eval",
    "layer_norm_over_two_axes",
    "encoder_pre_norm",
    "encoder_post_norm_eval",
    "cross_attention",
    "cross_attention_inside_time_major",
    "embeddings",
]


def check_layers(problem: Problem, got: LinearOperator, factors: dict[str, tuple[Tensor, Tensor]], joint: bool) -> None:
    matrix = got.to_dense()
    assert factors
    for name, (B, A) in factors.items():
        index, expected = dense.kfac_block(problem.model, name, B, A, joint)
        assert expected.norm() > 0
        torch.testing.assert_close(matrix[index[:, None], index], expected, rtol=1e-9, atol=1e-12)
        where = dense.flat_indices(problem.model)
        if not joint and f"{name}.bias" in where:
            bias = where[f"{name}.bias"]
            expected = torch.block_diag(*B)  # the input of a bias is one
            torch.testing.assert_close(matrix[bias[:, None], bias], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("name", LAYERED)
def test_factors_follow_the_definition(name: str, kind: str) -> None:
    problem = PROBLEMS[name]()
    check_layers(problem, estimate(problem, "kfac", kind), dense.kfac(problem, kind), joint=True)


@pytest.mark.parametrize("name", ["mlp_ce_all_options", "linear_on_sequences", "cnn", "conv_1d_and_3d"])
def test_separate_bias_has_a_block_of_its_own(name: str) -> None:
    problem = PROBLEMS[name]()
    check_layers(
        problem,
        estimate(problem, "kfac", "exact", bias="separate"),
        dense.kfac(problem, "exact", joint=False),
        joint=False,
    )


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize(
    "name", ["mlp_ce", "linear_on_sequences", "linear_on_images", "cnn", "encoder_pre_norm", "module_used_twice"]
)
def test_reduced_factors_follow_the_definition(name: str, joint: bool) -> None:
    problem = PROBLEMS[name]()
    got = estimate(problem, "kfac", "exact", sharing="reduce", bias="joint" if joint else "separate")
    check_layers(problem, got, dense.kfac(problem, "exact", "reduce", joint), joint)


@pytest.mark.parametrize(
    "name",
    [
        *("mlp_ce", "linear_on_sequences", "linear_on_images", "cnn", "encoder_pre_norm", "module_used_twice"),
        *("cross_attention", "two_inputs"),
    ],
)
def test_each_pass_chooses_for_each_layer(name: str) -> None:
    problem = PROBLEMS[name]()
    got = estimate(problem, "kfac", "exact", sharing="auto")
    check_layers(problem, got, dense.kfac(problem, "exact", "auto"), joint=True)


def test_what_is_chosen_differs_where_positions_are_aggregated_alone() -> None:
    for name, same in (("linear_on_sequences", "expand"), ("encoder_pre_norm", "reduce")):
        auto, expand, reduce = (
            estimate(PROBLEMS[name](), "kfac", "exact", sharing=sharing).to_dense()
            for sharing in ("auto", "expand", "reduce")
        )
        assert not torch.allclose(expand, reduce, rtol=1e-3)
        assert torch.equal(auto, expand if same == "expand" else reduce)


@pytest.mark.filterwarnings("ignore:not one loss")  # a batch norm in train mode, on two batches
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_factors_where_batch_norm_mixes_the_examples(kind: str) -> None:
    problem = PROBLEMS["residual_train"]()
    check_layers(problem, estimate(problem, "kfac", kind), dense.kfac(problem, kind, whole=True), joint=True)


@pytest.mark.parametrize("name", ["flattened_by_the_model", "positions_picked_by_a_mask", "encoder_time_major"])
def test_factors_where_the_rows_of_the_output_are_no_examples(name: str) -> None:
    """A factor is a sum over positions, so it does not matter where one example ends."""
    problem = PROBLEMS[name]()
    check_layers(problem, estimate(problem, "kfac", "exact"), dense.kfac(problem, "exact", whole=True), joint=True)


class WrittenOut(nn.Module):
    """What ``Encoder(norm_first=False)`` computes, with a Linear in place of each packed projection."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        layer = encoder.encoder.layers[0]
        self.packed, self.out = nn.Linear(4, 12).double(), nn.Linear(4, 4).double()
        self.packed.load_state_dict({"weight": layer.self_attn.in_proj_weight, "bias": layer.self_attn.in_proj_bias})
        self.out.load_state_dict(layer.self_attn.out_proj.state_dict())
        self.layer, self.head = layer, encoder.head

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in self.packed(x).chunk(3, -1))
        weights = (q @ k.mT / 2**0.5).softmax(-1)
        x = self.layer.norm1(x + self.out((weights @ v).transpose(1, 2).flatten(2)))
        x = self.layer.norm2(x + self.layer.linear2(nn.functional.gelu(self.layer.linear1(x))))
        return self.head(x.mean(1))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_packed_projections_of_attention(sharing: str) -> None:
    problem = PROBLEMS["encoder_post_norm_eval"]()
    written = replace(problem, model=WrittenOut(problem.model))  # type: ignore[arg-type]
    for x, _ in problem.data:
        torch.testing.assert_close(written.model(x), problem.model(x), rtol=1e-12, atol=1e-12)
    factors = dense.kfac(written, "exact", sharing)
    matrix, where = estimate(problem, "kfac", "exact", sharing=sharing).to_dense(), dense.flat_indices(problem.model)
    attention = "encoder.layers.0.self_attn."
    for name, ours in [("packed", ("in_proj_weight", "in_proj_bias")), ("out", ("out_proj.weight", "out_proj.bias"))]:
        index = torch.cat([where[attention + ours[0]], where[attention + ours[1]][:, None]], 1).flatten()
        (B,), (A,) = factors[name]
        torch.testing.assert_close(matrix[index[:, None], index], torch.kron(B, A), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_tied_head_is_the_nearest_product_to_both_of_its_uses(kind: str) -> None:
    problem = PROBLEMS["language_model"]()
    factors = dense.kfac(problem, kind)
    (B,), (A,) = factors.pop("head")
    check_layers(problem, estimate(problem, "kfac", kind), factors, joint=True)
    # The look-up, by its definition: one-hot inputs, gradients at its outputs.
    model = problem.model
    assert isinstance(model, LanguageModel)
    z, y = dense.dataset_outputs(problem, model)
    w = dense.term_weight(problem, z, y)
    frequencies, rows, G = torch.zeros(5, dtype=F64), 0, torch.zeros(4, 4, dtype=F64)
    looked_up: list[Tensor] = []
    handle = model.tokens.register_forward_hook(lambda *args: looked_up.append(args[2]))
    for x, target in problem.data:
        for ids, y in dense.examples(x, target):
            looked_up.clear()
            z, y = dense.as_terms(problem, model(ids), y)
            reached = torch.zeros(ids.shape[1], dtype=torch.bool)
            for v in dense.signals(problem, z, y, kind):
                (g,) = torch.autograd.grad(z, looked_up[0], v, retain_graph=True)
                G += w * g[0].T @ g[0]
                reached |= (g[0] != 0).any(-1)
            kept = ids[0][reached]
            rows += len(kept)
            for token in kept[kept != 0]:  # padding_idx: no gradient reaches the table
                frequencies[token] += 1
    handle.remove()
    expected = dense.nearest_kronecker(torch.kron(B, A) + torch.kron((frequencies / rows).diag(), G), 5, 4)
    index = dense.flat_indices(model)["tokens.weight"].flatten()
    got = estimate(problem, "kfac", kind).to_dense()[index[:, None], index]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_nearest_product_where_two_are_almost_equally_good() -> None:
    """The two products are orthogonal and all but equally large: half of each would be as far away as neither."""
    one, other = torch.diag(torch.tensor([1.0, 0], dtype=F64)), torch.diag(torch.tensor([0.0, 1], dtype=F64))
    got = nearest_kronecker([Kronecker(one, one), Kronecker(other, 1.001 * other)]).to_dense()
    torch.testing.assert_close(got, torch.kron(other, 1.001 * other), rtol=1e-12, atol=1e-12)


def test_nearest_product_of_diagonal_and_dense_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(2, 2, 3, 3, dtype=F64, generator=generator)
    (B1, A1), (B2, A2) = roots @ roots.mT
    dense_pair = Kronecker(B1, A1)
    for mixed in (Kronecker(Diagonal(B2.diagonal()), A2), Kronecker(B2, Diagonal(A2.diagonal()))):
        expected = dense.nearest_kronecker(dense_pair.to_dense() + mixed.to_dense(), 3, 3)
        torch.testing.assert_close(nearest_kronecker([dense_pair, mixed]).to_dense(), expected, rtol=1e-9, atol=1e-12)
    diagonals = [Kronecker(Diagonal(B.diagonal()), Diagonal(A.diagonal())) for B, A in ((B1, A1), (B2, A2))]
    nearest = nearest_kronecker(diagonals)
    assert all(isinstance(factor, Diagonal) for factor in nearest.factors)
    expected = dense.nearest_kronecker(diagonals[0].to_dense() + diagonals[1].to_dense(), 3, 3)
    torch.testing.assert_close(nearest.to_dense(), expected, rtol=1e-9, atol=1e-12)


def test_nearest_product_of_nothing_is_nothing() -> None:
    zero = torch.zeros(2, 2, dtype=F64)
    assert (nearest_kronecker([Kronecker(zero, zero)] * 2).to_dense() == 0).all()


def deep_linear(*between: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False), *between, nn.Linear(2, 3)).double()


def exact_cases() -> dict[str, tuple[Problem, str]]:
    torch.manual_seed(0)
    mse = nn.MSELoss()
    one = nn.Linear(3, 2).double()
    pooled = deep_linear(Fn(lambda x: x.mean(1)))
    return {
        "one linear layer": (Problem(one, mse, [(normal(n, 3), normal(n, 2)) for n in (3, 2)]), "expand"),
        "deep linear net": (Problem(deep_linear(), mse, [(normal(n, 3), normal(n, 3)) for n in (3, 2)]), "expand"),
        "deep linear net, sum": (
            Problem(deep_linear(), nn.MSELoss(reduction="sum"), [(normal(3, 3), normal(3, 3))]),
            "reduce",
        ),
        "linear on sequences": (Problem(deep_linear(), mse, [(normal(2, 3, 3), normal(2, 3, 3))]), "expand"),
        "pooled linear on sequences": (Problem(pooled, mse, [(normal(3, 2, 3), normal(3, 3))]), "reduce"),
        "one example": (Problem(mlp().double(), nn.CrossEntropyLoss(), [(normal(1, 4), classes(1, of=3))]), "expand"),
    }


class FromZero(nn.Module):
    """A recurrent network whose first state is made in ``forward``: nothing in its making tells whose rows it has."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.again, self.leave = nn.Linear(2, 3, bias=False), nn.Linear(3, 3), nn.Linear(3, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 3, dtype=x.dtype)
        for step in x.unbind(1):
            h = (self.enter(step) + self.again(h)).tanh()
        return self.leave(h)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_rows_of_a_state_that_starts_at_zero_count_once(kind: str) -> None:
    torch.manual_seed(0)
    data = [(normal(n, 3, 2), classes(n, of=3)) for n in (4, 2)]
    problem = Problem(FromZero(), nn.CrossEntropyLoss(), data)
    check_layers(problem, estimate(problem, "kfac", kind), dense.kfac(problem, kind), joint=True)


@pytest.mark.parametrize("name", exact_cases())
def test_blocks_are_those_of_the_ggn_where_theory_says_so(name: str) -> None:
    problem, sharing = exact_cases()[name]
    operator = estimate(problem, "kfac", "exact", sharing=sharing)
    got, full = operator.to_dense(), dense.ggn(problem)
    blocks = got != 0
    assert blocks.sum() > len(got)
    torch.testing.assert_close(got, torch.where(blocks, full, 0.0), rtol=1e-10, atol=1e-12)


def test_expand_and_reduce_agree_without_sharing() -> None:
    problem = PROBLEMS["mlp_ce"]()
    expand, reduce = (estimate(problem, "kfac", sharing=sharing) for sharing in ("expand", "reduce"))
    torch.testing.assert_close(expand.to_dense(), reduce.to_dense(), rtol=1e-12, atol=0)


def test_factors_above_the_limit_keep_their_diagonal() -> None:
    problem = PROBLEMS["mlp_ce"]()
    full = estimate(problem, "kfac", "exact")
    cut = estimate(problem, "kfac", "exact", max_dim=4)
    first, second = cut.blocks
    assert isinstance(first, Kronecker) and isinstance(second, Kronecker)
    assert [type(f).__name__ for f in first.factors + second.factors] == ["Diagonal", "Diagonal", "Dense", "Diagonal"]
    torch.testing.assert_close(cut.diagonal(), full.diagonal(), rtol=1e-12, atol=0)


def test_a_long_side_of_a_narrow_layer_keeps_its_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = PROBLEMS["mlp_ce"]()
    full = estimate(problem, "kfac", "exact")
    monkeypatch.setattr("curvature.structures.kfac.LONG", 2)
    assert torch.equal(estimate(problem, "kfac", "exact", max_ratio=None).to_dense(), full.to_dense())
    cut = estimate(problem, "kfac", "exact", max_ratio=1.5)
    kinds = [type(factor).__name__ for block in cut.blocks for factor in block.factors]  # type: ignore[attr-defined]
    assert kinds == ["Dense", "Dense", "Dense", "Diagonal"]  # sides of 5 and 5, of 3 and 6
    torch.testing.assert_close(cut.diagonal(), full.diagonal(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "tnt", "foof"])
def test_twelve_thousand_inputs_of_a_narrow_layer_make_no_matrix_by_default(structure: str) -> None:
    data = torch.randn(2, 12_000), torch.tensor([0, 2])
    found = curvature.fisher(nn.Linear(12_000, 3), nn.CrossEntropyLoss(), data, structure=structure, progress=False)
    assert 12_000 < max(sizes_in(found)) < 12_001 * 4
    with pytest.raises(ValueError, match="max_ratio is a finite number above 0"):
        curvature.fisher(nn.Linear(2, 3), nn.CrossEntropyLoss(), data, structure="kfac", max_ratio=0)


def sizes_in(value: Any) -> list[int]:
    """Of all tensors that an operator holds."""
    if isinstance(value, Tensor):
        return [value.numel()]
    if isinstance(value, LinearOperator):
        value = list(vars(value).values())
    return [size for entry in value for size in sizes_in(entry)] if isinstance(value, (list, tuple)) else []

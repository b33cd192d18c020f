"""``quantize``, ``prune`` and ``allocate`` as they are called: on models of many kinds, and where they refuse."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn

import curvature
from curvature.compression import Grid, allocate, prune, quantize
from curvature.compression.allocation import cheapest
from curvature.compression.factors import layer_curvature
from solvers import (
    Dense,
    Diagonal,
    Eigen,
    InexactWarning,
    Kronecker,
    NonFiniteError,
    NotPositiveDefiniteError,
    SingularMatrixError,
    StructureError,
)
from tests.curvature.compression.references import spd


class Attention(nn.Module):
    """Embedding, packed projections, a convolution over time with groups, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.symbols = nn.Embedding(7, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.symbols(ids)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(torch.tanh(self.conv(x.mT)).mean(-1))


@pytest.fixture
def attention() -> tuple[nn.Module, nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    model = Attention().double().eval()
    return model, nn.CrossEntropyLoss(), (torch.randint(7, (24, 6)), torch.randint(5, (24,)))


@pytest.fixture
def linear() -> tuple[nn.Module, nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    x = torch.randn(40, 6, dtype=torch.float64)
    return nn.Linear(6, 4).double(), nn.MSELoss(), (x, torch.randn(40, 4, dtype=torch.float64))


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "foof", "diagonal"])
@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_every_weight_matrix_is_on_its_grid_and_the_model_stays(attention, structure, bias):
    model, loss_fn, data = attention
    before = copy.deepcopy(model.state_dict())
    found = quantize(model, loss_fn, data, bits=3, structure=structure, bias=bias)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    new = dict(found.model.named_parameters())
    for name in ("attention.in_proj_weight", "attention.out_proj.weight", "head.weight"):
        assert all(len(row.unique()) <= 8 for row in new[name])
        assert not torch.equal(new[name], before[name])
    assert torch.equal(new["symbols.weight"], before["symbols.weight"])
    assert torch.equal(new["norm.weight"], before["norm.weight"])
    assert torch.equal(new["head.bias"], before["head.bias"]) == (bias == "separate" or structure == "diagonal")
    groups = [name for name in found.codes if name.startswith("conv")]
    assert len(groups) == 2  # one matrix for each group
    for index, name in enumerate(sorted(groups)):
        W = new["conv.weight"][4 * index : 4 * index + 4].flatten(1)
        assert torch.allclose(found.codes[name].dequantize(), W, rtol=0, atol=1e-12)
    assert torch.allclose(found.codes["head.weight"].dequantize(), new["head.weight"], rtol=0, atol=1e-12)
    assert all(layer.bits == 3 for layer in found.layers)
    assert all(layer.damping == (0.0 if structure == "diagonal" else 0.01) for layer in found.layers)


def test_prediction_and_measurement_agree_where_the_loss_is_the_form(linear):
    """A linear model under squared error: K-FAC is the Hessian, so at the minimum the prediction is exact."""
    model, loss_fn, (x, y) = linear
    ones = torch.cat([x, torch.ones(40, 1, dtype=torch.float64)], 1)
    best = torch.linalg.lstsq(ones, y).solution.T
    with torch.no_grad():
        model.weight.copy_(best[:, :6])
        model.bias.copy_(best[:, 6])
    found = quantize(model, loss_fn, (x, y), bits=3, kind="exact")
    (layer,) = found.layers
    assert layer.measured == pytest.approx(layer.predicted, rel=1e-9)
    assert found.loss_after - found.loss_before == pytest.approx(layer.predicted, rel=1e-9)
    assert "Loss" in str(found) and found.to_dict()["layers"][0]["name"] == "weight"
    pruned = prune(model, loss_fn, (x, y), sparsity="1:2", kind="exact")
    assert pruned.layers[0].measured == pytest.approx(pruned.layers[0].predicted, rel=1e-9)
    assert pruned.layers[0].kept == 0.5


def test_an_operator_of_before_gives_the_same_as_its_name(attention):
    model, loss_fn, data = attention
    op = curvature.fisher(model, loss_fn, data, kind="exact", structure="kfac")
    one = quantize(model, loss_fn, data, bits=4, structure=op, measure=False)
    other = quantize(model, loss_fn, data, bits=4, structure="kfac", kind="exact", measure=False)
    for name, codes in one.codes.items():
        assert torch.equal(codes.codes, other.codes[name].codes)


def test_layer_after_layer_sees_the_compressed_model(attention):
    model, loss_fn, data = attention
    at_once = quantize(model, loss_fn, data, bits=2, kind="exact", measure=False)
    in_turn = quantize(model, loss_fn, data, bits=2, kind="exact", measure=False, sequential=True)
    first, last = at_once.layers[0].name, at_once.layers[-1].name
    assert torch.equal(at_once.codes[first].codes, in_turn.codes[first].codes)
    # The last layer's curvature is that of the model with everything before it compressed.
    partial = copy.deepcopy(in_turn.model)
    with torch.no_grad():
        partial.head.weight.copy_(model.head.weight)
        partial.head.bias.copy_(model.head.bias)
    op = curvature.fisher(partial, loss_fn, data, kind="exact", structure="kfac")
    again = quantize(partial, loss_fn, data, bits=2, structure=op, layers="head.weight", measure=False)
    assert last == "head.weight" and torch.equal(again.codes[last].codes, in_turn.codes[last].codes)


def test_a_low_precision_model_keeps_its_dtype(attention):
    model, loss_fn, data = attention
    found = quantize(model.bfloat16(), loss_fn, data, bits=8, measure=False)
    assert found.model.head.weight.dtype == torch.bfloat16
    # Seven bits of a mantissa round what eight bits of a grid hold.
    assert (found.codes["head.weight"].dequantize() - found.model.head.weight).abs().max() < 2**-8


def test_names_choose_layers_and_bits(attention):
    model, loss_fn, data = attention
    found = quantize(model, loss_fn, data, bits={"head.weight": 2, "attention.out_proj.weight": 5}, measure=False)
    assert {layer.name: layer.bits for layer in found.layers} == {"attention.out_proj.weight": 5, "head.weight": 2}
    assert [layer.name for layer in quantize(model, loss_fn, data, layers="head", measure=False).layers] == [
        "head.weight"
    ]
    assert "symbols.weight" in quantize(model, loss_fn, data, embeddings=True, measure=False).codes
    with pytest.raises(ValueError, match="layers= names 'heads'"):
        quantize(model, loss_fn, data, layers="heads")


def test_allocation_is_the_best_of_all_choices():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        sizes = {name: int(torch.randint(1, 50, (), generator=generator)) for name in "abcd"}
        table = {
            name: {bits: float(torch.rand((), generator=generator)) / bits for bits in (2, 3, 4, 8)} for name in sizes
        }
        found = cheapest(table, sizes, 4.2)
        total = sum(sizes.values())
        allowed = [
            dict(zip(sizes, choice, strict=True))
            for choice in itertools.product((2, 3, 4, 8), repeat=4)
            if sum(sizes[n] * c for n, c in zip(sizes, choice, strict=True)) <= 4.2 * total
        ]
        cost = min(sum(table[n][c] for n, c in choice.items()) for choice in allowed)
        assert found in allowed
        assert sum(table[n][c] for n, c in found.items()) == pytest.approx(cost, rel=1e-9)


def test_bits_in_between_are_distributed(attention):
    model, loss_fn, data = attention
    op = curvature.fisher(model, loss_fn, data, kind="exact", structure="kfac")
    plan = allocate(model, op, bits=3.5)
    assert plan.mean <= 3.5 + 1e-6 and len(set(plan.bits.values())) > 1
    found = quantize(model, loss_fn, data, bits=3.5, structure=op, measure=False)
    assert {layer.name: layer.bits for layer in found.layers} == dict(plan.bits)
    assert found.predicted == pytest.approx(plan.predicted, rel=1e-9)
    assert found.bits == pytest.approx(plan.mean)
    uniform = quantize(model, loss_fn, data, bits=3, structure=op, measure=False)
    assert found.predicted < uniform.predicted
    with pytest.raises(ValueError, match="beyond 2"):
        allocate(model, op, bits=1.5)


def test_sparsity_is_distributed(attention):
    model, loss_fn, data = attention
    op = curvature.fisher(model, loss_fn, data, kind="exact", structure="kfac")
    plan = allocate(model, op, sparsity=0.5)
    assert plan.mean >= 0.5 - 1e-6 and len(set(plan.sparsity.values())) > 1 and not plan.bits
    found = prune(model, loss_fn, data, sparsity=plan.sparsity, structure=op, measure=False)
    assert {layer.name: round(1 - layer.kept, 3) for layer in found.layers} == pytest.approx(plan.sparsity, abs=0.02)
    assert found.predicted == pytest.approx(plan.predicted, rel=1e-6)
    assert found.predicted < prune(model, loss_fn, data, sparsity=0.5, structure=op, measure=False).predicted
    total = {m.name: m.shape[0] * m.shape[1] for m in found.layers}
    best = min(
        sum(plan.table[n][s] for n, s in zip(total, choice, strict=True))
        for choice in itertools.product((0.0, 0.5, 0.875), repeat=len(total))
        if sum(total[n] * s for n, s in zip(total, choice, strict=True)) >= 0.5 * sum(total.values())
    )
    some = allocate(model, op, sparsity=0.5, choices=(0.0, 0.5, 0.875))
    assert some.predicted == pytest.approx(best, rel=1e-9)
    with pytest.raises(ValueError, match="one at a time"):
        allocate(model, op, sparsity=0.5, bits=4)
    with pytest.raises(ValueError, match=r"beyond 0\.5"):
        allocate(model, op, sparsity=0.6, choices=(0.0, 0.5))


def test_a_plan_serves_groups_and_segments_by_their_names(attention):
    model, loss_fn, data = attention
    op = curvature.fisher(model, loss_fn, data, kind="exact", structure="kfac")
    plan = allocate(model, op, bits=3.5)
    assert {"conv.weight[group 0]", "conv.weight[group 1]"} <= set(plan.bits)
    found = quantize(model, loss_fn, data, bits=plan.bits, structure=op, measure=False)
    assert {layer.name: layer.bits for layer in found.layers} == dict(plan.bits)

    class Crossed(nn.Module):
        """Queries from one input, keys and values from another: the packed projection is used in segments."""

        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 5)

        def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            return self.head(self.attention(x, context, context, need_weights=False)[0].mean(1))

    torch.manual_seed(0)
    crossed = Crossed().double().eval()
    x, context = torch.randn(24, 4, 8, dtype=torch.float64), torch.randn(24, 5, 8, dtype=torch.float64)
    found = quantize(crossed, loss_fn, ((x, context), data[1]), bits=3, bias="separate", measure=False)
    names = [name for name in found.codes if name.startswith("attention.in_proj_weight")]
    assert len(names) > 1 and len(found.codes) == len(found.layers)
    rows = torch.cat([found.codes[name].dequantize() for name in names])
    torch.testing.assert_close(rows, found.model.attention.in_proj_weight.detach(), rtol=0, atol=1e-12)


def test_a_causal_language_model_of_transformers_with_its_own_batches():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 20, "n_positions": 8}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM")
    model = transformers.GPT2LMHeadModel(config).double().eval()
    ids = torch.randint(20, (6, 8))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    found = quantize(model, nn.CrossEntropyLoss(), batch, bits=3)
    names = [f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert list(found.codes) == names  # the head is the embedding
    # transformers takes the loss of logits in float32
    assert found.loss_before == pytest.approx(float(model(**batch).loss.detach()), rel=1e-6)
    assert found.loss_after == pytest.approx(float(found.model(**batch).loss.detach()), rel=1e-6)
    new = found.model.transformer.h[0].mlp.c_fc.weight.detach()  # stored as (inputs, outputs)
    torch.testing.assert_close(found.codes[names[2]].dequantize(), new.T, rtol=0, atol=1e-12)
    assert all(layer.seconds > 0 for layer in found.layers)


def test_codes_and_masks_can_be_stored(attention, tmp_path):
    model, loss_fn, data = attention
    found = quantize(model, loss_fn, data, bits=4, group=4, symmetric=False, measure=False)
    torch.save(found.tensors(), tmp_path / "codes.pt")
    back = torch.load(tmp_path / "codes.pt", weights_only=True)
    codes = found.codes["head.weight"]
    assert torch.equal(back["head.weight.codes"], codes.codes) and codes.codes.dtype == torch.uint8
    assert codes.scale.shape == (5, 2) and codes.stored_bits == pytest.approx(4 + 10 * 20 / 40)
    pruned = prune(model, loss_fn, data, sparsity=0.25, layers="head", measure=False)
    assert torch.equal(pruned.tensors()["head.weight.mask"], pruned.model.head.weight != 0)


@pytest.mark.parametrize("units", [False, True])
def test_pruning_a_model_of_many_kinds(attention, units):
    model, loss_fn, data = attention
    found = prune(model, loss_fn, data, sparsity=0.5, units=units)
    assert found.loss_after is not None
    for name, mask in found.masks.items():
        assert float((~mask).double().mean()) == pytest.approx(0.5, abs=0.1), name  # two or three of five
    zero_rows = (found.model.head.weight == 0).all(1)
    assert torch.equal(found.model.head.bias == 0, zero_rows) if units else not zero_rows.all()


def test_uneven_inputs_are_refused_by_name(linear):
    model, loss_fn, data = linear
    with pytest.raises(ValueError, match="weight has 6"):
        prune(model, loss_fn, data, sparsity="2:4")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": "4"}, TypeError, "bits is"),
        ({"bits": 17}, ValueError, "bits is"),
        ({"order": "size"}, ValueError, "order is"),
        ({"damping": -1.0}, ValueError, "damping is"),
        ({"damping": float("nan")}, ValueError, "damping is"),
        ({"structure": "layer"}, StructureError, "no factors"),
        ({"structure": "full"}, ValueError, "no block for each layer"),
        ({"structure": "kfac2"}, ValueError, "structure must be"),
    ],
)
def test_options_that_mean_nothing_are_refused(linear, options, error, message):
    model, loss_fn, data = linear
    with pytest.raises(error, match=message):
        quantize(model, loss_fn, data, **options)


G = torch.Generator().manual_seed(1)
GOOD = spd(4, G)
LOW = torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 5)).double()
DEAD = GOOD.clone()
DEAD[1] = DEAD[:, 1] = 0
NAN = GOOD.clone()
NAN[0, 0] = torch.nan
INDEFINITE = torch.diag(torch.tensor([4.0, 1.0, 0.5, -3.0], dtype=torch.float64))
NEARLY = GOOD - (torch.linalg.eigvalsh(GOOD)[0] + 0.05 * GOOD.diagonal().mean()) * torch.eye(4, dtype=torch.float64)


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize(
    ("damaged", "what"),
    [
        (LOW, "singular"),
        (DEAD, "singular"),
        (NEARLY, "raised"),
        (NAN, NonFiniteError),
        (INDEFINITE, NotPositiveDefiniteError),
        (torch.zeros(4, 4, dtype=torch.float64), SingularMatrixError),
    ],
    ids=["rank one", "dead", "slightly indefinite", "nan", "indefinite", "zero"],
)
def test_damaged_factors_are_damped_and_told_or_refused(damaged, what, side):
    """Never a silent fall back to plain rounding."""
    pair = (GOOD, damaged) if side == "inputs" else (damaged, GOOD)
    op = Kronecker(*(Dense(m) for m in pair))
    if isinstance(what, type):
        with pytest.raises(what, match=f"layer.weight, factor of the {side}"):
            layer_curvature("layer.weight", op, 0.01)
        return
    if what == "raised":
        with pytest.warns(InexactWarning, match=f"factor of the {side}.*damping=0.01"):
            found = layer_curvature("layer.weight", op, 0.01)
        assert found.damping > 0.01
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = layer_curvature("layer.weight", op, 0.01)
        assert found.damping == 0.01
    assert found.singular


def test_eigenvalues_in_a_basis_become_their_nearest_product(generator):
    left, right = (torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0] for d in (3, 4))
    b, a = (torch.rand(d, generator=generator, dtype=torch.float64) + 0.1 for d in (3, 4))
    op = Eigen(Kronecker(left, right), torch.outer(b, a))
    found = layer_curvature("W", op, 0.0)
    assert found.outputs is not None
    product = torch.kron(found.outputs.matrix, found.inputs.matrix)
    assert torch.allclose(product, op.to_dense(), rtol=0, atol=1e-12)
    with pytest.raises(StructureError, match="no factors"):
        layer_curvature("W", Diagonal(torch.rand(5)), 0.0)


def test_a_grid_for_each_parameter_is_the_same_by_name(linear):
    model, loss_fn, data = linear
    with pytest.raises(ValueError, match="bits"):
        quantize(model, loss_fn, data, bits={"weight": 0})
    assert Grid().bits == 4

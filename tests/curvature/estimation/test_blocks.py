"""Does every trainable parameter get a block, the right one, and exactly one?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from curvature import Block
from curvature.layers.block import BlockPart
from curvature.model.parameters import Parameters
from solvers import Dense, Diagonal, Eigen, Kronecker
from tests.curvature import dense_reference as dense
from tests.curvature.estimates import estimate
from tests.curvature.problems import PROBLEMS, Problem


def blocks(problem: Problem, **options: Any) -> dict[str, str]:
    """``{block name: type of its operator}``."""
    operator = estimate(problem, "kfac", **options)
    pairs = zip(operator.places, operator.blocks, strict=True)
    return {place.block.name: type(op).__name__ for place, op in pairs}  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_entry_lies_in_exactly_one_block(name: str) -> None:
    problem = PROBLEMS[name]()
    operator = estimate(problem, "kfac")
    size = sum(p.numel() for p in problem.model.parameters() if p.requires_grad)
    assert operator.in_shape == (size,)
    entries = torch.cat([place.gather(torch.arange(size)).flatten() for place in operator.places])
    assert torch.equal(entries.sort().values, torch.arange(size))


def test_structures_by_layer() -> None:
    assert blocks(PROBLEMS["residual_eval"]()) == {
        "conv1.weight": "Kronecker",
        "bn1.weight+bn1.bias": "Dense",
        "conv2.weight+conv2.bias": "Kronecker",
        "bn2.weight+bn2.bias": "Dense",
        "group.weight+group.bias": "Dense",
        "instance.weight+instance.bias": "Dense",
        "rms.weight": "Diagonal",
        "head.weight+head.bias": "Kronecker",
    }
    assert blocks(PROBLEMS["mlp_ce"](), bias="separate") == dict.fromkeys(
        ["0.weight", "0.bias", "2.weight", "2.bias"], "Kronecker"
    )


def test_functional_uses_get_the_blocks_of_layers() -> None:
    found = blocks(PROBLEMS["functional_uses"]())
    assert found == {
        "linear": "Kronecker",
        "right": "Kronecker",
        "transposed": "Kronecker",
        "conv1d_weight+conv1d_bias": "Kronecker",
        "packed[0:16]": "Kronecker",
        "packed[16:32]": "Kronecker",
        "chunked[0:16]": "Kronecker",
        "chunked[16:32]": "Kronecker",
        "rows_and_columns": "Diagonal",  # a strided piece of it: no rule
    }


def test_attention_gets_kronecker_blocks() -> None:
    packed = blocks(PROBLEMS["encoder_pre_norm"]())
    prefix = "encoder.layers.0."
    attention = prefix + "self_attn."
    assert packed == {
        f"{attention}in_proj_weight+{attention}in_proj_bias": "Kronecker",
        f"{attention}out_proj.weight+{attention}out_proj.bias": "Kronecker",
        **{f"{prefix}{n}.weight+{prefix}{n}.bias": "Kronecker" for n in ("linear1", "linear2")},
        **{f"{prefix}{n}.weight+{prefix}{n}.bias": "Dense" for n in ("norm1", "norm2")},
        "head.weight+head.bias": "Kronecker",
    }
    cross = blocks(PROBLEMS["cross_attention"]())
    a = "attention."
    for letter, start in (("q", 0), ("k", 4), ("v", 8)):
        assert cross[f"{a}{letter}_proj_weight+{a}in_proj_bias[{start}:{start + 4}]"] == "Kronecker"
    assert cross["attention.bias_k"] == cross["attention.bias_v"] == "Diagonal"


def test_shared_and_unknown_uses() -> None:
    assert blocks(PROBLEMS["language_model"]())["tokens.weight"] == "Kronecker"
    twice = blocks(PROBLEMS["module_used_twice"]())
    assert twice["shared.weight+shared.bias"] == "Kronecker" and twice["norm.weight+norm.bias"] == "Dense"
    # A bias that another layer uses without the weight cannot be joined to it.
    shared = blocks(PROBLEMS["used_with_and_without_positions"]())
    assert shared["shared.weight"] == shared["shared.bias"] == shared["other"] == "Kronecker"
    unknown = blocks(PROBLEMS["unknown_uses"]())
    assert unknown["both"] == unknown["log_scale"] == "Diagonal" and unknown["bias"] == "Kronecker"
    hidden = blocks(PROBLEMS["hidden_uses"]())
    assert hidden == {
        "only": "Diagonal",
        "also.weight": "Diagonal",
        "also.bias": "Kronecker",
        "head.weight+head.bias": "Kronecker",
    }


def test_frozen_parts_are_no_part_and_unused_ones_are_zero() -> None:
    problem = PROBLEMS["frozen_parts"]()
    found = blocks(problem)
    assert {"a.bias", "b.weight", "norm.bias", "c.weight+c.bias"} <= set(found)
    assert not any(name.startswith(("a.weight", "b.bias", "norm.weight")) for name in found)
    operator, where = estimate(problem, "kfac"), dense.flat_indices(problem.model)
    for name in ("unused.weight", "unused.bias"):
        assert (operator.to_dense()[where[name].flatten()] == 0).all()


def test_params_restrict_the_operator_to_a_sub_block() -> None:
    problem = PROBLEMS["mlp_ce"]()
    full, part = estimate(problem, "kfac"), estimate(problem, "kfac", params=["2.*"])
    index = torch.cat([dense.flat_indices(problem.model)[name].flatten() for name in ("2.weight", "2.bias")])
    torch.testing.assert_close(part.to_dense(), full.to_dense()[index[:, None], index], rtol=1e-12, atol=0)
    by_tensor = estimate(problem, "kfac", params=[problem.model.get_parameter("0.weight")])
    assert by_tensor.in_shape == (20,)


def test_block_form_is_the_layers_matrix() -> None:
    """``C @ g`` acts on the flat gradient as ``B [dW, db] A`` acts on the matrix."""
    problem = PROBLEMS["mlp_ce"]()
    operator = estimate(problem, "kfac")
    g = torch.randn(operator.in_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    product = Parameters(problem.model).unflatten(operator @ g)
    pieces = Parameters(problem.model).unflatten(g)
    B, A = (f.to_dense() for f in operator.blocks[0].factors)  # type: ignore[attr-defined]
    expected = B @ torch.cat([pieces["0.weight"], pieces["0.bias"][:, None]], 1) @ A
    torch.testing.assert_close(product["0.weight"], expected[:, :-1], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(product["0.bias"], expected[:, -1], rtol=1e-12, atol=1e-14)


@given(st.permutations([0, 1, 2]), st.integers(0, 3), st.integers(1, 2))
def test_reading_a_segment_and_writing_it_back(permutation: list[int], start: int, batch: int) -> None:
    split = (2, 3, 4)
    shape = tuple(split[p] for p in permutation)
    part = BlockPart("p", start, split, tuple(permutation), (shape[0], shape[1] * shape[2]))
    flat = torch.arange(batch * 30.0).reshape(batch, 30)
    read = part.read(flat)
    expected = flat[:, start : start + 24].reshape(batch, *split).permute(0, *(1 + p for p in permutation))
    assert torch.equal(read, expected.reshape(batch, *part.shape))
    out = torch.full_like(flat, -1)
    part.write(read, out)
    assert torch.equal(out[:, start : start + 24], flat[:, start : start + 24])
    assert (out[:, :start] == -1).all() and (out[:, start + 24 :] == -1).all()


def test_block_joins_the_columns_of_its_parts() -> None:
    block = Block("w+b", (BlockPart("w", 0, (2, 3), (0, 1), (2, 3)), BlockPart("b", 0, (2,), (0,), (2, 1))))
    tensors = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([10.0, 20.0])}
    joined = block.read(tensors)
    assert torch.equal(joined, torch.tensor([[0.0, 1, 2, 10], [3, 4, 5, 20]]))
    out: dict[str, Tensor] = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}
    block.write(joined, out)
    assert torch.equal(out["w"], tensors["w"]) and torch.equal(out["b"], tensors["b"])


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_operators_are_what_the_solvers_invert(structure: str) -> None:
    problem = PROBLEMS["cnn"]()
    operator = estimate(problem, structure)
    assert {type(block) for block in operator.blocks} <= {Kronecker, Eigen, Dense, Diagonal}
    torch.testing.assert_close(operator.to_dense(), operator.to_dense().T, rtol=1e-12, atol=1e-14)
    assert torch.linalg.eigvalsh(operator.to_dense()).min() > -1e-12


def test_tied_parameters_appear_once() -> None:
    model = PROBLEMS["language_model"]().model
    assert "tokens.weight" in Parameters(model) and "head.weight" not in Parameters(model)


def test_module_of_one_layer() -> None:
    """The root module itself is the layer."""
    problem = Problem(nn.Linear(2, 2).double(), nn.MSELoss(), [(torch.eye(2).double(), torch.eye(2).double())])
    assert blocks(problem) == {"weight+bias": "Kronecker"}

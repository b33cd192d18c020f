"""EKFAC influence of a language model as Grosse et al. (2023) define it, sequence by sequence, and token by token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvature
from curvature.losses.cross_entropy import CrossEntropyTerms
from tests.curvature.matrices.test_per_sample import assert_close

VOCABULARY, WIDTH = 7, 4  # no length, so that the class axis is clear
LENGTHS = [[5, 3, 4], [6, 2], [3, 5, 5, 6]]
LAYERS = ["q", "k", "v", "up", "down", "head"]


class Transformer(nn.Module):
    """One causal block, with the padding hidden by an attention mask."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(8, WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.up, self.down, self.head = nn.Linear(WIDTH, 5), nn.Linear(5, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        causal = torch.ones(input_ids.shape[1], input_ids.shape[1]).tril().bool()
        weights = self.q(x) @ self.k(x).mT / WIDTH**0.5
        weights = weights.masked_fill(~(causal & attention_mask.bool().unsqueeze(1)), -torch.inf)
        x = x + weights.softmax(-1).nan_to_num() @ self.v(x)
        return self.head(x + self.down(self.up(x).tanh()))


def problem(prompt: int = 0) -> tuple[Transformer, list[tuple[dict[str, Tensor], Tensor]]]:
    """Sequences of different lengths; the first tokens of each may be a prompt, which the loss ignores."""
    torch.manual_seed(0)
    model = Transformer().double()
    batches = []
    for lengths in LENGTHS:
        ids = torch.randint(1, VOCABULARY, (len(lengths), max(lengths) + 1))
        mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
        y = ids[:, 1:].masked_fill(~mask, -100)
        y[:, :prompt] = -100
        batches.append(({"input_ids": ids[:, :-1] * mask, "attention_mask": mask.long()}, y))
    return model, batches


def alone(batches: list[tuple[dict[str, Tensor], Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Every sequence by itself, without padding."""
    for x, y in batches:
        for ids, mask, targets in zip(x["input_ids"], x["attention_mask"], y, strict=True):
            yield ids[mask.bool()], targets[mask.bool()]


Rows = dict[str, tuple[Tensor, Tensor, Tensor]]


def one_sequence(model: Transformer, ids: Tensor, targets: Tensor) -> Rows:
    """Of each layer: inputs with a one ``(t, i)``, output gradients ``(t, o)`` and the gradient ``[W, b]``."""
    inputs, outputs = {}, {}
    hooks = []
    for name in LAYERS:

        def keep(_: nn.Module, given: Any, output: Tensor, name: str = name) -> None:
            output.retain_grad()
            inputs[name], outputs[name] = given[0][0].detach(), output

        hooks.append(model.get_submodule(name).register_forward_hook(keep))
    logits = model(ids.unsqueeze(0), torch.ones_like(ids).unsqueeze(0))[0]
    model.zero_grad()
    F.cross_entropy(logits, targets, reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    found: Rows = {}
    for name in LAYERS:
        layer, gradient = model.get_submodule(name), outputs[name].grad
        assert isinstance(layer, nn.Linear) and gradient is not None
        assert layer.weight.grad is not None and layer.bias.grad is not None
        a = torch.cat([inputs[name], torch.ones(len(ids), 1)], 1)
        whole = torch.cat([layer.weight.grad, layer.bias.grad.unsqueeze(1)], 1)
        found[name] = a, gradient[0].clone(), whole.clone()
    model.zero_grad(set_to_none=True)
    return found


def sampled(drawn: list[Tensor], batches: list[tuple[dict[str, Tensor], Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Sequences with the labels that a draw stands for: softmax minus one at the label, so its only negative entry."""
    for v, (x, y) in zip(drawn, batches, strict=True):
        labels = torch.where(y == -100, -100, v.argmin(-1))
        assert ((v < 0).sum(-1)[y != -100] == 1).all()
        yield from alone([(x, labels)])


def reference(
    model: Transformer, batches: list[tuple[dict[str, Tensor], Tensor]], first: list[Tensor], second: list[Tensor]
) -> dict[str, Tensor]:
    """Each layer's EKFAC in the scale of a sum over the tokens of a sequence, averaged over sequences."""
    A: dict[str, Tensor] = {}
    B: dict[str, Tensor] = {}
    for ids, labels in sampled(first, batches):
        for name, (a, g, _) in one_sequence(model, ids, labels).items():
            A[name] = A.get(name, 0) + a.T @ a  # sums: the eigenvectors do not depend on the scale
            B[name] = B.get(name, 0) + g.T @ g
    total: dict[str, Tensor] = {}
    bases = {name: (torch.linalg.eigh(B[name])[1], torch.linalg.eigh(A[name])[1]) for name in LAYERS}
    count = 0
    for ids, labels in sampled(second, batches):
        count += 1
        for name, (_, _, gradient) in one_sequence(model, ids, labels).items():
            left, right = bases[name]
            total[name] = total.get(name, 0) + (left.T @ gradient @ right).square()
    out = {}
    for name in LAYERS:
        Q = torch.kron(*bases[name])
        out[name] = Q @ torch.diag(total[name].flatten() / count) @ Q.T
    return out


def test_eigenvalues_are_those_of_sequences_and_padding_counts_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = problem()
    drawn: list[Tensor] = []
    sample = CrossEntropyTerms.sample

    def spy(self: CrossEntropyTerms, generator: torch.Generator) -> Tensor:
        drawn.append(sample(self, generator))
        return drawn[-1]

    monkeypatch.setattr(CrossEntropyTerms, "sample", spy)
    params = [f"{name}.*" for name in LAYERS]
    found = curvature.influence(model, nn.CrossEntropyLoss(), batches, batches[:2], params=params, progress=False)
    assert len(drawn) == 2 * len(batches), "one draw for the factors, one for the eigenvalues"
    expected = reference(model, batches, drawn[:3], drawn[3:])
    tokens, sequences = sum(map(sum, LENGTHS)), sum(map(len, LENGTHS))
    assert found.total == tokens

    drawn.clear()
    C = curvature.ggn(model, nn.CrossEntropyLoss(), batches, structure="ekfac", kind="mc", params=params)
    for block, place in zip(C.blocks, C.places, strict=True):  # type: ignore[attr-defined]
        # The loss is a mean over tokens, theirs a sum over the tokens of a sequence.
        assert_close(block.to_dense() * tokens / sequences, expected[place.name.split(".")[0]])

    gradients = [one_sequence(model, ids, y) for ids, y in alone(batches)]
    for name in LAYERS:
        rows = torch.stack([one[name][2].flatten() for one in gradients])
        C = expected[name]
        damped = C + 0.1 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
        scores = rows[:5] @ torch.linalg.solve(damped, rows.T)
        assert_close(found.by_block[f"{name}.weight+{name}.bias"] * sequences / tokens, scores)


def test_a_prompt_counts_where_the_loss_depends_on_it() -> None:
    """Tokens without a target: in the keys and values that later tokens look at, but not in the last layers."""
    model, batches = problem(prompt=2)
    batches = [batch for batch in batches if batch[0]["attention_mask"].sum(1).min() > 2]
    C = curvature.ggn(model, nn.CrossEntropyLoss(), batches, structure="kfac", params=["v.*", "up.*"])
    lengths = [len(ids) for ids, _ in alone(batches)]
    for block, place in zip(C.blocks, C.places, strict=True):  # type: ignore[attr-defined]
        factor = block.factors[1].to_dense()
        name = place.name.split(".")[0]
        rows = [one_sequence(model, ids, y)[name][0] for ids, y in alone(batches)]
        if name == "up":
            rows = [a[2:] for a in rows]
        assert sum(map(len, rows)) == sum(lengths) - (2 * len(lengths) if name == "up" else 0)
        a = torch.cat(rows)
        assert_close(factor, a.T @ a / len(a))


class PerToken(nn.Module):
    """A linear layer with a matrix of its own for every token of every sequence."""

    def __init__(self, layer: nn.Linear, sequences: int, length: int) -> None:
        super().__init__()
        weight = torch.cat([layer.weight, layer.bias.unsqueeze(1)], 1).detach()
        self.weight = nn.Parameter(weight.expand(sequences, length, *weight.shape).clone())

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight @ torch.cat([x, torch.ones_like(x[..., :1])], -1).unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("rank", [None, 2])
def test_scores_by_token_are_derivatives_in_the_matrix_of_that_token(rank: int | None) -> None:
    model, batches = problem()
    loss_fn, params = nn.CrossEntropyLoss(), [f"{name}.*" for name in LAYERS]
    C = curvature.ggn(model, loss_fn, batches, structure="ekfac", params=params)
    given: dict[str, Any] = {"curvature": C, "damping": 0.01, "params": params, "query_rank": rank}
    found = curvature.influence(model, loss_fn, batches, batches[0], by_position=True, **given)
    queries = [one_sequence(model, ids, y) for ids, y in alone(batches[:1])]
    total = torch.zeros(3, 9, 6, dtype=torch.float64)
    for block, place in zip(C.blocks, C.places, strict=True):  # type: ignore[attr-defined]
        name = place.name.split(".")[0]
        dense = block.to_dense()
        damped = dense + 0.01 * torch.eye(len(dense), dtype=dense.dtype)
        rows = torch.stack([torch.linalg.solve(damped, one[name][2].flatten()) for one in queries])
        rows = rows.unflatten(1, queries[0][name][2].shape)
        if rank is not None:
            U, s, Vh = torch.linalg.svd(rows)
            rows = torch.einsum("qor,qr,qri->qoi", U[..., :rank], s[..., :rank], Vh[:, :rank])
        layer, start = model.get_submodule(name), 0
        assert isinstance(layer, nn.Linear)
        expected = torch.zeros(3, 9, 6, dtype=torch.float64)
        for x, y in batches:
            many = PerToken(layer, *y.shape)
            model.set_submodule(name, many)
            logits = model(**x)
            (gradient,) = torch.autograd.grad(
                F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum"), many.weight
            )
            model.set_submodule(name, layer)
            at = slice(start, start + len(y))
            expected[:, at, : y.shape[1]] = torch.einsum("qoi,nsoi->qns", rows, gradient)
            start += len(y)
        assert_close(found.by_position[place.name], expected)
        total += expected
    assert_close(found.by_token, total)
    assert_close(found.scores, total.sum(-1))
    padding = torch.cat([F.pad(x["attention_mask"], (0, 6 - x["attention_mask"].shape[1])) for x, _ in batches]) == 0
    assert not found.by_token[:, padding].any()


def test_what_has_no_tokens_is_said() -> None:
    model, batches = problem()
    found = curvature.influence(model, nn.CrossEntropyLoss(), batches, batches[0], progress=False)
    with pytest.raises(ValueError, match=r"none were kept.*by_position=True"):
        _ = found.by_token
    with pytest.raises(ValueError, match="no query was truncated"):
        _ = found.truncation

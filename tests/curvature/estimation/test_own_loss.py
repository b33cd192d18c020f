"""A batch with labels, for a model that computes its own loss: every function reads them as the model does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import curvature
from curvature.laplace import LinearizedLaplace
from curvature.matrices.problem import loss_and_gradient
from tests.curvature.problems import normal

V, T = 5, 4
PAGE = Path(__file__).resolve().parents[3] / "docs" / "support.md"


class Language(nn.Module):
    """Predicts the next token, and shifts its labels to say how well; may also leave that to the caller."""

    def __init__(self, penalty: float = 0.0, smoothing: float = 0.0) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(V, 3), nn.Linear(3, V)
        self.penalty, self.smoothing = penalty, smoothing

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        hidden = self.table(ids).cumsum(1).tanh()
        logits = self.head(hidden)
        loss = None
        if labels is not None:
            said, meant = logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1)
            loss = F.cross_entropy(said, meant, label_smoothing=self.smoothing) + self.penalty * hidden.square().mean()
        return SimpleNamespace(loss=loss, logits=logits)


def language(**options: float) -> Language:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Language(**options).double()


def batches(collated: bool) -> list[Any]:
    """As a collator makes them, or as pairs with each target at its place, written down by hand."""
    ids = torch.tensor([[0, 3, 1, 2], [4, 4, 0, 3], [1, 2, 3, 4], [2, 0, 0, 1]])
    labels = ids.clone()
    labels[1, 2:] = -100
    if collated:
        return [{"ids": ids[:3], "labels": labels[:3]}, {"ids": ids[3:], "labels": labels[3:]}]
    after = torch.tensor([[3, 1, 2, -100], [4, -100, -100, -100], [2, 3, 4, -100], [0, 0, 1, -100]])
    return [({"ids": ids[:3]}, after[:3]), ({"ids": ids[3:]}, after[3:])]


def report_of(model: nn.Module, loss_fn: Any, data: Any) -> Tensor:
    found = curvature.report(model, loss_fn, data, sections=["eigenvalues", "noise"], k=2)
    assert found.loss is not None and found.noise is not None and not found.refused
    return torch.tensor(
        [found.loss.value, found.eigenvalues["ggn"].largest[0].value, found.noise.covariance_trace.value]
    )


def monitored(model: nn.Module, loss_fn: Any, data: Any) -> Tensor:
    row = curvature.Monitor(model, loss_fn, data, max_fraction=None).measure()
    return torch.tensor([row["loss"], row["sharpness"], row["trace"]])


def laplace(model: nn.Module, loss_fn: Any, data: Any) -> Tensor:
    return LinearizedLaplace(model, loss_fn, data).curvature.to_dense()


DOORS: dict[str, Callable[[nn.Module, Any, Any], Tensor]] = {
    "hessian": lambda *given: curvature.hessian(*given).to_dense(),
    "ggn": lambda *given: curvature.ggn(*given).to_dense(),
    "kfac": lambda *given: curvature.fisher(*given, structure="kfac", kind="exact").to_dense(),
    "sampled": lambda *given: curvature.fisher(*given, structure="layer", kind="mc").to_dense(),
    "empirical": lambda *given: curvature.fisher(*given, structure="diagonal", kind="empirical").to_dense(),
    "covariance": lambda *given: curvature.gradient_covariance(*given, structure="dense").to_dense(),
    "moments": lambda *given: torch.cat([v.flatten() for v in curvature.gradient_second_moment(*given).values()]),
    "examples": lambda model, loss_fn, data: torch.cat(
        [rows.flatten(1) for rows in curvature.per_sample_gradients(model, loss_fn, data[0]).values()], 1
    ),
    "influence": lambda model, loss_fn, data: curvature.influence(model, loss_fn, data, data[1]).scores,
    "self_influence": lambda *given: curvature.self_influence(*given),
    "report": report_of,
    "Monitor": monitored,
    "Laplace": laplace,
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_shifts_the_labels_as_the_model_does(door: str) -> None:
    model, loss_fn = language(), nn.CrossEntropyLoss()
    expected = DOORS[door](model, loss_fn, batches(collated=False))
    torch.testing.assert_close(DOORS[door](model, loss_fn, batches(collated=True)), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_gradient_are_the_models_own(reduction: str) -> None:
    model = language()
    data = batches(collated=True)[0]
    own = model(**data).loss * (7 if reduction == "sum" else 1)  # of the targets that count
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(own, list(model.parameters()))])
    problem = curvature.hessian(model, nn.CrossEntropyLoss(reduction=reduction), data).problem
    value, gradient = loss_and_gradient(problem)
    torch.testing.assert_close(value, own.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-13)


def test_an_untrained_head_does_not_hide_the_shift() -> None:
    """All readings of the labels then have the same loss, log V."""
    model = language()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    got, expected = (DOORS["ggn"](model, nn.CrossEntropyLoss(), batches(c)) for c in (True, False))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)
    got, expected = (DOORS["examples"](model, nn.CrossEntropyLoss(), batches(c)) for c in (True, False))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("door", [door for door in DOORS if door not in ("Laplace",)])
@pytest.mark.parametrize("options", [{"penalty": 0.1}, {"smoothing": 0.1}], ids=str)
def test_another_loss_than_the_models_is_refused(door: str, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"computes its own loss from the labels .* Pass the loss that the model"):
        DOORS[door](language(**options), nn.CrossEntropyLoss(), batches(collated=True))


def test_what_the_model_computes_is_taken_where_it_is_passed() -> None:
    model, loss_fn = language(smoothing=0.1), nn.CrossEntropyLoss(label_smoothing=0.1)
    got, expected = (DOORS["hessian"](model, loss_fn, batches(c)) for c in (True, False))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


def test_a_function_on_one_batch_means_the_models_reading_as_well() -> None:
    def shifted(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.flatten(0, 1), y.flatten())

    model = language()
    got, expected = (curvature.hessian(model, shifted, batches(c)[0]).to_dense() for c in (True, False))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)
    with pytest.raises(ValueError, match="computes its own loss"):
        curvature.hessian(model, lambda z, y: 2 * shifted(z, y), batches(True)[0]).to_dense()


def test_a_model_that_takes_no_labels_leaves_them_to_the_loss() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = language()

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(ids).logits

    model, data = Plain(), batches(collated=True)[0]
    value, _ = loss_and_gradient(curvature.hessian(model, nn.CrossEntropyLoss(), data, class_dim=-1).problem)
    expected = F.cross_entropy(model(data["ids"]).flatten(0, 1), data["labels"].flatten())
    torch.testing.assert_close(value, expected.detach())


def test_a_wrapper_that_passes_everything_on_is_looked_through() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = language()

        def forward(self, **inputs: Tensor) -> Any:
            return self.inner(**inputs)

    got = DOORS["ggn"](Wrapper(), nn.CrossEntropyLoss(), batches(collated=True))
    torch.testing.assert_close(got, DOORS["ggn"](language(), nn.CrossEntropyLoss(), batches(collated=False)))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_wrapper_that_keeps_the_loss_to_itself_is_looked_into(scale: float) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = language()

        def forward(self, **inputs: Tensor) -> Tensor:
            logits = self.inner(**inputs).logits
            return logits if scale == 1 else scale * logits

    wrapper, given = Wrapper(), (nn.CrossEntropyLoss(), batches(collated=True))
    if scale == 1:
        torch.testing.assert_close(DOORS["ggn"](wrapper, *given), DOORS["ggn"](language(), given[0], batches(False)))
    else:
        with pytest.raises(ValueError, match="computes its own loss"):  # which is not that of these outputs
            DOORS["ggn"](wrapper, *given)
    assert not wrapper.inner._forward_hooks


def test_output_may_leave_out_the_last_position() -> None:
    model, loss_fn = language(), nn.CrossEntropyLoss()
    got = curvature.ggn(model, loss_fn, batches(True), output=lambda result: result.logits[:, :-1]).to_dense()
    torch.testing.assert_close(got, DOORS["ggn"](model, loss_fn, batches(False)), rtol=1e-10, atol=1e-13)


FAST = (
    "GPT2LMHeadModel",
    "MixtralForCausalLM, load balance in the loss",
    "GPT-2 with prompt tuning (peft)",
    "T5ForConditionalGeneration",
    "BertForMaskedLM",
    "BertForSequenceClassification, regression",
    "BertForSequenceClassification, several labels",
    "BertForTokenClassification",
    "ViTForImageClassification",
)


def _families(fast: bool) -> Any:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from tests.benchmarks import own_losses

    logging.disable(logging.WARNING)
    return [family for family in own_losses.FAMILIES if (family.name in FAST) == fast], own_losses


def _assert_as_the_page_says(fast: bool) -> None:
    families, own_losses = _families(fast)
    page = PAGE.read_text(encoding="utf-8")
    try:
        for family in families:
            cells = own_losses.row(family)
            assert set(cells[3:]) <= {"exact", "refused"}, cells
            assert own_losses.line(cells) in page, "the table in the documentation is of other code"
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_families_of_transformers() -> None:
    _assert_as_the_page_says(fast=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_more_families_of_transformers() -> None:
    _assert_as_the_page_says(fast=False)


def test_labels_of_encoder_decoders_are_inputs_as_well() -> None:
    """Examples are told apart although what the decoder reads is made of the labels."""

    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.source, self.target, self.head = nn.Embedding(V, 3), nn.Embedding(V, 3), nn.Linear(3, V)

        def forward(self, ids: Tensor, labels: Tensor) -> Any:
            before = F.pad(labels[:, :-1].clamp(min=0), (1, 0))
            logits = self.head((self.target(before) + self.source(ids).mean(1, keepdim=True)).tanh())
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return {"loss": loss, "logits": logits}

    torch.manual_seed(0)
    model = Translator().double()
    batch = {"ids": torch.randint(V, (3, 6)), "labels": torch.tensor([[1, 2], [3, -100], [4, 0]])}
    rows = curvature.per_sample_gradients(model, nn.CrossEntropyLoss(), batch)
    for n, count in enumerate((2, 1, 2)):
        loss = model(batch["ids"][n : n + 1], batch["labels"][n : n + 1])["loss"] * count
        expected = torch.autograd.grad(loss, list(model.parameters()))
        for got, g in zip(rows.values(), expected, strict=True):
            torch.testing.assert_close(got[n], g, rtol=1e-9, atol=1e-12)
    v = normal(sum(p.numel() for p in model.parameters()))
    assert torch.isfinite(curvature.ggn(model, nn.CrossEntropyLoss(), batch, structure="kfac") @ v).all()

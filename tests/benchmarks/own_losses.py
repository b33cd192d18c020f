"""Is a batch with labels read as its model reads it? ``python -m tests.benchmarks.own_losses`` runs models to see.

Models of transformers and peft, small and untrained, on batches as a collator makes them. The reference is the model's
own ``loss``, by plain backward passes, in float64 (also where transformers turns logits to float32). A row is about the
loss, its gradient, a product with its Hessian, and the sum of the gradients of single examples: *exact*, a relative
error of 1e-9 at most; the error; or *refused*, in words.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import curvature
from curvature.matrices.problem import loss_and_gradient
from tests.curvature.problems import KeepFloat64

VOCABULARY, LENGTH, BATCH = 19, 6, 3
EXACT = 1e-9
Made = tuple[nn.Module, Any, dict[str, Tensor]]


@dataclass(frozen=True)
class Family:
    """Models that read labels in one way.

    Attributes:
        name: Of the class.
        labels: How it reads them.
        make: The model, a loss module for it, and a batch.
    """

    name: str
    labels: str
    make: Callable[[], Made]


_TEXT = {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
_BERT = {**_TEXT, "intermediate_size": 12, "max_position_embeddings": 16}
_LLAMA = {**_BERT, "num_key_value_heads": 1}


def tokens(*extra: int) -> Tensor:
    """Random tokens ``(BATCH, LENGTH)``."""
    return torch.randint(2, VOCABULARY, (BATCH, LENGTH, *extra))


def text(labels: Tensor | None = None, **more: Tensor) -> dict[str, Tensor]:
    """A batch of texts, of which one is shorter; labels are the tokens, padding left out, unless given."""
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    labels = ids.masked_fill(mask == 0, -100) if labels is None else labels
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **more}


def _model(kind: str, config: Any, **options: Any) -> nn.Module:
    import transformers

    made = getattr(transformers, kind)(getattr(transformers, config)(**options))
    return made.double().eval()


def _causal(kind: str, config: str, **options: Any) -> Callable[[], Made]:
    return lambda: (_model(kind, config, **options), nn.CrossEntropyLoss(), text())


def _masked(kind: str, config: str, **options: Any) -> Callable[[], Made]:
    def make() -> Made:
        batch = text()
        batch["labels"] = batch["labels"].masked_fill(torch.rand(BATCH, LENGTH) < 0.6, -100)
        return _model(kind, config, **options), nn.CrossEntropyLoss(), batch

    return make


def _seq2seq(kind: str, config: str, **options: Any) -> Callable[[], Made]:
    def make() -> Made:
        labels = torch.randint(2, VOCABULARY, (BATCH, 4))
        labels[0, 2:] = -100
        return _model(kind, config, **options), nn.CrossEntropyLoss(), text(labels)

    return make


def _classes(labels: Tensor | Callable[[], Tensor], loss: Any, kind: str, config: str, **options: Any) -> Any:
    def make() -> Made:
        return _model(kind, config, **options), loss, text(labels() if callable(labels) else labels)

    return make


def _images(kind: str, config: str, **options: Any) -> Callable[[], Made]:
    def make() -> Made:
        model = _model(kind, config, num_labels=4, **options)
        images = torch.randn(BATCH, 3, 8, 8, dtype=torch.float64)
        return model, nn.CrossEntropyLoss(), {"pixel_values": images, "labels": torch.tensor([0, 3, 1])}

    return make


def _choice() -> Made:
    ids = torch.randint(2, VOCABULARY, (BATCH, 2, LENGTH))  # the options of each question
    model = _model("BertForMultipleChoice", "BertConfig", **_BERT)
    return model, nn.CrossEntropyLoss(), {"input_ids": ids, "labels": torch.tensor([1, 0, 1])}


def _speech() -> Made:
    sizes = {**_BART, "num_mel_bins": 4, "max_source_positions": 5, "max_target_positions": 8}
    model = _model("WhisperForConditionalGeneration", "WhisperConfig", **sizes)
    features = torch.randn(BATCH, 4, 10, dtype=torch.float64)
    return model, nn.CrossEntropyLoss(), {"input_features": features, "labels": tokens()[:, :4]}


def _segmentation() -> Made:
    sizes: dict[str, Any] = {"num_encoder_blocks": 1, "depths": [1], "sr_ratios": [1], "hidden_sizes": [8]}
    sizes |= {"patch_sizes": [3], "strides": [2], "num_attention_heads": [1], "decoder_hidden_size": 8, "num_labels": 3}
    model = _model("SegformerForSemanticSegmentation", "SegformerConfig", mlp_ratios=[2], **sizes)
    images = torch.randn(BATCH, 3, 8, 8, dtype=torch.float64)
    return model, nn.CrossEntropyLoss(), {"pixel_values": images, "labels": torch.randint(3, (BATCH, 8, 8))}


def _peft(config: Callable[[], Any]) -> Callable[[], Made]:
    def make() -> Made:
        import peft

        base = _model("GPT2LMHeadModel", "GPT2Config", **_GPT2)
        return peft.get_peft_model(base, config()).double().eval(), nn.CrossEntropyLoss(), text()

    return make


def _lora() -> Any:
    import peft

    return peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)


def _prompt() -> Any:
    import peft

    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)


_GPT2 = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
_GPT2 |= {"bos_token_id": 0, "eos_token_id": 1}
_T5 = {"vocab_size": VOCABULARY, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
_T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0}
_BART: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 8, "max_position_embeddings": 16, "pad_token_id": 0}
_BART |= {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
_BART |= {
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "decoder_start_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# The grouped kernel has no float64.
_MOE = {**_LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "eager"}
_VIT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}

_NEXT = "those of the next position"
_SAME = "as they stand"
FAMILIES: tuple[Family, ...] = (
    Family("GPT2LMHeadModel", _NEXT, _causal("GPT2LMHeadModel", "GPT2Config", **_GPT2)),
    Family("LlamaForCausalLM", _NEXT, _causal("LlamaForCausalLM", "LlamaConfig", **_LLAMA)),
    Family("MistralForCausalLM", _NEXT, _causal("MistralForCausalLM", "MistralConfig", **_LLAMA)),
    Family("Qwen2ForCausalLM", _NEXT, _causal("Qwen2ForCausalLM", "Qwen2Config", **_LLAMA)),
    Family("GemmaForCausalLM", _NEXT, _causal("GemmaForCausalLM", "GemmaConfig", head_dim=4, **_LLAMA)),
    Family("GPTNeoXForCausalLM", _NEXT, _causal("GPTNeoXForCausalLM", "GPTNeoXConfig", **_BERT)),
    Family("OPTForCausalLM", _NEXT, _causal("OPTForCausalLM", "OPTConfig", word_embed_proj_dim=8, ffn_dim=12, **_TEXT)),
    Family(
        "BloomForCausalLM",
        _NEXT,
        _causal("BloomForCausalLM", "BloomConfig", vocab_size=VOCABULARY, hidden_size=8, n_layer=1, n_head=2),
    ),
    Family(
        "MambaForCausalLM",
        _NEXT,
        _causal(
            "MambaForCausalLM", "MambaConfig", vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, state_size=4
        ),
    ),
    Family("MixtralForCausalLM", _NEXT, _causal("MixtralForCausalLM", "MixtralConfig", **_MOE)),
    Family(
        "MixtralForCausalLM, load balance in the loss",
        "another loss",
        _causal("MixtralForCausalLM", "MixtralConfig", output_router_logits=True, router_aux_loss_coef=0.1, **_MOE),
    ),
    Family("GPT-2 with LoRA (peft)", _NEXT, _peft(_lora)),
    Family("GPT-2 with prompt tuning (peft)", f"{_NEXT}, after the prompt", _peft(_prompt)),
    Family("BertForMaskedLM", _SAME, _masked("BertForMaskedLM", "BertConfig", **_BERT)),
    Family("RobertaForMaskedLM", _SAME, _masked("RobertaForMaskedLM", "RobertaConfig", **_BERT)),
    Family(
        "DistilBertForMaskedLM",
        _SAME,
        _masked(
            "DistilBertForMaskedLM",
            "DistilBertConfig",
            vocab_size=VOCABULARY,
            dim=8,
            n_layers=1,
            n_heads=2,
            hidden_dim=12,
            max_position_embeddings=16,
        ),
    ),
    Family("T5ForConditionalGeneration", _SAME, _seq2seq("T5ForConditionalGeneration", "T5Config", **_T5)),
    Family("MT5ForConditionalGeneration", _SAME, _seq2seq("MT5ForConditionalGeneration", "MT5Config", **_T5)),
    Family("BartForConditionalGeneration", _SAME, _seq2seq("BartForConditionalGeneration", "BartConfig", **_BART)),
    Family("MarianMTModel", _SAME, _seq2seq("MarianMTModel", "MarianConfig", decoder_vocab_size=VOCABULARY, **_BART)),
    Family(
        "BertForSequenceClassification",
        _SAME,
        _classes(
            torch.tensor([2, 0, 1]),
            nn.CrossEntropyLoss(),
            "BertForSequenceClassification",
            "BertConfig",
            num_labels=3,
            **_BERT,
        ),
    ),
    Family(
        "GPT2ForSequenceClassification",
        _SAME,
        _classes(
            torch.tensor([2, 0, 1]),
            nn.CrossEntropyLoss(),
            "GPT2ForSequenceClassification",
            "GPT2Config",
            num_labels=3,
            pad_token_id=0,
            **_GPT2,
        ),
    ),
    Family(
        "BertForSequenceClassification, regression",
        "in the shape of the output",
        _classes(
            torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64),
            nn.MSELoss(),
            "BertForSequenceClassification",
            "BertConfig",
            num_labels=1,
            **_BERT,
        ),
    ),
    Family(
        "BertForSequenceClassification, several labels",
        _SAME,
        _classes(
            torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0]], dtype=torch.float64),
            nn.BCEWithLogitsLoss(),
            "BertForSequenceClassification",
            "BertConfig",
            num_labels=3,
            **_BERT,
        ),
    ),
    Family(
        "BertForTokenClassification",
        _SAME,
        _classes(
            lambda: torch.randint(3, (BATCH, LENGTH)),
            nn.CrossEntropyLoss(),
            "BertForTokenClassification",
            "BertConfig",
            num_labels=3,
            **_BERT,
        ),
    ),
    Family(
        "ViTForImageClassification",
        _SAME,
        _images("ViTForImageClassification", "ViTConfig", image_size=8, patch_size=4, **_VIT),
    ),
    Family(
        "ResNetForImageClassification",
        _SAME,
        _images(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=4,
            hidden_sizes=[4, 8],
            depths=[1, 1],
            layer_type="basic",
        ),
    ),
    Family(
        "SwinForImageClassification",
        _SAME,
        _images(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=8,
            patch_size=2,
            embed_dim=8,
            depths=[1],
            num_heads=[2],
            window_size=2,
        ),
    ),
    Family("BertForMultipleChoice", _SAME, _choice),
    Family("WhisperForConditionalGeneration", _SAME, _speech),
    Family("SegformerForSemanticSegmentation", "another loss", _segmentation),
    Family(
        "GPT2LMHeadModel, label smoothing",
        "another loss",
        lambda: (_model("GPT2LMHeadModel", "GPT2Config", **_GPT2), nn.CrossEntropyLoss(label_smoothing=0.1), text()),
    ),
)


def errors(made: Made) -> dict[str, float]:
    """Relative errors of what is computed, against the model's own loss by plain backward passes."""
    model, loss_fn, batch = made
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        loss = model(**batch).loss
        gradient = torch.autograd.grad(loss, list(params.values()), create_graph=True, allow_unused=True)
    flat = torch.cat([_flat(g, p) for g, p in zip(gradient, params.values(), strict=True)])
    v = torch.randn(len(flat), generator=torch.Generator().manual_seed(0), dtype=flat.dtype)
    product = torch.autograd.grad(flat @ v, list(params.values()), allow_unused=True)
    along = torch.cat([_flat(g, p) for g, p in zip(product, params.values(), strict=True)])

    H = curvature.hessian(model, loss_fn, batch)
    value, ours = loss_and_gradient(H.problem)
    rows = curvature.per_sample_gradients(model, loss_fn, batch)
    total = H.problem.visit(lambda _: None, "divisor")
    summed = torch.cat([rows[name].sum(0).reshape(-1) for name in params]) / total
    return {
        "loss": float((value - loss).abs() / loss.abs()),
        "gradient": _distance(ours, flat),
        "Hessian": _distance(H @ v, along),
        "single examples": _distance(summed, flat),
    }


def _flat(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return (torch.zeros_like(parameter) if gradient is None else gradient).reshape(-1)


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def row(family: Family) -> tuple[str, ...]:
    """Name, how labels are read, and for each quantity "exact", its error, or the refusal."""
    torch.manual_seed(0)
    made = family.make()
    try:
        with KeepFloat64():
            found = errors(made).values()
        cells = tuple("exact" if error <= EXACT else f"{error:.0e}" for error in found)
    except ValueError as error:
        assert "computes its own loss" in str(error), error
        cells = ("refused",) * 4
    return family.name, family.labels, *cells


def line(cells: Iterable[str]) -> str:
    """A line of the table."""
    return f"| {' | '.join(cells)} |\n"


def markdown() -> str:
    """The table of ``docs/support.md``."""
    head = ("model", "labels are read", "loss", "gradient", "Hessian", "single examples")
    return "".join(map(line, [head, ("---",) * len(head), *map(row, FAMILIES)]))


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        print(markdown(), end="")


if __name__ == "__main__":
    main()

"""Real architectures, tiny and random, as their users call them: is everything covered, and exact?"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import NotOneLossWarning, fisher
from curvature.estimation.dataset import record
from curvature.model.parameters import Parameters
from tests.curvature import dense_reference as dense
from tests.curvature.problems import KeepFloat64, Problem

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
# peft asks transformers in an old way.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

N, T, V, D = 2, 4, 7, 8


def tokens() -> dict[str, Tensor]:
    """Two texts, the second one shorter; the first token of the first is no target."""
    ids = torch.randint(0, V, (N, T), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(N, T, dtype=torch.long)
    mask[1, 3:] = 0
    labels = ids.flip(1).masked_fill(mask == 0, -100)
    labels[0, 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def classes() -> Tensor:
    return torch.tensor([0, 2])


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.GPT2Config(vocab_size=V, n_positions=T, n_embd=D, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config), tokens()


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    return transformers.LlamaForCausalLM(config), tokens()


def mixtral() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.MixtralConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        num_local_experts=3,
        num_experts_per_tok=2,
        experts_implementation="eager",  # the grouped kernel has no float64
    )
    return transformers.MixtralForCausalLM(config), tokens()


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.BertConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=T,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config), {**tokens(), "labels": classes()}


def vit() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.ViTConfig(
        hidden_size=D,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_channels=2,
        num_labels=3,
    )
    pixels = torch.randn(N, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return transformers.ViTForImageClassification(config), {"pixel_values": pixels, "labels": classes()}


def t5() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.T5Config(
        vocab_size=V,
        d_model=D,
        d_kv=4,
        d_ff=12,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=4,
        relative_attention_max_distance=8,
        decoder_start_token_id=0,
    )
    batch = tokens()
    decoder = {"decoder_input_ids": batch["input_ids"].flip(0)[:, :3], "labels": batch["labels"][:, :3]}
    return transformers.T5ForConditionalGeneration(config), {**batch, **decoder}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "gpt2": gpt2,
    "llama": llama,
    "mixtral": mixtral,
    "bert": bert,
    "vit": vit,
    "t5": t5,
}


def built(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batch = MODELS[name]()
        model.double().eval()
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p)
    assert getattr(model.config, "_attn_implementation") == "sdpa"  # noqa: B009  (the default kernels)
    return model, batch


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with KeepFloat64():
        yield


class Logits(nn.Module):
    """What the loss sees, as a tensor; the parameters keep their order."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.model(**inputs).logits


def reference(model: nn.Module, batch: dict[str, Tensor]) -> Problem:
    """The logits and, beside each of them, its target: of causal models the token that follows."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch["labels"]
    if labels.dim() == 2 and not model.config.is_encoder_decoder:
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    return Problem(Logits(model), nn.CrossEntropyLoss(), [(inputs, labels)])


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_a_rule(name: str) -> None:
    model, batch = built(name)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    parameters = Parameters(model)
    recorder = record(model, parameters, inputs)[1]
    assert recorder.unknown == {}
    assert {ref.name for site in recorder.sites for ref in site.refs} == set(parameters)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("name", MODELS)
def test_diagonal_is_exact(name: str, kind: Any) -> None:
    model, batch = built(name)
    expected = dense.curvature(reference(model, batch), kind).diagonal()
    got = fisher(model, nn.CrossEntropyLoss(), batch, kind=kind, structure="diagonal").diagonal()
    assert expected.norm() > 1e-6
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


def linear_instead_of_conv1d(model: nn.Module) -> None:
    """Replace GPT-2's ``Conv1D`` by the ``nn.Linear`` that computes the same."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, transformers.pytorch_utils.Conv1D):
                d_in, d_out = child.weight.shape
                layer = nn.Linear(d_in, d_out, dtype=torch.float64)
                layer.weight.data, layer.bias.data = child.weight.data.T.contiguous(), child.bias.data
                setattr(parent, name, layer)


@pytest.mark.parametrize("name", MODELS)
def test_kronecker_factors_of_every_linear_layer_are_those_of_the_definition(name: str) -> None:
    model, batch = built(name)
    got = fisher(model, nn.CrossEntropyLoss(), batch, kind="exact", structure="kfac").to_dense()
    where = dense.flat_indices(model)
    linear_instead_of_conv1d(model)
    # Heads read the class token alone, so the last layers' other positions do not count; nor does the padding of a
    # source, which the mask of the attention hides from all that read it.
    factors = dense.kfac(reference(model, batch), "exact", picks=name in ("bert", "vit", "t5"))
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    checked = 0
    for layer, (B, A) in factors.items():
        path = layer.removeprefix("model.")
        module = model.get_submodule(path)
        if id(module.weight) in tied:
            continue
        index = where[f"{path}.weight"]
        if index.shape != module.weight.shape or (name == "gpt2" and path != "lm_head"):
            index = index.T
        index = index.reshape(len(index), -1)
        if module.bias is not None:
            index = torch.cat([index, where[f"{path}.bias"].unsqueeze(1)], 1)
        at = index.flatten()
        torch.testing.assert_close(got[at][:, at], torch.kron(B[0], A[0]), rtol=1e-9, atol=1e-13)
        checked += 1
    assert checked >= 8


@pytest.mark.parametrize("name", MODELS)
def test_eigenvalue_corrected_factors_keep_the_trace(name: str) -> None:
    model, batch = built(name)
    expected = dense.ggn(reference(model, batch)).trace()
    got = fisher(model, nn.CrossEntropyLoss(), batch, kind="exact", structure="ekfac")
    torch.testing.assert_close(got.diagonal().sum(), expected, rtol=1e-10, atol=0)


def warnings_of_dropout(model: nn.Module) -> Any:
    """What is said of a model in train mode, where it has dropout."""
    active = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return pytest.warns(NotOneLossWarning, match="dropout is active") if active else contextlib.nullcontext()


@pytest.mark.parametrize("name", MODELS)
def test_sampling_runs_and_leaves_the_model_alone(name: str) -> None:
    model, batch = built(name)
    model.train()  # dropout and all
    before = {key: value.clone() for key, value in model.state_dict().items()}
    states = torch.random.get_rng_state()
    for structure in ("diagonal", "kfac", "ekfac"):
        with warnings_of_dropout(model):
            got = fisher(model, nn.CrossEntropyLoss(), batch, kind="mc", samples=2, structure=structure)
        assert torch.isfinite(got.diagonal()).all() and (got.diagonal() > 0).any()
    assert torch.equal(torch.random.get_rng_state(), states)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# Adapters ------------------------------------------------------------------------------------------------------------


def adapted(dora: bool) -> tuple[nn.Module, dict[str, Tensor]]:
    model, batch = built("llama")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj", "down_proj"], use_dora=dora)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(model, config).double().eval()
        for p in Parameters(model).values():  # B starts at zero
            p.data += 0.1 * torch.randn_like(p)
    return model, batch


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_are_exact(dora: bool) -> None:
    model, batch = adapted(dora)
    for kind in ("exact", "empirical"):
        expected = dense.curvature(reference(model, batch), kind).diagonal()
        got = fisher(model, nn.CrossEntropyLoss(), batch, kind=kind, structure="diagonal")
        torch.testing.assert_close(got.diagonal(), expected, rtol=1e-10, atol=1e-13)
    expected = dense.ggn(reference(model, batch)).trace()
    got = fisher(model, nn.CrossEntropyLoss(), batch, kind="exact", structure="ekfac")
    torch.testing.assert_close(got.diagonal().sum(), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_have_rules(dora: bool) -> None:
    model, batch = adapted(dora)
    parameters = Parameters(model)
    recorder = record(model, parameters, {key: value for key, value in batch.items() if key != "labels"})[1]
    assert all("lora_" in name for name in parameters)
    # DoRA divides its magnitude by a norm: a quotient has no rule.
    assert set(recorder.unknown) == {name for name in parameters if "magnitude" in name}

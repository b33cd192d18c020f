"""Hugging Face's ``Trainer`` as it is, beside the same steps in a loop by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import precond

transformers: Any = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.precond.integrations.trainer_processes import LENGTH, VOCABULARY, Seen, rows  # noqa: E402

ACCUMULATION = 2
METHODS: dict[str, Callable[[nn.Module], precond.PreconditionedOptimizer]] = {
    "KFAC": lambda model: precond.KFAC(model, nn.CrossEntropyLoss(), lr=0.1, kl_clip=None),
    "KFAC, exact": lambda model: precond.KFAC(model, nn.CrossEntropyLoss(), lr=0.1, fisher="exact"),
    "EKFAC": lambda model: precond.EKFAC(model, nn.CrossEntropyLoss(), lr=0.1, fisher="empirical"),
}


def model_of(seed: int = 0) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def trainer(method: str, folder: Path, bf16: bool, steps: int = 4, **options: Any) -> tuple[Any, nn.Module]:
    model = model_of()
    optimizer = METHODS[method](model)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        bf16=bf16,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=steps,
        max_grad_norm=0.0,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        dataloader_pin_memory=False,
        **options,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    made = Seen(model=model, args=arguments, train_dataset=rows(12), optimizers=(optimizer, scheduler))
    made.batches = []
    return made, model


def state_of(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["KFAC", "EKFAC"])
def test_the_same_steps_by_hand(method: str, bf16: bool, tmp_path: Path) -> None:
    run, model = trainer(method, tmp_path, bf16)
    run.train()
    assert len(run.batches) == 4 * ACCUMULATION
    other = model_of()
    optimizer = METHODS[method](other)
    other.train()
    autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
    for step in range(4):
        optimizer.zero_grad()
        for inputs, counted in run.batches[ACCUMULATION * step : ACCUMULATION * (step + 1)]:
            with autocast:
                loss = other(**inputs, num_items_in_batch=counted).loss
            loss.backward()
        optimizer.step()
    assert (state_of(other) - state_of(model_of())).norm() > 1e-3
    torch.testing.assert_close(state_of(model), state_of(other), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["KFAC, exact", "EKFAC"])
def test_accumulation_is_one_batch(method: str, tmp_path: Path) -> None:
    """The micro-batches of a step, each with its own number of labels, are as one batch of all of them."""
    run, model = trainer(method, tmp_path, False, steps=1)
    run.train()
    other = model_of()
    optimizer = METHODS[method](other)
    other.train()
    whole = {name: torch.cat([inputs[name] for inputs, _ in run.batches]) for name in run.batches[0][0]}
    z = other(input_ids=whole["input_ids"]).logits
    optimizer.loss_fn(z[:, :-1].flatten(0, 1), whole["labels"][:, 1:].flatten()).backward()
    optimizer.step()
    moved = state_of(other) - state_of(model_of())
    assert moved.norm() > 1e-3
    torch.testing.assert_close(state_of(model), state_of(other), rtol=0, atol=1e-4 * float(moved.norm()))


@pytest.mark.parametrize("method", ["KFAC", "EKFAC"])
def test_a_resumed_run_ends_where_the_other_one_does(method: str, tmp_path: Path) -> None:
    run, model = trainer(method, tmp_path, True, save_steps=2)
    run.args.save_strategy = transformers.trainer_utils.SaveStrategy.STEPS
    run.train()
    again, resumed = trainer(method, tmp_path, True)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(again.batches) == 2 * ACCUMULATION
    torch.testing.assert_close(state_of(resumed), state_of(model), rtol=0, atol=0)

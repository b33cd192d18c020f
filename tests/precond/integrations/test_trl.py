"""TRL's trainers are Hugging Face's: supervised fine-tuning and preferences, with the loss computed by the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from precond import KFAC, PSGD, SOAP, AdaHessian, LevenbergMarquardt, Muon, param_groups
from precond.integrations import inner_optimizer
from tests.precond.integrations.test_hugging_face import IDS, LOSS, flat, model

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore")


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, **{f"w{i}": i for i in range(1, 11)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<pad>", unk_token="<pad>")


def settings(cls: Any, folder: Path, **options: Any) -> Any:
    return cls(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=0.05,
        report_to=[],
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
        max_grad_norm=0.0,
        **options,
    )


def recorded(base: Any) -> Any:
    class Recorded(base):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            self.__dict__.setdefault("seen", []).append(({k: v for k, v in inputs.items()}, num_items_in_batch))
            return super().training_step(model, inputs, num_items_in_batch)

    return Recorded


METHODS: dict[str, Any] = {
    "KFAC": lambda m: KFAC(m, LOSS, lr=0.05),
    "SOAP": lambda m: SOAP(m.parameters(), lr=0.05),
    "PSGD": lambda m: PSGD(m.parameters(), lr=0.05),
    "Muon": lambda m: Muon(param_groups(m, Muon), lr=0.05),
}


def next_tokens(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """The loss of a language model on its logits, as ``compute_loss_func``."""
    return LOSS(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def fine_tuning(m: Any, folder: Path, optimizer: Any, **options: Any) -> Any:
    rows = datasets.Dataset.from_dict({"input_ids": IDS.tolist()})
    return recorded(trl.SFTTrainer)(
        model=m,
        args=settings(trl.SFTConfig, folder, max_length=6),
        train_dataset=rows,
        processing_class=tokenizer(),
        optimizers=(optimizer, None),
        **options,
    )


@pytest.mark.parametrize("name", METHODS)
def test_supervised_fine_tuning_equals_the_plain_loop(name: str, tmp_path: Path) -> None:
    ours, theirs = model(), model()
    options = {"compute_loss_func": next_tokens} if name == "KFAC" else {}
    run = fine_tuning(ours, tmp_path, METHODS[name](ours), **options)
    run.train()
    optimizer = METHODS[name](theirs)
    loss_of = fine_tuning(theirs, tmp_path, optimizer, **options).compute_loss  # the plain loop has the same loss
    theirs.train()
    for inputs, count in run.seen:
        optimizer.zero_grad()
        loss_of(theirs, inputs, num_items_in_batch=count).backward()
        optimizer.step()
    assert torch.equal(flat(ours), flat(theirs))
    assert not torch.allclose(flat(ours), flat(model()), atol=1e-3)
    assert inner_optimizer(run.optimizer).metrics()["steps"] == 4


def test_refusals(tmp_path: Path) -> None:
    ours = model()
    with pytest.raises(RuntimeError, match=r"KFAC\.step\(\): no forward pass was captured"):
        fine_tuning(ours, tmp_path, METHODS["KFAC"](ours)).train()
    ours = model()
    with pytest.raises(TypeError, match=r"AdaHessian needs second derivatives: call step\(closure\)"):
        fine_tuning(ours, tmp_path, AdaHessian(ours.parameters())).train()
    ours = model()
    rule = KFAC(ours, LOSS, lr=0.05, damping_rule=LevenbergMarquardt(period=1))
    with pytest.raises(RuntimeError, match=r"the batch of this step cannot be run again"):
        fine_tuning(ours, tmp_path, rule, compute_loss_func=next_tokens).train()


@pytest.mark.parametrize("name", ["SOAP", "Muon"])
def test_preferences(name: str, tmp_path: Path) -> None:
    ours = model()
    rows = datasets.Dataset.from_dict({"prompt": ["w1 w2"] * 8, "chosen": [" w3 w4"] * 8, "rejected": [" w5 w6"] * 8})
    run = trl.DPOTrainer(
        model=ours,
        ref_model=model(),
        args=settings(trl.DPOConfig, tmp_path),
        train_dataset=rows,
        processing_class=tokenizer(),
        optimizers=(METHODS[name](ours), None),
    )
    run.train()
    assert inner_optimizer(run.optimizer).metrics()["steps"] == 4
    assert isinstance(ours, nn.Module) and not torch.equal(flat(ours), flat(model()))

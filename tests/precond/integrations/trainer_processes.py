"""Hugging Face's ``Trainer`` in several processes, as ``torchrun -m`` starts it: see ``test_trainer_processes.py``."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import precond

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of the imports of other libraries
import transformers

STEPS, KILLED, LENGTH, VOCABULARY = 6, 4, 5, 7
METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "KFAC": lambda model: precond.KFAC(model, nn.CrossEntropyLoss(), lr=0.1, inverse_update_period=2),
    "SOAP": lambda model: precond.SOAP(model.parameters(), lr=0.03, inverse_update_period=2),
}


def model_of() -> nn.Module:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **sizes)  # type: ignore[arg-type]
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def rows(count: int = 24) -> list[dict[str, Tensor]]:
    """Sequences with different numbers of labels, so that processes and micro-batches weigh differently."""
    g, found = torch.Generator().manual_seed(1), []
    for n in range(count):
        ids = torch.randint(1, VOCABULARY, (LENGTH,), generator=g)
        labels = ids.clone()
        labels[2 + n % 4 :] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


class Seen(transformers.Trainer):  # type: ignore[misc]
    """Notes the batches that this process is given, and how many labels count in all of them."""

    batches: list[tuple[dict[str, Tensor], Any]]

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self.batches.append(({k: v.clone() for k, v in inputs.items()}, num_items_in_batch))
        found: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return found


class Kill(transformers.TrainerCallback):  # type: ignore[misc]
    """Ends the process, as a scheduler of jobs does: nothing is written and nobody is told."""

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == KILLED:
            dist.barrier()  # the checkpoint before is whole
            os.kill(os.getpid(), signal.SIGKILL)


def flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def trained(method: str, folder: Path, resume: bool, kill: bool) -> tuple[Tensor, Seen]:
    model = model_of()
    optimizer = METHODS[method](model)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "out"),
        use_cpu=True,
        per_device_train_batch_size=2,
        max_steps=STEPS,
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        ddp_backend="gloo",
    )
    trainer = Seen(model, arguments, train_dataset=rows(), optimizers=(optimizer, None), callbacks=[Kill()] * kill)
    trainer.batches = []
    trainer.train(resume_from_checkpoint=resume)
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    return flat(model), trainer


def by_hand(method: str, run: Seen) -> Tensor:
    """The plain loop of ``DistributedDataParallel`` on the batches that the trainer drew, with its schedule."""
    model = model_of()
    optimizer = METHODS[method](model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, (STEPS - step) / STEPS))
    parallel = DistributedDataParallel(model)
    model.train()
    for inputs, counted in run.batches:
        optimizer.zero_grad()
        loss = parallel(**inputs, num_items_in_batch=counted).loss
        (loss * dist.get_world_size()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return flat(model)


def main(method: str, what: str, folder: Path) -> None:
    found, run = trained(method, folder, what == "resumed", what == "killed")
    everyone = [torch.empty_like(found) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, found)
    if what == "whole":
        expected = by_hand(method, run)
        numbers = {"plain": float((found - expected).abs().max()), "moved": float((found - flat(model_of())).norm())}
        torch.save(found, folder / "whole.pt")
    else:
        numbers = {"whole": float((found - torch.load(folder / "whole.pt")).abs().max())}
    numbers |= {"ranks": max(float((x - found).abs().max()) for x in everyone), "batches": len(run.batches)}
    if dist.get_rank() == 0:
        torch.save(numbers, folder / f"{what}.numbers")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))

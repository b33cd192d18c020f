"""Adapters of PEFT: LoRA and DoRA under the Trainer and in a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from precond import EKFAC, KFAC, SOAP, Muon, param_groups
from precond.integrations import inner_optimizer, with_model
from tests.precond.integrations.test_hugging_face import LOSS, Recorded, flat, model, replayed, trainer

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def adapted(dora: bool) -> Any:
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["c_attn", "c_fc"], use_dora=dora, fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    base = model()
    torch.manual_seed(1)
    return peft.get_peft_model(base, config)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("cls", [KFAC, EKFAC, SOAP, Muon])
def test_adapters_under_the_trainer(cls: Any, dora: bool, tmp_path: Path) -> None:
    ours, theirs = adapted(dora), adapted(dora)
    before = flat(ours)
    run: Recorded = trainer(tmp_path, ours, made=(with_model(cls, ours, LOSS), {"lr": 0.05}), weight_decay=0.0)
    run.train()
    trained = [p for p in theirs.parameters() if p.requires_grad]
    expected = replayed(run.seen, theirs, with_model(cls, theirs, LOSS)(trained, lr=0.05))
    # The Trainer sorts parameters by weight decay; draws and sums follow the order of the model either way.
    assert torch.allclose(flat(ours), expected, rtol=1e-5, atol=1e-6)
    frozen = torch.cat([torch.full((p.numel(),), not p.requires_grad) for p in ours.parameters()])
    assert torch.equal(flat(ours)[frozen], before[frozen])
    moved = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert all(key in " ".join(moved) for key in ("lora_A", "lora_B", *(["magnitude"] if dora else [])))
    for (name, p), old in zip(ours.named_parameters(), adapted(dora).parameters(), strict=True):
        assert not p.requires_grad or not torch.equal(p, old), name
    if cls is KFAC:
        table = inner_optimizer(run.optimizer).coverage()  # type: ignore[attr-defined]
        assert {row.structure for row in table if "lora_" in row.parameter and "magnitude" not in row.parameter} <= {
            "kronecker",
            "diagonal",
        }


def test_groups_of_adapters() -> None:
    groups = {
        g["name"]: {name.rpartition(".default")[0].rpartition(".")[2] for name, _ in g["params"]}
        for g in param_groups(adapted(True))
    }
    assert groups["matrix"] == {"lora_A", "lora_B"}
    assert isinstance(adapted(True), nn.Module) and set(groups) == {"matrix", "vector"}

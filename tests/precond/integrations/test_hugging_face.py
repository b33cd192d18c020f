"""Under Hugging Face's Trainer: is every run the plain loop's, bit for bit, also when it is killed and resumed?"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precond import (
    EKFAC,
    KFAC,
    PSGD,
    SOAP,
    AdaHessian,
    CurveBall,
    GaussNewton,
    HessianFree,
    LevenbergMarquardt,
    Muon,
    Newton,
    QuadraticModel,
    Sophia,
    methods,
    param_groups,
)
from precond.integrations import inner_optimizer, with_model

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

LOSS = nn.CrossEntropyLoss(ignore_index=-100)
IDS = torch.arange(24 * 6).reshape(24, 6) * 7 % 10 + 1
LABELS = torch.where(IDS % 5 == 0, -100, IDS)


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return len(IDS)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": IDS[i], "attention_mask": torch.ones(6, dtype=torch.long), "labels": LABELS[i]}


def model() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
    drop = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "loss_type": "ForCausalLM"}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **drop, **ids))


def flat(m: nn.Module) -> Tensor:
    return torch.cat([p.detach().float().flatten() for p in m.parameters()])


class Recorded(transformers.Trainer):
    """Keeps what each backward pass was of."""

    seen: list[tuple[dict[str, Tensor], Any]]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self.seen.append(({k: v.clone() for k, v in inputs.items()}, copy.copy(num_items_in_batch)))
        return super().training_step(model, inputs, num_items_in_batch)


def trainer(folder: Path, m: nn.Module, optimizer: Any = None, made: Any = None, **options: Any) -> Recorded:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "max_grad_norm": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    given = {"optimizers": (optimizer, None)} if made is None else {"optimizer_cls_and_kwargs": made}
    out = Recorded(model=m, args=transformers.TrainingArguments(**settings), train_dataset=Rows(), **given)
    out.seen = []
    return out


def replayed(seen: Any, m: nn.Module, optimizer: Any, parts: int = 1, clip: float = 0.0, bf16: bool = False) -> Tensor:
    """A plain loop over the same batches."""
    m.train()
    for start in range(0, len(seen), parts):
        optimizer.zero_grad()
        for inputs, count in seen[start : start + parts]:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = m(**inputs, num_items_in_batch=count).loss
            loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(m.parameters(), clip)
        optimizer.step()
    return flat(m)


Make = Callable[[Any, Any], torch.optim.Optimizer]
#: Method -> the optimizer of a model with parameter groups, or with all its parameters.
METHODS: dict[str, Make] = {
    "KFAC": lambda m, groups: KFAC(m, LOSS, lr=0.05, params=groups),
    "EKFAC": lambda m, groups: EKFAC(m, LOSS, lr=0.05, params=groups, inverse_update_period=2),
    "SOAP": lambda m, groups: SOAP(groups or m.parameters(), lr=0.05),
    "PSGD": lambda m, groups: PSGD(groups or m.parameters(), lr=0.05),
    "Muon": lambda m, groups: Muon(groups or m.parameters(), lr=0.05),
}


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped and accumulated": {"max_grad_norm": 0.1, "gradient_accumulation_steps": 2, "max_steps": 2},
    "bf16": {"bf16": True, "max_steps": 2},
}


@pytest.mark.parametrize(
    ("name", "how"),
    [*((name, "plain") for name in METHODS), *((n, h) for n in ("KFAC", "SOAP") for h in OPTIONS if h != "plain")],
)
def test_optimizers(name: str, how: str, tmp_path: Path) -> None:
    ours, theirs, options = model(), model(), OPTIONS[how]
    run = trainer(tmp_path, ours, METHODS[name](ours, None), **options)
    run.train()
    parts, clip = options.get("gradient_accumulation_steps", 1), options.get("max_grad_norm", 0.0)
    expected = replayed(run.seen, theirs, METHODS[name](theirs, None), parts, clip, "bf16" in options)
    assert torch.equal(flat(ours), expected)
    assert not torch.allclose(flat(ours), flat(model()), atol=1e-4)
    assert inner_optimizer(run.optimizer).metrics()["steps"] == options.get("max_steps", 4)


@pytest.mark.parametrize("name", ["KFAC", "SOAP"])
def test_optimizer_cls_and_kwargs_keep_the_trainers_weight_decay(name: str, tmp_path: Path) -> None:
    cls: Any = {"KFAC": KFAC, "SOAP": SOAP}[name]
    ours, theirs = model(), model()
    run = trainer(tmp_path, ours, made=(with_model(cls, ours, LOSS), {"lr": 0.05}))
    run.train()
    optimizer: Any = inner_optimizer(run.optimizer)
    assert type(optimizer) is cls
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    decayed = set(run.get_decay_parameter_names(theirs))
    groups = [
        {"params": [p for n, p in theirs.named_parameters() if (n in decayed) == (decay > 0)], "weight_decay": decay}
        for decay in (0.1, 0.0)
    ]
    assert torch.equal(flat(ours), replayed(run.seen, theirs, METHODS[name](theirs, groups)))
    assert pickle.loads(pickle.dumps(optimizer)).param_groups[0]["weight_decay"] == 0.1


def test_param_groups_in_place_of_the_trainers(tmp_path: Path) -> None:
    ours, theirs = model(), model()
    made = [Muon(param_groups(m, Muon, weight_decay=0.1), lr=0.01) for m in (ours, theirs)]
    run = trainer(tmp_path, ours, made[0])
    run.train()
    assert torch.equal(flat(ours), replayed(run.seen, theirs, made[1]))


@pytest.mark.parametrize("name", ["EKFAC", "SOAP"])
def test_a_run_that_is_killed_goes_on(name: str, tmp_path: Path) -> None:
    whole = model()
    trainer(tmp_path / "whole", whole, METHODS[name](whole, None)).train()
    killed = model()
    options = {"save_strategy": "steps", "save_steps": 2}

    class Kill(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    run = trainer(tmp_path / "run", killed, METHODS[name](killed, None), **options)
    run.add_callback(Kill())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    resumed = model()
    again = trainer(tmp_path / "run", resumed, METHODS[name](resumed, None), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(flat(resumed), flat(whole))


CLOSURES: dict[str, Any] = {
    "AdaHessian": lambda m: AdaHessian(m.parameters()),
    "Sophia": lambda m: Sophia(m.parameters()),
    "Newton": lambda m: Newton(m.parameters()),
    "GaussNewton": lambda m: GaussNewton(m.parameters()),
    "HessianFree": lambda m: HessianFree(m, LOSS),
    "CurveBall": lambda m: CurveBall(m, LOSS),
    "PSGD": lambda m: PSGD(m.parameters(), criterion="hessian"),
}


@pytest.mark.parametrize("name", CLOSURES)
def test_methods_that_need_a_closure_are_refused(name: str, tmp_path: Path) -> None:
    m = model()
    with pytest.raises(TypeError, match=rf"{name} needs second derivatives: call step\(closure\)"):
        trainer(tmp_path, m, CLOSURES[name](m)).train()


@pytest.mark.parametrize("extra", [{"damping_rule": LevenbergMarquardt(period=1)}, {"step_size": QuadraticModel()}])
def test_methods_that_run_the_batch_again_are_refused(extra: dict[str, Any], tmp_path: Path) -> None:
    m = model()
    with pytest.raises(RuntimeError, match=r"the batch of this step cannot be run again"):
        trainer(tmp_path, m, KFAC(m, LOSS, lr=0.05, **extra)).train()


def test_with_model_says_what_it_takes() -> None:
    m = nn.Linear(3, 2)
    with pytest.raises(TypeError, match="takes an optimizer class of precond such as KFAC, not 'KFAC'"):
        with_model("KFAC", m, LOSS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes the model that is trained, not generator"):
        with_model(KFAC, m.parameters(), LOSS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="there is no optimizer of precond in this SGD"):
        inner_optimizer(torch.optim.SGD(m.parameters()))
    assert with_model(SOAP, m, LOSS) is SOAP
    free = with_model(HessianFree, m, nn.MSELoss())(m.parameters(), lr=0.5)
    assert type(free) is HessianFree and free.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("name", [m.name for m in methods() if m.name != "GaussNewton"])
def test_an_empty_group_as_trainers_make_them_changes_nothing(name: str) -> None:
    cls = next(m.cls for m in methods() if m.name == name)
    loss, found = nn.MSELoss(), []
    x = torch.linspace(-1, 1, 12).reshape(4, 3)
    for empty in (True, False):
        torch.manual_seed(0)
        m = nn.Linear(3, 2)
        groups = [{"params": [], "weight_decay": 0.1}] * empty + [{"params": list(m.parameters()), "weight_decay": 0.0}]
        options = {"damping": 10.0} if name == "Newton" else {}
        optimizer = with_model(cls, m, loss)(groups, lr=0.01, **options)
        for _ in range(2):
            optimizer.zero_grad()
            if cls.needs == "closure":
                optimizer.step(lambda m=m: loss(m(x), x[:, :2]))
            else:
                loss(m(x), x[:, :2]).backward()
                optimizer.step()
        found.append(flat(m))
        optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(*found)

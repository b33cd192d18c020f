"""Does ``torch.distributed.checkpoint`` restore every method, or refuse? It fills the template of a fresh optimizer."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from precond import KFAC, SOAP, Momentum, TrustRegion
from tests.precond.test_protocol import METHODS, Training, same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # a single process: as is meant here

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Application:
    """What torch's tutorial makes of a model and its optimizer."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])


def through_parts(options: StateDictOptions | None, old: Training, new: Training, folder: Path) -> None:
    old.optimizer.zero_grad()
    parts = dict(zip(("m", "o"), get_state_dict(old.model, old.optimizer, options=options), strict=True))
    dcp.save(parts, checkpoint_id=folder)
    parts = dict(zip(("m", "o"), get_state_dict(new.model, new.optimizer, options=options), strict=True))
    dcp.load(parts, checkpoint_id=folder)
    set_state_dict(new.model, new.optimizer, model_state_dict=parts["m"], optim_state_dict=parts["o"], options=options)


def nested(old: Training, new: Training, folder: Path) -> None:
    through_parts(None, old, new, folder)


def flat(old: Training, new: Training, folder: Path) -> None:
    through_parts(FLAT, old, new, folder)


def application(old: Training, new: Training, folder: Path) -> None:
    old.optimizer.zero_grad()
    dcp.save({"app": Application(old.model, old.optimizer)}, checkpoint_id=folder)
    dcp.load({"app": Application(new.model, new.optimizer)}, checkpoint_id=folder)


def itself(old: Training, new: Training, folder: Path) -> None:
    dcp.save({"m": old.model, "o": old.optimizer}, checkpoint_id=folder)
    dcp.load({"m": new.model, "o": new.optimizer}, checkpoint_id=folder)


Way = Callable[[Training, Training, Path], None]


def resumes(name: str, way: Way, folder: Path, **options: Any) -> None:
    whole, first, second = (Training(name, **options) for _ in range(3))
    for step in range(8):
        whole.step(step)
    for step in range(5):
        first.step(step)
    way(first, second, folder)
    assert second.optimizer.steps == 5
    for step in range(5, 8):
        second.step(step)
        first.step(step)  # the one that was saved goes on as well
    assert same(whole.values(), second.values()) and same(whole.values(), first.values())


WAYS = [(name, way) for name in METHODS for way in (nested, flat)]


@pytest.mark.parametrize(
    ("name", "way"),
    [*WAYS, *((name, way) for name in ("SOAP", "KFAC", "Newton", "MFAC") for way in (application, itself))],
)
def test_a_fresh_optimizer_continues_bit_for_bit(name: str, way: Way, tmp_path: Path) -> None:
    resumes(name, way, tmp_path)


@pytest.mark.parametrize("way", [nested, flat, itself])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("KFAC", {"momentum": 0.0}),  # no state of torch's kind at all
        ("KFAC", {"momentum": Momentum(0.5, nesterov=True), "kl_clip": TrustRegion(1e-4)}),
        ("EKFAC", {"momentum": lambda step: 0.0 if step < 2 else 0.9}),
        ("SOAP", {"momentum": 0.9, "kl_clip": 1e-3}),
    ],
    ids=["no momentum", "bound", "scheduled momentum", "momentum beside a basis"],
)
def test_so_do_its_options(name: str, options: dict[str, Any], way: Way, tmp_path: Path) -> None:
    resumes(name, way, tmp_path, **options)


@pytest.mark.parametrize("name", ["SOAP", "KFAC", "Newton", "MFAC"])
def test_a_used_optimizer_takes_the_saved_state(name: str, tmp_path: Path) -> None:
    whole, first, second = (Training(name) for _ in range(3))
    for step in range(8):
        whole.step(step)
    for step in range(5):
        first.step(step)
    for step in range(20, 23):
        second.step(step)
    second.optimizer.zero_grad()
    flat(first, second, tmp_path)
    for step in range(5, 8):
        second.step(step)
    assert same(whole.values(), second.values())


@pytest.mark.parametrize("way", [nested, flat, itself])
@pytest.mark.parametrize("method", [SOAP, KFAC])
def test_parameters_that_were_not_used_yet_are_no_obstacle(method: Any, way: Way, tmp_path: Path) -> None:
    """Where one head of two was trained, the template of a fresh optimizer names more than was saved."""

    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)
            with torch.no_grad():
                for i, p in enumerate(self.parameters()):
                    p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape) * (i + 1))

        def forward(self, x: torch.Tensor, which: str) -> torch.Tensor:
            return getattr(self, which)(self.body(x).tanh())

    x, y, loss_fn = torch.linspace(-1, 1, 12).reshape(4, 3), torch.linspace(0, 1, 8).reshape(4, 2), nn.MSELoss()

    class Run:
        def __init__(self) -> None:
            self.model = TwoHeads()
            layers = {"lr": 0.05, "curvature_update_period": 1}  # a head that comes late has statistics at once
            made = method(self.model, loss_fn, **layers) if method is KFAC else method(self.model.parameters())
            self.optimizer = made

        def train(self, which: str) -> None:
            for _ in range(3):
                self.optimizer.zero_grad()
                loss_fn(self.model(x, which), y).backward()
                self.optimizer.step()

    whole, first, second = Run(), Run(), Run()
    for run in (whole, first):
        run.train("one")
    way(first, second, tmp_path)  # type: ignore[arg-type]
    for run in (whole, second):
        run.train("one")
        run.train("two")
    assert same(list(whole.model.parameters()), list(second.model.parameters()))


@pytest.mark.parametrize("name", ["SOAP", "KFAC", "Sophia", "HessianFree", "MFAC"])
def test_what_a_loader_has_dropped_is_missed(name: str, tmp_path: Path) -> None:
    """``state_dict()`` of a fresh optimizer as the template: it names no entries, so none are read."""
    first, second = Training(name), Training(name)
    for step in range(3):
        first.step(step)
    dcp.save({"o": first.optimizer.state_dict()}, checkpoint_id=tmp_path)
    template = {"o": second.optimizer.state_dict()}
    dcp.load(template, checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match=r"holds 0 of its \d+ entries.*get_optimizer_state_dict"):
        second.optimizer.load_state_dict(template["o"])
    assert second.optimizer.steps == 0
    second.step(0)  # and it trains on, as if nothing had been tried


@pytest.mark.parametrize("flatten", [False, True])
def test_the_state_is_read_by_torch_load_with_weights_only(flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    whole, second = Training("KFAC"), Training("KFAC")
    for step in range(3):
        whole.step(step)
    whole.optimizer.zero_grad()
    buffer = io.BytesIO()
    torch.save(get_optimizer_state_dict(whole.model, whole.optimizer, options=options), buffer)
    buffer.seek(0)
    second.model.load_state_dict(whole.model.state_dict())
    set_optimizer_state_dict(second.model, second.optimizer, torch.load(buffer, weights_only=True), options=options)
    for training in (whole, second):
        training.step(3)
    assert same(whole.values(), second.values())


def test_asking_changes_nothing_of_the_plain_state() -> None:
    training = Training("KFAC")
    for step in range(3):
        training.step(step)
    training.optimizer.zero_grad()
    before = training.optimizer.state_dict()
    get_optimizer_state_dict(training.model, training.optimizer)
    after = training.optimizer.state_dict()
    assert before["state"].keys() == after["state"].keys() and before["param_groups"] == after["param_groups"]
    assert all(before["state"][key].keys() == after["state"][key].keys() for key in before["state"])

"""Does every method pass the checks that PyTorch runs on its own optimizers?

The questions are those of PyTorch's ``test_optim.py``; its lists of wrong inputs are used as they are.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from precond import WeightDecay, methods
from tests.precond.test_protocol import OPTIONS

pytest.importorskip("expecttest")
from torch.testing._internal.common_optimizers import (
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

METHODS = {method.name: method for method in methods()}
NAMES = list(METHODS)
WITHOUT_CLOSURE = [name for name, method in METHODS.items() if method.needs != "closure"]
#: That watch the loss, and so are given it.
WITH_MODEL_AND_LOSS = ("HessianFree", "CurveBall")
#: That only minimise, or whose model of the loss is convex.
NO_MAXIMIZE = ("KBFGS", "GaussNewton", "HessianFree", "CurveBall")


def inputs(name: str) -> list[OptimizerInput]:
    """Keyword arguments as in PyTorch's list for AdamW."""
    rate = OPTIONS.get(name, {}).get("lr", 0.01)
    found = [
        OptimizerInput(None, {}, "default"),
        OptimizerInput(None, {"lr": rate}, "non-default lr"),
        OptimizerInput(None, {"lr": torch.tensor(rate)}, "tensor lr"),
        OptimizerInput(None, {"weight_decay": 0.1}, "weight decay"),
        OptimizerInput(None, {"weight_decay": WeightDecay(0.1, "cautious")}, "cautious weight decay"),
    ]
    if name not in NO_MAXIMIZE:
        found.append(OptimizerInput(None, {"maximize": True}, "maximize"))
    return found


INFOS = {
    name: OptimizerInfo(
        method.cls,
        optim_inputs_func=lambda device, dtype=None, name=name: inputs(name),
        supported_impls=(),
        supports_complex=False,
        step_requires_closure=method.needs == "closure",
    )
    for name, method in METHODS.items()
}


class Problem:
    """A linear regression with a weight, a bias, and the loop that a method asks for."""

    def __init__(self, name: str, contiguous: bool = True, dtype: torch.dtype = torch.float32) -> None:
        self.name, self.info, self.needs = name, INFOS[name], METHODS[name].needs
        self.model, self.loss_fn = nn.Linear(5, 4, dtype=dtype), nn.MSELoss()
        generator = torch.Generator().manual_seed(2024)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=dtype)

        if contiguous:
            self.model.weight.data, self.model.bias.data = draw(4, 5), draw(4)
        else:
            self.model.weight.data, self.model.bias.data = draw(4, 5, 2)[..., 0], draw(4, 2)[..., 0]
            assert not self.model.weight.is_contiguous() and not self.model.bias.is_contiguous()
        self.x, self.y = draw(8, 5), draw(8, 4)

    @property
    def params(self) -> list[nn.Parameter]:
        return [self.model.weight, self.model.bias]

    def make(self, params: Any = None, **options: Any) -> torch.optim.Optimizer:
        params = self.params if params is None else params
        options = {**OPTIONS.get(self.name, {}), **options}
        if self.needs == "layers":
            return self.info.optim_cls(self.model, self.loss_fn, params=params, **options)
        if self.name in WITH_MODEL_AND_LOSS:
            return self.info.optim_cls(params, self.loss_fn, **options)
        return self.info.optim_cls(params, **options)

    def loss(self) -> Tensor:
        out = self.model(self.x)
        return (out - self.y).flatten() * 0.2 if self.name == "GaussNewton" else self.loss_fn(out, self.y)

    def value(self) -> float:
        with torch.no_grad():
            return float(self.loss().square().sum()) if self.name == "GaussNewton" else float(self.loss())

    def closure(self, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss()
            if self.name != "GaussNewton":
                loss.backward()
            return loss

        return evaluate

    def step(self, optimizer: torch.optim.Optimizer) -> Any:
        closure = self.closure(optimizer)
        if self.info.step_requires_closure:
            return optimizer.step(closure)
        closure()
        return optimizer.step()

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]


def each_input(name: str) -> Iterator[dict[str, Any]]:
    for given in INFOS[name].optim_inputs_func("cpu"):
        yield copy.deepcopy(given.kwargs)


def equal(a: Any, b: Any) -> bool:
    """Whether two trees hold the same, tensors bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


# Inputs


WRONG = {given.optimizer_error_input.desc: given for given in get_error_inputs_for_all_optims("cpu", torch.float32)}


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        (name, wrong)
        for wrong, given in WRONG.items()
        for name in NAMES
        # Layer-based methods refuse parameters that are not of the model before anything else.
        if given.optimizer_error_input.params is None or METHODS[name].needs != "layers"
    ],
)
def test_wrong_inputs_raise_what_torch_raises(name, wrong):
    given, problem = WRONG[wrong], Problem(name)
    params, kwargs = given.optimizer_error_input.params, given.optimizer_error_input.kwargs
    assert given.error_on.name == "CONSTRUCTION_ERROR"
    # What torch warns of would be moved twice: it is refused here.
    error = ValueError if issubclass(given.error_type, Warning) else given.error_type
    with pytest.raises(error, match=given.error_regex):
        problem.make(params, **kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_printed(name):
    text = str(Problem(name).make())
    assert name in text and "weight_decay=" in text


# Steps


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("contiguous", "scheduled"), [(True, True), (False, False)])
def test_it_goes_the_right_way(name, contiguous, scheduled):
    for kwargs in each_input(name):
        problem = Problem(name, contiguous)
        optimizer = problem.make(**kwargs)
        schedulers = [make(optimizer) for make in INFOS[name].scheduler_inputs[0] if scheduled]
        before = problem.value()
        for _ in range(6):
            problem.step(optimizer)
            for scheduler in schedulers:
                if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                    scheduler.step(problem.value())
                else:
                    scheduler.step()
        if kwargs.get("maximize"):
            assert problem.value() > before
        else:
            assert problem.value() < before, kwargs


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_lr_of_any_shape_with_one_element(name):
    rate = 0.01
    reference = Problem(name, dtype=torch.float64)
    optimizer = reference.make(lr=rate)
    for _ in range(3):
        reference.step(optimizer)
    for lr in (torch.tensor(rate, dtype=torch.float64), torch.tensor([rate], dtype=torch.float64)):
        problem = Problem(name, dtype=torch.float64)
        optimizer = problem.make(lr=lr)
        for _ in range(3):
            problem.step(optimizer)
        for a, b in zip(problem.values(), reference.values(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        assert lr.item() == rate


@pytest.mark.parametrize("name", NAMES)
def test_groups_have_their_own_lr_and_weight_decay(name):
    problem = Problem(name)
    groups = [{"params": [problem.model.weight], "lr": 0.0}, {"params": [problem.model.bias], "weight_decay": 0.5}]
    try:
        optimizer = problem.make(groups)
    except ValueError as error:
        assert "together" in str(error)
        return
    before = problem.values()
    for _ in range(3):
        problem.step(optimizer)
    assert torch.equal(before[0], problem.values()[0]) and not torch.equal(before[1], problem.values()[1])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.5]


@pytest.mark.filterwarnings("ignore:.*has a gradient but no curvature yet:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_a_group_is_added_to_a_running_optimizer(name):
    problem = Problem(name)
    optimizer = problem.make([problem.model.weight])
    problem.step(optimizer)
    bias = problem.model.bias.detach().clone()
    optimizer.add_param_group({"params": problem.model.bias})
    for _ in range(4):
        problem.step(optimizer)
    assert not torch.equal(problem.model.bias, bias)


@pytest.mark.parametrize("name", WITHOUT_CLOSURE)
def test_parameters_without_gradient_stay(name):
    for kwargs in each_input(name):
        problem = Problem(name)
        optimizer, before = problem.make(**kwargs), problem.values()
        for p in problem.params:
            p.grad = None
        optimizer.step()
        assert equal(problem.values(), before)
        assert not any(optimizer.state.values())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_zero_move_nothing(name):
    for kwargs in each_input(name):
        if kwargs.get("weight_decay"):
            continue
        problem = Problem(name)
        problem.y = problem.model(problem.x).detach()
        optimizer, before = problem.make(**kwargs), problem.values()
        for _ in range(3):
            problem.step(optimizer)
        assert equal(problem.values(), before)


@pytest.mark.parametrize("name", NAMES)
def test_the_state_is_not_empty_after_a_step(name):
    problem = Problem(name)
    optimizer = problem.make()
    problem.step(optimizer)
    state = optimizer.state_dict()
    assert METHODS[name].name in ("Newton",) or state["state"], "nothing is kept"
    assert state["param_groups"][0]["steps"] == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_closure_is_called_once_or_more_and_its_loss_comes_back(name):
    problem = Problem(name)
    optimizer, calls = problem.make(), []
    evaluate = problem.closure(optimizer)

    def closure() -> Tensor:
        loss = evaluate()
        calls.append(loss.detach())
        return loss

    result = optimizer.step(closure)
    assert calls and result is not None
    if name == "GaussNewton":
        assert result.item() == pytest.approx(0.5 * calls[0].square().sum().item())
    else:
        assert result.item() == calls[0].item()


# Hooks


@pytest.mark.parametrize("name", NAMES)
def test_hooks_of_all_optimizers_and_of_this_one_run_in_order(name):
    problem = Problem(name)
    optimizer, calls = problem.make(), []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("all before")),
        optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
        optimizer.register_step_post_hook(lambda *_: calls.append("after")),
        register_optimizer_step_post_hook(lambda *_: calls.append("all after")),
    ]
    try:
        problem.step(optimizer)
        assert calls == ["all before", "before", "after", "all after"]
    finally:
        for handle in handles:
            handle.remove()
    problem.step(optimizer)
    assert len(calls) == 4


@pytest.mark.parametrize("name", NAMES)
def test_hooks_of_state_dict(name):
    problem = Problem(name)
    optimizer, calls = problem.make(), []
    problem.step(optimizer)
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("before"))

    def after(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        calls.append("after")
        return {**state, "note": state["param_groups"][0]["steps"]}

    handle = optimizer.register_state_dict_post_hook(after)
    assert optimizer.state_dict()["note"] == 1 and calls == ["before", "after"]
    handle.remove()
    assert "note" not in optimizer.state_dict()


@pytest.mark.parametrize("name", NAMES)
def test_hooks_of_load_state_dict(name):
    problem = Problem(name)
    optimizer, calls = problem.make(lr=0.01), []
    problem.step(optimizer)
    saved = optimizer.state_dict()

    def second(_: Any, state: dict[str, Any]) -> None:
        calls.append("second")
        assert state["param_groups"][0]["lr"] == 0.002
        state["param_groups"][0]["lr"] = 0.003

    def first(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        calls.append("first")
        groups = [{**group, "lr": 0.002} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    def after(self: torch.optim.Optimizer) -> None:
        calls.append("after")
        self.state["loaded"] = True  # as PyTorch's own test does

    optimizer.register_load_state_dict_pre_hook(second)
    optimizer.register_load_state_dict_pre_hook(first, prepend=True)
    optimizer.register_load_state_dict_post_hook(after)
    optimizer.load_state_dict(saved)
    assert calls == ["first", "second", "after"]
    assert optimizer.param_groups[0]["lr"] == 0.003 and optimizer.state["loaded"]
    assert saved["param_groups"][0]["lr"] == 0.01
    problem.step(optimizer)


# State


@pytest.mark.parametrize("name", NAMES)
def test_saving_and_loading_gives_the_same_with_weights_only(name):
    for kwargs in each_input(name):
        problem = Problem(name)
        optimizer = problem.make(**kwargs)
        for _ in range(3):
            problem.step(optimizer)
        saved = optimizer.state_dict()
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True)
        assert equal(saved, loaded)
        other = problem.make(**kwargs)
        other.load_state_dict(loaded)
        assert equal(other.state_dict(), saved)


@pytest.mark.parametrize("name", [name for name in NAMES if METHODS[name].needs == "grad"])
def test_the_order_of_a_state_dict_does_not_depend_on_the_order_of_gradients(name):
    states = []
    for order in ([0, 1], [1, 0]):
        problem = Problem(name)
        optimizer = problem.make()
        for index in order:
            optimizer.zero_grad()
            problem.params[index].grad = torch.ones_like(problem.params[index])
            optimizer.step()
        states.append([list(state) for _, state in sorted(optimizer.state_dict()["state"].items())])
    assert states[0] == states[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_may_be_older_than_an_option(name):
    problem = Problem(name)
    optimizer = problem.make()
    problem.step(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for option in ("decay", "kl_clip", "maximize", "nesterov"):  # the steps were counted from the beginning
            del group[option]
    optimizer.load_state_dict(saved)
    problem.step(optimizer)
    assert optimizer.param_groups[0]["decay"] == "decoupled"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("named", [(True, False), (False, True), (True, True)])
def test_names_may_come_and_go_between_saving_and_loading(name, named):
    def params(problem: Problem, with_names: bool) -> Any:
        return list(problem.model.named_parameters()) if with_names else problem.params

    first, second = Problem(name), Problem(name)
    saving, loading = first.make(params(first, named[0])), second.make(params(second, named[1]))
    first.step(saving)
    second.model.load_state_dict(first.model.state_dict())
    loading.load_state_dict(copy.deepcopy(saving.state_dict()))
    for _ in range(2):
        first.step(saving)
        second.step(loading)
    assert equal(first.values(), second.values())
    if named == (True, True):
        assert loading.param_groups[0]["param_names"] == ["weight", "bias"]


@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_other_groups_is_refused(name):
    problem = Problem(name)
    saved = problem.make().state_dict()
    saved["param_groups"][0]["params"] = [0]
    with pytest.raises(ValueError, match="parameter group that doesn't match the size"):
        problem.make().load_state_dict(saved)


@pytest.mark.parametrize("name", NAMES)
def test_copies_have_all_public_attributes(name):
    problem = Problem(name)
    optimizer = problem.make()
    problem.step(optimizer)
    public = {key for key in vars(optimizer) if not key.startswith("_")}
    pair = (problem.model, optimizer)
    for twin in (copy.deepcopy(pair)[1], pickle.loads(pickle.dumps(pair))[1]):
        assert {key for key in vars(twin) if not key.startswith("_")} == public
        assert equal(twin.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("name", [name for name in NAMES if METHODS[name].needs != "layers"])
def test_complex_parameters_are_refused(name):
    with pytest.raises(TypeError, match="is complex"):
        Problem(name).make([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])

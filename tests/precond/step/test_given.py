"""Is what is mistaken for parameters, groups, closures and states told from them, at every method alike?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from precond import KFAC, SOAP, methods
from precond.step.base import SecondOrderOptimizer

METHODS = {method.name: method for method in methods()}
OF_MODELS = [name for name, method in METHODS.items() if method.needs == "layers"]
OF_PARAMETERS = [name for name in METHODS if name not in OF_MODELS]
LOSS = nn.CrossEntropyLoss()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))


def made(name: str, model: nn.Module, params: Any = None) -> SecondOrderOptimizer:
    cls: Any = METHODS[name].cls
    if name in OF_MODELS:
        return cls(model, LOSS, lr=0.1, params=params)
    params = model.parameters() if params is None else params
    return cls(params, LOSS) if name in ("CurveBall", "HessianFree") else cls(params)


def exhausted(model: nn.Module) -> Any:
    generator = model.parameters()
    list(generator)
    return generator


NO_PARAMETERS = {
    "an exhausted generator": (exhausted, ValueError, "can be gone through once; call it anew"),
    "one tensor": (lambda m: m[0].weight, TypeError, "not one tensor alone"),
    "a state dict": (lambda m: m.state_dict(), TypeError, "not one OrderedDict"),
    "one group": (lambda m: {"params": list(m.parameters())}, TypeError, "takes a list of groups, not one dict"),
    "names": (lambda m: ["0.weight"], TypeError, "not their names such as '0.weight'"),
    "numbers": (lambda m: [0.1], TypeError, "which are tensors, not float"),
    "a number": (lambda m: 0.1, TypeError, "or groups of them, not float"),
    "a result": (lambda m: [m[0].weight * 2], ValueError, "non-leaf Tensor, one of shape"),
    "one twice": (lambda m: [*m.parameters(), m[2].bias], ValueError, r"duplicate parameters, one of shape \(2,\)"),
}


@pytest.mark.parametrize("what", NO_PARAMETERS)
def test_what_is_no_list_of_parameters(what: str) -> None:
    params, error, message = NO_PARAMETERS[what]
    for name in OF_PARAMETERS:
        with pytest.raises(error, match=message):
            made(name, (model := network()), params(model))


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ({"lr": 0.1}, ValueError, "lacks 'params': it has 'lr'"),
        ({"learning_rate": 0.1}, TypeError, "no option 'learning_rate' .*write 'lr' here"),
        ({"weight_decai": 0.1}, TypeError, "no option 'weight_decai'; did you mean 'weight_decay'"),
        ({"amsgrad": True}, TypeError, "no option 'amsgrad', which is of torch.optim.Adam"),
    ],
)
def test_what_is_no_group(group: Any, error: type[Exception], message: str) -> None:
    for name in METHODS:
        model = network()
        whole = {**group, "params": list(model[2].parameters())} if error is TypeError else group
        with pytest.raises(error, match=f"a parameter group of {name} .*{message}"):
            made(name, model, [{"params": list(model[0].parameters())}, whole])
        optimizer = made(name, model, list(model[0].parameters()))
        with pytest.raises(error, match=f"a parameter group of {name} .*{message}"):
            optimizer.add_param_group(whole)
        assert len(optimizer.param_groups) == 1
        optimizer.add_param_group({"params": list(model[2].parameters())})


def test_a_list_is_no_group() -> None:
    for name in METHODS:
        model = network()
        optimizer = made(name, model, list(model[0].parameters()))
        with pytest.raises(TypeError, match=r"is a dict, \{'params': \[...\], 'lr': ...\}, not list"):
            optimizer.add_param_group(list(model[2].parameters()))  # type: ignore[arg-type]


def test_labels_of_groups_are_kept() -> None:
    model = network()
    labels = {"name": "all", "lr_scale": 0.5, "layer": 3, "fused": None, "initial_lr": 0.1}
    for name in METHODS:
        (group,) = made(name, model, [{"params": list(model.parameters()), **labels}]).param_groups
        assert {key: group[key] for key in labels} == labels


def test_the_value_of_a_loss_is_no_closure() -> None:
    for name, method in METHODS.items():
        model = network()
        optimizer = made(name, model)
        loss = LOSS(model(torch.ones(4, 3)), torch.tensor([0, 1, 0, 1]))
        mend = r"step\(lambda: loss_fn" if method.needs == "closure" else r"loss\.backward\(\), then step\(\) alone"
        for value in (loss, loss.item()):
            for half in (optimizer.step, optimizer.precondition):
                with pytest.raises(
                    TypeError, match=rf"step of {name} takes a function .*{type(value).__name__}\): {mend}"
                ):
                    half(value)
        assert optimizer.steps == 0


@pytest.mark.parametrize("other", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("stepped", [False, True])
def test_the_state_of_an_optimizer_of_torch_is_refused(other: Any, stepped: bool) -> None:
    """Of which nothing but its learning rate would be left."""
    model = network()
    theirs = other(model.parameters(), lr=1e-3)
    if stepped:
        LOSS(model(torch.ones(4, 3)), torch.tensor([0, 1, 0, 1])).backward()
        theirs.step()
    for name in METHODS:
        optimizer = made(name, model)
        rate = optimizer.param_groups[0]["lr"]
        with pytest.raises(ValueError, match=rf"^{name}\.load_state_dict got the state of another optimizer"):
            optimizer.load_state_dict(theirs.state_dict())
        assert optimizer.param_groups[0]["lr"] == rate


def test_a_schedule_in_a_group_is_no_label() -> None:
    model = network()
    for optimizer in (
        SOAP([{"params": list(model.parameters()), "weight_decay": lambda step: 0.1 * step}]),
        KFAC(model, LOSS, lr=0.1, params=[{"params": ["*"], "weight_decay": lambda step: 0.1 * step}]),
    ):
        assert optimizer.param_groups[0]["weight_decay"] == 0.0


@pytest.mark.parametrize("make", [torch.optim.lr_scheduler.OneCycleLR, torch.optim.lr_scheduler.CyclicLR])
def test_groups_that_a_scheduler_wrote_to_make_another_optimizer(make: Any) -> None:
    old = SOAP(network().parameters(), lr=1e-2, betas=(0.9, 0.95))
    make(old, 0.1, 10)
    for group in old.param_groups:
        group |= {"weight_decay_mult": 0.5, "max_momentum": 0.95, "base_momentum": 0.85}
    assert SOAP(old.param_groups, lr=1e-2).param_groups[0]["weight_decay_mult"] == 0.5


def test_a_set_has_no_order() -> None:
    with pytest.raises(TypeError, match="those of a set come in another one in every run"):
        SOAP([{"params": set(network().parameters())}], lr=1e-2)


def test_the_state_of_another_method_is_refused_before_its_first_step() -> None:
    """It has no entries of parameters yet, only options, some with the same names and another meaning."""
    states = {name: made(name, network()).state_dict() for name in METHODS}
    for name in METHODS:
        optimizer = made(name, network())
        before = dict(optimizer.param_groups[0])
        for other in states.keys() - {name}:
            with pytest.raises(ValueError, match=rf"^{name}.load_state_dict got the state of another method, {other}:"):
                optimizer.load_state_dict(states[other])
        assert optimizer.param_groups[0] == before
        optimizer.load_state_dict(states[name])


def test_a_class_derived_by_a_user_takes_the_states_of_its_method() -> None:
    class Mine(SOAP):
        pass

    theirs, own = SOAP(network().parameters(), lr=0.2), Mine(network().parameters())
    own.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(own.state_dict())
    assert own.param_groups[0]["lr"] == 0.2


@pytest.mark.parametrize("lr", [torch.tensor([0.1, 0.2]), float("nan")])
def test_a_schedule_is_blamed_for_its_own_option_alone(lr: Any) -> None:
    """KFAC's period follows a function of the step by default."""
    with pytest.raises(ValueError, match="lr must be") as refusal:
        KFAC(network(), LOSS, lr=lr)
    assert "schedule" not in str(refusal.value)
    with pytest.raises(ValueError, match=r"weight_decay.*by the schedule given for weight_decay\.\)"):
        KFAC(network(), LOSS, lr=0.1, weight_decay=lambda step: -1.0)

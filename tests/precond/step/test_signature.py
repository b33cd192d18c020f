"""Do signatures show all parameters, with types and documentation, and do calls refuse others by name?"""

from __future__ import annotations

import inspect
import pydoc
import re
from typing import Any

import pytest
import torch
from torch import nn

from precond import (
    KFAC,
    SINGD,
    SOAP,
    Momentum,
    Muon,
    PreconditionedOptimizer,
    SecondOrderOptimizer,
    SMWNaturalGradient,
    methods,
)
from precond.step.other_names import counterpart
from precond.step.signature import refusal

CLASSES: dict[str, Any] = {method.name: method.cls for method in methods()}
ALL = {**CLASSES, "PreconditionedOptimizer": PreconditionedOptimizer}


def model() -> nn.Module:
    return nn.Linear(3, 2)


def documented(text: str) -> set[str]:
    """Names of the parameters in a docstring."""
    return set(re.findall(r"^ {4,8}(\w+): ", inspect.cleandoc(text).replace("\n    ", "\n        "), re.M))


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_is_shown_typed_and_documented(name: str) -> None:
    cls = ALL[name]
    parameters = inspect.signature(cls).parameters
    # Three are for several processes, seven for what becomes of the direction: `cautious` and `tables` among them.
    # Shampoo has the most: blocks, and which of their axes have a factor, beside roots, grafting and corrections.
    assert len(parameters) <= 27
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
    assert [p.name for p in parameters.values() if p.annotation is p.empty] == []
    named, text = {cls}, cls.__doc__
    for base in cls.__mro__:  # a docstring names the class that says the rest
        if f":class:`{base.__name__}`" in text:
            named, text = named | {base}, text + base.__doc__
    assert set(parameters) - {name for base in named for name in documented(base.__doc__)} == set()


def test_shared_options_have_the_defaults_of_the_base() -> None:
    own, base = inspect.signature(KFAC).parameters, inspect.signature(PreconditionedOptimizer).parameters
    for name in ("weight_decay", "step_size", "damping_rule", "params", "maximize", "loop"):
        assert (own[name].default, own[name].annotation) == (base[name].default, base[name].annotation)
    assert own["momentum"].default == Momentum(0.9, nesterov=True) and base["momentum"].default == 0.0
    assert own["structures"].default is None


def test_help_shows_them() -> None:
    page = pydoc.render_doc(KFAC, renderer=pydoc.plaintext)
    head = page[: page.index("K-FAC: natural gradient")]
    for text in ("lr: 'float | Tensor'", "weight_decay: 'Scheduled | WeightDecay' = 0.0", "damping_rule: 'Levenberg"):
        assert text in head


class Mine(KFAC):
    """A method of a user."""

    def __init__(self, model: nn.Module, loss_fn: Any, *, colour: str = "red", **options: Any) -> None:
        super().__init__(model, loss_fn, lr=0.1, **options)
        self.colour = colour


class Inherited(KFAC):
    """One that has no constructor of its own."""


def test_classes_of_users_are_served_alike() -> None:
    parameters = inspect.signature(Mine).parameters
    assert list(parameters)[:3] == ["model", "loss_fn", "colour"] and "damping" in parameters
    assert Mine(model(), nn.MSELoss(), colour="blue", damping=0.1).colour == "blue"
    with pytest.raises(TypeError, match=r"^Mine has no option 'dampin'; did you mean 'damping'\?"):
        Mine(model(), nn.MSELoss(), dampin=0.1)
    with pytest.raises(TypeError, match=r"^Inherited has no option 'colour'\. Its parameters are model, loss_fn, lr, "):
        Inherited(model(), nn.MSELoss(), lr=0.1, colour="blue")  # type: ignore[call-arg]
    assert SecondOrderOptimizer.__init__.__name__ == "__init__"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KFAC(model(), nn.MSELoss(), lr=0.1, betas=(0.9, 0.9)), r"'betas' \(torch.optim.AdamW\); write 'curv"),
        (lambda: KFAC(model(), nn.MSELoss(), lr=0.1, inv_update_steps=9), r"\(kfac-pytorch\); write 'inverse_update_p"),
        (
            lambda: KFAC(model(), nn.MSELoss(), lr=0.1, l2_reg=0.1),
            r"\(kfac-jax\); write \"weight_decay=WeightDecay\(1e",
        ),
        (lambda: KFAC(model(), nn.MSELoss(), lr=0.1, fused=True), "'fused', which says how torch.optim runs its kern"),
        (
            lambda: KFAC(model(), nn.MSELoss(), lr=0.1, colour=1, dampin=2),
            "option 'colour'. 'dampin'; did you mean 'da",
        ),
        (lambda: KFAC(model(), nn.MSELoss(), lr=0.1, exponent=-0.5), "'exponent', which the method decides; Precond"),
        (lambda: SOAP(model().parameters(), precondition_frequency=9), r"\(SOAP\); write 'inverse_update_period' here"),
        (lambda: Muon(model().parameters(), ns_steps=5), r"'ns_steps' \(torch.optim.Muon\); write 'polynomial' here"),
        (lambda: SOAP(model().parameters(), ns_steps=5), "'ns_steps', which is of torch.optim.Muon"),
        (
            lambda: KFAC(model().parameters(), lr=0.1),
            r"and the loss that the loop calls: KFAC\(model, loss_fn\)",
        ),
        (
            lambda: KFAC(model().parameters(), lr=0.1),
            r"pass the model itself, not generator \(such as model.parameters",
        ),
        (lambda: KFAC(model().parameters(), nn.MSELoss(), lr=0.1), "learns from the layers of a model: pass the model"),
        (
            lambda: SINGD(model(), nn.MSELoss()),
            r"missing a required argument: 'lr'\. Call SINGD\(model, loss_fn, lr=\.\.\.\)",
        ),
        (lambda: KFAC(model(), nn.MSELoss(), 0.1), "options by name, lr=... among them"),
        (lambda: SOAP(model()), r"takes parameters, not the model: SOAP\(model\.parameters\(\), \.\.\.\)"),
        (lambda: SINGD(model(), nn.MSELoss(), lr=0.1, curvature_ema=0.9), "no option 'curvature_ema'; did you mean"),
        (lambda: SMWNaturalGradient(model(), nn.MSELoss(), lr=0.1, stager=1), "no option 'stager'"),
    ],
)
def test_a_call_is_refused_by_the_class_that_was_called(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=rf"^(KFAC|SOAP|Muon|SINGD|SMWNaturalGradient)\b.*{message}"):
        make()


def test_names_of_others_point_to_options_that_exist() -> None:
    known = {name for cls in ALL.values() for name in inspect.signature(cls).parameters}
    for name in ("betas", "precondition_frequency", "ns_steps", "skip_layers", "norm_constraint", "learning_rate"):
        hint = counterpart(name, known)
        assert hint is not None and "write" in hint
        assert "write" in refusal("KFAC", [name], known)
    assert counterpart("colour", known) is None


@pytest.mark.parametrize(
    ("cls", "name", "expected"),
    [
        (KFAC, "criterion", r"'criterion'; write 'loss_fn' here"),
        (KFAC, "stat_decay", r"'stat_decay' \(kfac_pytorch\); write 'curvature_ema'"),
        (KFAC, "TInv", r"'TInv' \(kfac_pytorch\); write 'inverse_update_period'"),
        (KFAC, "inv_update_steps", r"\(kfac-pytorch\); write 'inverse_update_period'"),
        (KFAC, "compute_method", r"says how kfac-pytorch computes"),
        (KFAC, "curvature_upd_interval", r"\(ASDL\); write 'curvature_update_period'"),
        (KFAC, "grad_clip", r"is of the loop: call torch\.nn\.utils\.clip_grad_norm_"),
        (SOAP, "max_precondition_dim", r"\(pytorch-optimizer\); write 'max_dim'"),
        (SOAP, "weight_decouple", r"write \"weight_decay=WeightDecay\(1e-2, 'decoupled'\)\""),
        (CLASSES["Shampoo"], "matrix_eps", r"\(pytorch-optimizer\); write 'damping'"),
        (CLASSES["Shampoo"], "epsilon", r"\(Distributed Shampoo\); write 'eps'"),
        (CLASSES["Shampoo"], "max_preconditioner_dim", r"\(Distributed Shampoo\); write 'block_size'"),
        (CLASSES["Shampoo"], "inv_root_override", r"write 'exponent'"),
        (CLASSES["AdaHessian"], "hessian_distribution", r"the random vectors have signs"),
        (CLASSES["PSGD"], "precond_lr", r"write 'preconditioner_lr'"),
        (CLASSES["GaLore"], "update_proj_gap", r"write 'inverse_update_period'"),
        (CLASSES["Sophia"], "rho", r"write 'gamma'"),
        (SINGD, "T", r"\(singd\); write 'curvature_update_period'"),
        (Muon, "adamw_params", r"write 'params=param_groups\(model, Muon, batch\)'"),
        (Muon, "adamw_betas", r"write 'betas'"),
        (Muon, "use_muon", r"write 'orthogonalize'"),
        (Muon, "max_iter", r"which is of torch\.optim\.LBFGS"),
    ],
)
def test_options_of_other_libraries(cls: Any, name: str, expected: str) -> None:
    first = (model(), nn.MSELoss()) if cls.needs == "layers" else (model().parameters(),)
    with pytest.raises(TypeError, match=rf"^{cls.__name__} has no option .*{expected}"):
        cls(*first, lr=0.1, **{name: 1})


LINEAR, MSE = nn.Linear(3, 2), nn.MSELoss()
LAYERED = [name for name, cls in ALL.items() if cls.needs == "layers"]


@pytest.mark.parametrize("name", LAYERED)
@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((LINEAR.parameters(),), r"learns from the layers of a model: pass the model itself, not generator"),
        (([*LINEAR.parameters()], MSE), r"learns from the layers of a model: pass the model itself, not list"),
        (([{"params": [*LINEAR.parameters()]}],), r"learns from .*itself takes precond\.integrations\.with_model\("),
        ((LINEAR,), r"needs the loss, too, and loss_fn is missing"),
        ((MSE, LINEAR), r"takes the model first, then the loss, which came the other way round"),
        (
            (LINEAR, MSE(torch.ones(2), torch.ones(2))),
            r"takes the loss itself, as nn\.CrossEntropyLoss\(\), not its val",
        ),
        ((LINEAR, 0.1), r"takes the loss after the model, not 0\.1"),
        ((LINEAR, MSE, 0.1), r"takes options by name, lr=\.\.\. among them"),
    ],
)
def test_layer_based_methods_say_what_they_take(name: str, args: tuple[Any, ...], expected: str) -> None:
    given = {} if len(args) == 3 else {"lr": 0.1}
    with pytest.raises(TypeError, match=rf"^{name} {expected}.*{name}\(model, loss_fn|^{name} {expected}"):
        ALL[name](*args, **given)


@pytest.mark.parametrize(
    "name", [name for name, cls in ALL.items() if "params" in [*inspect.signature(cls).parameters][:1]]
)
def test_methods_of_parameters_say_so(name: str) -> None:
    cls, parameters = ALL[name], list(model().parameters())
    for args, given in (
        ((parameters, MSE), {}),
        ((parameters,), {"loss_fn": MSE}),
        ((parameters,), {"criterion": MSE}),
    ):
        with pytest.raises(TypeError, match=rf"^{name} takes parameters, and no loss: {name}\(model\.parameters\(\), "):
            cls(*args, **given)
    with pytest.raises(TypeError, match=rf"^{name} takes parameters, not the model and its loss: "):
        cls(model(), MSE)
    if name != "GaussNewton":  # which takes a model for its parameters
        with pytest.raises(TypeError, match=rf"^{name} takes parameters, not the model: {name}\(model\.parameters"):
            cls(model())


@pytest.mark.parametrize("name", ["HessianFree", "CurveBall"])
def test_methods_of_closures_that_watch_the_loss_need_it(name: str) -> None:
    for first in (model(), list(model().parameters())):
        with pytest.raises(
            TypeError, match=rf"^{name} needs the loss, too, and loss_fn is missing: {name}\(model, loss_"
        ):
            CLASSES[name](first)
    with pytest.raises(TypeError, match=rf"^{name} takes the model first"):
        CLASSES[name](MSE, model())

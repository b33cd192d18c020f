"""Every public function refuses what its options cannot mean, by name, before anything is computed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from torch import Tensor, nn

import curvature
import curvature.laplace
import curvature.plots
import solvers
from curvature.model.arguments import checked

matplotlib.use("agg")
nan = float("nan")
X, Y = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2), torch.ones(3, 1, dtype=torch.float64)
LOSS = nn.MSELoss()


class Untouched(nn.Sequential):
    """A model that must not run."""

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("the model ran")


def model(kind: type[nn.Sequential] = Untouched) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()


MODEL = model(nn.Sequential)
OF_LOSS = {"model": model(), "loss_fn": LOSS, "data": (X, Y)}
OF_BATCH = {"model": model(), "loss_fn": LOSS, "batch": (X, Y)}
OF_TRAIN = {"model": model(), "loss_fn": LOSS, "train": (X, Y)}
BLOCKS = curvature.fisher(MODEL, LOSS, (X, Y), structure="kfac")
OP = solvers.Dense(torch.eye(3, dtype=torch.float64))
POSTERIOR = curvature.laplace.LinearizedLaplace(MODEL, nn.MSELoss(reduction="sum"), (X, Y))
LINE = curvature.interpolation(MODEL, MODEL, LOSS, (X, Y), points=3, layerwise=True)
SURFACE = curvature.surface(MODEL, LOSS, (X, Y), points=2)
NUMBERS = {"first": 1.0, "second": 2.0}

#: Arguments with which each public function works; those it does not need are tried as well.
CURVATURE: dict[str, Mapping[str, Any]] = {
    **{name: OF_LOSS for name in ("hessian", "ggn", "fisher", "gradient_covariance", "report", "Monitor", "Subspace")},
    **{name: OF_LOSS for name in ("gradient_second_moment", "gradient_variance", "surface", "quantize", "prune")},
    **{name: OF_BATCH for name in ("per_sample_gradients", "per_sample_norms")},
    "subspace": OF_LOSS,
    "coverage": OF_LOSS,
    "dynamics": {**OF_LOSS, "lr": 0.1},
    "activation_hessian": {**OF_BATCH, "module": "0"},
    "jacobian": {"model": model(), "x": X},
    "ntk": {"model": model(), "x": X},
    "kernel_eigenvalues": {"model": model(), "data": (X, Y)},
    "check_deterministic": {"model": model(), "data": (X, Y)},
    "influence": {**OF_TRAIN, "queries": (X, Y)},
    "self_influence": OF_TRAIN,
    "interpolation": {"model_a": model(), "model_b": model(), "loss_fn": LOSS, "data": (X, Y)},
    "overlap": {"first": torch.eye(2), "second": torch.eye(2)},
    "resumable_eigsh": {"op": OP, "path": "pairs.pt", "k": 1},
    "Checkpoint": {"path": "run.pt"},
    "Grid": {},
    "allocate": {"model": MODEL, "curvature": BLOCKS},
    "sensitivity": {"model": MODEL, "curvature": BLOCKS},
}
BACKEND = {"model": model(), "likelihood": "regression"}
LAPLACE: dict[str, Mapping[str, Any]] = {
    **{name: BACKEND for name in ("GGNBackend", "EFBackend", "HessianBackend")},
    "LinearizedLaplace": {"model": model(), "likelihood": nn.MSELoss(reduction="sum"), "data": (X, Y)},
    **{
        name: {"posterior": POSTERIOR}
        for name in ("PosteriorSampler", "StochasticEvidence", "evidence", "optimize_evidence")
    },
}
PLOTS: dict[str, Mapping[str, Any]] = {
    **{name: {"result": LINE} for name in ("interpolation", "barriers", "layer_paths")},
    **{name: {"result": SURFACE} for name in ("surface", "surface_3d")},
    **{name: {"values": NUMBERS} for name in ("bars", "shares")},
    "distances": {"values": {"first": NUMBERS}},
    "gradient_norms": {"squares": {"first": torch.ones(3)}},
    "eigenvalues": {"result": solvers.eigsh(OP, 1)},
    "density": {"result": solvers.spectral_density(OP, samples=1)},
    "dynamics": {"result": []},
    "subspace": {"result": []},
    "monitor": {"result": {"step": [0.0], "sharpness": [1.0]}},
    "loss_against_bits": {"results": []},
    "sensitivity": {"table": {"first": {2: 1.0}}},
}
#: Public names that take no options of a user: contracts, results, errors, and structures, which have a test of theirs.
OTHERS = {
    *("Allocation", "Block", "CompressedLayer", "Compression", "Coverage", "Dynamics", "Influence", "Interpolation"),
    *("Report", "Surface", "plots", "Mixed", "CheckpointError", "NondeterministicError", "NotOneLossWarning"),
    *("Comparison", "NotComparableWarning", "compare"),  # of reports, one after another: tests/curvature/comparison
    *("Curvature", "CurvatureEstimator", "InverseEstimator", "MeanEstimator", "MeansEstimator"),
    "residual_ggn",  # of residuals, not of a model and a loss: tests/curvature/residuals
}
RESULTS_OF_LAPLACE = {
    *("BlockKron", "BlockKronDecomposed", "Evidence", "IndefinitePosteriorError", "PosteriorSamples", "Predictive"),
    *("Tuned", "OnlineLaplace", "load", "save"),
}

HOSTILE: dict[str, Any] = {
    "nan": nan,
    "inf": float("inf"),
    "-1": -1,
    "0": 0,
    "0.5": 0.5,
    "'x'": "x",
    "None": None,
    "True": True,
    "huge": 10**400,
    "complex": 1j,
    "object": object(),
    "[nan]": [nan],
    "[]": [],
    "tensor": torch.full((2,), torch.nan, dtype=torch.float64),
    "module": nn.Sequential(nn.Linear(2, 1)),
    "loss": nn.L1Loss(),
    "data": [(X, Y)],
}
#: Options for which 0 is a number like others, and those for which 0.5 is.
ZERO = (
    "rtol",
    "damping",
    "momentum",
    "seconds",
    "lr",
    "class_dim",
    "batch_dim",
    "seed",
    "prior_mean",
    "params",
    "contours",
)
HALF = (*ZERO[:5], "max_fraction", "budget", "products", "span", "sparsity", "prior_precision", "prior_mean")
HALF = (*HALF, "sigma_noise", "temperature", "floor")
#: Values that have a meaning after all.
ALLOWED = {
    *(
        ("None", option)
        for option in ("params", "class_dim", "batch_dim", "x2", "query_loss", "metric", "preconditioner")
    ),
    ("None", "process_group"),
    *(("object", option) for option in ("x", "x2")),  # of the user's, as a graph may be
    ("[]", "quantities"),
    ("'x'", "quantity"),  # a KeyError with the columns that there are
    ("-1", "class_dim"),
    ("-1", "batch_dim"),
    ("-1", "seed"),
    ("-1", "prior_mean"),
    ("0", "momentum"),
    ("'x'", "resume"),
    ("'x'", "store"),
    ("'x'", "path"),
    ("'x'", "csv"),
    ("'x'", "prefix"),
    ("'x'", "label"),
    ("'x'", "dict_key_x"),
    ("'x'", "dict_key_y"),
    ("tensor", "x2"),
    ("tensor", "x"),
    ("data", "x"),
    ("data", "x2"),
    ("[nan]", "x"),  # the model is asked
    ("[nan]", "x2"),
    ("module", "model"),
    ("module", "model_a"),
    ("module", "model_b"),
    ("module", "loss_fn"),  # one of the user's may be anything that can be called
    ("module", "query_loss"),
    ("module", "likelihood"),
    ("module", "output"),
    ("module", "callback"),
    ("module", "metric"),
    ("loss", "loss_fn"),
    ("loss", "query_loss"),
    ("loss", "likelihood"),
    ("loss", "output"),
    ("loss", "callback"),
    ("loss", "metric"),
    ("data", "data"),
    ("data", "train"),
    ("data", "queries"),
    ("tensor", "squares"),
    ("[]", "result"),
    ("[]", "results"),
}
#: How messages call an option, if not by its name.
OTHER_WORDS = {"model_b": "architecture", "directions": "architecture"}
FREE = {"ax", "optimizer", "writer"}  # objects of other libraries


def doors() -> list[Any]:
    packages = [(curvature, CURVATURE), (curvature.laplace, LAPLACE), (curvature.plots, PLOTS)]
    return [
        pytest.param(getattr(package, name), good, id=f"{package.__name__}.{name}")
        for package, table in packages
        for name, good in table.items()
    ]


def means_something(option: str, hostile: str, annotation: str) -> bool:
    return (
        option in FREE
        or (hostile == "None" and "None" in annotation)
        or (hostile == "True" and "bool" in annotation)
        or (hostile == "0" and option in ZERO)
        or (hostile == "0.5" and option in HALF)
        or (hostile, option) in ALLOWED
    )


def state_of(module: nn.Module) -> list[Any]:
    """Hooks, modes and gradients of a model."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        (m.training, [len(getattr(m, name)) for name in hooks], [p.grad is None for p in m.parameters()])
        for m in module.modules()
    ]


@pytest.mark.parametrize(("door", "good"), doors())
def test_hostile_values_are_refused_by_name(
    door: Any, good: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {name: state_of(value) for name, value in good.items() if isinstance(value, nn.Module)}
    wrong = []
    for option, parameter in inspect.signature(door).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        for hostile, value in HOSTILE.items():
            if means_something(option, hostile, str(parameter.annotation)):
                continue
            try:
                door(**{**good, option: value})
                wrong.append(f"{option}={hostile} is accepted")
            except (TypeError, ValueError) as error:
                if not re.search(rf"\b({option}|{OTHER_WORDS.get(option, option)})\b", str(error)):
                    wrong.append(f"{option}={hostile}: {error}")
            except Exception as error:
                wrong.append(f"{option}={hostile}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)
    assert before == {name: state_of(good[name]) for name in before}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name, good in CURVATURE.items() if "loss_fn" in good and "model" in good])
def test_swapped_arguments_are_told(name: str) -> None:
    door, good = getattr(curvature, name), dict(CURVATURE[name])
    rest = {key: value for key, value in good.items() if key not in ("model", "loss_fn", "data", "batch", "train")}
    (given,) = (good[key] for key in ("data", "batch", "train") if key in good)
    with pytest.raises(TypeError, match="model is the model, not the loss"):
        door(good["loss_fn"], good["model"], given, **rest)
    with pytest.raises(TypeError, match="loss_fn"):
        door(good["model"], given, good["loss_fn"], **rest)
    with pytest.raises(TypeError, match="model"):
        door(given, good["loss_fn"], good["model"], **rest)
    with pytest.raises(TypeError, match="loss_fn is a loss, not a class"):
        door(good["model"], nn.MSELoss, given, **rest)


def test_every_public_name_is_tried() -> None:
    structures = {
        name
        for name in curvature.__all__
        if inspect.isclass(kind := getattr(curvature, name)) and issubclass(kind, curvature.Curvature)
    }
    assert CURVATURE.keys() | OTHERS | structures == set(curvature.__all__)
    assert LAPLACE.keys() | RESULTS_OF_LAPLACE | {
        name for name in curvature.laplace.__all__ if name.endswith(("Laplace", "Posterior"))
    } == set(curvature.laplace.__all__)
    assert PLOTS.keys() == set(curvature.plots.__all__)


def test_structure_options_are_checked_at_the_door() -> None:
    for options in ({"memory": 0}, {"mode": "x"}, {"keep_graph": 1}):
        for door in (curvature.ggn, curvature.fisher):
            with pytest.raises((TypeError, ValueError), match=next(iter(options))):
                door(**OF_LOSS, **options)


def test_a_door_without_a_check_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="does not check width"):

        @checked()
        def door(model: nn.Module, width: int) -> None: ...

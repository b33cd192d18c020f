"""Every public name refuses what its options cannot mean, at once and by the option's name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import scipy.sparse.linalg
import torch

import solvers
from solvers import CG, Cholesky, Dense, Diagonal, Eigen, Eigh, Rows, Segment
from solvers.outcome import arguments
from tests.solvers.problems import normal, positive

OP = Dense(positive(4))
DIAGONAL = Diagonal(torch.ones(3, dtype=torch.float64))
F64 = torch.float64
nan, inf = float("nan"), float("inf")

#: Options with which each public name works.
GOOD: dict[str, Mapping[str, Any]] = {
    "BlockDiagonal": {"blocks": (OP,), "places": (Segment(0, (4,)),), "size": 4},
    "CholeskyInverse": {"factor": torch.eye(3)},
    "Congruence": {"root": Rows(normal(2, 3)), "core": Dense(positive(2))},
    "Dense": {"matrix": positive(3), "is_gram": True},
    "Diagonal": {"values": torch.ones(3)},
    "Eigen": {"basis": Dense(torch.eye(3)), "values": torch.ones(3)},
    "Flattened": {"op": OP, "tensor_shape": (2, 2)},
    "Function": {
        "matvec": lambda x: x,
        "in_shape": (3,),
        "out_shape": (3,),
        "rmatvec": lambda x: x,
        "symmetric": True,
        "dtype": F64,
        "device": "cpu",
        "batched": True,
    },
    "IterativeInverse": {"op": OP, "solver": CG()},
    "Kronecker": {"factors": (OP, OP)},
    "LowRank": {"root": normal(2, 3), "gram": positive(2)},
    "Product": {"factors": (OP, OP)},
    "Reshape": {"in_shape": (4,), "out_shape": (2, 2), "dtype": F64, "device": torch.device("cpu")},
    "Rows": {"tensors": normal(2, 3), "transposed": False},
    "Scaled": {"op": OP, "scalar": 2.0},
    "Segment": {"start": 0, "shape": (2,)},
    "Shifted": {"op": OP, "lam": 1.0},
    "Submatrix": {"op": OP, "rows": torch.tensor([0]), "columns": torch.tensor([1])},
    "Sum": {"terms": (OP, OP)},
    "from_scipy": {
        "op": scipy.sparse.linalg.aslinearoperator(positive(3).numpy()),
        "symmetric": True,
        "dtype": F64,
        "device": "cpu",
    },
    "identity": {"shape": (3,), "dtype": F64, "device": "cpu"},
    "FactoredTikhonov": {"lam": 0.1},
    "RelativeTikhonov": {"fraction": 0.1},
    "Tikhonov": {"lam": 0.1},
    "Auto": {},
    "CG": {
        "rtol": 1e-3,
        "atol": 0.0,
        "max_steps": 9,
        "preconditioner": OP,
        "stop": "progress",
        "min_progress": 1e-3,
        "negative_curvature": "stop",
        "on_failure": "raise",
        "progress": False,
    },
    "Cholesky": {"explicit": True},
    "CoupledNewton": {"rtol": 1e-3, "max_steps": 9, "on_failure": "raise"},
    "Eigh": {"mode": "clamped", "floor": 0.1},
    "Fallback": {"solvers": (Cholesky(), Eigh())},
    "InFloat64": {"solver": Eigh()},
    "Jitter": {"solver": Cholesky(), "attempts": 2, "smallest": 1e-3},
    "LSMR": {"rtol": 1e-3, "atol": 0.0, "max_steps": 9, "damp": 0.1, "on_failure": "raise", "progress": False},
    "MINRES": {
        "rtol": 1e-3,
        "atol": 0.0,
        "max_steps": 9,
        "preconditioner": OP,
        "on_failure": "raise",
        "progress": False,
    },
    "Neumann": {
        "rtol": 1e-3,
        "atol": 0.0,
        "max_steps": 9,
        "scale": 0.1,
        "preconditioner": OP,
        "on_failure": "raise",
        "progress": False,
    },
    "NewtonSchulz": {"rtol": 1e-3, "max_steps": 9, "on_failure": "raise"},
    "Nystrom": {
        "rank": 2,
        "rtol": 1e-3,
        "atol": 0.0,
        "generator": torch.Generator(),
        "on_failure": "raise",
        "progress": False,
    },
    "Previous": {},
    "Subspace": {"steps": 1, "tolerance": 0.0, "rtol": 0.1, "on_failure": "raise"},
    "Woodbury": {},
    "ladder": {"solver": Eigh()},
    "diagonalize": {"op": OP, "solver": Eigh(), "previous": Eigen(DIAGONAL, DIAGONAL.values)},
    "polar": {"matrix": torch.eye(3), "steps": 5, "together": False},
    "power": {"op": OP, "exponent": -1.0, "solver": Eigh(), "previous": OP, "dense": True},
    "rule": {"function": solvers.power, "kind": type("Own", (Dense,), {})},
    "solve": {"op": OP, "b": normal(4), "solver": Eigh(), "dense": True},
    "from_state": {"state": solvers.state(OP)},
    "state": {"op": OP},
    "storable": {"kind": type("Stored", (), {}), "name": "a name of a test"},
}
ESTIMATE = {
    "op": OP,
    "samples": 2,
    "rtol": None,
    "atol": None,
    "max_samples": 50,
    "batch_size": 3,
    "generator": torch.Generator(),
    "on_failure": "raise",
    "progress": False,
}
SEARCH = {
    "op": OP,
    "k": 2,
    "rtol": 1e-3,
    "atol": 0.0,
    "max_products": 100,
    "basis_size": 4,
    "generator": torch.Generator(),
    "on_failure": "warn",
    "progress": False,
}
GOOD |= {
    "trace": {**ESTIMATE, "method": "hutchinson"},
    "diagonal": {**ESTIMATE, "method": "hutchinson"},
    "frobenius_norm": ESTIMATE,
    "logdet": {**ESTIMATE, "damping": 0.1, "method": "slq", "steps": 4},
    "quadratic_form": {
        "op": OP,
        "x": normal(4),
        "function": torch.sqrt,
        "steps": 5,
        "rtol": 0.1,
        "atol": 0.0,
        "on_failure": "raise",
    },
    "spectral_density": {
        "op": OP,
        "method": "slq",
        "samples": 2,
        "steps": 3,
        "grid": 9,
        "width": 0.1,
        "batch_size": 2,
        "generator": torch.Generator(),
        "progress": False,
    },
    "eigsh": {
        **SEARCH,
        "which": "LA",
        "preconditioner": None,
        "method": "lanczos",
        "search_copies": True,
        "v0": normal(4),
        "storage": None,
        "state": None,
        "checkpoint": None,
    },
    "svds": SEARCH,
}
#: Public names that take no options of a user: contracts, results and errors.
OTHERS = {
    *("BasisSolver", "Damping", "IterativeSolver", "LinearOperator", "MatrixIteration", "Place", "Solver"),
    *("Density", "Eigenpairs", "Estimate", "SingularTriplets", "Solution", "SolveInfo"),
    *(name for name in solvers.__all__ if name.endswith(("Error", "Warning"))),
}

HOSTILE: dict[str, Any] = {
    "nan": nan,
    "inf": inf,
    "-inf": -inf,
    "-1": -1,
    "0": 0,
    "0.5": 0.5,
    "True": True,
    "None": None,
    "'x'": "x",
    "''": "",
    "huge": 10**400,
    "complex": 1j,
    "list": [nan],
    "dict": {"a": 1},
    "object": object(),
    "tensor": torch.full((2,), nan, dtype=F64),
    "complex tensor": torch.ones(3, 3, dtype=torch.complex64),
    "bool tensor": torch.tensor(True),
}
NUMBERS = {"rtol", "atol", "min_progress", "damp", "tolerance", "lam", "fraction", "damping", "exponent", "scalar"}
POSITIVE = {"floor", "smallest", "scale", "width"}


def allowed(public: str, option: str, hostile: str, annotation: str) -> bool:
    """Whether a hostile value has a meaning for an option after all."""
    match hostile:
        case "None":
            return "None" in annotation or (public, option) in {("storable", "kind")}
        case "True":
            return "bool" in annotation
        case "0":
            return option in NUMBERS or (public, option) in {
                ("Segment", "start"),
                ("polar", "steps"),
                ("Function", "device"),
                ("from_scipy", "device"),
                ("identity", "device"),
            }
        case "0.5":
            return option in NUMBERS | POSITIVE
        case "-1":
            return option in {"exponent", "scalar", "lam"} and public in {"power", "Scaled", "Shifted"}
        case "'x'" | "''":
            return option in {"name", "storage"}
        case "object" | "dict":
            return option == "state"
        case "tensor":
            tensors = {"values", "tensors", "root", "matrix", "x", "b", "v0", "places"}
            return option in tensors
        case "complex tensor":
            return option in {"x", "b", "v0"}
        case "bool tensor":
            return option in {"x", "b", "v0"}
    return False


#: How messages call an option, if not by its name.
OTHER_WORDS = {
    "factors": ("factor", "dense takes a"),
    "solvers": ("solver",),
    "lam": ("damping",),
    "fraction": ("damping",),
    "size": ("a vector of 0",),
    "root": ("tensors",),
    "gram": ("the gram matrix",),
}


def call(public: str, options: Mapping[str, Any]) -> Any:
    function: Callable[..., Any] = getattr(solvers, public)
    starred = {"Kronecker": "factors", "Fallback": "solvers"}.get(public)
    if starred is None:
        return function(**options)
    value = options[starred]
    return function(*value) if isinstance(value, (tuple, list)) else function(value)


def test_every_public_name_is_tried() -> None:
    assert GOOD.keys() | OTHERS == set(solvers.__all__)
    for public, good in GOOD.items():
        parameters = inspect.signature(getattr(solvers, public)).parameters
        assert set(parameters) == set(good), public
        if public not in ("rule", "storable"):  # which register something
            call(public, good)


@pytest.mark.parametrize("public", GOOD)
def test_hostile_values_are_refused_by_name(public: str) -> None:
    parameters = inspect.signature(getattr(solvers, public)).parameters
    accepted, unclear = [], []
    for option in GOOD[public]:
        for hostile, value in HOSTILE.items():
            if allowed(public, option, hostile, str(parameters[option].annotation)):
                continue
            try:
                call(public, {**GOOD[public], option: value})
                accepted.append(f"{option}={hostile}")
            except (TypeError, ValueError) as error:
                if not any(word in str(error).lower() for word in (option, *OTHER_WORDS.get(option, ()))):
                    unclear.append(f"{option}={hostile}: {error}")
    assert not accepted
    assert not unclear


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (lambda v: arguments.number("n", v, low=0, open_high=True, high=1), [0, 0.5], [1, -1, nan, "x", True, 10**400]),
        (lambda v: arguments.number("n", v, tensor=True), [torch.tensor(0.5)], [torch.ones(2), torch.tensor(nan)]),
        (lambda v: arguments.whole("n", v, low=0), [0, 7], [-1, 2.0, True, "1", 2**63]),
        (lambda v: arguments.flag("n", v), [True, False], [None, 1, "yes"]),
        (lambda v: arguments.choice("n", v, ("a", "b"), optional=True), ["a", None], ["c", 1, torch.ones(2)]),
        (lambda v: arguments.function("n", v), [len], [None, 1]),
        (lambda v: arguments.real_tensor("n", v), [torch.ones(2)], [None, torch.tensor(1), torch.ones(1) * 1j]),
        (lambda v: arguments.shape("n", v), [(), (2, 3), [0]], [3, "x", (1.5,), (-1,), None]),
        (lambda v: arguments.all_of("n", v, arguments.whole), [(1, 2), []], [1, "x", (0,), None]),
    ],
)
def test_checks_take_and_refuse(check: Callable[[Any], Any], good: list[Any], bad: list[Any]) -> None:
    for value in good:
        check(value)
    for value in bad:
        with pytest.raises((TypeError, ValueError), match=r"\bn\b"):
            check(value)

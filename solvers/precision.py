"""The precision that numbers are computed in: float32 at least, whatever the process or an autocast region asks for."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import cache
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

#: Where torch has a precision for products of float32 numbers, and the names of full precision.
_TORCH: Any = torch.backends
_BACKENDS = _TORCH.cuda.matmul, _TORCH.mkldnn.matmul
_FULL = "ieee", "none"


#: Kinds of devices with an autocast of their own.
_AUTOCASTING = "cpu", "cuda", "xpu", "mps"

P = ParamSpec("P")
T = TypeVar("T")


class HasDtype(Protocol):
    """Anything with a dtype: a tensor, an operator, a set of parameters."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of its numbers."""


def working_dtype(of: HasDtype | torch.dtype) -> torch.dtype:
    """The dtype where it has at least float32's precision, else float32 (complex64 for complex numbers)."""
    return _at_least_float32(of if isinstance(of, torch.dtype) else of.dtype)


@cache
def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)  # an operation of torch, at its price


def widen(x: Tensor) -> Tensor:
    """The tensor in its :func:`working_dtype`; itself if that is its dtype."""
    dtype = working_dtype(x)
    return x if x.dtype == dtype else x.to(dtype)


@cache
def multiplies_bfloat16_faster(device: torch.device) -> bool:
    """Whether a device has units for products of bfloat16 matrices, several times as fast as those of float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # from torch 2.10 on
    return bool(known.get("amx_bf16") or known.get("avx512_bf16"))


@cache
def _asks_quietly() -> bool:
    """Whether torch says what was asked for without a warning; that of 2.9 recommends its newer interface."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with suppress(RuntimeError):
            torch.get_float32_matmul_precision()
    return not said


def reduced() -> bool:
    """Whether the process has asked torch for products of float32 numbers in less than float32, by any of its APIs."""
    with suppress(RuntimeError):  # the backends were set one by one
        if _asks_quietly() and torch.get_float32_matmul_precision() == "highest":  # the quick answer, nearly always
            return False
    return any(backend.fp32_precision not in _FULL for backend in _BACKENDS)


def without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: a function that computes as outside of ``torch.autocast`` where its caller is inside.

    An autocast region is meant for the passes of a model: for factors, eigenbases, solves and steps its bfloat16
    products are as wrong as TF32, and functions that do not know it refuse what it makes of their numbers.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch._C._is_any_autocast_enabled():
            return function(*args, **kwargs)
        with torch._C._DisableAutocast():
            return function(*args, **kwargs)

    return call


class Autocast:
    """The autocast regions that stood where this was made, to be entered again by what belongs to the user's passes.

    Attributes:
        regions: Kind of device and dtype of each; empty outside of autocast.
    """

    def __init__(self) -> None:
        self.regions: tuple[tuple[str, torch.dtype], ...] = ()
        if torch._C._is_any_autocast_enabled():
            kinds = (k for k in _AUTOCASTING if torch.amp.is_autocast_available(k) and torch.is_autocast_enabled(k))
            self.regions = tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)

    def __call__(self) -> AbstractContextManager[None]:
        """A block within these regions."""
        return self._entered() if self.regions else nullcontext()

    @contextmanager
    def _entered(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, dtype in self.regions:
                # Autocast keeps the casts of parameters, which may have moved since.
                stack.enter_context(torch.autocast(kind, dtype, cache_enabled=False))
            yield

    def around(self, function: Callable[P, T]) -> Callable[P, T]:
        """The function, called within these regions; itself where there are none."""
        if not self.regions:
            return function

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            with self():
                return function(*args, **kwargs)

        return call


class FullFloat32:
    """A block in which products of float32 numbers are float32 products, whatever the process has asked torch for.

    TF32 and bfloat16 products are good enough for the passes of a model, but not for factors, eigenbases and solves,
    whose errors they multiply by a condition number. The setting belongs to the process: while one thread is inside,
    others get full products as well, and the last one to leave puts the setting back. Autocast belongs to the thread,
    and ends with its own block.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._own = threading.local()
        self._inside = 0
        self._undo: list[tuple[Any, str]] = []

    def __enter__(self) -> None:
        stack: list[Any] = self._own.__dict__.setdefault("stack", [])
        stack.append(torch._C._DisableAutocast() if torch._C._is_any_autocast_enabled() else None)
        if stack[-1] is not None:
            stack[-1].__enter__()
        with self._lock:
            if not self._inside and reduced():
                whole = _TORCH.fp32_precision
                # What follows the setting for all backends goes on following it.
                now = [(backend, backend.fp32_precision) for backend in _BACKENDS]
                self._undo = [(backend, "none" if p == whole else p) for backend, p in now if p not in _FULL]
                for backend, _ in self._undo:
                    backend.fp32_precision = "ieee"
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                undo, self._undo = self._undo, []
                for backend, precision in undo:
                    backend.fp32_precision = precision
        if (guard := self._own.stack.pop()) is not None:
            guard.__exit__(*error)


full_float32 = FullFloat32()

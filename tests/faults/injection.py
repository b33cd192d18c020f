"""A run of any method on a small model, and the faults that are put into it."""

from __future__ import annotations

import copy
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from precond import methods
from solvers import SolverError
from solvers.tree import pieces
from tests.precond.test_protocol import OPTIONS

METHODS = {method.name: method for method in methods()}

#: What becomes of a run with a fault. It survives: it is the run without the fault, bit for bit (to rounding where the
#: step found a way round an error by itself), and where the fault is a batch, parameters stay finite and moderate. It
#: is refused in words, and nothing has changed. It is another run and nobody said so. Or the words do not tell.
Outcome = Literal["survived", "refused", "silent", "unclear"]

#: Errors that memory, a kernel and a user raise.
RAISED: dict[str, type[BaseException]] = {
    "out of memory": torch.OutOfMemoryError,
    "error": RuntimeError,
    "interrupt": KeyboardInterrupt,
}


class At(TorchDispatchMode):
    """Raises at one of torch's operations, counted from the last call of :meth:`after`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.at, self.error = 0, 0, torch.OutOfMemoryError

    def after(self, at: int, error: type[BaseException] = torch.OutOfMemoryError) -> At:
        self.seen, self.at, self.error = 0, at, error
        return self

    @property
    def struck(self) -> bool:
        return 0 < self.at <= self.seen

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace != "profiler":  # torch's own labels around a step, which compute nothing
            self.seen += 1
        if self.seen == self.at and function.namespace != "profiler":
            raise self.error("simulated")
        return function(*args, **(kwargs or {}))


class Run:
    """A small network trained by a method; a step of it is a function of its number alone."""

    def __init__(
        self,
        name: str,
        width: int = 6,
        dtype: torch.dtype = torch.float64,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.name, self.method, self.dtype = name, METHODS[name], dtype
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, 3))
        self.model.to(dtype)
        self.loss_fn = nn.MSELoss()
        self.spoil: Callable[[Tensor], Tensor] = lambda loss: loss
        given = {"momentum": 0.5, **OPTIONS.get(name, {}), **options}
        if self.method.needs == "layers":
            self.optimizer = self.method.cls(self.model, self.loss_fn, **{"lr": 0.01, **given})
        elif name in ("HessianFree", "CurveBall"):
            self.optimizer = self.method.cls(self.model.parameters(), self.loss_fn, **given)
        else:
            self.optimizer = self.method.cls(self.model.parameters(), **given)

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 5, generator=generator, dtype=torch.float64).to(self.dtype)
        y = torch.randn(8, 3, generator=generator, dtype=torch.float64).to(self.dtype)
        out = self.model(x)
        return self.spoil((out - y).flatten() * 0.2 if self.name == "GaussNewton" else self.loss_fn(out, y))

    def backward(self, step: int) -> None:
        if self.method.needs != "closure":
            self.optimizer.zero_grad()
            self.loss(step).backward()

    def move(self, step: int) -> None:
        if self.method.needs == "closure":
            self.optimizer.step(lambda: self.loss(step))
        else:
            self.optimizer.step()

    def once(self, step: int) -> None:
        self.backward(step)
        self.move(step)

    def steps(self, *numbers: int) -> Run:
        for step in numbers:
            self.once(step)
        return self

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def held(self) -> list[Any]:
        """Everything that must be as before: parameters, state, options, the global random stream."""
        saved = copy.deepcopy(self.optimizer.state_dict())
        return [
            *self.values(),
            torch.get_rng_state(),
            *(item for _, item in pieces(saved) if not isinstance(item, dict)),
        ]


def same(first: list[Any], second: list[Any]) -> bool:
    """Bit for bit."""
    return len(first) == len(second) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else _equal(a, b)
        for a, b in zip(first, second, strict=True)
    )


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and (isinstance(a, (list, tuple)) or a == b)


def clear(error: BaseException) -> bool:
    """Whether an error speaks for itself: raised in words by the library, not by torch in the middle of something."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return "site-packages" not in last.filename and (last.line or "").startswith("raise") and len(str(error)) > 40


@contextmanager
def listening() -> Iterator[list[str]]:
    """What is said meanwhile: warnings, and records of the library's loggers."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("precond")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *_: said.append(str(message))  # type: ignore[assignment]
            yield said
    finally:
        logger.removeHandler(handler)


def raised(name: str, kind: str, step: int, at: int) -> Outcome | None:
    """An error at an operation of a step, caught; the batch again, and one more.

    Returns:
        ``None`` if there are not so many operations.
    """
    mode = At()
    run = Run(name).steps(*range(step))
    before, passes = run.held(), at
    with listening() as said:
        try:
            with mode.after(at, RAISED[kind]):
                run.backward(step)
                passes = mode.seen
            before = run.held()  # with the statistics that the passes have brought
            with mode:
                run.move(step)
        except RAISED[kind] as error:
            if str(error) != "simulated" and not isinstance(error, SolverError):
                return "unclear"
        else:
            if not mode.struck:
                return None
            if said:
                return "refused"  # a decomposition that failed keeps the last one, and says so
            return "survived" if _close(run, name, step + 1) else "silent"
        stepping = mode.at > passes
        if not same(before, run.held()) if stepping else not same(run.values(), clean(name, step)):
            return "silent"
        try:
            run.steps(step, step + 1)
        except Exception:
            return "unclear"
    return "survived" if same(run.values(), clean(name, step + 2)) else "silent"


def _close(run: Run, name: str, steps: int) -> bool:
    """A way round an error (another precision, another formula) leads to the same numbers up to rounding."""
    pairs = zip(run.values(), clean(name, steps), strict=True)
    return all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in pairs)


_CLEAN: dict[tuple[str, int], list[Tensor]] = {}


def clean(name: str, steps: int) -> list[Tensor]:
    """Parameters after steps without a fault."""
    if (name, steps) not in _CLEAN:
        _CLEAN[name, steps] = Run(name).steps(*range(steps)).values()
    return _CLEAN[name, steps]


def operations(name: str, step: int) -> tuple[int, int]:
    """Operations of a step's passes, which the loop itself runs, and of all of it."""
    mode, run = At(), Run(name).steps(*range(step))
    with mode.after(0):
        run.backward(step)
        passes = mode.seen
        run.move(step)
    return passes, mode.seen


def batch(name: str, factor: float, step: int) -> Outcome:
    """A batch whose loss is multiplied by NaN, inf, or a number that is very large or small; then two good ones."""
    run = Run(name, dtype=torch.float32).steps(*range(step))
    before = run.held()
    with listening() as said:
        run.spoil = lambda loss: loss * factor
        try:
            run.once(step)
        except Exception as error:
            return "refused" if clear(error) and same(before, run.held()) else "unclear"
        run.spoil = lambda loss: loss
        if said:
            return "refused" if same(before[:6], run.values()) else "silent"
        run.steps(step + 1, step + 2)
    finite = all(bool(p.isfinite().all()) and float(p.abs().max()) < 1e4 for p in run.values())
    return "survived" if finite else "silent"


def spoilt_state(name: str, index: int) -> Outcome | None:
    """One NaN in one tensor of the optimizer's state in the middle of a run."""
    run = Run(name).steps(*range(3))
    held = [
        x for _, x in pieces(run.optimizer.state_dict()["state"]) if isinstance(x, Tensor) and x.is_floating_point()
    ]
    held = [x for x in held if x.numel()]
    if index >= len(held):
        return None
    held[index][tuple(n - 1 for n in held[index].shape)] = torch.nan
    with listening() as said:
        try:
            run.steps(*range(3, 10))
        except Exception as error:
            return "refused" if clear(error) and _finite(run) else "unclear"
    if not _finite(run):
        return "silent"
    return "refused" if said else "survived" if same(run.values(), clean(name, 10)) else "silent"


def _finite(run: Run) -> bool:
    return all(bool(p.isfinite().all()) for p in run.values())


def _first(saved: Any, change: Callable[[Tensor], Tensor], last: bool = False) -> None:
    """Replace one tensor of a state, the first or the last with an axis."""
    found = [(path, x) for path, x in pieces(saved["state"]) if isinstance(x, Tensor) and x.ndim]
    path, x = found[-1 if last else 0]
    place = saved["state"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = change(x)


def _without_one(saved: Any) -> None:
    entries = saved["state"][0]
    inner = next(iter(entries["blocks"].values())) if "blocks" in entries else entries
    if len(inner) > 1:
        del inner[next(key for key, value in inner.items() if isinstance(value, (Tensor, dict)))]
    else:  # nothing tells that it was there
        saved.clear()


def _nan_option(saved: Any) -> None:
    saved["param_groups"][0]["lr"] = float("nan")


#: Ways in which a file differs from what was saved.
FILES: dict[str, Callable[[Any], Any]] = {
    "nan": lambda saved: _first(saved, lambda x: torch.full_like(x, torch.nan)),
    "inf, last": lambda saved: _first(saved, lambda x: torch.full_like(x, torch.inf), last=True),
    "another shape": lambda saved: _first(saved, lambda x: torch.cat([x, x])),
    "another shape, last": lambda saved: _first(saved, lambda x: torch.cat([x, x]), last=True),
    "an entry is missing": _without_one,
    "an option is nan": _nan_option,
    "no groups": lambda saved: saved.pop("param_groups"),
    "one group too many": lambda saved: saved["param_groups"].append(saved["param_groups"][0]),
    "whole numbers": lambda saved: _first(saved, lambda x: torch.ones_like(x, dtype=torch.int64)),
}


def loaded(name: str, change: str) -> Outcome:
    """A state that does not fit is loaded, into an optimizer in the middle of a run."""
    run = Run(name).steps(*range(3))
    if change == "a wider model":
        saved = Run(name, width=8).steps(*range(3)).optimizer.state_dict()
    else:
        saved = copy.deepcopy(run.optimizer.state_dict())
        FILES[change](saved)
    before = run.held()
    try:
        run.optimizer.load_state_dict(saved)
    except Exception as error:
        if not (clear(error) or isinstance(error, ValueError)):
            return "unclear"
        if not same(before, run.held()):
            return "silent"
        return "refused" if same(run.steps(3, 4).values(), clean(name, 5)) else "silent"
    return "silent"


def load_raises(name: str, kind: str, at: int) -> Outcome | None:
    """An error at an operation of a load."""
    run, other, mode = Run(name).steps(*range(3)), Run(name).steps(*range(5)), At()
    before = run.held()
    try:
        with mode.after(at, RAISED[kind]):
            run.optimizer.load_state_dict(other.optimizer.state_dict())
    except BaseException as error:
        if "simulated" not in str(error):
            return "unclear"
        return "survived" if same(before, run.held()) and same(run.steps(3, 4).values(), clean(name, 5)) else "silent"
    return None if not mode.struck else "silent"


def spread(first: int, last: int, count: int, shift: int = 0) -> list[int]:
    """About ``count`` numbers of a range, its ends included."""
    if last - first + 1 <= count:
        return list(range(first, last + 1))
    if count == 1:
        return [(first + last) // 2 + shift]
    inner = {first + (last - first) * i // (count - 1) for i in range(count)}
    return sorted({min(last, max(first, n + (shift if first < n < last else 0))) for n in inner})


def injections(name: str, long: bool) -> Iterator[tuple[str, Outcome]]:
    """Faults of every kind at moments spread over a run of a method, and what became of each.

    Args:
        name: The method.
        long: All that the record is made of; otherwise a few of each kind.
    """
    shift = sorted(METHODS).index(name)  # so that the short forms of two methods differ
    kinds = list(RAISED)
    for step in (0, 2) if long else (2 * (shift % 2),):
        passes, last = operations(name, step)
        places = [*spread(1, passes, 4 if long else 1, shift)] if passes else []
        places += spread(passes + 1, last, 24 if long else 4, shift)
        for index, at in enumerate(places):
            kind = kinds[(index + shift) % 3]
            yield from _named(kind, raised(name, kind, step, at))
    factors = {"nan batch": float("nan"), "inf batch": float("inf"), "huge batch": 1e30, "tiny batch": 1e-30}
    for index, (kind, factor) in enumerate(factors.items()):
        for step in (0, 2) if long else (2,) * (index == shift % 4):
            yield from _named(kind, batch(name, factor, step))
    for index in range(0, 24, 2) if long else (shift % 3,):
        yield from _named("nan in the state", spoilt_state(name, index))
    files = [*FILES, "a wider model"]
    for change in files if long else files[shift % len(files) :: len(files)]:
        yield from _named("a file that does not fit", loaded(name, change))
    for index, at in enumerate((1, 2, 3, 5, 8, 13) if long else (2,)):
        kind = kinds[(index + shift) % 3]
        yield from _named(f"{kind}, loading", load_raises(name, kind, at))


def _named(kind: str, outcome: Outcome | None) -> Iterator[tuple[str, Outcome]]:
    if outcome is not None:
        yield kind, outcome

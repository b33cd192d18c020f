"""Measurements as tables, and where a page holds them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ours
import peers_curvature  # noqa: F401  (registers its entries)
import peers_optim
import torch
from registry import ENTRIES, Entry
from timing import Ratio, ratio
from workloads import Workload, epoch_data, make

from tests.peak_memory import peak_kib, resident_kib

#: Operations that are affordable, or mean something, on some workloads only.
WHERE = {
    "dense GGN": ("mlp-tiny",),
    "top-10 Hessian eigenvalues": ("mlp-small",),
    "NTK, 64 samples": ("mlp-small", "cnn"),
    "Hessian trace, 30 vectors": ("mlp", "cnn"),
    "Hessian density, 2 x 20 products": ("mlp",),
    "Laplace fit diag": ("mlp-small",),
    "Laplace fit kron": ("mlp-small",),
    "Laplace fit full": ("mlp-tiny",),
}
#: How far two results of one operation, cosine, may be apart.
AGREE = 0.9999


class DisagreementError(AssertionError):
    """Two entries of one operation do not compute the same."""


def _reference(w: Workload, kind: str) -> Callable[[], object]:
    """What is counted: a gradient, a pass of gradients over the data of a fit, or a step of SGD."""
    if kind == "optim":
        return peers_optim.sgd(w)
    if kind == "laplace":
        x, y = epoch_data(w, 1000)
        batches = list(zip(x.split(250), y.split(250), strict=True))
        return lambda: [torch.autograd.grad(w.loss_fn(w.model(a), b), w.params) for a, b in batches]
    return lambda: torch.autograd.grad(w.loss(), w.params)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    sink = io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def measured(entry: Entry, name: str, seconds: float, interval: int = 1) -> tuple[Ratio, torch.Tensor | None]:
    """The cost of an entry on a workload, and its result where others can be compared with it."""
    w = make(name)
    with _quiet():
        built = entry.build(w, interval=interval) if entry.kind == "optim" else entry.build(w)
        run, canonical = built if isinstance(built, tuple) else (built, None)
        for _ in range(interval if entry.kind == "optim" else 0):
            run()
        found = ratio(_reference(make(name), entry.kind), run, block=interval, seconds=seconds)
        return found, None if canonical is None else canonical(run()).detach().double().reshape(-1)


def cell(row: Ratio | str) -> str:
    """Median, quartiles and number of ratios; or why there are none."""
    if isinstance(row, str):
        return row
    return f"{row.median:.3g} ({row.low:.3g} to {row.high:.3g}, n={row.n})"


def _tried(entry: Entry, name: str, seconds: float, interval: int = 1) -> tuple[Ratio | str, torch.Tensor | None]:
    """As :func:`measured`; a peer that fails is a row of its own, ours that fails is an error."""
    try:
        return measured(entry, name, seconds, interval)
    except ImportError:
        return "", None  # not installed
    except Exception:
        if is_ours(entry):
            raise
        return "fails", None


def is_ours(entry: Entry) -> bool:
    return entry.build.__module__.startswith("ours")


def curvature(workloads: Iterable[str], only: str, seconds: float) -> Iterator[str]:
    """Lines of a table of operations, in gradients."""
    chosen = list(workloads)
    yield from ("| operation | workload | ours | beside |", "| --- | --- | --- | --- |")
    of_curvature = [e for e in ENTRIES if e.kind in ("curvature", "laplace") and only in e.meta["op"]]
    for op in dict.fromkeys(e.meta["op"] for e in of_curvature):
        entries = sorted((e for e in of_curvature if e.meta["op"] == op), key=is_ours, reverse=True)
        for name in WHERE.get(op, tuple(w for w in chosen if w != "gpt")):
            yield f"| {op} | {name} | {' | '.join(_beside(op, name, entries, seconds))} |"


def _beside(op: str, name: str, entries: list[Entry], seconds: float) -> tuple[str, str]:
    """Ours and the others, best first, on one workload."""
    results: dict[str, torch.Tensor] = {}
    mine: dict[str, str] = {}
    rows: dict[str, Ratio] = {}
    failed: list[str] = []
    for entry in entries:
        row, result = _tried(entry, name, seconds)
        if result is not None:
            _agree(op, name, entry.name, result, results)
        if isinstance(row, str):
            failed += [f"{entry.name} {row}"] if row else []
        elif is_ours(entry):
            mine[entry.name] = cell(row)
        else:
            rows[entry.name] = row
    own = "; ".join(text if len(mine) == 1 else f"{who}: {text}" for who, text in mine.items())
    peers = [f"{peer} {cell(row)}" for peer, row in sorted(rows.items(), key=lambda item: item[1].median)]
    return own, "; ".join([*peers, *failed])


def _agree(op: str, name: str, who: str, result: torch.Tensor, results: dict[str, torch.Tensor]) -> None:
    """Compare a result with the first one of its operation."""
    for other, known in results.items():
        if known.shape != result.shape or torch.cosine_similarity(known, result, dim=0) < AGREE:
            raise DisagreementError(f"{op} on {name}: {who} and {other} do not compute the same.")
    if not results:
        results[who] = result


def steps(workloads: Iterable[str], only: str, seconds: float) -> Iterator[str]:
    """Lines of a table of optimizers, in steps of SGD, refreshed in every step and in every tenth."""
    chosen = list(workloads)
    yield f"| optimizer | refresh every | {' | '.join(chosen)} |"
    yield "| --- | --- |" + " --- |" * len(chosen)
    for entry in ENTRIES:
        if entry.kind != "optim" or only not in entry.name:
            continue
        for interval in (1,) if entry.meta.get("fixed") else (1, 10):
            cells = [cell(_tried(entry, name, seconds, interval)[0]) for name in chosen]
            if any(cells):
                yield f"| {entry.name} | {interval} | {' | '.join(cells)} |"


def peak(build: Callable[..., Any], name: str) -> int | str:
    """KiB that a process of its own takes for a model and three steps, every one of which refreshes; or what it said.

    The process is a copy of this one, in which torch and the entries are loaded already.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # a copy has none of the threads that its operations would wait for
            with _quiet():
                before = resident_kib()
                step = build(make(name), interval=1)
                for _ in range(3):
                    step()
            answer: int | str = peak_kib() - before
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(write, json.dumps(answer).encode()[:4096])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    found: int | str = json.loads(text or '"was ended"')
    return found


def memory(workloads: Iterable[str], only: str, seconds: float) -> Iterator[str]:
    """Lines of a table of the peak of training, in that of SGD; in no need of ``seconds``."""
    chosen = list(workloads)
    yield f"| optimizer | refresh every | {' | '.join(chosen)} |"
    yield "| --- | --- |" + " --- |" * len(chosen)
    with _quiet():  # what is loaded at first use is no part of a step
        peers_optim.sgd(make(chosen[0]))()
    plain = {name: peak(lambda w, interval: peers_optim.sgd(w), name) for name in chosen}
    for entry in ENTRIES:
        if entry.kind != "optim" or only not in entry.name:
            continue
        cells = []
        for name in chosen:
            found, base = peak(entry.build, name), plain[name]
            if isinstance(found, str) or isinstance(base, str):
                if is_ours(entry):
                    raise RuntimeError(f"{entry.name} on {name}: {found}")
                cells.append("" if "ModuleNotFoundError" in str(found) else "fails")
            else:
                cells.append(f"{found / base:.2f}")
        if any(cells):
            yield f"| {entry.name} | 1 | {' | '.join(cells)} |"


def put(page: str, name: str, lines: list[str]) -> str:
    """The page with a table between its marks, ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``.

    Rows of the table that was there, which are known by their first two cells, stay where the new one has none.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    found = re.compile(f"{re.escape(begin)}\n(.*?){re.escape(end)}", re.DOTALL)
    old = found.search(page)
    if old is None:
        raise ValueError(f"the page has no marks {begin} and {end}.")
    before = old[1].strip().splitlines()
    rows = {_key(line): line for line in (before[2:] if before[:1] == lines[:1] else [])}
    rows |= {_key(line): line for line in lines[2:]}
    whole = "\n".join([*lines[:2], *rows.values()])
    return found.sub(lambda _: f"{begin}\n\n{whole}\n\n{end}", page)


def _key(line: str) -> tuple[str, ...]:
    return tuple(text.strip() for text in line.split("|")[1:3])


def registered() -> list[Any]:
    """All entries, in the order of the tables."""
    assert ours
    return list(ENTRIES)

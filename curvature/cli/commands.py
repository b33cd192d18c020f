"""The commands, as functions of a source."""

from __future__ import annotations

import time
import warnings
from argparse import Namespace
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import solvers
from curvature.cli import output
from curvature.cli.source import Source, UsageError
from curvature.comparison import compare
from curvature.compression import quantize
from curvature.estimation.checkpoint import Checkpoint, save
from curvature.estimation.coverage import coverage
from curvature.matrices.by_name import MATRICES
from curvature.matrices.dataset_operator import DatasetOperator
from curvature.matrices.resumable import resumable_eigsh
from curvature.model.determinism import NondeterministicError, NotOneLossWarning, check_deterministic
from curvature.plots.spectrum import density as plot_density
from curvature.reports import report
from solvers.files import save_figure

_PICTURES = (".svg", ".png", ".pdf")


@dataclass(frozen=True)
class Answer:
    """The output of a command.

    Attributes:
        text: For people.
        content: For programs, as JSON can hold it, tensors being lists.
        good: Whether it is as exact as was asked for.
    """

    text: str
    content: dict[str, Any]
    good: bool = True


def run(source: Source, given: Namespace) -> Answer:
    """Run a command.

    Args:
        source: Model, loss and data.
        given: The parsed command line.
    """
    start = time.monotonic()
    match given.command:
        case "report":
            return _report(source, given)
        case "coverage":
            found = coverage(source.model, source.loss_fn, source.data, **source.options)
            return Answer(str(found), found.to_dict())
        case "quantize":
            return _quantize(source, given)
    op, head = _operator(source, given)
    answer = {"eigs": _eigs, "density": _density, "trace": _trace}[given.command](op, given)
    seconds = time.monotonic() - start
    about = {"source": source.name, "command": given.command, "matrix": given.matrix, "seed": given.seed, **head}
    about |= {"version": version("precond"), "seconds": round(seconds, 3)}
    top = f"{op.title} of {head['model']} ({head['parameters']:,} parameters) under {head['loss_fn']}"
    text = f"{top}, loss {head['loss']:.6g}\n\n{answer.text}\n{answer.content['products']} products, {seconds:.1f} s"
    return Answer(text, about | answer.content, answer.good)


def compared(given: Namespace) -> Answer:
    """Compare saved reports."""
    if len(given.reports) < 2:
        raise UsageError(f"a comparison takes two reports or more, got {given.reports[0]} only.")
    for place in given.out:
        _folder_of("--out", place)
        if Path(place).suffix not in (".html", ".json"):
            raise UsageError(f"--out takes .html or .json, not {place!r}.")
    for place in given.reports:
        if not Path(place).is_file():
            raise UsageError(f"there is no file {place}.")
    if given.names is not None and len({*given.names}) != len(given.reports):
        raise UsageError(f"--names takes {len(given.reports)} different names, one for each report.")
    found = compare(*given.reports, names=given.names)
    for place in given.out:
        found.save(place)
    return Answer(str(found), found.to_dict())


def _operator(source: Source, given: Namespace) -> tuple[DatasetOperator, dict[str, Any]]:
    """The matrix, and facts about its loss."""
    op = MATRICES[given.matrix](source.model, source.loss_fn, source.data, progress=False, **source.options)
    losses: list[Tensor] = []
    with warnings.catch_warnings():
        if not given.no_check:
            warnings.simplefilter("ignore", NotOneLossWarning)  # refused below, together with the order of the data
        divisor = op.problem.visit(lambda evaluation: losses.append(evaluation.loss().detach()), "loss")
    loss = float(sum(losses) / divisor)
    if not loss - loss == 0:
        raise solvers.NonFiniteError(f"the loss is {loss}, so it has no curvature. Look at the data and the weights.")
    if not given.no_check:
        try:
            check_deterministic(source.model, source.data, output=source.options.get("output"))
        except NondeterministicError as error:
            raise NondeterministicError(
                f"{error}. --eval sets the model's mode, --no-check goes on as it is."
            ) from None
    facts = {"model": type(source.model).__name__, "loss_fn": _name(source.loss_fn), "loss": loss}
    return op, facts | {"parameters": op.shape[1]}


def _eigs(op: DatasetOperator, given: Namespace) -> Answer:
    if given.vectors is not None:
        _folder_of("--vectors", given.vectors)
    options: dict[str, Any] = {
        "rtol": given.rtol,
        "max_products": given.max_products,
        "storage": given.storage,
        **_search(op, given),
    }
    k = min(given.k, op.shape[1])
    if given.resume is None:
        pairs = solvers.eigsh(op, k, given.which, **options)
    else:
        pairs = resumable_eigsh(op, _kept(given), k, given.which, **options)
    names = ("values", "residuals", "converged")
    if given.vectors is not None:
        save(given.vectors, {name: getattr(pairs, name) for name in ("vectors", *names)})
    content = {name: getattr(pairs, name) for name in names}
    content |= {"which": given.which, "rtol": given.rtol, "complete": pairs.complete, "products": pairs.products}
    good = pairs.complete and bool(pairs.converged.all())
    return Answer(output.eigenvalues(pairs), content, good)


def _density(op: DatasetOperator, given: Namespace) -> Answer:
    if given.out is not None:
        _folder_of("--out", given.out)
        if Path(given.out).suffix not in _PICTURES:
            raise UsageError(f"--out draws {', '.join(_PICTURES)}, not {given.out!r}; numbers come with --json.")
    found = solvers.spectral_density(op, given.method, samples=given.samples, steps=given.steps, **_search(op, given))
    if given.out is not None:
        save_figure(plot_density(found).figure, given.out)
    names = ("grid", "density", "stderr", "width", "samples", "products")
    content: dict[str, Any] = {name: getattr(found, name) for name in names}
    content["moments"] = {"value": found.moments.value, "stderr": found.moments.stderr}
    return Answer(output.density(found), content)


def _trace(op: DatasetOperator, given: Namespace) -> Answer:
    found = solvers.trace(op, given.method, samples=given.samples, rtol=given.rtol, **_search(op, given))
    good = given.rtol is None or bool(found.stderr <= given.rtol * found.value.abs())
    content = {"value": found.value, "stderr": found.stderr, "samples": found.samples, "products": found.products}
    return Answer(output.estimate("trace", found), content, good)


def _report(source: Source, given: Namespace) -> Answer:
    for place in given.out:
        _folder_of("--out", place)
        if Path(place).suffix not in (".html", ".json", ".pt"):
            raise UsageError(f"--out takes .html, .json or .pt, not {place!r}.")
    options = {
        "budget": given.budget,
        "matrix": tuple(given.matrix or ("hessian", "ggn")),
        "k": given.k,
        "seed": given.seed,
        "lr": given.lr,
        "resume": None if given.resume is None else _kept(given),
        "progress": _progress(given),
        **source.options,
    }
    if given.dry_run:
        plan = report(source.model, source.loss_fn, source.data, dry_run=True, **options)
        return Answer(str(plan), asdict(plan))
    found = report(source.model, source.loss_fn, source.data, **options)
    for place in given.out:
        found.save(place)
    return Answer(str(found), found.to_dict())


def _quantize(source: Source, given: Namespace) -> Answer:
    if given.out is not None:
        _folder_of("--out", given.out)
        if Path(given.out).suffix != ".pt":
            raise UsageError(f"--out takes .pt, not {given.out!r}.")
    if source.options.get("params") is not None:
        raise UsageError("--params restricts derivatives; --layers says which layers are quantized.")
    found = quantize(
        source.model,
        source.loss_fn,
        source.data,
        bits=given.bits,
        structure=given.structure,
        group="row" if given.group is None else given.group,
        symmetric=not given.asymmetric,
        sequential=given.sequential,
        damping=given.damping,
        layers=given.layers,
        embeddings=given.embeddings,
        generator=torch.Generator(next(source.model.parameters()).device).manual_seed(given.seed),
        progress=_progress(given),
        **source.options,
    )
    if given.out is not None:
        save(given.out, {"state_dict": dict(found.model.state_dict()), "codes": found.tensors()})
    about = {"source": source.name, "command": given.command, "seed": given.seed, "bits": found.bits}
    return Answer(str(found), about | found.to_dict())


def _search(op: DatasetOperator, given: Namespace) -> dict[str, Any]:
    return {"generator": torch.Generator(op.device).manual_seed(given.seed), "progress": _progress(given)}


def _progress(given: Namespace) -> bool | None:
    return False if given.quiet else None


def _kept(given: Namespace) -> Checkpoint:
    _folder_of("--resume", given.resume)
    return Checkpoint(given.resume, given.save_every)


def _folder_of(option: str, place: str) -> None:
    if not Path(place).parent.is_dir():
        raise UsageError(f"{option} {place}: there is no folder {Path(place).parent}.")


def _name(loss_fn: Any) -> str:
    return (
        type(loss_fn).__name__ if isinstance(loss_fn, torch.nn.Module) else getattr(loss_fn, "__name__", "a function")
    )

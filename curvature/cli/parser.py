"""The arguments of the command line, and their help."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any, get_args

from curvature.matrices.by_name import MATRICES
from solvers import __version__
from solvers.eigenpairs.result import Which
from solvers.estimates.spectral_density import DensityMethod
from solvers.estimates.trace import TraceMethod

FACTORED = ("kfac", "ekfac", "foof", "diagonal")
DTYPES = ("float32", "float64", "bfloat16", "float16")

_DESCRIPTION = """\
The curvature of a model's loss: its Hessian, or the Gauss-Newton matrix (GGN),
which for cross-entropy and squared errors is the Fisher information.

SOURCE names a function of yours, module:function or path/to/file.py:function.
It is called without arguments and returns (model, loss_fn, data): the model in
the mode and with the weights to look at, the loss module, and one batch (x, y),
a list of batches or a DataLoader. A dict with these keys may add params, output,
class_dim and batch_dim, as for curvature.hessian.
"""
_EPILOG = """\
exit status:
  0  done
  1  refused or failed, and why is said in one line; or printed, but not as
     exact as was asked for
  2  a wrong command line, or no model, loss and data from SOURCE, or no reports
     to compare

example:
  python -m curvature eigs train.py:problem -k 5 --resume eigs.pt
"""
_COMMANDS = {
    "report": "everything within a time: eigenvalues, trace, density, noise, structures; as text, HTML or JSON",
    "eigs": "eigenvalues at the ends of the spectrum, with residuals",
    "density": "the spectral density, with an error band",
    "trace": "the trace, with its standard error",
    "quantize": "round the weights with the curvature's factors and save them; what each layer costs",
    "compare": "what differs between saved reports, with combined errors; as text, HTML or JSON",
    "coverage": "which curvature every parameter can get in the structured estimates",
}
_NO_CHECK = "go on where dropout, batch statistics or shuffled data leave the loss to chance; one draw is held fixed"


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(
        prog="python -m curvature",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"curvature of precond {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    made = {
        name: commands.add_parser(
            name,
            help=text,
            description=textwrap.fill(f"{text[0].upper()}{text[1:]}.", 80),
            epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for name, text in _COMMANDS.items()
    }
    _compare(made.pop("compare"))
    for name, command in made.items():
        command.add_argument("source", metavar="SOURCE", help="function that returns (model, loss_fn, data)")
        if name not in ("coverage", "quantize"):
            _matrix(command, both=name == "report")
    _report(made["report"])
    _eigs(made["eigs"])
    _density(made["density"])
    _trace(made["trace"])
    _quantize(made["quantize"])
    for name, command in made.items():
        _shared(command)
        if name != "coverage":
            command.add_argument("--seed", metavar="N", type=int, default=0, help="of the random vectors (default: 0)")
        if name not in ("coverage", "report", "quantize"):
            command.add_argument("--no-check", action="store_true", help=_NO_CHECK)
    return top


def _matrix(command: argparse.ArgumentParser, both: bool) -> None:
    if both:
        command.add_argument("--matrix", choices=MATRICES, action="append", help="one of them (default: both)")
    else:
        command.add_argument("--matrix", choices=MATRICES, default="hessian", help="which (default: hessian)")


def _report(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", metavar="FILE", action="append", default=[], help="write it there: .html, .json, .pt")
    command.add_argument("--budget", metavar="SECONDS", type=positive(float), help="time to spend (default: no limit)")
    command.add_argument("--dry-run", action="store_true", help="say what it would cost, and stop")
    command.add_argument("-k", "--k", metavar="N", type=positive(int), default=10, help="eigenvalues (default: 10)")
    command.add_argument("--lr", metavar="X", type=positive(float), help="learning rate: is 2 / lr above them?")
    _resume(command)


def _compare(command: argparse.ArgumentParser) -> None:
    command.add_argument("reports", metavar="REPORT", nargs="+", help="two files or more that reports were saved to")
    command.add_argument("-o", "--out", metavar="FILE", action="append", default=[], help="write it: .html, .json")
    command.add_argument("--names", metavar="NAME", nargs="+", help="one for each (default: those of the files)")
    _output(command)


def _eigs(command: argparse.ArgumentParser) -> None:
    command.add_argument("-k", "--k", metavar="N", type=positive(int), default=10, help="how many (default: 10)")
    command.add_argument(
        "--which",
        choices=get_args(Which),
        default="LA",
        help="LA largest, SA smallest, LM largest in magnitude, BE both ends (default: LA)",
    )
    command.add_argument(
        "--rtol",
        metavar="X",
        type=positive(float),
        default=1e-3,
        help="residual wanted, relative to the eigenvalue, whose own error is about its square (default: 1e-3)",
    )
    command.add_argument("--max-products", metavar="N", type=positive(int), help="products with the matrix at most")
    _resume(command)
    command.add_argument("--storage", metavar="FOLDER", help="keep the vectors on disk, where memory does not do")
    command.add_argument("--vectors", metavar="FILE", help="save values, vectors and residuals there (.pt)")


def _resume(command: argparse.ArgumentParser) -> None:
    command.add_argument("--resume", metavar="FILE", help="keep the run there; go on from it if it exists")
    command.add_argument(
        "--save-every", metavar="SECONDS", type=positive(float), default=60.0, help="how often (default: 60)"
    )


def _density(command: argparse.ArgumentParser) -> None:
    command.add_argument("--method", choices=get_args(DensityMethod), default="slq", help="(default: slq)")
    command.add_argument("--samples", metavar="N", type=positive(int), default=10, help="random vectors (default: 10)")
    command.add_argument("--steps", metavar="N", type=positive(int), default=80, help="products for each (default: 80)")
    command.add_argument("--out", metavar="FILE", help="draw it there: .svg, .png or .pdf (needs matplotlib)")


def _trace(command: argparse.ArgumentParser) -> None:
    command.add_argument("--method", choices=get_args(TraceMethod), help="(default: exact where small, else hutch++)")
    command.add_argument("--samples", metavar="N", type=positive(int), default=100, help="products (default: 100)")
    command.add_argument("--rtol", metavar="X", type=positive(float), help="go on to this relative standard error")


def _quantize(command: argparse.ArgumentParser) -> None:
    command.add_argument("--bits", metavar="X", type=positive(float), default=4.0, help="mean bits (default: 4)")
    command.add_argument("--structure", choices=FACTORED, default="kfac", help="curvature (default: kfac)")
    command.add_argument("--group", metavar="N", type=positive(int), help="inputs that share a scale (default: a row)")
    command.add_argument("--asymmetric", action="store_true", help="a grid whose zero may lie off its middle")
    command.add_argument("--sequential", action="store_true", help="see earlier layers compressed already")
    command.add_argument("--damping", metavar="X", type=positive(float), default=0.01, help="(default: 0.01)")
    command.add_argument("--layers", metavar="GLOB", action="append", help="these only; may be repeated")
    command.add_argument("--embeddings", action="store_true", help="embeddings as well")
    command.add_argument(
        "--out", metavar="FILE", help="save there (.pt): state_dict with rounded weights, and codes, scales, zeros"
    )


def _shared(command: argparse.ArgumentParser) -> None:
    model = command.add_argument_group("model")
    model.add_argument("--params", metavar="GLOB", action="append", help="these parameters only; may be repeated")
    model.add_argument("--device", metavar="NAME", help="move the model there: cpu, cuda, cuda:1 (default: as it is)")
    model.add_argument("--dtype", choices=DTYPES, help="convert model and data (default: as they are)")
    model.add_argument("--eval", action="store_true", help="put the model in eval mode (default: the mode it is in)")
    _output(command).add_argument("--quiet", action="store_true", help="no progress bars")


def _output(command: argparse.ArgumentParser) -> Any:
    shown = command.add_argument_group("output")
    shown.add_argument("--json", action="store_true", help="print JSON in place of text")
    shown.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return shown


def positive(kind: type) -> Any:
    """A type for argparse: a number above zero."""

    def read(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    read.__name__ = f"positive {kind.__name__}"
    return read

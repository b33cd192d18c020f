"""The command line of the library: ``python -m curvature``."""

from __future__ import annotations

import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from curvature.cli.blame import called_on
from curvature.cli.commands import Answer, compared, run
from curvature.cli.output import to_json
from curvature.cli.parser import make_parser
from curvature.cli.source import UsageError, load

__all__ = ["main"]

# Errors whose message is written for the user; others come with the name of their class.
_EXPLAINED = (ValueError, RuntimeError, TypeError, OSError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        0 if all is well; 1 if the computation was refused, failed or is not as exact as was asked for; 2 if the command
        line or the source makes no sense.
    """
    given = make_parser().parse_args(argv)
    try:
        with _warnings_in_one_line():
            answer = compared(given) if given.command == "compare" else _of_source(given)
    except KeyboardInterrupt:
        _say("stopped")
        return 130
    except Exception as error:
        if given.debug:
            raise
        named = isinstance(error, (UsageError, *_EXPLAINED)) and str(error)
        where = called_on(error)
        _say(f"error: {where}{error if named else f'{type(error).__name__}: {error} (--debug shows where)'}")
        return 2 if isinstance(error, UsageError) else 1
    print(to_json(answer.content) if given.json else answer.text)
    return 0 if answer.good else 1


def _of_source(given: Namespace) -> Answer:
    source = load(given.source).to(given.device, None if given.dtype is None else getattr(torch, given.dtype))
    if given.eval:
        source.model.eval()
    if given.params is not None:
        source.options["params"] = given.params
    return run(source, given)


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Print warnings once, without the places in the code that they come from."""
    seen = set[str]()

    def show(message: Warning | str, *_: object, **__: object) -> None:
        if str(message) not in seen:
            seen.add(str(message))
            _say(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = show
        yield


def _say(text: str) -> None:
    print(f"curvature: {' '.join(text.split())}", file=sys.stderr)

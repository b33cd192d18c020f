"""The command line, ``python -m precond``."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Sequence

from precond import demo
from precond.catalogue import methods
from solvers import __version__


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``python -m precond``.

    Args:
        arguments: The command line; that of the process by default.

    Raises:
        SystemExit: If an argument is wrong, or a package of the ``demo`` extra is missing.
    """
    parser = argparse.ArgumentParser(prog="python -m precond", description="Second-order optimisation for PyTorch.")
    parser.add_argument("--version", action="version", version=f"precond {__version__}")
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("demo", help="train on scikit-learn's digits with K-FAC, EKFAC, AdamW and SGD")
    demo.add_arguments(train)
    train.set_defaults(run=demo.run)
    listing = commands.add_parser("methods", help="list the optimizers, with what each needs and is made of")
    listing.set_defaults(run=lambda options: print(table()))
    options = parser.parse_args(arguments)
    options.run(options)


def table() -> str:
    """The optimizers: name, what each needs of a loop; curvature, structure and solver, as wide as the terminal."""
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    lines = []
    for m in methods():
        text = f"{m.curvature}; {m.structure}; {m.solver}"
        head = f"{m.name:<19} {m.needs:<8} "
        lines += textwrap.wrap(text, width, initial_indent=head, subsequent_indent=" " * len(head))
    return "\n".join(lines)

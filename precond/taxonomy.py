"""All methods on one page, read off the code: ``python -m precond.taxonomy`` prints ``docs/reference/methods.md``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import get_args

from precond.catalogue import Method, methods
from precond.step.methods import Form, Matrix

_INTRODUCTION = """\
# The methods

Made from the code by `python -m precond.taxonomy`; a test holds the two together. Which one to take is said in
[Choose](../choose.md).

Every method here computes `P g`, with P a power (mostly -1 or -1/2) of an estimate of the curvature, and what makes it
that method are three choices: *which matrix* is estimated, *in which structure* it is kept, and *which solver* inverts
or roots it. `PreconditionedOptimizer` takes the three as arguments, so the cells between are yours to fill.

## Matrix by structure

In brackets, the solver. The Fisher is the GGN for losses that are likelihoods; the second moment of batch gradients is
what can be had without looking at the model, and equals neither.
"""

_COSTS = """\
## Costs

Leading terms, for a weight of m outputs and n inputs: floating-point operations beyond the gradient and elementwise
work, and numbers kept beyond parameters and momentum. B is the number of rows that the layer sees in a batch (examples
times positions), P that of all parameters. A refresh happens once in the method's update period. Methods that need
*layers* take the model and its loss and watch the plain training loop; those that need *grad* take parameters; those
that need a *closure* call it.
"""

_LAYERS = """\
Where these are fewer, K-FAC and TNT apply their inverse to the rows of the gradient, `2B(m² + n²) + 2Bmn` in place of
`2(m²n + mn²)`. Statistics of small matrices take twice what is said here, since only large symmetric products are
computed by halves.
"""


def markdown() -> str:
    """The page."""
    return "\n".join([_INTRODUCTION, _grid(methods()), _COSTS, _costs(methods()), _LAYERS])


def _grid(found: Sequence[Method]) -> str:
    rows = []
    for matrix in get_args(Matrix):
        cells = []
        for form in get_args(Form):
            here = [method for method in found if matrix in method.matrices and form in method.forms]
            cells.append(", ".join(f"`{method.name}` ({method.solver})" for method in here))
        rows.append([f"**{matrix}**", *cells])
    return _table(["", *get_args(Form)], rows)


def _costs(found: Sequence[Method]) -> str:
    rows = []
    for m in found:
        name = f"[`{m.name}`]({m.paper})"
        rows.append([name, m.needs, m.curvature, m.structure, m.step, m.refresh, m.memory])
    return _table(["method, paper", "needs", "curvature", "structure", "a step", "a refresh", "memory"], rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(markdown(), end="")

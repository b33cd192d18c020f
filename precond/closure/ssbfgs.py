"""Self-scaled BFGS, dense or of limited memory."""

from __future__ import annotations

from typing import ClassVar

from precond.closure.recent_pairs import RecentBFGS, WindowedQuasiNewton
from precond.step.methods import Taxonomy


class SSBFGS(WindowedQuasiNewton):
    r"""Self-scaled BFGS, dense or of limited memory.

    BFGS, with the inverse Hessian H enlarged before an update wherever it is too small along the move s:

    .. math:: H \leftarrow \frac{1}{\tau} \Big(I - \frac{s y^\top}{y^\top s}\Big) H
        \Big(I - \frac{y s^\top}{y^\top s}\Big) + \frac{s s^\top}{y^\top s}, \qquad
        \tau = \min\Big(1, \frac{y^\top s}{s^\top H^{-1} s}\Big)

    with the change y of the gradient along s. At the first update :math:`\tau = y^\top y / y^\top s` gives H, the
    identity so far, the scale of the problem.

    Prefer it where :class:`SSBroyden` would fit but for its memory: with ``window=m`` H is known from the last m pairs
    alone, at 4mP an iteration and 2mP numbers; otherwise it is dense, ``P^2``.

    ============================== =============================================================
    Urbán, Stefanou and Pons       here
    ============================== =============================================================
    the update                     ``quasi_newton.DenseInverse``, ``recent_pairs.RecentBFGS``
    :math:`\tau` (Al-Baali)        ``scales``
    the line search (strong Wolfe) ``line_search.strong_wolfe``: Nocedal and Wright, 3.5 and 3.6
    ============================== =============================================================

    Args:
        params: The model, or parameters, groups, or named parameters; all are solved for together.
        lr: Multiplies the move of a step; 1 is the method's.
        window: Pairs that H is made from; ``None`` for all of them, in a dense matrix.
        iterations: Iterations of a step, each with its line search.
        wolfe: The constants :math:`(c_1, c_2)` of the Wolfe conditions.
        options: See :class:`SecondOrderOptimizer`.

    References:
        Al-Baali (1998); Urbán, Stefanou and Pons (2025), equation 11, https://arxiv.org/abs/2405.04230; Kiyani et al.
        (2025), https://arxiv.org/abs/2501.16371
    """

    taxonomy: ClassVar = Taxonomy(
        curvature="Hessian, from differences of gradients",
        structure="dense, or low rank from a window of pairs",
        solver="self-scaled BFGS updates",
        matrices=("Hessian",),
        forms=("dense", "low rank"),
        step="a line search and 6P², or 8MP for a window of M, for each iteration",
        refresh="none",
        memory="P², or 2MP",
        paper="https://arxiv.org/abs/2405.04230",
    )

    recent: ClassVar = RecentBFGS

    def scales(self, b: float, h: float, size: int, fresh: bool) -> tuple[float, float]:
        return (h if fresh else min(1.0, 1 / b)), 1.0

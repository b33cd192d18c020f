"""Self-scaled Broyden, dense or of limited memory."""

from __future__ import annotations

import math
from typing import ClassVar

from precond.closure.recent_pairs import RecentFamily, WindowedQuasiNewton
from precond.step.methods import Taxonomy


class SSBroyden(WindowedQuasiNewton):
    r"""Self-scaled Broyden: a quasi-Newton method that chooses its member of Broyden's family at every update.

    With the inverse Hessian H, the move s, the change y of the gradient, and :math:`h = y^\top H y / y^\top s`,
    :math:`b = s^\top H^{-1} s / y^\top s`, :math:`a = h b - 1`, :math:`c = \sqrt{a / (1 + a)}`:

    .. math::
        \rho^- = \min(1, h (1 - c)), \quad
        \theta = \max\Big(\frac{\rho^- - 1}{a}, \min\Big(\frac{1}{\rho^-}, \frac{1 - b}{b}\Big)\Big), \quad
        \sigma = 1 + a \theta

        \tau = \begin{cases} \min(1, 1/b) \min(\sigma^{-1/(P-1)}, 1/\theta) & \theta > 0 \\
        \min(\min(1, 1/b)\, \sigma^{-1/(P-1)}, \sigma) & \theta \le 0 \end{cases}, \qquad
        \phi = \frac{1 - \theta}{1 + a \theta}

        H \leftarrow \frac{1}{\tau} \Big(H - \frac{H y y^\top H}{y^\top H y} + \phi\, (y^\top H y)\, v v^\top\Big)
        + \frac{s s^\top}{y^\top s}, \qquad v = \frac{s}{y^\top s} - \frac{H y}{y^\top H y}

    At the first update H, the identity so far, is given the scale of the problem by :math:`\tau = h / \sigma`.

    Prefer it, and :class:`SSBFGS`, to ``torch.optim.LBFGS`` for smooth deterministic losses solved to high accuracy,
    such as physics-informed networks whose loss is no sum of squares; for those that are, :class:`GaussNewton` needs
    fewer steps. Memory ``P^2``; with ``window=m`` H is known from the last m pairs alone, at 3mP numbers and
    ``4m^2 P`` an iteration.

    ============================== =============================================================
    Urbán, Stefanou and Pons       here
    ============================== =============================================================
    the update                     ``quasi_newton.DenseInverse.updated``, ``recent_pairs.RecentFamily``
    :math:`\tau`, :math:`\phi`     ``scales``
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
        Al-Baali and Khalfan (2005); Urbán, Stefanou and Pons (2025), equations 13 to 23,
        https://arxiv.org/abs/2405.04230; Kiyani et al. (2025), https://arxiv.org/abs/2501.16371
    """

    taxonomy: ClassVar = Taxonomy(
        curvature="Hessian, from differences of gradients",
        structure="dense, or low rank from a window of pairs",
        solver="self-scaled Broyden updates",
        matrices=("Hessian",),
        forms=("dense", "low rank"),
        step="a line search and 6P², or 4M²P for a window of M, for each iteration",
        refresh="none",
        memory="P², or 3MP",
        paper="https://arxiv.org/abs/2405.04230",
    )

    recent: ClassVar = RecentFamily

    def scales(self, b: float, h: float, size: int, fresh: bool) -> tuple[float, float]:
        a = max(h * b - 1, 0.0)  # not negative, by Cauchy and Schwarz
        if a < 1e-12:  # s and H y are parallel: all members of the family are one
            return (h if fresh else min(1.0, 1 / b)), 1.0
        c = math.sqrt(a / (1 + a))
        rho = min(1.0, h / ((1 + a) * (1 + c)))  # 1 - c without cancellation
        theta = max((rho - 1) / a, min(1 / rho, (1 - b) / b))
        sigma = 1 + a * theta
        phi = (1 - theta) / sigma
        if fresh:
            return h / sigma, phi
        first, root = min(1.0, 1 / b), sigma ** (-1 / (size - 1)) if size > 1 else 1.0
        return (first * min(root, 1 / theta) if theta > 0 else min(first * root, sigma)), phi

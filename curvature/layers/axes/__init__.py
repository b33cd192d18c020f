"""Where the examples lie in the activations of a pass.

Calls are recorded (``calls``, ``example_axes``), and one rule for each group of functions tells where the examples lie
in a result, given where they lie in the arguments; importing this package registers them. A rule is asked only about
calls in which at least one argument holds examples on an axis and none mixes them; what it cannot prove it answers with
``MIXED``. Axes are matched by labels, as in an einsum: an argument's example axis must survive into the result, and all
arguments must agree on where.
"""

from curvature.layers.axes import elementwise, indices, layers, losses, memory, moves, products, reductions

__all__ = ["elementwise", "indices", "layers", "losses", "memory", "moves", "products", "reductions"]

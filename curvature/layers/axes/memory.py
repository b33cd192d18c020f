"""Functions that share, copy, write or hand out the memory of tensors, or look at shapes alone."""

from __future__ import annotations

from torch import Tensor

from curvature.layers.axes.calls import (
    COPYING,
    EXPOSING,
    SHAPES,
    UNREAD,
    UNWRITTEN,
    functions,
)

SHAPES.update(
    functions(
        "zeros_like ones_like full_like rand_like randn_like randint_like empty_like new_zeros new_ones new_full "
        "new_empty new_empty_strided"
    )
)
COPYING.update(
    functions(
        "reshape view flatten unflatten ravel squeeze unsqueeze view_as reshape_as expand expand_as broadcast_to "
        "permute transpose movedim t contiguous detach clone long int to"
    ),
    [Tensor.__getitem__],
)
UNWRITTEN.update(functions("empty empty_like empty_strided new_empty new_empty_strided empty_permuted"))
UNREAD.update(  # writing over all of a tensor
    dict.fromkeys(functions("copy_ fill_ zero_ normal_ uniform_ exponential_ random_"), lambda call: call.args[:1])
)
EXPOSING.update(
    functions("data_ptr numpy storage untyped_storage __dlpack__ __array__", (Tensor,)),
    [Tensor.__cuda_array_interface__.__get__],
)

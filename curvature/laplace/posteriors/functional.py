"""A model and its likelihood as two functions of parameters and a batch, seen as a backend sees a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from curvature.laplace.backends.ggn import GGNBackend
from curvature.losses import AutogradLoss, Terms
from curvature.model.data import batch_size, map_tensors
from curvature.model.parameters import tensor_of_its_own
from curvature.model.trees import tensors_in

Params = dict[str, Tensor]
#: ``forward(params, batch)`` gives the output, one row for each example, and auxiliary information.
Forward = Callable[[Any, Any], tuple[Tensor, Any]]
#: ``outer_log_likelihood(output, batch)``, a scalar: the sum over the examples.
OuterLogLikelihood = Callable[[Tensor, Any], Tensor]


class Transform(NamedTuple):
    """The two functions of an approximation, with its options in them.

    Attributes:
        init: ``init(params)`` gives the state to start from.
        update: ``update(state, batch, inplace=False)`` gives the state with a batch added, and what ``forward`` gave
            besides its output.
    """

    init: Callable[..., Any]
    update: Callable[..., tuple[Any, Any]]


class _Module(nn.Module):
    """A module with those parameters, which share their memory, in sorted order of their names."""

    def __init__(self, params: Params, forward: Forward) -> None:
        super().__init__()
        for name in sorted(params):
            # Not register_parameter, which refuses the dots of state_dict names.
            self._parameters[name] = nn.Parameter(params[name].detach())
        self._forward = forward
        self.aux: list[Any] = []  # of the last pass; attributes are put back after each

    def forward(self, batch: Any) -> Tensor:
        """The output; the rest is kept."""
        result = self._forward(dict(self._parameters), batch)
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Tensor)):
            raise TypeError(
                "forward(params, batch) must return the output, a tensor, and auxiliary information (torch.tensor([]) "
                f"if there is none); got {type(result).__name__}."
            )
        output, self.aux[:] = result[0], [result[1]]
        return output


class FunctionalBackend(GGNBackend):
    """Gauss-Newton matrices of ``-outer_log_likelihood(forward(params, batch), batch)``, summed over a batch.

    The flat vector has the parameters in sorted order of their names, as ``posteriors`` flattens a dict.

    Args:
        params: Parameters by name.
        forward: See :data:`Forward`.
        outer_log_likelihood: See :data:`OuterLogLikelihood`; a sum over examples that do not interact.

    Raises:
        TypeError: If ``params`` is not a dict of floating-point tensors.
    """

    def __init__(self, params: Params, forward: Forward, outer_log_likelihood: OuterLogLikelihood) -> None:
        module = _Module(check_params(params), forward)
        super().__init__(module, "classification")
        self._aux = module.aux
        self._log_likelihood = outer_log_likelihood

    @property
    def aux(self) -> Any:
        """Auxiliary information that ``forward`` gave for the last batch."""
        return self._aux[0] if self._aux else None

    def count(self, x: Any, y: Any = None) -> int:
        """Number of examples: the first axis of the first tensor that has one."""
        size = batch_size(x)
        if size is None:
            raise ValueError("the batch holds no tensor with a leading dimension, which would count its examples.")
        return size

    def terms_of(self, output: Tensor, y: Any) -> Terms:
        """The loss example by example: the log-likelihood of a batch of one."""
        size = self.count(y)

        def is_row(tensor: Tensor) -> bool:
            return tensor.dim() > 0 and tensor.shape[0] == size

        def negative(z: Tensor, *rows: Tensor) -> Tensor:
            left = iter(rows)
            value = self._log_likelihood(z, map_tensors(y, lambda t: next(left) if is_row(t) else t))
            if not isinstance(value, Tensor) or value.dim():
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"outer_log_likelihood(output, batch) must return a scalar tensor, got {shape}.")
            return -value

        loss = AutogradLoss(negative, reduction="sum")
        return loss.terms(output, *filter(is_row, tensors_in(y)), check=True)


def check_params(params: Any) -> Params:
    """The parameters, if they are a dict of floating-point tensors by name; a TypeError otherwise."""
    known = isinstance(params, Mapping) and all(isinstance(name, str) for name in params)
    if not known or not all(isinstance(p, Tensor) and p.is_floating_point() for p in params.values()):
        raise TypeError(
            "params must be a dict of floating-point tensors by name, such as dict(model.named_parameters()); got "
            f"{type(params).__name__}. Leave frozen tensors and integers to forward."
        )
    return params


def flatten(tensors: Mapping[str, Tensor]) -> Tensor:
    """One vector, in sorted order of the names."""
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)])


def unflatten(vectors: Tensor, like: Mapping[str, Tensor]) -> Params:
    """Vectors ``(*batch, P)`` as ``{name: (*batch, *shape)}``, in the order of ``like``."""
    names = sorted(like)
    pieces = dict(zip(names, vectors.split([like[name].numel() for name in names], dim=-1), strict=True))
    return {name: tensor_of_its_own(pieces[name].reshape(*vectors.shape[:-1], *p.shape)) for name, p in like.items()}


def around(
    params: Params, sample_shape: Any, generator: torch.Generator | None, root: Callable[[Tensor], Any]
) -> Params:
    """``params`` plus ``root`` of standard normal vectors ``(*sample_shape, P)``, as tensors of their shapes."""
    mean = flatten(params).detach()
    noise = torch.randn(*sample_shape, len(mean), dtype=mean.dtype, device=mean.device, generator=generator)
    return unflatten(mean + root(noise), params)


def advance(state: Any, inplace: bool, **changed: Any) -> Any:
    """The state after a step, with other fields; a new one, or the same."""
    target = state if inplace else type(state)(**vars(state))
    vars(target).update(changed, step=state.step + 1)
    return target

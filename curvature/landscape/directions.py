"""Directions in parameter space, which span a line or a plane through a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from curvature.matrices.hessian import Hessian
from curvature.matrices.problem import Problem, gradient
from curvature.model.parameters import Parameters
from curvature.model.wrappers import unwrapped
from solvers import Eigenpairs, eigsh

KINDS = ("random", "gradient", "eigenvector")


@dataclass(frozen=True, eq=False)
class Direction:
    """A vector in parameter space.

    Attributes:
        vector: ``(P,)``, what one unit of the coordinate adds to the parameters.
        label: Its name, with the unit of its coordinate.
        end: Coordinates ``(alpha, beta)`` of the checkpoint it leads to, if it leads to one.
    """

    vector: Tensor
    label: str
    end: tuple[float, float] | None = None


def random_direction(
    model: nn.Module, parameters: Parameters, generator: torch.Generator, *, biases: bool = False
) -> Tensor:
    r"""A normal direction, each filter of which is as long as the filter of the weights it is added to.

    .. math:: d_{ij} \leftarrow \frac{d_{ij}}{\|d_{ij}\|} \|\theta_{ij}\|

    A filter is what makes one output: a row of a matrix, a slice ``[i]`` of a convolution's weight (its second axis in
    transposed ones). So the picture does not depend on the scale of weights that a following normalisation or
    rectifier undoes.

    Args:
        model: Module of the parameters.
        parameters: The parameters that move.
        generator: Source of the draws.
        biases: Whether biases, scales and shifts (one axis or none) move, each as a whole in proportion to its norm.
            By default they stay, as in the paper.

    Returns:
        ``(P,)``.

    References:
        Li, Xu, Taylor, Studer and Goldstein (2018), section 4, https://arxiv.org/abs/1712.09913
    """
    transposed = {id(m.weight): m.groups for m in model.modules() if isinstance(m, _ConvTransposeNd)}
    out = {}
    for name, p in parameters.items():
        w = p.detach()
        d = torch.randn(w.shape, generator=generator, dtype=torch.float64, device=generator.device)
        d = d.to(w.device, parameters.dtype)
        if w.dim() < 2:
            rows = (1, -1)
            d = d if biases else torch.zeros_like(d)
        elif id(p) in transposed:
            groups = transposed[id(p)]
            shape = (groups, w.shape[0] // groups, w.shape[1], w[0, 0].numel())
            scale = _ratio(w.reshape(shape), d.reshape(shape), (1, 3))
            out[name] = (d.reshape(shape) * scale).reshape(w.shape)
            continue
        else:
            rows = (len(w), -1)
        scale = _ratio(w.reshape(rows), d.reshape(rows), (1,))
        out[name] = (d.reshape(rows) * scale).reshape(w.shape)
    return parameters.flatten(out)


def _ratio(w: Tensor, d: Tensor, dim: tuple[int, ...]) -> Tensor:
    length = torch.linalg.vector_norm(d, dim=dim, keepdim=True)
    return torch.linalg.vector_norm(w.to(d.dtype), dim=dim, keepdim=True) / torch.where(length > 0, length, 1)


def check_directions(name: str, value: Any) -> Any:
    """Refuse what is no direction, nor a sequence of one or two.

    Args:
        name: Name of the argument.
        value: What was given, see :func:`span_of`.

    Raises:
        TypeError: If an entry is of another kind.
        ValueError: If there are not one or two.
    """
    if isinstance(value, Eigenpairs):
        return value
    entries = [value] if isinstance(value, (str, Tensor, nn.Module, Mapping)) else value
    if not isinstance(entries, Sequence) or not 1 <= len(entries) <= 2:
        raise ValueError(f"{name} must be one (a line) or two (a plane), got {value!r}.")
    for entry in entries:
        known = entry in KINDS if isinstance(entry, str) else isinstance(entry, (Tensor, nn.Module, Mapping))
        if not known:
            raise TypeError(
                f"{name} are among {', '.join(map(repr, KINDS))}, vectors (P,), models and state dicts; {entry!r} is "
                "none."
            )
    return value


def span_of(problem: Problem, entries: Any, generator: torch.Generator, *, biases: bool = False) -> list[Direction]:
    """One or two directions from the user's argument.

    Args:
        problem: The loss, for gradients and eigenvectors.
        entries: One of the following or a sequence of up to two; ``Eigenpairs`` gives both of its first vectors.
            ``"random"``; ``"gradient"`` and ``"eigenvector"`` (of the Hessian, the largest eigenvalues first) as unit
            vectors; a vector ``(P,)``; a model or its state dict, as the way there.
        generator: Source of random directions.
        biases: See :func:`random_direction`.

    Raises:
        TypeError: If an entry is of another kind.
        ValueError: If there are not one or two, or a vector does not fit, is zero, not finite or parallel to the other.
    """
    if isinstance(entries, Eigenpairs):
        found = [_eigenvector(entries, i, problem.parameters) for i in range(min(2, len(entries.values)))]
    else:
        if isinstance(entries, (str, Tensor, nn.Module, Mapping)):
            entries = [entries]
        if not isinstance(entries, Sequence) or not 1 <= len(entries) <= 2:
            raise ValueError(f"directions must be one (a line) or two (a plane), got {entries!r}.")
        found = _found(problem, entries, generator, biases)
    for number, direction in enumerate(found, 1):
        length = torch.linalg.vector_norm(direction.vector.double())
        if not (torch.isfinite(length) and length > 0):
            raise ValueError(f"direction {number} ({direction.label}) has the norm {float(length)}: it leads nowhere.")
    return _independent(found)


def _found(problem: Problem, entries: Sequence[Any], generator: torch.Generator, biases: bool) -> list[Direction]:
    wanted = [i for i, entry in enumerate(entries) if isinstance(entry, str) and entry == "eigenvector"]
    found: dict[int, Direction] = {}
    if wanted:
        pairs = eigsh(Hessian(problem), len(wanted))
        found = {i: _eigenvector(pairs, rank, problem.parameters) for rank, i in enumerate(wanted)}
    for i, entry in enumerate(entries):
        if i not in found:
            found[i] = _direction(problem, entry, generator, biases, ((1.0, 0.0), (0.0, 1.0))[i])
    return [found[i] for i in range(len(entries))]


def _eigenvector(pairs: Eigenpairs, rank: int, parameters: Parameters) -> Direction:
    label = f"eigenvector of {float(pairs.values[rank]):.3g} (distance)"
    return Direction(_fitting(pairs.vectors[rank], parameters), label)


def _fitting(vector: Tensor, parameters: Parameters) -> Tensor:
    if vector.shape != (parameters.size,):
        raise ValueError(
            f"each vector of directions has the shape ({parameters.size},) of all parameters, not "
            f"{tuple(vector.shape)}."
        )
    return vector.detach().to(parameters.device, parameters.dtype)


def _direction(
    problem: Problem, entry: Any, generator: torch.Generator, biases: bool, end: tuple[float, float]
) -> Direction:
    parameters = problem.parameters
    if isinstance(entry, str) and entry == "random":
        vector = random_direction(problem.model, parameters, generator, biases=biases)
        return Direction(vector, "random (in units of the weights)")
    if isinstance(entry, str) and entry == "gradient":
        g = gradient(problem)
        return Direction(g / torch.linalg.vector_norm(g).clamp(min=1e-300), "gradient (distance)")
    if isinstance(entry, Tensor):
        return Direction(_fitting(entry, parameters), "given direction")
    if isinstance(entry, (nn.Module, Mapping)):
        there = matching(problem.model, parameters, entry)
        vector = parameters.flatten({name: there[name].to(p.dtype) - p.detach() for name, p in parameters.items()})
        return Direction(vector, "to the checkpoint", end)
    raise TypeError(
        f"a direction is one of {', '.join(map(repr, KINDS))}, a vector, a model or a state dict; got {entry!r}."
    )


def matching(
    model: nn.Module, tensors: Mapping[str, Tensor], other: nn.Module | Mapping[str, Any]
) -> dict[str, Tensor]:
    """The other model's values for tensors of this one.

    Args:
        model: The model they are of.
        tensors: Some of its parameters and buffers, by name.
        other: A model of the same architecture, or its state dict.

    Raises:
        ValueError: If one is missing or has another shape, or the other model has something that this one lacks.
    """
    there = dict(unwrapped(other).state_dict()) if isinstance(other, nn.Module) else other
    wrong = [
        f"{name}: {tuple(p.shape)} here, {tuple(there[name].shape) if name in there else 'missing'} there"
        for name, p in tensors.items()
        if name not in there or there[name].shape != p.shape
    ]
    wrong += [f"{name}: missing here" for name in sorted(set(there) - set(model.state_dict()))]
    if wrong:
        raise ValueError(f"the models are not of one architecture: {'; '.join(wrong[:4])} ({len(wrong)} differ).")
    return {name: there[name].detach().to(p.device) for name, p in tensors.items()}


def _independent(found: list[Direction]) -> list[Direction]:
    """The directions, the way to a second checkpoint made orthogonal to the first and as long as it.

    Distances in the plane are then those in parameter space.
    """
    if len(found) < 2:
        return found
    first, second = found
    u, v = first.vector.double(), second.vector.double()
    along = (u @ v) / (u @ u)
    across = v - along * u
    if torch.linalg.vector_norm(across) <= 1e-6 * torch.linalg.vector_norm(v):
        raise ValueError("the two directions are parallel and span no plane. Give one of them for a line.")
    if first.end is None or second.end is None:
        return found
    ratio = torch.linalg.vector_norm(across) / torch.linalg.vector_norm(u)
    end = (float(along), float(ratio))
    return [first, Direction((across / ratio).to(second.vector.dtype), "across (same unit)", end)]

"""Values with their first and second derivatives along directions, pushed through a function in one pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp

from solvers.outcome.memory import is_out_of_memory


class NoRuleError(Exception):
    """An operation of the function has no rule here."""


class NestedError(Exception):
    """Derivatives would be nested where they are needed in one pass."""


_ONLY = threading.local()


@contextmanager
def one_pass_only() -> Iterator[None]:
    """Within the block, derivatives that do not go by one pass of jets raise :class:`NestedError`."""
    before = getattr(_ONLY, "on", False)
    _ONLY.on = True
    try:
        yield
    finally:
        _ONLY.on = before


class Jet:
    r"""A tensor z, its derivatives along k directions, and the sum of its pure second derivatives along them.

    .. math:: \big(z,\; \partial_{v_1} z, \dots, \partial_{v_k} z,\; \textstyle\sum_i \partial^2_{v_i} z\big)

    The components lie along the first axis of one tensor, so an affine map is one product for all of them; with
    activations,

    .. math:: \partial_v\, \sigma(z) = \sigma'(z)\, \partial_v z, \qquad
        \sum_i \partial^2_{v_i} \sigma(z) = \sigma'(z) \sum_i \partial^2_{v_i} z
        + \sigma''(z) \sum_i (\partial_{v_i} z)^2

    Second derivatives are summed as they arise, which nested forward mode does at the end. An operation without a rule
    raises :class:`NoRuleError`; nothing is computed by a wrong one.

    Args:
        parts: ``(k + 2, *shape of z)``.

    References:
        Li et al. (2024), forward Laplacian, https://arxiv.org/abs/2307.08214; Dangel, Siebert et al. (2025), collapsed
        Taylor mode, https://arxiv.org/abs/2505.13644
    """

    def __init__(self, parts: Tensor) -> None:
        self.parts = parts

    @property
    def shape(self) -> torch.Size:
        return self.parts.shape[1:]

    @property
    def ndim(self) -> int:
        return self.parts.ndim - 1

    @property
    def dtype(self) -> torch.dtype:
        return self.parts.dtype

    @property
    def device(self) -> torch.device:
        return self.parts.device

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """A method of tensors, by its function."""
        function = getattr(Tensor, name, None)
        if name.startswith("__") or not callable(function):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.__torch_function__(function, (), (self, *args), kwargs)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = _RULES.get(function)
        if rule is None:
            raise NoRuleError(getattr(function, "__name__", repr(function)))
        return rule(function, *args, **(kwargs or {}))

    def __getitem__(self, index: Any) -> Jet:
        index = index if isinstance(index, tuple) else (index,)
        if any(isinstance(i, Jet) for i in index) or sum(isinstance(i, (Tensor, list)) for i in index) > 1:
            raise NoRuleError("an index")
        return Jet(self.parts[(slice(None), *index)])

    def __eq__(self, other: object) -> Any:
        raise NoRuleError("a comparison")

    __ne__ = __eq__
    __hash__ = object.__hash__

    def __neg__(self) -> Jet:
        return Jet(-self.parts)

    def __add__(self, other: Any) -> Jet:
        return _plus(torch.add, self, other)

    def __sub__(self, other: Any) -> Jet:
        return _plus(torch.sub, self, other)

    def __rsub__(self, other: Any) -> Jet:
        return -self + other

    def __mul__(self, other: Any) -> Jet:
        return _product(torch.mul, self, other)

    def __truediv__(self, other: Any) -> Jet:
        return _quotient(torch.div, self, other)

    def __rtruediv__(self, other: Any) -> Jet:
        return _quotient(torch.div, other, self)

    def __pow__(self, exponent: Any) -> Jet:
        return _pointwise(torch.pow, self, exponent)

    def __matmul__(self, other: Any) -> Jet:
        return _matmul(torch.matmul, self, other)

    __radd__, __rmul__ = __add__, __mul__


def second_order(u: Callable[[Any], Any], x: Tensor, directions: Tensor) -> Tensor | None:
    """Value, derivatives along directions, and sum of the pure second derivatives along them.

    Args:
        u: The function of one point ``(d,)``.
        x: The point.
        directions: ``(k, d)``.

    Returns:
        ``(k + 2, *shape of u(x))``; ``None`` where u holds an operation that has no rule.
    """
    start = Jet(torch.cat([x.unsqueeze(0), directions, torch.zeros_like(x).unsqueeze(0)]))
    try:
        found = u(start)
    except NestedError:
        raise
    except Exception as error:  # what is wrong with u itself is found by the general way
        if is_out_of_memory(error):
            raise
        nested()
        return None
    if isinstance(found, Jet):
        return found.parts
    nested()
    return None


def nested() -> None:
    """Derivatives are about to be nested.

    Raises:
        NestedError: Within :func:`one_pass_only`.
    """
    if getattr(_ONLY, "on", False):
        raise NestedError


# Rules


def _lifted(other: Any, like: Jet) -> Tensor:
    """The components of a jet, or of a constant."""
    if isinstance(other, Jet):
        return other.parts
    constant = torch.as_tensor(other, dtype=None if isinstance(other, Tensor) else like.dtype, device=like.device)
    constant = _as_beside(constant, like)
    rest = torch.zeros_like(constant).expand(len(like.parts) - 1, *constant.shape)
    return torch.cat([constant.unsqueeze(0), rest])


def _as_beside(constant: Tensor, z: Jet) -> Tensor:
    """A constant in the dtype of its product with z: a number does not promote a tensor."""
    return constant.to(torch.result_type(z.parts[0], constant))


def _jet(*candidates: Any) -> Jet:
    return next(c for c in candidates if isinstance(c, Jet))


def _broadcast(*parts: Tensor) -> list[Tensor]:
    """With as many axes after the first, so that these broadcast."""
    most = max(p.ndim for p in parts)
    return [p.reshape(len(p), *[1] * (most - p.ndim), *p.shape[1:]) for p in parts]


def _plus(function: Any, a: Any, b: Any) -> Jet:
    one = _jet(a, b)
    sign = -1 if function in (torch.sub, Tensor.sub, Tensor.__sub__) else 1
    left, right = _broadcast(_lifted(a, one), _lifted(b, one))
    return Jet(left + sign * right)


def _reversed_minus(function: Any, a: Any, b: Any) -> Jet:
    return _plus(torch.sub, b, a)


def _product(function: Any, a: Any, b: Any) -> Jet:
    if not isinstance(a, Jet):
        a, b = b, a
    if not isinstance(b, Jet):
        if not isinstance(b, Tensor):
            return Jet(a.parts * b)
        left, right = _broadcast(a.parts, _as_beside(b, a).unsqueeze(0))
        return Jet(left * right)
    left, right = _broadcast(a.parts, b.parts)
    x, y, dx, dy = left[:1], right[:1], left[1:-1], right[1:-1]
    second = x * right[-1:] + left[-1:] * y + 2 * (dx * dy).sum(0, keepdim=True)
    return Jet(torch.cat([x * y, x * dy + dx * y, second]))


def _quotient(function: Any, a: Any, b: Any) -> Jet:
    if not isinstance(b, Jet):
        divisor = _as_beside(b, a).unsqueeze(0) if isinstance(b, Tensor) else a.parts.new_full((1,), b)
        left, right = _broadcast(a.parts, divisor)
        return Jet(left / right)
    return _product(torch.mul, a, _pointwise(torch.reciprocal, b))


def _pointwise(function: Any, z: Any, *args: Any, inplace: bool = False, **kwargs: Any) -> Jet:
    """A function of each entry, by itself; see :class:`Jet`."""
    given = (*args, *kwargs.values())
    if inplace or not isinstance(z, Jet) or any(a is True or isinstance(a, Tensor) for a in given):
        raise NoRuleError(getattr(function, "__name__", repr(function)))
    value, first, second = z.parts[:1], z.parts[1:-1], z.parts[-1:]
    known = _DERIVATIVES.get(function)
    if known is not None:
        f, slope, bend = known(value)
    else:
        ones = torch.ones_like(value)

        def sloped(v: Tensor) -> Any:
            return jvp(lambda w: function(w, *args, **kwargs), (v,), (ones,))

        with torch.enable_grad():  # without it torch has no forward derivative of silu's derivative, for one
            (f, slope), (_, bend) = jvp(sloped, (value,), (ones,))[:2]
    return Jet(torch.cat([f, slope * first, slope * second + bend * first.square().sum(0, keepdim=True)]))


def _linear(function: Any, z: Any, weight: Any, bias: Any = None) -> Jet:
    if not isinstance(z, Jet) or isinstance(weight, Jet) or isinstance(bias, Jet):
        raise NoRuleError("linear")
    out = F.linear(z.parts, weight)
    return Jet(out) if bias is None else Jet(torch.cat([out[:1] + bias, out[1:]]))


def _matmul(function: Any, a: Any, b: Any) -> Jet:
    if not isinstance(b, Jet) and b.ndim <= 2:
        return Jet(a.parts @ b)
    if not isinstance(a, Jet) and a.ndim == 2 and b.ndim <= 2:
        return Jet(b.parts @ a.mT if b.ndim == 1 else a @ b.parts)
    raise NoRuleError("matmul")


def _axis(dim: int, axes: int) -> int:
    """The axis of the components that is ``dim`` of so many axes of the tensor."""
    if not -axes <= dim < axes:
        raise NoRuleError(f"axis {dim} of {axes}")
    return dim % axes + 1


def _reduced(function: Any, z: Any, dim: Any = None, *args: Any, **kwargs: Any) -> Jet:
    dims = range(z.ndim) if dim is None or dim == () else (dim,) if isinstance(dim, int) else dim
    axes = tuple(_axis(d, z.ndim) for d in dims)
    return Jet(function(z.parts, axes, *args, **kwargs)) if axes else z


def _unsqueeze(function: Any, z: Any, dim: int) -> Jet:
    return Jet(z.parts.unsqueeze(_axis(dim, z.ndim + 1)))


def _squeeze(function: Any, z: Any, dim: int | None = None) -> Jet:
    if dim is None:
        return Jet(z.parts.reshape(len(z.parts), *(n for n in z.shape if n != 1)))
    return Jet(z.parts.squeeze(_axis(dim, z.ndim)))


def _reshape(function: Any, z: Any, *shape: Any) -> Jet:
    wanted = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    return Jet(z.parts.reshape(len(z.parts), *wanted))


def _flatten(function: Any, z: Any, start_dim: int = 0, end_dim: int = -1) -> Jet:
    return Jet(z.parts.flatten(_axis(start_dim, z.ndim), _axis(end_dim, z.ndim)))


def _joined(function: Any, tensors: Any, dim: int = 0) -> Jet:
    tensors = list(tensors)
    one = _jet(*tensors)
    return Jet(function([_lifted(t, one) for t in tensors], _axis(dim, one.ndim + (function is torch.stack))))


def _split(function: Any, z: Any, size: Any, dim: int = 0) -> tuple[Jet, ...]:
    return tuple(Jet(part) for part in function(z.parts, size, _axis(dim, z.ndim)))


def _unbind(function: Any, z: Any, dim: int = 0) -> tuple[Jet, ...]:
    return tuple(Jet(part) for part in z.parts.unbind(_axis(dim, z.ndim)))


def _tanh(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.tanh(v)
    slope = 1 - y * y
    return y, slope, -2 * y * slope


def _sin(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.sin(v)
    return y, torch.cos(v), -y


def _square(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return v * v, 2 * v, torch.full_like(v, 2.0)


_DERIVATIVES = {torch.tanh: _tanh, Tensor.tanh: _tanh, torch.sin: _sin, Tensor.sin: _sin}
_DERIVATIVES |= {torch.square: _square, Tensor.square: _square}

_RULES: dict[Any, Callable[..., Any]] = {F.linear: _linear}


def _add_rules() -> None:
    groups: dict[Callable[..., Any], str] = {
        _pointwise: "tanh sin cos exp log sqrt rsqrt square reciprocal sigmoid erf sinh cosh atan relu neg pow log1p",
        _plus: "add sub __add__ __radd__ __sub__",
        _reversed_minus: "__rsub__",
        _product: "mul multiply __mul__ __rmul__",
        _quotient: "div true_divide __truediv__",
        _matmul: "matmul __matmul__",
        _reduced: "sum mean",
        _unsqueeze: "unsqueeze",
        _squeeze: "squeeze",
        _reshape: "reshape view",
        _flatten: "flatten",
        _joined: "cat concat stack",
        _split: "split chunk",
        _unbind: "unbind",
    }
    for rule, names in groups.items():
        for name in names.split():
            for home in (torch, Tensor):
                if hasattr(home, name):
                    _RULES[getattr(home, name)] = rule
    for function in (F.silu, F.gelu, F.softplus, F.elu, F.celu, F.selu, F.mish, F.relu, F.leaky_relu, F.logsigmoid):
        _RULES[function] = _pointwise


_add_rules()

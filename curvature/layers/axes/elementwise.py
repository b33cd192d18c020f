"""Rules for functions that give every entry from the entries at its place, with broadcasting."""

from __future__ import annotations

import torch

from curvature.layers.axes.calls import (
    MIXED,
    SHARING,
    Call,
    Result,
    broadcast,
    dunders,
    functions,
    getters,
    handles,
    rule,
)


@rule(
    "abs+ absolute+ acos+ acosh+ add+ addcdiv+ addcmul+ angle arccos+ arccosh+ arcsin+ arcsinh+ arctan+ arctan2+ "
    "arctanh+ asin+ asinh+ atan+ atan2+ atanh+ bernoulli+ bitwise_and+ bitwise_not+ bitwise_or+ bitwise_xor+ "
    "bitwise_left_shift+ bitwise_right_shift+ ceil+ clamp+ clamp_max+ clamp_min+ clip+ complex conj_physical+ "
    "copysign+ cos+ cosh+ deg2rad+ digamma+ div+ divide+ eq+ erf+ erfc+ erfinv+ exp+ exp2+ expm1+ fix+ float_power+ "
    "floor+ floor_divide+ fmax fmin fmod+ frac+ ge+ greater+ greater_equal+ gt+ heaviside+ hypot+ i0+ isclose isfinite "
    "isinf isnan isneginf isposinf isreal le+ less+ less_equal+ ldexp+ lerp+ lgamma+ log+ log10+ log1p+ log2+ "
    "logaddexp logaddexp2 logical_and+ logical_not+ logical_or+ logical_xor+ logit+ lt+ maximum minimum mul+ multiply+ "
    "mvlgamma+ nan_to_num+ ne+ neg+ negative+ nextafter+ not_equal+ poisson polar polygamma+ positive pow+ rad2deg+ "
    "real reciprocal+ remainder+ round+ rsqrt+ rsub sgn+ sigmoid+ sign+ signbit sin+ sinc+ sinh+ special_entr sqrt+ "
    "square+ sub+ subtract+ tan+ tanh+ tril+ triu+ true_divide+ trunc+ where xlogy+ masked_fill+ "
    # Activations and noise.
    "relu+ relu6 leaky_relu+ elu+ selu+ celu+ gelu silu mish hardswish hardsigmoid hardtanh+ hardshrink softshrink "
    "tanhshrink softplus softsign logsigmoid threshold+ rrelu+ dropout+ alpha_dropout+ feature_dropout+ dropout1d "
    "dropout2d dropout3d feature_alpha_dropout+ native_dropout "
    # The same values again: copies, casts, flags, writing over all of a tensor.
    "clone copy_ fill_ zero_ normal_ uniform_ exponential_ random_ log_normal_ cauchy_ geometric_ float double half "
    "bfloat16 int long short bool char byte cdouble cfloat",
    *dunders(
        "add radd iadd sub rsub isub mul rmul imul div rdiv idiv truediv rtruediv itruediv floordiv rfloordiv mod"
    ),
    *dunders("ifloordiv rmod imod pow rpow ipow and rand iand or ror ior xor rxor ixor invert neg pos abs eq ne lt le"),
    *dunders("gt ge lshift rlshift ilshift rshift rrshift irshift"),
    *functions("entr erf erfc erfinv exp2 expit expm1 gammaln i0 log1p logit ndtr xlog1py xlogy", [torch.special]),
)
def elementwise(call: Call) -> Result:
    """Every entry from the entries at its place, with broadcasting."""
    if call.func is torch.where and len(call.args) + len(call.kwargs) == 1:
        return MIXED  # the places of the entries that hold
    return broadcast(call, call.read, call.outputs[0].shape)


@rule(
    "contiguous detach+ alias requires_grad_ to cpu cuda type type_as expand broadcast_to conj real imag resolve_conj "
    "resolve_neg pin_memory",
    *getters("data real imag"),
    sharing=True,
)
def _same(call: Call) -> Result:
    """The first argument, as it is or broadcast."""
    return broadcast(call, call.args[:1], call.outputs[0].shape)


SHARING.update(
    functions("float double half bfloat16 int long short bool char byte dropout dropout1d dropout2d dropout3d")
)
SHARING.update(functions("alpha_dropout feature_alpha_dropout feature_dropout relu6 threshold hardtanh leaky_relu elu"))
rule("expand_as", sharing=True)(_same)


@rule("broadcast_tensors", sharing=True)
def _broadcast_tensors(call: Call) -> Result:
    return [broadcast(call, [h], o.shape) for h, o in zip(call.read, call.outputs, strict=True)]


@rule("prelu")
def _prelu(call: Call) -> Result:
    x, weight = handles(call.args)
    return call.state(x) if call.constant(weight) else MIXED

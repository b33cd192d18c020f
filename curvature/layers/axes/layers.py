"""Rules for layers that torch has a function for: pooling, convolutions, norms, embeddings, recurrent ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from curvature.layers.axes.calls import (
    CONSTANT,
    MIXED,
    UNREAD,
    Axis,
    Call,
    Handle,
    Result,
    Rule,
    State,
    axis_of,
    handles,
    rule,
)


def leading(trailing: int) -> Rule:
    """Rule for functions of one tensor that mix the last ``trailing`` axes and keep those before."""

    def apply(call: Call) -> Result:
        x = call.args[0]
        return kept_before(call, x, len(x.shape) - trailing) if type(x) is Handle else MIXED

    return apply


def kept_before(call: Call, x: Handle, width: int) -> State:
    """The state of ``x`` if examples lie on one of the first ``width`` axes and everything else is constant."""
    state = axis_of(call, x)
    return MIXED if state is None or state.axis >= width or not call.constant(call.besides(x)) else state


for _d in (1, 2, 3):
    rule(f"max_pool{_d}d avg_pool{_d}d adaptive_avg_pool{_d}d adaptive_max_pool{_d}d lp_pool{_d}d")(leading(_d))
    rule(f"max_pool{_d}d_with_indices adaptive_max_pool{_d}d_with_indices")(leading(_d))
    rule("lp_pool2d" if _d == 2 else "")(leading(_d))
    rule(f"fractional_max_pool{_d}d")(leading(_d))
rule("interpolate upsample")(lambda call: kept_before(call, call.args[0], 2))
rule("pixel_shuffle pixel_unshuffle", sharing=True)(leading(3))
rule("channel_shuffle", sharing=True)(lambda call: kept_before(call, call.args[0], 1))
rule("group_norm instance_norm local_response_norm")(lambda call: kept_before(call, call.args[0], 1))
rule("inv inverse pinv pinverse cholesky matrix_exp svd svdvals qr eigh eigvalsh eig eigvals det slogdet", places=[
    torch.linalg
])(leading(2))  # fmt: skip
rule("inverse pinverse cholesky matrix_exp det slogdet logdet cholesky_inverse")(leading(2))


@rule("unfold fold", places=[F])
def _unfold(call: Call) -> Result:
    x = call.args[0]
    batched = len(x.shape) == (4 if call.func is F.unfold else 3)
    return kept_before(call, x, 1) if batched else MIXED


@rule("pad")
def _pad(call: Call) -> Result:
    x, amounts = call.get(0, "input"), call.get(1, "pad")
    return kept_before(call, x, len(x.shape) - len(amounts) // 2) if isinstance(amounts, tuple) else MIXED


@rule("grid_sample")
def _grid_sample(call: Call) -> Result:
    fits = all(call.state(h) in (CONSTANT, Axis(0)) for h in call.read)
    return Axis(0) if fits else MIXED


@rule("affine_grid")
def _affine_grid(call: Call) -> Result:
    return kept_before(call, call.args[0], 1)


def convolution(spatial: int, groups_at: int) -> Rule:
    """Rule for (transposed) convolutions."""

    def apply(call: Call) -> Result:
        x, weight = call.get(0, "input"), call.get(1, "weight")
        if len(x.shape) != spatial + 2 or not call.constant(call.besides(x, weight)):
            return MIXED
        state, kernel, n = axis_of(call, x), call.state(weight), call.batch
        if state is not None and state.axis == 0 and kernel is CONSTANT:
            return state
        # Examples in the channels, each in groups of its own: kernels per example.
        groups = call.get(groups_at, "groups", 1)
        per_example = isinstance(kernel, Axis) and kernel.axis == 0 and kernel.outer == 1
        if groups_at != 6 or type(groups) is not int or groups % n or not (kernel is CONSTANT or per_example):
            return MIXED
        if state is not None and (state.axis, state.outer) != (1, 1):
            return MIXED
        return Axis(1, 1, call.outputs[0].shape[1] // n)

    return apply


for _d in (1, 2, 3):
    rule(f"conv{_d}d")(convolution(_d, 6))
    rule(f"conv_transpose{_d}d")(convolution(_d, 7))


@rule("layer_norm rms_norm")
def _layer_norm(call: Call) -> Result:
    x, shape = call.get(0, "input"), call.get(1, "normalized_shape")
    return kept_before(call, x, len(x.shape) - len(shape)) if isinstance(shape, tuple) else MIXED


def in_training(call: Call) -> bool:
    """Whether a call of ``batch_norm`` takes the statistics of the batch."""
    return bool(call.get(5, "training", False))


@rule("batch_norm", places=[F])
def _batch_norm(call: Call) -> Result:
    """Scale and shift by statistics that are taken as fixed; of a batch they are reported apart."""
    x = call.args[0]
    return call.state(x) if call.constant(call.besides(x)) else MIXED


def _running(call: Call) -> tuple[Any, ...]:
    return call.get(1, "running_mean"), call.get(2, "running_var")


UNREAD[F.batch_norm] = lambda call: _running(call) if in_training(call) else ()
UNREAD[F.instance_norm] = lambda call: _running(call) if call.get(5, "use_input_stats", True) else ()


@rule("embedding")
def _embedding(call: Call) -> Result:
    ids, weight = call.get(0, "input"), call.get(1, "weight")
    if call.func is torch.embedding:
        ids, weight = weight, ids
    return call.state(ids) if call.constant(weight) else MIXED


@rule("embedding_bag", places=[F])
def _embedding_bag(call: Call) -> Result:
    bound = call.bound()
    ids, weights = bound["input"], bound["per_sample_weights"]
    if len(ids.shape) != 2 or not call.constant(bound["weight"]):
        return MIXED
    fits = all(call.state(h) in (CONSTANT, Axis(0)) for h in (ids, weights))
    return Axis(0) if fits else MIXED


@rule("lstm gru rnn_tanh rnn_relu")
def _recurrent(call: Call) -> Result:
    """Only sequences of one length; packed ones come with a tensor of batch sizes in the second place."""
    if len(call.args) != 9 or type(call.args[3]) is not bool:
        return MIXED
    x, hidden, weights, batch_first = call.args[0], call.args[1], call.args[2], call.args[8]
    axis = Axis(0 if batch_first else 1)
    if len(x.shape) != 3 or not call.constant(weights):
        return MIXED
    fits = call.state(x) in (CONSTANT, axis) and all(call.state(h) in (CONSTANT, Axis(1)) for h in handles((hidden,)))
    return [axis, Axis(1), Axis(1)][: len(call.outputs)] if fits else MIXED


@rule("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
def _recurrent_cell(call: Call) -> Result:
    fits = all(call.state(h) in (CONSTANT, Axis(0)) for h in handles(call.args[:2]))
    return Axis(0) if fits and call.constant(call.args[2:]) and len(call.args[0].shape) == 2 else MIXED

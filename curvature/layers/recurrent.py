"""Recurrent layers and cells, as dense layers on the inputs and on the states before each step.

The layers are fused: a forward pass hides the states between the steps and the gates. In a pass of our own they run
step by step. Axes: ``n`` examples, ``t`` steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.layers.linear import LinearSite
from curvature.layers.rules import replacement_for
from curvature.layers.site import Observer, RowLayout

#: Hidden state, and the cell state of an LSTM.
State = tuple[Tensor, ...]
#: Gates from the input and from the hidden state, and the state before the step, to the state after it.
Step = Callable[[Tensor, Tensor, State], State]


def lstm_step(i: Tensor, h: Tensor, state: State) -> State:
    """One step of an LSTM from the sum of its gates; a projection of the hidden state comes after."""
    enter, forget, cell, leave = (i + h).chunk(4, -1)
    c = torch.sigmoid(forget) * state[1] + torch.sigmoid(enter) * torch.tanh(cell)
    return torch.sigmoid(leave) * torch.tanh(c), c


def gru_step(i: Tensor, h: Tensor, state: State) -> State:
    """One step of a GRU, whose reset gate acts on the hidden part of the candidate alone."""
    (reset_i, update_i, new_i), (reset_h, update_h, new_h) = i.chunk(3, -1), h.chunk(3, -1)
    update = torch.sigmoid(update_i + update_h)
    new = torch.tanh(new_i + torch.sigmoid(reset_i + reset_h) * new_h)
    return (new + update * (state[0] - new),)


def tanh_step(i: Tensor, h: Tensor, state: State) -> State:
    """One step of an Elman network with tanh."""
    return (torch.tanh(i + h),)


def relu_step(i: Tensor, h: Tensor, state: State) -> State:
    """One step of an Elman network with ReLU."""
    return (torch.relu(i + h),)


@dataclass(frozen=True)
class Weights:
    """Parameters of one layer in one direction; ``w_hr`` projects the hidden state of an LSTM."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None

    @classmethod
    def split(cls, flat: Sequence[Tensor], biases: bool, runs: int) -> list[Weights]:
        """The parameters of each of ``runs`` runs from the flat list a fused layer takes."""
        size = len(flat) // runs
        pieces = [flat[start : start + size] for start in range(0, len(flat), size)]
        return [cls(*piece) if biases else cls(piece[0], piece[1], None, None, *piece[2:]) for piece in pieces]


class Unrolled:
    """Runs recurrent layers step by step and records the uses of their parameters.

    The rows of all steps are kept together as ``(n, t, d)``; for packed sequences as ``(rows, d)``, step after step,
    where the examples are mixed.

    Args:
        recorder: Takes the uses.
        step: One step of the cell.
        sizes: Number of examples at each step, if the sequences are packed.
        layout: How the rows hold examples.
    """

    def __init__(self, recorder: Observer, step: Step, sizes: list[int] | None, layout: RowLayout) -> None:
        self.recorder, self.step, self.sizes, self.layout = recorder, step, sizes, layout

    def run(self, x: Tensor, state: State, weights: Weights, reverse: bool) -> tuple[Tensor, State]:
        """One layer in one direction: from its inputs and first state to all its outputs and its last state."""
        gates = self._linear(x, weights.w_ih, weights.b_ih)
        steps = self._apart(gates)
        # Zeros added to what the state contributes: their gradients are those of all steps at once.
        hidden = gates.new_zeros(gates.shape, requires_grad=True)
        hidden_steps = self._apart(hidden)
        if weights.w_hr is not None:
            projected = gates.new_zeros(*gates.shape[:-1], weights.w_hr.shape[0], requires_grad=True)
            projected_steps = self._apart(projected)
        before, unprojected, after = [], [], []
        order = range(len(steps))[:: -1 if reverse else 1]
        for t in order:
            # Packed sequences are sorted by length: the first rows are those that have a step t.
            rows = len(steps[t])
            now = tuple(s[:rows] for s in state)
            before.append(now[0])
            new = self.step(steps[t], F.linear(now[0], weights.w_hh, weights.b_hh) + hidden_steps[t], now)
            if weights.w_hr is not None:
                unprojected.append(new[0])
                new = (F.linear(new[0], weights.w_hr) + projected_steps[t], *new[1:])
            after.append(new[0])
            state = tuple(torch.cat([n, s[rows:]]) if rows < len(s) else n for n, s in zip(new, state, strict=True))
        self._record(self._together(before, reverse), weights.w_hh, weights.b_hh, hidden)
        if weights.w_hr is not None:
            self._record(self._together(unprojected, reverse), weights.w_hr, None, projected)
        return self._together(after, reverse), state

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.linear(x, weight, bias)
        self._record(x, weight, bias, y)
        return y

    def _record(self, x: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor) -> None:
        refs = self.recorder.resolve(weight), self.recorder.resolve(bias)
        if refs != (None, None):
            d_out, d_in = weight.shape
            self.recorder.add(LinearSite(x, (d_out, d_in), *refs, self.layout, "recurrent"), output)

    def _apart(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The rows of each step."""
        return rows.unbind(1) if self.sizes is None else rows.split(self.sizes)

    def _together(self, steps: Sequence[Tensor], reverse: bool) -> Tensor:
        """Inverse of :meth:`_apart`, for steps in the order in which they were taken."""
        steps = list(steps[::-1]) if reverse else list(steps)
        return torch.stack(steps, 1) if self.sizes is None else torch.cat(steps)


def _layers(
    unrolled: Unrolled, x: Tensor, state: State, weights: list[Weights], bidirectional: bool, dropout: float
) -> tuple[Tensor, State]:
    """A stack of layers, each in one or two directions; states are ``(layer and direction, n, h)``."""
    directions = 2 if bidirectional else 1
    last: list[State] = []
    for start in range(0, len(weights), directions):
        if start and dropout:
            x = F.dropout(x, dropout)
        outputs = []
        for run in range(start, start + directions):
            output, final = unrolled.run(x, tuple(s[run] for s in state), weights[run], reverse=run > start)
            outputs.append(output)
            last.append(final)
        x = torch.cat(outputs, -1)
    return x, tuple(torch.stack(list(s)) for s in zip(*last, strict=True))


def _tracked(recorder: Observer, tensors: Sequence[Tensor]) -> bool:
    return any(recorder.resolve(t) is not None for t in tensors)


def layer(step: Step, recorder: Observer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """``torch.lstm``, ``gru``, ``rnn_tanh`` and ``rnn_relu`` on padded or packed sequences.

    Packed sequences lose the batch axis, so ``exact`` and ``empirical`` signals go through them one example at a time.
    """
    if kwargs:
        return None
    packed = isinstance(args[3], (list, tuple))
    x, sizes = args[0], None
    if packed:
        _, batch_sizes, hx, flat, biases, _, dropout, train, bidirectional = args
        sizes, batch_first = batch_sizes.tolist(), False
    else:
        _, hx, flat, biases, _, dropout, train, bidirectional, batch_first = args
    state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    if not _tracked(recorder, flat) or _tracked(recorder, (x, *state)):
        return None
    batched = recorder.layout(x).batched or any(recorder.layout(s).batched for s in state)
    if packed:
        layout = RowLayout(None, batched=False)
    else:
        if not batch_first:
            # The recorder takes the leading axis for the batch. Where time is as long as the batch, only
            # this flag shows the mix-up.
            recorder.examples_interact |= x.shape[0] == x.shape[1] == recorder.batch and x.shape[1] > 1
            x = x.transpose(0, 1)
        layout = RowLayout(x.shape[0], batched)
    weights = Weights.split(flat, biases, state[0].shape[0])
    unrolled = Unrolled(recorder, step, sizes, layout)
    output, last = _layers(unrolled, x, state, weights, bidirectional, dropout if train else 0.0)
    return (output if packed or batch_first else output.transpose(0, 1), *last)


def cell(step: Step, recorder: Observer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """``torch.lstm_cell``, ``gru_cell``, ``rnn_tanh_cell`` and ``rnn_relu_cell``."""
    if kwargs:
        return None
    x, hx, *flat = args
    state = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    flat = [w for w in flat if w is not None]
    if not _tracked(recorder, flat) or _tracked(recorder, (x, *state)):
        return None
    layout = RowLayout(recorder.batch, recorder.layout(x).batched or any(recorder.layout(s).batched for s in state))
    unrolled = Unrolled(recorder, step, None, layout)
    last = unrolled.run(x.unsqueeze(1), state, Weights(*flat), reverse=False)[1]
    return last if len(last) > 1 else last[0]


_CELLS = (
    (torch.lstm, torch.lstm_cell, lstm_step),
    (torch.gru, torch.gru_cell, gru_step),
    (torch.rnn_tanh, torch.rnn_tanh_cell, tanh_step),
    (torch.rnn_relu, torch.rnn_relu_cell, relu_step),
)
for _of_layer, _of_cell, _step in _CELLS:
    replacement_for(_of_layer, modules=dict.fromkeys((nn.RNN, nn.LSTM, nn.GRU), "kronecker"))(partial(layer, _step))
    replacement_for(_of_cell, modules=dict.fromkeys((nn.RNNCell, nn.LSTMCell, nn.GRUCell), "kronecker"))(
        partial(cell, _step)
    )

"""The model under a tape: its parameters as passes use them, passes of our own through its graphs, a pass once more."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from curvature.estimation.passes import Inputs, Pass
from curvature.estimation.taped_losses import called_again, own_loss
from curvature.layers.recorder import Recorder
from curvature.losses.loss import module_called
from curvature.losses.sum_of_losses import SumOfLosses
from curvature.model.backward_hooks import muted, no_backward_hooks, of_leaves
from curvature.model.data import Output, batch_size, resolve_output
from curvature.model.fully_sharded import FullyShard, call_forward
from curvature.model.inner_backward import passes_of
from curvature.model.parameters import with_values
from curvature.model.settings import autocasting, settings, untouched
from curvature.model.trees import tensors_in
from curvature.model.wrappers import data_parallel, is_compiled, plain_checkpoints, undisturbed, unwrapped

#: Model -> threads of backward passes of the library's own, the innermost last.
_OWN_PASSES: weakref.WeakKeyDictionary[nn.Module, list[int]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


class TapedModel:
    """A model, and what is known of how a training loop calls it.

    Args:
        model: The module the user calls; wrappers of ``torch.compile`` and DDP are looked through.
        loss_fn: The loss module the user calls, or one that describes what is computed elsewhere.
        parameters: The tracked parameters at this moment, by name.
        output: Picks the output tensor where the model returns something else.

    Attributes:
        parallel: The DistributedDataParallel through which the model is called, once that was seen.
        shards: The parameters under ``fully_shard``, if there are any.
        compiled: A call of the model ran compiled code.
        counting: Which of the input tensors counts the examples.
        concealed: Parameters, by ``id``, that a custom function uses in a backward pass of its own.
    """

    def __init__(
        self, model: nn.Module, loss_fn: Any, parameters: Callable[[], Mapping[str, Tensor]], output: Output | None
    ) -> None:
        self.called, self.model, self.parameters = model, unwrapped(model), parameters
        self.loss_module, self.output = module_called(loss_fn), output
        self.parallel = data_parallel(model)
        self.shards = FullyShard.of(self.model)
        self.compiled = False
        self.counting = 0
        self.concealed: set[int] = set()
        self._others: list[Tensor] = []  # trained parameters that are not tracked

    def seen(self) -> Mapping[str, Tensor]:
        """The tracked parameters by the tensors that passes use in their place."""
        parameters = self.parameters()
        if self.shards is None:
            return parameters
        return {name: self.shards.whole(p) for name, p in parameters.items()}

    def is_compiled(self) -> bool:
        """Whether calls of the model run compiled code, in which no use of a parameter is seen."""
        return self.compiled or is_compiled(self.called)

    def expected(self, result: Any, own: Tensor | None = None) -> Any:
        """What the loss is expected to see; ``None`` where the result does not tell.

        Of several tensors that is the only one that is no loss by itself and can be differentiated.

        Args:
            result: Of the model.
            own: The loss in it, if there is one.
        """
        try:
            found = self.seen_by_the_loss(result)
            return None if found is own and self.output is None else found
        except TypeError:
            if self.output is not None:
                raise
            outputs = [t for t in tensors_in(result) if t.requires_grad and t is not own]
            return outputs[0] if len(outputs) == 1 else None

    def seen_by_the_loss(self, result: Any) -> Any:
        """What the loss is called on: a tensor, or several where it is a sum of losses."""
        if self.output is None and isinstance(self.loss_module, SumOfLosses):
            return result
        return resolve_output(result, self.output)

    @property
    def inside(self) -> bool:
        """Whether a backward pass of the library's own, in this thread, runs through the model."""
        threads = _OWN_PASSES.get(self.model)
        if not threads:
            return False
        # Hooks may run in threads of the device, which are none of Python's.
        return threading.get_ident() in threads or isinstance(threading.current_thread(), threading._DummyThread)

    @contextlib.contextmanager
    def own_pass(self, passes: Iterable[Pass], output: Any) -> Iterator[None]:
        """For backward passes of our own through the user's graph: what arrives in them does not count.

        The user's hooks are not run.

        Args:
            passes: Those whose graph it is.
            output: Where ours begin.
        """
        passes = [origin for origin in passes if origin.recorder is not None]
        outputs = tensors_in([output, *(origin.output for origin in passes)])
        with _LOCK:
            _OWN_PASSES.setdefault(self.model, []).append(threading.get_ident())
        try:
            with torch.enable_grad(), undisturbed(self.parallel), contextlib.ExitStack() as stack:
                parameters = self.seen().values()
                stack.enter_context(passes_of([*parameters, *self._others], self.concealed))
                stack.enter_context(muted(of_leaves(parameters)))
                if self.shards is not None:
                    stack.enter_context(self.shards.undisturbed())
                for origin in passes:
                    assert origin.recorder is not None
                    stack.enter_context(origin.recorder.hooks.muted(outputs))
                yield
        finally:
            with _LOCK:
                _OWN_PASSES[self.model].remove(threading.get_ident())

    def recorder(self, inputs: Any, tensors: list[Tensor] | None = None) -> Recorder:
        """A recorder of the uses of the tracked parameters in one pass on these inputs.

        Args:
            inputs: Of the model.
            tensors: Buffers and parameters of the model; those that it has, by default.
        """
        parameters = self.seen()
        tracked = {id(p) for p in parameters.values()}
        if tensors is None:
            tensors = [*self.model.buffers(), *self.model.parameters()]
        constants = [t for t in tensors if id(t) not in tracked]
        self._others = [t for t in constants if t.requires_grad]
        sizes = [t.shape[0] for t in tensors_in(inputs) if t.dim()]
        number = sizes[self.counting] if self.counting < len(sizes) else batch_size(inputs)
        recorder = Recorder(parameters, constants, number or None)  # there may be no example
        recorder.mark_inputs(inputs)
        return recorder

    @contextlib.contextmanager
    def repeat(
        self,
        origin: Pass,
        *,
        record: bool = True,
        inputs: Inputs | None = None,
        values: Mapping[str, Tensor] | None = None,
        twice: bool = False,
    ) -> Iterator[Pass]:
        """Run a pass of this step again, eagerly, with the random numbers, modes, buffers and autocast it had.

        Buffers, random states and hooks see nothing of it. Reentrant checkpoints run as plain calls, so that what they
        hide is recorded.

        Args:
            origin: One of :attr:`passes`.
            record: Whether the uses of parameters are recorded, which takes a graph; otherwise there is one where
                gradients are enabled.
            inputs: In the place of those it had.
            values: In the places of parameters, by name.
            twice: Whether its graph will be differentiated twice, or forwards.

        Yields:
            The pass, with its output and its graph.

        Raises:
            ValueError: If it ran with other values in the places of parameters.
        """
        if self.shards is not None and record:
            raise NotImplementedError(
                "this step needs a second forward pass (of a compiled model, a reentrant or a selective checkpoint, "
                "Loop(capture='shadow'), or a method that evaluates the batch again), which is not served under "
                "fully_shard. Use checkpoints with use_reentrant=False, no context_fn, and uncompiled modules, or wrap "
                "the model in DistributedDataParallel."
            )
        now = {} if self.shards is not None else dict(self.model.named_parameters())  # shards are exchanged for wholes
        if replaced := [name for name, p in now.items() if id(p) not in origin.moment.parameters]:
            raise ValueError(
                "this step runs a forward pass again, and it ran with other values in the places of "
                f"{', '.join(replaced[:3])} (torch.func.functional_call), which are gone. Write these values into the "
                "parameters, or let a module of its own compute them (torch.nn.utils.parametrize)."
            )
        args, kwargs = inputs or origin.inputs
        device = next(iter(self.parameters().values())).device
        run = lambda: call_forward(self.model, args, kwargs)  # noqa: E731  # neither hooks nor a compiled call
        with (
            settings(self.model, origin.random, device, origin.moment)
            if twice
            else untouched(self.model, device, origin.random, origin.moment),
            plain_checkpoints(),
            autocasting(device, origin.autocast),
            torch.set_grad_enabled(record or torch.is_grad_enabled()),
            no_backward_hooks(self.model) as bare,
        ):
            again = Pass((args, kwargs), origin.random, origin.moment, origin.autocast)
            if record:
                again.recorder = self.recorder((args, kwargs))
                again.recorder.on_loss = partial(called_again, again)
            with again.recorder or contextlib.nullcontext():
                result = run() if values is None else with_values(self.model, values, run)
            bare(result)
            if again.recorder is not None:
                again.recorder.returned(result)
            again.returned = list(tensors_in(result))
            again.loss = own_loss(result, again.calls, hidden=False)
            again.output = self.expected(result, again.loss)
            yield again

"""Watching one forward pass: which parameters were used, by which operation, on which activations."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.overrides import TorchFunctionMode

from curvature.layers.axes.calls import Axis, Handle, getters
from curvature.layers.axes.example_axes import ExampleAxes, Resolved
from curvature.layers.explained import Explained, now
from curvature.layers.rules import REPLACEMENTS, RULES
from curvature.layers.site import Ref, RowLayout, Site
from curvature.losses.loss import FUNCTIONS as LOSS_FUNCTIONS
from curvature.model.backward_hooks import HANGING, GraphHooks
from curvature.model.graph_nodes import in_order
from curvature.model.kernels import ATTENTION
from curvature.model.trees import tensors_in
from curvature.model.wrappers import in_selective_checkpoint

#: Looks at a tensor whose results are no tensors and tell nothing of its values: models take many of them.
_SHAPES_ONLY = frozenset(
    (
        *getters("shape dtype device requires_grad is_leaf ndim layout is_cuda"),
        *(Tensor.dim, Tensor.ndimension, Tensor.size, Tensor.numel, Tensor.nelement, Tensor.stride),
        *(Tensor.is_contiguous, Tensor.is_floating_point, Tensor.is_complex),
    )
)
_REPEATING = {Tensor.expand, Tensor.expand_as, Tensor.repeat, torch.broadcast_to, Tensor.broadcast_to, torch.tile}


class Recorder(TorchFunctionMode):
    """Records the uses of parameters while it is active.

    Values, random numbers and autograd graphs of the recorded code are what they would be without it: every function
    runs unchanged, with the recorder looking at its arguments and its result.

    Args:
        parameters: Tracked parameters by name.
        constants: Further tensors that do not depend on the example (buffers, frozen parameters).
        batch: Number of examples, the leading dimension of the model's inputs; ``None`` where unknown.
        own_pass: The result is used for statistics only, so fused layers may run as an equal computation that shows
            their inner activations, and may round differently.

    Attributes:
        sites: Recognised uses, in order of execution.
        unknown: For parameters used in a way no rule covers, the operations that did.
        examples_interact: A batch norm in train mode was seen: every output depends on every example.
        selective: A part of the pass is in a selective checkpoint, which allows for one backward pass only: the user's.
        parts: The recorders of several passes that led to one loss, if this one stands for them.
        hooks: Of the user's on the backward pass.
        on_loss: Called with function, arguments and result of every call of one of torch's loss functions.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        constants: Iterable[Tensor] = (),
        batch: int | None = None,
        *,
        own_pass: bool = False,
    ) -> None:
        super().__init__()
        self.batch = batch
        self.own_pass = own_pass
        self.on_loss: Callable[[Any, Any, Any, Any], None] | None = None
        self.sites: list[Site] = []
        self.unknown: dict[str, set[str]] = {}
        self.examples_interact = self.selective = False
        self._names = {id(p): name for name, p in parameters.items()}
        self._parameters = parameters
        self._time_major: int | None = None
        # Results of recorded uses that are still views of a parameter (``expand``): already accounted for.
        self._done: dict[int, weakref.ref[Tensor]] = {}
        # Which tensors depend on the example, by identity. A tensor no recorded function made is not in here.
        self._depends: dict[int, tuple[weakref.ref[Tensor], bool]] = {}
        fixed = [*constants, *parameters.values()]
        for tensor in fixed:
            self._mark(tensor, False)
        self.parts: list[Recorder] = []
        self._returned: list[tuple[weakref.ref[Tensor], Handle]] = []
        self._resolved: Resolved | None = None
        self.axes = ExampleAxes({id(tensor): tensor for tensor in fixed})
        self.explained = Explained()
        self.hooks = GraphHooks()

    def mark_inputs(self, inputs: Any) -> None:
        """Declare the model's inputs: tensors whose leading dimension is the batch depend on the example."""
        for tensor in tensors_in(inputs):
            depends = self.batch is None or (tensor.dim() > 0 and tensor.shape[0] == self.batch)
            self._mark(tensor, depends)
            self.axes.start(tensor, 0 if depends and tensor.dim() else None)

    def resolve(self, tensor: Any) -> Ref | None:
        """The tracked parameter that ``tensor`` is, or is a contiguous segment or the transpose of."""
        name = self._name(tensor) if isinstance(tensor, Tensor) else None
        if name is None:
            return None
        base = tensor._base
        if id(tensor) in self._names or base is None:
            return Ref(name, 0, tuple(tensor.shape))
        if not base.is_contiguous():
            return None
        start, whole = int(tensor.storage_offset() - base.storage_offset()), tensor.numel() == base.numel()
        if tensor.is_contiguous():
            return Ref(name, start, tuple(tensor.shape), whole=whole)
        if tensor.dim() == 2 and tensor.mT.is_contiguous():
            return Ref(name, start, tuple(tensor.mT.shape), transposed=True, whole=whole)
        return None

    def layout(self, tensor: Tensor) -> RowLayout:
        """How the leading dimensions of ``tensor`` hold examples."""
        if self._time_major is not None:
            return RowLayout(self._time_major, self._depends_on_example(tensor), time_major=True)
        return RowLayout(self.batch, self._depends_on_example(tensor))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling() or get_eval_frame_callback() is not None:  # inside of a compiled part
            return _outside_of_the_graph(self, func, args, kwargs or {})
        return self._watched(func, args, kwargs or {})

    def _watched(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a function, and look at its arguments and its result."""
        if func in _SHAPES_ONLY:
            return func(*args, **kwargs)
        self.selective = self.selective or in_selective_checkpoint()
        if func is F.multi_head_attention_forward:
            return self._attention(args, kwargs)
        if func is F.batch_norm and (kwargs.get("training") or (len(args) > 5 and args[5])):
            self.examples_interact = True
        tensors = tensors_in((args, kwargs))
        since = now()
        output, replaced = self._replaced(func, args, kwargs), True
        if output is None:
            output, replaced = func(*args, **kwargs), False
        if func in HANGING:
            self.hooks.note(args[0])
        self.axes.call(func, args, kwargs, output)
        if func in LOSS_FUNCTIONS and self.on_loss is not None:
            self.on_loss(func, args, kwargs, output)
        if isinstance(output, (Tensor, tuple, list)):
            depends = any(self._depends_on_example(t) for t in tensors) or self._gives_batch(func, args, output)
            for result in tensors_in(output):
                self._mark(result, depends)
            if torch.is_grad_enabled() and not replaced:
                self._record(func, output, tensors, args, kwargs, since)
            elif replaced:
                for result in tensors_in(output):
                    self.explained.add_use(result, since)
        return output

    def add(self, site: Site, output: Tensor, inputs: Iterable[Tensor] = ()) -> None:
        """Record a use whose result is ``output``, of a function of these tensors."""
        site.watch(output, inputs)
        site.place = self.axes.handle(output)
        if site.layout.batched:
            self.axes.claim(site.place, int(site.layout.time_major))
        self.sites.append(site)

    def knows(self, parameter: Tensor, name: str | None = None) -> None:
        """Declare a tensor that the pass uses in the place of a parameter, of that name if it is tracked."""
        if name is not None:
            self._names[id(parameter)] = name
        entry = self._depends.get(id(parameter))
        if entry is None or entry[0]() is not parameter:
            self._mark(parameter, False)
            self.axes.constant(parameter)

    def continues(self, before: Tensor, after: Tensor) -> None:
        """Declare that a tensor holds what another one does, which something that function modes do not see made."""
        self._mark(after, self._depends_on_example(before))
        self.axes.call(Tensor.to, (before,), {}, after)

    def returned(self, result: Any) -> None:
        """Declare what the model returned."""
        for tensor in tensors_in(result):
            self.hooks.note(tensor)
        self._returned = [(weakref.ref(t), self.axes.handle(t)) for t in tensors_in(result) if t.requires_grad]

    def keeps_examples(self, sites: Iterable[Site], output: Tensor, number: int) -> bool:
        """Whether each row of some uses is certain to hear of the example it is counted to, and of that alone.

        Certain from the operations alone, whatever the values: not so where values pick or move rows, or where
        something ran that function modes do not see.

        Args:
            sites: Of :attr:`sites`.
            output: What the loss saw.
            number: Number of examples.
        """
        if self.parts:
            return all(p.keeps_examples([s for s in sites if s in p.sites], output, number) for p in self.parts)
        if self.batch != number:
            return False
        if self._resolved is None:
            self._resolved = self.axes.resolve()
        leads = any((t := ref()) is not None and in_order(output, t) and self._apart(h) for ref, h in self._returned)
        return leads and all(
            site.layout.batched and site.place is not None and self._apart(site.place, int(site.layout.time_major))
            for site in sites
        )

    def lie_elsewhere(self, output: Tensor) -> bool:
        """Whether the examples are certain not to be the entries along the first axis of an output, or runs of them."""
        if self._resolved is None:
            return False
        states = [self._resolved.of(h) for ref, h in self._returned if (t := ref()) is not None and in_order(output, t)]
        return any(isinstance(state, Axis) and (state.axis, state.outer) != (0, 1) for state in states)

    def _apart(self, place: Handle, axis: int = 0) -> bool:
        """Whether the examples lie along an axis, the outermost number of it."""
        assert self._resolved is not None
        state = self._resolved.of(place)
        return isinstance(state, Axis) and state.axis == axis and state.outer == 1

    def _replaced(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Result of the replacement of a fused function; ``None`` where it is to run as it is."""
        if not self.own_pass or func not in REPLACEMENTS or not torch.is_grad_enabled():
            return None
        return REPLACEMENTS[func](self, args, kwargs)

    def _record(self, func: Any, output: Any, tensors: list[Tensor], args: Any, kwargs: Any, since: int) -> None:
        tracked = [t for t in tensors if self._is_tracked(t)]
        if not tracked:
            self._inherit(tensors, output)
            return
        names = {name for t in tracked if (name := self._name(t)) is not None}
        # A jagged tensor has no axes that rows could be laid out by.
        rule = None if any(t.is_nested for t in tensors) else RULES.get(func)
        if rule is not None and isinstance(output, Tensor) and output.requires_grad and not output.is_complex():
            site = rule(self, output, args, kwargs)
            if site is not None:
                if output.numel():  # an expert that nothing was sent to was not used
                    self.add(site, output, tensors)
                self.explained.add_use(output, since)
                names -= {ref.name for ref in site.refs}
                self._done[id(output)] = weakref.ref(output)
        if not names:
            return
        results = [t for t in tensors_in(output) if t.requires_grad]
        if all(self.resolve(t) is not None for t in results):
            for result in results:  # only looked at, or cut into views that are followed further
                self.explained.add_view(result, since)
            return
        for name in names:
            self.unknown.setdefault(name, set()).add(getattr(func, "__name__", str(func)))

    def _attention(self, args: Any, kwargs: Any) -> Any:
        """``nn.MultiheadAttention``: its projections are plain linears on (length, batch, d) activations."""
        query = args[0] if args else kwargs["query"]
        before, self._time_major = self._time_major, query.shape[1] if query.dim() == 3 else None
        try:
            with self:
                return ATTENTION(*args, **kwargs)
        finally:
            self._time_major = before

    def _inherit(self, tensors: list[Tensor], output: Any) -> None:
        """Views of accounted results are accounted for."""
        if any(self._is_done(t) for t in tensors):
            for result in tensors_in(output):
                if result._base is not None and id(result._base) in self._names:
                    self._done[id(result)] = weakref.ref(result)

    def _is_done(self, tensor: Tensor) -> bool:
        entry = self._done.get(id(tensor))
        return entry is not None and entry() is tensor

    def _is_tracked(self, tensor: Tensor) -> bool:
        return self._name(tensor) is not None and (id(tensor) in self._names or not self._is_done(tensor))

    def _name(self, tensor: Tensor) -> str | None:
        """Name of the tracked parameter that ``tensor`` is, or is a view of; a detached one is a constant."""
        if not tensor.requires_grad:
            return None
        if id(tensor) in self._names:
            return self._names[id(tensor)]
        # A view made under no_grad claims to require gradients, but is a leaf of its own.
        return None if tensor._base is None or tensor.grad_fn is None else self._names.get(id(tensor._base))

    def _gives_batch(self, func: Any, args: Any, output: Any) -> bool:
        """Whether a call repeats something once per example, as ``arange(n).expand(batch, n)`` does."""
        if func not in _REPEATING or not isinstance(output, Tensor) or output.dim() == 0:
            return False
        source = args[0]
        return output.shape[0] == self.batch and (source.dim() < output.dim() or source.shape[0] == 1)

    def _mark(self, tensor: Tensor, depends: bool) -> None:
        self._depends[id(tensor)] = (weakref.ref(tensor), depends)

    def _depends_on_example(self, tensor: Tensor) -> bool:
        entry = self._depends.get(id(tensor))
        if entry is not None and entry[0]() is tensor:
            return entry[1]
        # Made by something that functions modes do not see (a custom autograd.Function): the shape must tell.
        return self.batch is None or (tensor.dim() > 0 and tensor.shape[0] % self.batch == 0)


# A part of the model that is compiled meets the recorder on torch's stack: it is no part of what is compiled. See
# curvature.model.hooks for why this is not torch.compiler.disable.
@torch._disable_dynamo  # type: ignore[attr-defined]
def _outside_of_the_graph(recorder: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    return recorder._watched(func, args, kwargs)

"""The user's data: one batch or many, tensors, tuples or mappings."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from tqdm import tqdm

from curvature.model.backward_hooks import no_backward_hooks
from curvature.model.hooks import remove
from curvature.model.trees import tensors_in
from curvature.model.wrappers import Depth, plain_checkpoints, unwrapped

Batch = tuple[Any, Any]
Data = Batch | Mapping[str, Any] | Iterable[Any]
Output = Callable[[Any], Any]


class Collated(dict[str, Any]):
    """The inputs of a batch that is a mapping, as a collator makes it, beside the labels that came with them.

    A model that takes labels, and computes its own loss from them, is called with both.

    Args:
        inputs: The mapping without its labels.
        labels: The labels.

    Attributes:
        found: The loss that a module inside a wrapper computed from the labels, in the last call.
    """

    def __init__(self, inputs: Mapping[str, Any], labels: Any) -> None:
        super().__init__(inputs)
        self.found: Tensor | None = None
        # Models look at their labels as one vector, which tensors that are cut out of others do not allow.
        self.labels = labels.contiguous() if isinstance(labels, Tensor) else labels


def is_one_batch(data: Any) -> bool:
    """Whether ``data`` is one batch: a pair ``(x, y)``, a mapping with ``labels``, or a list that begins with a tensor.

    A list of two is a batch as a loader collates it: the targets of some losses are themselves a list.
    """
    if isinstance(data, Mapping):
        return True
    if isinstance(data, tuple):
        return len(data) == 2
    return isinstance(data, list) and len(data) == 2 and isinstance(data[0], Tensor)


def batches(data: Data, passes: int = 1, empty: bool = False) -> Callable[[], Iterator[Batch]]:
    """A function that starts a pass over the data, without the batches of several that hold no example.

    Args:
        data: One batch ``(x, y)``, or an iterable of batches (a list, a ``DataLoader``).
        passes: How often it will be called; a one-shot iterator serves one pass only.
        empty: Whether there may be no batches, as in a process that has no data of a common set.

    Raises:
        TypeError: If ``data`` is not iterable, or a one-shot iterator where several passes are needed.
    """
    if is_one_batch(data):
        return lambda: iter([split_batch(data)])
    if not isinstance(data, Iterable):
        raise TypeError(
            f"data must be one batch (x, y) or an iterable of batches such as a list or a DataLoader, got "
            f"{type(data).__name__}."
        )
    if passes > 1 and isinstance(data, Iterator):  # iter(data) would start workers, and draw random numbers
        raise TypeError(
            f"data is a one-shot iterator ({type(data).__name__}), but {passes} passes over it are needed: after the "
            "first it would be empty. Pass a list of batches or a DataLoader."
        )

    def start() -> Iterator[Batch]:
        none = not empty
        for batch in data:
            x, y = split_batch(batch)
            if isinstance(y, Tensor) and y.dim() and not len(y):  # a filter left nothing of it
                continue
            none = False
            yield x, y
        if none:
            raise ValueError("data has no batches: is it an iterator that was consumed before, or an empty loader?")

    return start


def shown(stream: Iterator[Batch], title: str, progress: bool | None) -> Iterator[Batch]:
    """The stream behind a progress bar; under ``None`` the bar waits, so that short passes print nothing."""
    if progress is False:
        return stream
    return iter(tqdm(stream, desc=title, delay=0 if progress else 5, leave=False))


def split_batch(batch: Any) -> Batch:
    """A batch as ``(x, y)``; y are the ``labels`` of a mapping."""
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise TypeError(
                f"a batch that is a mapping needs the key 'labels' for the targets, got {sorted(batch)}. Otherwise "
                "pass pairs (x, y), where x may be a mapping."
            )
        labels = batch["labels"]
        return Collated({key: value for key, value in batch.items() if key != "labels"}, labels), labels
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    what = type(batch).__name__ + (f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else "")
    raise TypeError(f"a batch must be a pair (x, y), got a {what}. For several inputs make x a tuple or a mapping.")


def to_device(tree: Any, device: torch.device) -> Any:
    """Move every tensor of nested tuples, lists, mappings and dataclasses.

    Autograd can use copies of inference tensors only.
    """

    def moved(tensor: Tensor) -> Tensor:
        result = tensor.to(device)
        return result.clone() if result.is_inference() else result

    return map_tensors(tree, moved)


def map_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested tuples, lists, mappings and dataclasses with every tensor changed; mappings become dicts."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        changed = {key: map_tensors(value, change) for key, value in tree.items()}
        return Collated(changed, map_tensors(tree.labels, change)) if isinstance(tree, Collated) else changed
    if isinstance(tree, PackedSequence):  # its batch sizes stay on the CPU
        data, sizes, *orders = tree
        return type(tree)(change(data), sizes, *(None if order is None else change(order) for order in orders))
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(value, change) for value in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_tensors(value, change) for value in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        named = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree) if field.init}
        return dataclasses.replace(tree, **map_tensors(named, change))
    return tree


def batch_size(inputs: Any) -> int | None:
    """Leading dimension of the first tensor among the inputs that has one."""
    for tensor in tensors_in(inputs):
        if tensor.dim() > 0:
            return int(tensor.shape[0])
    return None


def examples_of(inputs: Any, seen: Any = None) -> int | None:
    """Number of examples of a batch: as its targets or outputs count them, where an input has as many rows.

    The first input may be a mask, a context or an edge list. Where no input has that many rows, examples and positions
    were flattened, and the rows of the first input count.

    Args:
        inputs: Of the model.
        seen: Targets, or what the loss saw.
    """
    number = batch_size(seen)
    if number is not None and any(tensor.shape[:1] == (number,) for tensor in tensors_in(inputs)):
        return number
    return batch_size(inputs)


def call(model: nn.Module, x: Any) -> Any:
    """Run the model: a tuple as positional inputs, a mapping as keywords where ``forward`` takes those names.

    A model that takes ``labels`` gets those of a batch that is a mapping: encoder-decoders make inputs of them.
    Reentrant checkpoints run as plain calls: with no gradient asked of what enters them, they hide their parameters.
    """
    with inspection(), plain_checkpoints(), no_backward_hooks(model) as bare:
        result = _called(model, x)
        bare(result)
    return result


def _called(model: nn.Module, x: Any) -> Any:
    if isinstance(x, tuple) and not isinstance(x, PackedSequence):
        return model(*x)
    if isinstance(x, Mapping) and _takes(model, x):
        if not (isinstance(x, Collated) and _takes_labels(model)):
            return model(**x)
        with _watched(model, x):
            return model(**x, labels=x.labels)
    return model(x)


def loss_in(result: Any) -> Tensor | None:
    """The loss in what a model returned: an object or mapping with ``loss``, or a tuple that begins with it."""
    if isinstance(result, Mapping):
        found = result.get("loss")
    elif isinstance(result, tuple) and not hasattr(result, "_fields"):
        found = result[0] if len(result) > 1 else None
    else:
        found = getattr(result, "loss", None)
    return found if isinstance(found, Tensor) and found.numel() == 1 else None


@contextlib.contextmanager
def _watched(model: nn.Module, x: Collated) -> Iterator[None]:
    """Note the loss of a module that a wrapper passes the labels on to: the wrapper may return its logits alone."""
    x.found = None
    inner = [] if "labels" in _keywords(unwrapped(model))[0] else [m for m in model.modules() if m is not model]

    def note(module: nn.Module, args: Any, result: Any) -> None:
        found = loss_in(result)
        x.found = x.found if found is None else found

    handles = [m.register_forward_hook(note) for m in inner if "labels" in _keywords(m)[0]]
    try:
        yield
    finally:
        remove(handles)


def _keywords(model: nn.Module) -> tuple[set[str], bool]:
    """The names that ``forward`` takes, and whether it takes any other."""
    parameters = inspect.signature(model.forward).parameters
    catch_all = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {p.name for p in parameters.values() if p.kind not in catch_all}
    return named, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _takes_labels(model: nn.Module) -> bool:
    """Whether ``forward`` has the name, or passes any name on to a module that has it."""
    named, any_name = _keywords(model)
    return "labels" in named or (any_name and any("labels" in _keywords(inner)[0] for inner in model.modules()))


def _takes(model: nn.Module, x: Mapping[str, Any]) -> bool:
    named, any_name = _keywords(model)
    known = [key for key in x if key in named]
    # A wrapper that passes everything on, forward(*args, **kwargs), has no names itself.
    return len(known) == len(x) or (any_name and (bool(known) or not named))


def resolve_output(result: Any, output: Output | None = None) -> Tensor:
    """The tensor that the loss sees, from the model's return value.

    Args:
        result: Result of the model.
        output: Picks the tensor; by default a tensor itself, or its attribute or key ``logits``.

    Raises:
        TypeError: If no tensor is found.
    """
    if output is not None:
        result = output(result)
        if not isinstance(result, Tensor):
            raise TypeError(f"output= must return a tensor, got {type(result).__name__}.")
        return result
    if isinstance(result, Tensor):
        return result
    if isinstance(getattr(result, "logits", None), Tensor):
        return result.logits
    if isinstance(result, Mapping) and isinstance(result.get("logits"), Tensor):
        return result["logits"]
    raise TypeError(
        f"the model returned a {type(result).__name__}; say which tensor the loss sees with output=, for instance "
        "output=lambda result: result[0]."
    )


def refuse_complex(output: Any) -> None:
    """Refuse outputs of a model that are complex: derivatives of a loss in them have other rules than real ones.

    Raises:
        TypeError: If a tensor among them is complex.
    """
    for z in tensors_in(output):
        if z.is_complex():
            raise TypeError(
                f"the model's output is complex ({z.dtype}). Curvature is that of real outputs: return "
                "torch.view_as_real(output) from the model, and let the loss join the parts by torch.view_as_complex."
            )


_own_passes = Depth()


def inspecting() -> bool:
    """Whether a pass is no training step: the library's own, or under a transform of ``torch.func``."""
    return _own_passes.value > 0 or torch._C._functorch.maybe_current_level() is not None


def inspection() -> contextlib.AbstractContextManager[None]:
    """Passes inside, in this thread, are the library's own."""
    return _own_passes.deeper()

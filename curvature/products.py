"""Products with a matrix over a data set: passes over the batches, blocks of vectors, and what is kept between them."""

from __future__ import annotations

import contextlib
import copy
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from curvature.data import Data, Output, batches, call, is_one_batch, resolve_output, shown, to_device
from curvature.dataset import over_all_data, record, terms_of
from curvature.losses import AutogradLoss, ClassDim, Loss, Terms, UnknownLossError, WeightedSum, loss_for
from curvature.parameters import Parameters
from curvature.recorder import Recorder
from solvers import LinearOperator, StructureError

#: Memory in bytes that a block of vectors may take at once, beyond the vectors themselves and their products.
MEMORY = 1 << 28
# A pass that saves less than this is bound by the overhead of its calls: there, vectors share one vectorised pass. In
# larger ones a loop over the vectors is as fast or faster (batched convolutions above all).
SMALL = {"cpu": 1 << 21, "cuda": 1 << 26}

Product = Callable[[Tensor], Tensor]


class Evaluation:
    """The model on one batch: its output, attached to the graph, and the loss there.

    Attributes:
        problem: What is evaluated.
        x: Inputs, on the device of the parameters.
        output: What the loss saw.
        terms: The loss as a sum of terms; ``None`` where nothing but the loss function itself is known.
        first: Whether this is the first pass, in which what holds for all is checked.
        random: State of torch's random generators before the model ran.
        nbytes: Size of what the pass made, where it was counted.
        recorder: Uses of the parameters, where they were recorded.
    """

    def __init__(self, problem: Problem, x: Any, y: Any, *, first: bool, count: bool, recorded: bool) -> None:
        self.problem, self.x, self.y, self.first = problem, x, y, first
        self.random = random_state(problem.parameters.device)
        self.recorder: Recorder | None = None
        counter = _BytesMade() if count else None
        with torch.enable_grad(), counter or contextlib.nullcontext():
            if recorded:
                result, self.recorder = record(problem.model, problem.parameters, x)
            else:
                result = call(problem.model, x)
        self.nbytes = counter.total if counter else 0
        self.terms: Terms | None = None
        if problem.loss is None:
            self.output = problem.pick(result)
        else:
            self.terms = terms_of(problem.loss, result, y, problem.output, problem.class_dim, check=first)
            self.output = self.terms.output
            if self.terms.reduction == "none":
                raise ValueError("the loss has reduction='none', so it is no scalar. Use 'mean' or 'sum'.")

    def loss(self) -> Tensor:
        """The loss of the batch as a sum over terms, 0-d, differentiable."""
        with torch.enable_grad():
            return self.problem.loss_fn(self.output, self.y) if self.terms is None else self.terms.value()

    @property
    def total(self) -> Tensor | float:
        """What this batch brings to the divisor of the loss."""
        if self.terms is None:
            return 1.0
        return self.terms.total if self.terms.reduction == "mean" else 1.0

    @property
    def mean(self) -> bool:
        """Whether the loss divides by the sum of :attr:`total` over the batches."""
        return self.terms is not None and self.terms.reduction == "mean"


class Problem:
    """A loss over a data set, as a function of a model's parameters at which it can be evaluated again and again.

    Each pass sees the same random numbers (dropout masks, order of a shuffling loader), the user's random state and
    buffers stay as they are, and parameters that changed since are refused: products taken at different times belong
    to one matrix.

    Args:
        model: Any module; evaluated in its current mode.
        loss_fn: The loss.
        data: One batch or a re-iterable of batches.
        params: Restriction of the parameters.
        output: Picks the output tensor.
        class_dim: Class axis of the output where the shapes leave it open.
        progress: Show a progress bar; ``None`` shows one on long passes.
        opaque: Allow a loss of which only the value is known.

    Raises:
        TypeError: If the data can be seen only once.
        UnknownLossError: If the loss is not known and cannot do without.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        data: Data,
        *,
        params: Any = None,
        output: Output | None = None,
        class_dim: ClassDim = None,
        progress: bool | None = None,
        opaque: bool = False,
    ) -> None:
        _refuse_sparse(model)
        self.model, self.loss_fn = model, loss_fn
        self.parameters = Parameters(model, params)
        self.output, self.class_dim = output, class_dim
        self.start = batches(data, passes=2)
        self.single = is_one_batch(data)
        self.progress = False if progress is None and self.single else progress
        self.loss = self._loss(opaque)
        if self.loss is not None and not self.single:
            self.loss = over_all_data(self.loss, model, self.start, self.parameters.device, output, class_dim)
        self.random = random_state(self.parameters.device)
        self._versions = versions(model)
        self._seen: float | None = None

    def _loss(self, opaque: bool) -> Loss | None:
        try:
            return loss_for(self.loss_fn)
        except UnknownLossError:
            if opaque and self.single:
                return None  # whatever the loss does with its batch, this batch is all of the data
            if isinstance(getattr(self.loss_fn, "reduction", None), str):
                return AutogradLoss(self.loss_fn)  # compares the batch with its examples, and refuses other sums
            raise

    def pick(self, result: Any) -> Any:
        """The tensor that the loss sees, or whatever an opaque loss is called with."""
        if isinstance(self.loss, WeightedSum):
            return self.loss.joined(result if self.output is None else self.output(result))
        return resolve_output(result) if self.output is None else self.output(result)

    def visit(
        self, use: Callable[[Evaluation], Any], title: str, *, count: bool = False, recorded: bool = False
    ) -> Tensor | float:
        """Evaluate every batch of one pass and hand it to ``use``.

        Args:
            use: Called with each evaluation, inside the pass's settings.
            title: What the progress bar says.
            count: Count the bytes each evaluation makes.
            recorded: Record the uses of the parameters.

        Returns:
            What sums over terms are divided by, 1 for a loss that is a sum.

        Raises:
            RuntimeError: If parameters changed since the matrix was made, or the data are others than before.
        """
        self.check_unchanged()
        first = self._seen is None
        total: Tensor | float = 0.0
        seen: Tensor | None = None
        mean = False
        device = self.parameters.device
        with settings(self.model, self.random, device):
            for x, y in shown(self.start(), title, self.progress):
                x, y = to_device(x, device), to_device(y, device)
                evaluation = Evaluation(self, x, y, first=first, count=count, recorded=recorded)
                total, mean = total + evaluation.total, evaluation.mean
                if not self.single:
                    seen = _fingerprint(evaluation) if seen is None else seen + _fingerprint(evaluation)
                use(evaluation)
        if seen is not None:
            self._compare(*seen.tolist())
        return total if mean else 1.0

    def check_unchanged(self) -> None:
        """Raise if a parameter was written since."""
        refuse_changes(self.model, self._versions)

    def _compare(self, loss: float, size: float) -> None:
        """Raise if the batches of this pass gave another loss than those of the first."""
        if self._seen is None:
            self._seen = loss
        # Batches may come in another order; anything beyond the rounding of a sum of this size is other data.
        tolerance = torch.finfo(torch.promote_types(self.parameters.dtype, torch.float32)).eps ** 0.5
        if not abs(loss - self._seen) <= tolerance * size:
            raise RuntimeError(
                f"this pass over the data gave a loss of {loss:.8g}, the first one {self._seen:.8g}: products with one "
                "matrix need the same numbers in every pass. curvature.check_deterministic(model, data) says what "
                "differs (augmentation, a random sampler of a subset, a model that draws its own numbers)."
            )


def _fingerprint(evaluation: Evaluation) -> Tensor:
    """Sum of the loss terms of a batch, and of their sizes."""
    assert evaluation.terms is not None  # only a single batch does without
    with torch.no_grad():
        values = torch.where(evaluation.terms.mask, evaluation.terms.values(), 0.0).double()
        return torch.stack([values.sum(), values.abs().sum()])


class DatasetOperator(LinearOperator):
    """A matrix between flat parameter vectors: a sum over batches, known by its products.

    A block of vectors costs one pass over the data. Small models take the block in one vectorised pass, in chunks that
    stay within a memory budget; for larger ones a loop over the vectors is as fast.

    Args:
        problem: The loss over the data.
        rows: Parameters of the result.
        columns: Parameters of the vectors it acts on.
        keep_graph: Keep the graphs of all batches between products: a product then costs no forward pass, and the
            memory of the batches' activations stays taken as long as the operator lives. ``None`` keeps the graph
            if the data are one batch.
        memory: Bytes that intermediate results of a block of vectors may take.
    """

    def __init__(
        self, problem: Problem, rows: Parameters, columns: Parameters, keep_graph: bool | None, memory: int
    ) -> None:
        self.problem, self.rows, self.columns = problem, rows, columns
        self.keep_graph = problem.single if keep_graph is None else keep_graph
        self.memory = memory
        self._kept: list[tuple[Product, int]] | None = None
        self._total: Tensor | float = 1.0

    @property
    def in_shape(self) -> tuple[int, ...]:
        return (self.columns.size,)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (self.rows.size,)

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.problem.parameters.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        return self.problem.parameters.device

    @property
    def symmetric(self) -> bool:
        return list(self.rows) == list(self.columns)

    def adjoint(self) -> LinearOperator:
        return self if self.symmetric else self._narrowed(self.columns, self.rows)

    def block(self, rows: Any, columns: Any = None) -> Self:
        """The block of some parameters, at the cost of those parameters only.

        Args:
            rows: Names, globs or tensors of the parameters of the result.
            columns: The same for the vectors; ``rows`` if left out.

        Returns:
            Operator from the flat vector of ``columns`` to that of ``rows``.
        """
        inner = Parameters(self.problem.model, rows)
        outer = inner if columns is None else Parameters(self.problem.model, columns)
        for chosen, known in ((inner, self.rows), (outer, self.columns)):
            if missing := [name for name in chosen if name not in known]:
                raise ValueError(f"{missing} are no parameters of {self!r}, which has {list(known)}.")
        return self._narrowed(inner, outer)

    def _narrowed(self, rows: Parameters, columns: Parameters) -> Self:
        other = copy.copy(self)
        other.rows, other.columns, other._kept = rows, columns, None
        return other

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Self:
        if dtype in (None, self.dtype) and (device is None or torch.device(device) == self.device):
            return self
        raise StructureError(
            f"{self!r} runs where and as the model is. Convert the model and make the operator anew, or to_dense() the "
            "operator."
        )

    @abstractmethod
    def record(self, evaluation: Evaluation) -> Product:
        """The product of one batch, in the scale of the sum over terms.

        Returns:
            Function from ``(k, columns.size)`` to ``(k, rows.size)`` in the parameters' dtype.
        """

    def begin(self) -> None:
        """Called before each pass."""

    def apply(self, x: Tensor) -> Tensor:
        vectors = x.detach().reshape(-1, self.columns.size)
        out = torch.zeros(len(vectors), self.rows.size, dtype=self.dtype, device=self.device)

        def add(product: Product, nbytes: int) -> None:
            step = self.chunk(nbytes)
            for start in range(0, len(vectors), step):
                part = vectors[start : start + step].to(self.problem.parameters.dtype)
                out[start : start + step] += product(part)

        self.each(add, vectorized=len(vectors) > 1)
        out /= self._total
        return out.reshape(*x.shape[:-1], self.rows.size)

    def each(self, use: Callable[[Product, int], None], vectorized: bool = True) -> None:
        """Call ``use(product, bytes of one vector)`` for every batch; afterwards the divisor is known."""
        if self._kept is not None:
            self.problem.check_unchanged()
            with settings(self.problem.model, self.problem.random, self.device):
                for product, nbytes in self._kept:
                    use(product, nbytes)
            return
        kept: list[tuple[Product, int]] = []

        def visit(evaluation: Evaluation) -> None:
            product = self.record(evaluation)
            use(product, evaluation.nbytes)
            if self.keep_graph:
                kept.append((product, evaluation.nbytes))

        self.begin()
        self._total = self.problem.visit(visit, type(self).__name__, count=vectorized or self.keep_graph)
        if self.keep_graph:
            self._kept = kept

    def chunk(self, nbytes: int) -> int:
        """How many vectors go through a pass at once that made ``nbytes``."""
        size = nbytes + 4 * self.columns.size
        if nbytes == 0 or size > SMALL.get(self.device.type, SMALL["cuda"]):
            return 1
        # A second derivative makes a few times what the forward pass made.
        return max(1, self.memory // (4 * size))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape[0]}x{self.shape[1]})"


class Pullback:
    """The transposed Jacobian of a recorded function: cotangents of its outputs to cotangents of its inputs.

    Args:
        outputs: Tensors with a graph (those without contribute nothing).
        inputs: Tensors of that graph.
    """

    def __init__(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        self._live = [i for i, output in enumerate(outputs) if output.requires_grad]
        self._outputs = [outputs[i] for i in self._live]
        self._inputs = list(inputs)
        self._batched = True

    def __call__(self, cotangents: Sequence[Tensor]) -> list[Tensor]:
        """Pull back a block.

        Args:
            cotangents: One ``(k, *output.shape)`` per output.

        Returns:
            One ``(k, *input.shape)`` per input; the graph stays.
        """
        k = len(cotangents[0])
        if not self._live:
            return [x.new_zeros(k, *x.shape) for x in self._inputs]
        live = [cotangents[i] for i in self._live]
        if k > 1 and self._batched:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # an operation that vmap can only loop over is no news to a user
                    return self._grad(live, True)
            except RuntimeError:  # an operation that cannot be vectorised; one by one it works, or says why not
                self._batched = False
        each = [self._grad([c[i] for c in live], False) for i in range(k)]
        return [torch.stack(column) if k > 1 else column[0].unsqueeze(0) for column in zip(*each, strict=True)]

    def _grad(self, cotangents: list[Tensor], batched: bool) -> list[Tensor]:
        gradients = torch.autograd.grad(
            self._outputs, self._inputs, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
        lead = (len(cotangents[0]),) if batched else ()
        return [x.new_zeros(*lead, *x.shape) if g is None else g for x, g in zip(self._inputs, gradients, strict=True)]


def refuse_differentiated_once(tensors: Iterable[Tensor]) -> None:
    """Refuse gradients that cannot be differentiated again.

    PyTorch marks them by a node that raises, but never reaches it where gradients are taken with respect to given
    inputs: their derivative would silently be zero.

    Raises:
        RuntimeError: If there is such a node in the graph of ``tensors``.
    """
    waiting: list[Any] = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node.name() == "torch::autograd::Error":
            raise RuntimeError(
                "the model contains an operation that can be differentiated only once (an autograd.Function whose "
                "backward is marked once_differentiable, as custom kernels are), so second derivatives do not exist. "
                "Replace it by an implementation in plain torch operations."
            )
        following = [before for before, _ in node.next_functions if before is not None and before not in seen]
        seen.update(following)
        waiting.extend(following)


@contextlib.contextmanager
def settings(model: nn.Module, random: list[Tensor], device: torch.device) -> Iterator[None]:
    """What holds while a model is evaluated for products: all of it is as before afterwards, exceptions included.

    Random numbers start from ``random``; buffers are copies, so running statistics stay what they are and graphs that
    are kept refer to values nobody changes; kernels are those that can be differentiated twice.
    """
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), own_buffers(model), differentiable_kernels(model):
        set_random_state(random, device)
        yield


@contextlib.contextmanager
def differentiable_kernels(model: nn.Module) -> Iterator[None]:
    """Use kernels that have a second derivative.

    Fused attention and cuDNN's recurrence have none, the fast path of encoder layers in eval mode has no derivative at
    all, and that of the fused weight norm is wrong.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    fast = torch.backends.mha.get_fastpath_enabled()
    cudnn = torch.backends.cudnn.enabled
    with sdpa_kernel(SDPBackend.MATH), _PlainWeightNorm():
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            torch.backends.cudnn.enabled = cudnn and not recurrent
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            torch.backends.cudnn.enabled = cudnn


@contextlib.contextmanager
def own_buffers(model: nn.Module) -> Iterator[None]:
    """Let the model work on copies of its buffers."""
    before = [(module, dict(module._buffers)) for module in model.modules()]
    copies: dict[int, Tensor] = {}
    for module, buffers in before:
        for name, b in buffers.items():
            if b is not None:
                module._buffers[name] = copies.setdefault(id(b), b.detach().clone())
    try:
        yield
    finally:
        for module, buffers in before:
            module._buffers.clear()
            module._buffers.update(buffers)


def versions(model: nn.Module) -> dict[str, tuple[int, int]]:
    """What tells whether a parameter was written since, frozen ones included."""
    return {name: (p._version, p.data_ptr()) for name, p in model.named_parameters()}


def refuse_changes(model: nn.Module, before: dict[str, tuple[int, int]]) -> None:
    """Raise if a parameter was written since ``before = versions(model)``."""
    now = versions(model)
    changed = [name for name in before if now.get(name) != before[name]]
    if changed:
        raise RuntimeError(
            f"{changed[0]} was changed after this operator was made (by an optimizer step?), so products before and "
            "after would belong to different matrices. Make the operator anew."
        )


def random_state(device: torch.device) -> list[Tensor]:
    """States of torch's default generators that a model on ``device`` draws from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_random_state(states: list[Tensor], device: torch.device) -> None:
    """Restore :func:`random_state`."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


class _PlainWeightNorm(TorchFunctionMode):
    """Computes a weight norm from its parts.

    The backward pass of the fused kernel takes the norms as constants, so its derivative lacks their part (the Hessian
    is not even symmetric).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


class _BytesMade(TorchDispatchMode):
    """Adds up the size of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.total += sum(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


def _refuse_sparse(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and module.weight.requires_grad:
            raise ValueError(
                f"{name or 'the model'} is an embedding with sparse=True, whose sparse gradients cannot be "
                "differentiated again. Set its attribute sparse = False."
            )

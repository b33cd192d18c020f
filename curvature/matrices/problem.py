"""A loss over a data set, as a function of the parameters that can be evaluated again and again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from curvature.estimation.batch_loss import read_for, refuse_beyond_outputs, refuse_unreduced, require_terms, terms_of
from curvature.estimation.dataset import over_all_data, record
from curvature.layers.recorder import Recorder
from curvature.losses import (
    AutogradLoss,
    BatchDim,
    ClassDim,
    Loss,
    NonFiniteLossError,
    Terms,
    UnknownLossError,
    WeightedSum,
    loss_for,
    loss_over_data,
)
from curvature.losses.loss import more_arguments
from curvature.model.data import (
    Batch,
    Data,
    Output,
    batches,
    call,
    is_one_batch,
    resolve_output,
    shown,
    to_device,
)
from curvature.model.determinism import warn_of_chance
from curvature.model.parameters import Parameters
from curvature.model.pullback import pull_back, refuse_hidden
from curvature.model.settings import refuse_changes, settings, untouched, versions
from curvature.model.shares import Shares, summed
from curvature.model.streams import drew_since, random_state
from solvers.precision import working_dtype


class Evaluation:
    """The model on one batch: its output, attached to the graph, and the loss there.

    Attributes:
        problem: The problem that is evaluated.
        x: Inputs, on the device of the parameters.
        y: Targets, as the loss takes them.
        output: The output that the loss saw.
        terms: The loss as a sum of terms; ``None`` where only the loss function itself is known.
        first: Whether this is the first pass, in which what holds for all is checked.
        random: State of torch's random generators before the model ran.
        nbytes: Size of what the pass made, where it was counted.
        recorder: Uses of the parameters, where they were recorded.
        empty: Whether no term of the loss counts.
    """

    def __init__(self, problem: Problem, x: Any, y: Any, *, first: bool, count: bool, recorded: bool) -> None:
        self.problem, self.x, self.y, self.first = problem, x, y, first
        self.random = random_state(problem.parameters.device)
        self.recorder: Recorder | None = None
        counter = _BytesMade() if count else None
        with torch.enable_grad(), counter or contextlib.nullcontext():
            if recorded:
                result, self.recorder = record(problem.model, problem.parameters, x, y, batch_dim=problem.batch_dim)
            else:
                result = call(problem.model, x)
        self.nbytes = counter.total if counter else 0
        self.terms: Terms | None = None
        if problem.loss is None:
            self.output = problem.pick(result)
            self.y = read_for(problem.loss_fn, result, x, self.output, y)
        else:
            axes = problem.class_dim, first, problem.batch_dim
            with torch.enable_grad():
                self.terms = terms_of(problem.loss, result, x, y, problem.output, *axes)
            if problem.fisher is not False:
                self.terms = self.terms.fisher(strict=bool(problem.fisher))
            self.output = self.terms.output
            refuse_unreduced(self.terms)
            refuse_hidden(self.output)
        self.empty = self.terms is not None and self.terms.empty
        if first:
            self._refuse_non_finite()

    def _refuse_non_finite(self) -> None:
        with torch.no_grad():
            value = self.terms.value() if self.terms is not None else self.problem.loss_fn(self.output, self.y)
        if not bool(torch.isfinite(value).all()):  # a loss in terms has said where
            raise NonFiniteLossError(f"the loss is {value.tolist()}. Look for NaN or infinity in data and parameters.")

    def through_output(self) -> Terms:
        """The terms, of a loss that depends on the parameters through the output alone."""
        assert self.terms is not None
        if self.first:
            refuse_beyond_outputs(self.terms, self.problem.parameters)
        return self.terms

    def loss(self) -> Tensor:
        """The loss of the batch as a sum over terms, 0-d, differentiable."""
        with torch.enable_grad():
            return self.problem.loss_fn(self.output, self.y) if self.terms is None else self.terms.value()

    @property
    def total(self) -> Tensor | float:
        """The share of this batch in the divisor of the loss."""
        if self.terms is None:
            return 1.0
        return self.terms.total if self.terms.reduction == "mean" else 1.0

    @property
    def mean(self) -> bool:
        """Whether the loss divides by the sum of :attr:`total` over the batches."""
        return self.terms is not None and self.terms.reduction == "mean"

    @property
    def divisor(self) -> Tensor | float:
        """What sums over terms are divided by if this batch is all the data; 1 for a loss that is a sum."""
        return self.total if self.mean else 1.0


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
        batch_dim: Axis of the output that counts the examples, where it is not the first; by key for a sum of losses.
        progress: Show a progress bar; ``None`` shows one on long passes.
        opaque: Allow a loss of which only the value is known.
        fisher: Put the Fisher information of the outputs in the place of the Hessian of the loss in them. ``None``
            leaves a loss that is no likelihood as it is, which True refuses.
        process_group: Processes whose data together are the data.

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
        batch_dim: BatchDim = None,
        progress: bool | None = None,
        opaque: bool = False,
        fisher: bool | None = False,
        process_group: Any = None,
    ) -> None:
        _refuse_sparse(model)
        self.model, self.loss_fn = model, loss_fn
        self.parameters = Parameters(model, params)
        self.output, self.class_dim, self.batch_dim = output, class_dim, batch_dim
        self.shares = Shares(process_group)
        self.start = batches(data, passes=2, empty=self.shares.several)
        self.single, self.fisher = is_one_batch(data) and not self.shares.several, fisher
        self.progress = False if progress is None and self.single else progress
        self.loss = self._loss(opaque)
        if isinstance(self.loss, AutogradLoss) and self.loss.open:
            self._find_reduction()
        if self.loss is not None and not self.single:
            device = self.parameters.device
            self.loss = over_all_data(self.loss, model, self.start, device, output, class_dim, self.shares)
        self.random = random_state(self.parameters.device)
        self._versions = versions(model)
        self._visited = False
        self._seen: float | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies have parameters of their own, at the same values."""
        self.check_unchanged()
        return {name: value for name, value in vars(self).items() if name != "_versions"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._versions = versions(self.model)

    def _loss(self, opaque: bool) -> Loss | None:
        try:
            return loss_for(self.loss_fn) if opaque and self.single else loss_over_data(self.loss_fn)
        except UnknownLossError:
            if more_arguments(self.loss_fn):
                raise
            if opaque and self.single:
                return None  # one batch holds all data, however the loss joins examples
            raise

    def _find_reduction(self) -> None:
        """Let the first batch tell how a loss joins examples, so that one that has no terms is refused at once."""
        device = self.parameters.device
        with self.shares.together(), untouched(self.model):
            for x, y in islice(self.start(), 1):
                self.terms(to_device(x, device), to_device(y, device))

    def terms(self, x: Any, y: Any) -> Terms:
        """The loss on a batch, attached to the graph."""
        assert self.loss is not None
        return terms_of(self.loss, call(self.model, x), x, y, self.output, self.class_dim, batch_dim=self.batch_dim)

    def pick(self, result: Any) -> Any:
        """The tensor that the loss sees, or whatever an opaque loss is called with."""
        picked = result if self.output is None else self.output(result)
        if self.loss is not None and self.loss.reads(picked):
            return self.loss.joined(picked)
        return resolve_output(result) if self.output is None else picked

    def visit(
        self,
        use: Callable[[Evaluation], Any],
        title: str,
        *,
        count: bool = False,
        recorded: bool = False,
        every: bool = False,
    ) -> Tensor | float:
        """Evaluate every batch of one pass and hand it to ``use``, but for those in which no term counts.

        Args:
            use: Called with each evaluation, inside the pass's settings.
            title: Text of the progress bar.
            count: Count the bytes each evaluation makes.
            recorded: Record the uses of the parameters.
            every: Hand over batches without a term as well: their examples are counted.

        Returns:
            The divisor of sums over terms, 1 for a loss that is a sum.

        Raises:
            ValueError: If no term of any batch counts, unless all are handed over.
            NonFiniteLossError: If the loss is not finite.
            RuntimeError: If parameters changed since the matrix was made, or the data are others than before.
        """
        self.check_unchanged()
        first = not self._visited
        total: Tensor | float = 0.0
        terms: Tensor | float = 0.0
        seen: Tensor | None = None
        mean, drew, number = False, False, 0
        device = self.parameters.device
        with self.shares.together(), settings(self.model, self.random, device):
            for x, y in shown(self.start(), title, self.progress):
                x, y = to_device(x, device), to_device(y, device)
                evaluation = Evaluation(self, x, y, first=first, count=count, recorded=recorded)
                number += 1
                drew = drew or (first and drew_since(evaluation.random, device))
                total, mean = total + evaluation.total, evaluation.mean
                terms = terms + (1.0 if evaluation.terms is None else evaluation.terms.total)
                if not self.single:
                    seen = _fingerprint(evaluation) if seen is None else seen + _fingerprint(evaluation)
                if every or not evaluation.empty:
                    use(evaluation)
        if self.shares.several:
            flags = [total, terms, float(mean), number, *([0.0, 0.0] if seen is None else seen)]
            total, terms, means, batches, *sizes = summed(self.shares, flags, device)
            mean, number, seen = bool(means), int(batches), torch.stack(sizes)
        if first and not every and number:
            require_terms(terms)
        if first:
            warn_of_chance(self.model, drew=drew, split=number > 1)
            self._visited = True
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
        tolerance = torch.finfo(working_dtype(self.parameters)).eps ** 0.5
        if not abs(loss - self._seen) <= tolerance * size:
            raise RuntimeError(
                f"this pass over the data gave a loss of {loss:.8g}, the first one {self._seen:.8g}: products with one "
                "matrix need the same numbers in every pass. curvature.check_deterministic(model, data) says what "
                "differs (augmentation, a random sampler of a subset, a model that draws its own numbers)."
            )


def gradient_of(
    value: Tensor,
    parameters: Mapping[str, Tensor],
    signal: Tensor | None = None,
    create_graph: bool = False,
    *,
    numbers: bool = True,
) -> dict[str, Tensor]:
    """Gradient of a number, or of ``<signal, value>``, by parameter; zeros for those that are not used.

    With ``create_graph`` and without ``numbers`` it is there to be differentiated, see :func:`pull_back`.

    Raises:
        ValueError: If the value has no graph.
    """
    if not value.requires_grad:
        raise ValueError(
            "the loss does not depend on the model's parameters: the model runs under no_grad, or its output is "
            "detached."
        )
    given = torch.ones_like(value) if signal is None else signal
    inputs = list(parameters.values())
    graph = {"create_graph": create_graph, "retain_graph": create_graph}
    gradient = pull_back([value], inputs, [given], **graph, numbers=numbers)
    pairs = zip(parameters.items(), gradient, strict=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}


def loss_and_gradient(problem: Problem, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The loss over all data, and its gradient ``(P,)``; summed in ``dtype``, by default that of the parameters."""
    p = problem.parameters
    total = torch.zeros(p.size, dtype=dtype or p.dtype, device=p.device)
    value = torch.zeros_like(total[0])

    def add(evaluation: Evaluation) -> None:
        loss = evaluation.loss()
        total.add_(p.flatten(gradient_of(loss, p)))
        value.add_(loss.detach())

    divisor = problem.visit(add, "loss and gradient")
    problem.shares.sum(value, total)
    return value / divisor, total / divisor


def gradient(problem: Problem) -> Tensor:
    """Gradient of the loss over all data, ``(P,)``, in the parameters' dtype."""
    return loss_and_gradient(problem)[1]


def refuse_sums(problem: Problem) -> None:
    """Refuse sums of losses where the gradients of different terms are added up.

    Raises:
        TypeError: If the loss is one.
    """
    if isinstance(problem.loss, WeightedSum):
        raise TypeError(
            "gradients of single examples and their covariance are those of one loss. Take the losses of the sum "
            f"({', '.join(map(repr, problem.loss.loss_fn.losses))}) one by one, with output= to pick what each sees."
        )


def one_batch(model: nn.Module, loss_fn: Any, batch: Batch, **options: Any) -> Problem:
    """The problem of a single batch.

    Raises:
        TypeError: If there is more than one.
    """
    if not is_one_batch(batch):
        raise TypeError(
            f"expected one batch (x, y), got {type(batch).__name__}: what belongs to single examples is returned for "
            "one batch at a time. Loop over the batches."
        )
    return Problem(model, loss_fn, batch, **options)


def _fingerprint(evaluation: Evaluation) -> Tensor:
    """Sum of the loss terms of a batch, and of their sizes."""
    assert evaluation.terms is not None  # only a single batch may lack terms
    with torch.no_grad():
        values = torch.where(evaluation.terms.mask, evaluation.terms.values(), 0.0).double()
        return torch.stack([values.sum(), values.abs().sum()])


class _BytesMade(TorchDispatchMode):
    """Adds up the size of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would load its compiler, for seconds, to keep it away from the method below."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.total += sum(map(_nbytes, tree_leaves(result)))
        return result


def _nbytes(leaf: Any) -> int:
    """Size of a tensor; a sparse one counts as the parts that made it do."""
    return leaf.nbytes if isinstance(leaf, Tensor) and leaf.layout == torch.strided else 0


def _refuse_sparse(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and module.weight.requires_grad:
            raise ValueError(
                f"{name or 'the model'} is an embedding with sparse=True, whose sparse gradients cannot be "
                "differentiated again. Set its attribute sparse = False."
            )

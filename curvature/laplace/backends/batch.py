"""One batch of laplace-torch, in the form of this package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from laplace.curvature import CurvatureInterface
from torch import Tensor

from curvature.estimation.dataset import examples_along, record
from curvature.laplace.backends.last_layer import Features
from curvature.laplace.likelihoods.summed import likelihood_for
from curvature.layers.recorder import Recorder
from curvature.losses import AmbiguousClassAxisError, Layout, Terms
from curvature.losses.picked import along
from curvature.matrices.examples import Examples
from curvature.model.data import refuse_complex, resolve_output
from curvature.model.parameters import Parameters
from curvature.model.settings import untouched
from curvature.model.shares import Shares

Inputs = Tensor | MutableMapping[str, Any]


@dataclass(frozen=True)
class BatchPass:
    """The model on one batch.

    Attributes:
        output: Its output, with its graph.
        recorder: The uses of the parameters.
        parameters: Those that count.
        terms: The loss, where there are targets.
    """

    output: Tensor
    recorder: Recorder
    parameters: Parameters
    terms: Terms | None = None

    @property
    def loss(self) -> Terms:
        """The loss."""
        assert self.terms is not None
        return self.terms

    def examples(self) -> Examples:
        """The pass by examples, as the loss sees them."""
        return Examples(self.parameters, self.recorder, self.output, self.loss, self.recorder.batch)


class BatchBackend(CurvatureInterface):
    """Runs the model on batches and leaves the model unchanged.

    Attributes:
        class_dim: Class axis of the outputs, as the user said; ``None`` where the shapes tell.
        batch_dim: Axis of the outputs and targets that counts the examples; ``None`` for the first.
        layout: Which axes of the outputs of the last batch belonged to one term; ``None`` before the first.
        shares: Processes whose data together are the data.
    """

    class_dim: int | None = None
    batch_dim: int | None = None
    layout: Layout | None = None
    shares: Shares = Shares()

    def trainable(self) -> Parameters:
        """The trainable parameters; with a subnetwork those that it touches."""
        if not self.params:
            what = "the last layer" if self.last_layer else type(self.model).__name__
            raise ValueError(
                f"{what} has no trainable parameter; call requires_grad_(True) on those that should count."
            )
        everything = Parameters(self.model, self.params)
        if self.subnetwork_indices is None:
            return everything
        touched = torch.zeros(everything.size, dtype=torch.bool)
        touched[self.subnetwork_indices.cpu()] = True
        return Parameters(self.model, [n for n, part in everything.unflatten(touched).items() if bool(part.any())])

    def columns_of(self, parameters: Parameters) -> Tensor | None:
        """Where the entries of the subnetwork lie among the parameters; ``None`` for all of them."""
        if self.subnetwork_indices is None:
            return None
        everything = Parameters(self.model, self.params)
        where = torch.full((everything.size,), -1, device=everything.device)
        for name, piece in everything.unflatten(where).items():
            if name in parameters:
                start = parameters.starts[name]
                piece.copy_(torch.arange(start, start + piece.numel(), device=where.device).reshape(piece.shape))
        return where[self.subnetwork_indices.to(where.device)]

    def of_subnetwork(self, tensor: Tensor, parameters: Parameters) -> Tensor:
        """The entries of the subnetwork along the last axis; all without one."""
        columns = self.columns_of(parameters)
        return tensor if columns is None else tensor[..., columns]

    @contextlib.contextmanager
    def leaving_all(self) -> Iterator[None]:
        """Leave the model, its buffers, the random state and the features of the last batch as they were."""
        features: Any = self.model._features if self.last_layer else {}
        before = dict(features)
        try:
            with torch.inference_mode(False), untouched(self.model):
                yield
        finally:
            features.clear()
            features.update(before)

    @contextlib.contextmanager
    def run_on(self, x: Inputs, y: Tensor | None = None) -> Iterator[BatchPass]:
        """Run the model, as laplace-torch does: on x as its one argument."""
        parameters = self.trainable()
        with self.leaving_all():
            result, recorder = record(self.model, parameters, (x,), y, self.count(x), self.batch_dim)
            output = resolve_output(result)
            refuse_complex(output)
            if not output.requires_grad:
                raise ValueError(
                    f"the output of {type(self.model).__name__} does not depend on its trainable parameters through "
                    "autograd: it was detached, or made under no_grad. Its curvature would be zero."
                )
            yield BatchPass(output, recorder, parameters, None if y is None else self.terms_of(output, y))

    def terms_of(self, output: Tensor, y: Tensor) -> Terms:
        """The loss of a batch, term by term.

        Raises:
            AmbiguousClassAxisError: If the classes may lie on two axes.
            ValueError: If outputs and targets do not fit the likelihood.
        """
        lossfunc: Any = self.lossfunc
        try:
            terms = likelihood_for(lossfunc).terms(output, y, class_dim=self.class_dim_of(output, y), check=True)
        except AmbiguousClassAxisError as error:
            first, last = 1, output.dim() - 1
            raise AmbiguousClassAxisError(
                f"outputs {tuple(output.shape)} and targets {tuple(y.shape)} fit with the classes on axis {first}, as "
                f"images have them, and on axis {last}, as tokens do. Say which with backend_kwargs={{'class_dim': "
                f"{first}}} or {{'class_dim': {last}}}."
            ) from error
        self.layout = terms.layout
        return along(terms, self.batch_dim, self.class_dim)

    def class_dim_of(self, output: Tensor, y: Tensor) -> int | None:
        """The class axis that the user gave, where there is more than one to choose from."""
        return self.class_dim if output.dim() > 2 else None

    def count(self, x: Inputs, y: Tensor | None = None) -> int:
        """Number of examples; where they lie along another axis, the targets tell."""
        found = None if self.batch_dim is None else examples_along(y, self.batch_dim)
        return found or int((x[self.dict_key_x] if isinstance(x, MutableMapping) else x).shape[0])

    def scaled_loss(self, terms: Terms) -> Tensor:
        """The value of the loss in the units of laplace-torch, detached."""
        return (self.factor * terms.value()).detach().to(terms.output.dtype)

    def on_device(self, batch: Any) -> tuple[Inputs, Tensor]:
        """Inputs and targets of what a loader gives; mappings are for the model to move."""
        device = self.params[0].device
        if isinstance(batch, MutableMapping):
            return batch, batch[self.dict_key_y].to(device)
        x, y = batch
        return x.to(device), y.to(device)

    def features(self, x: Inputs, enable_backprop: bool = False) -> Features | None:
        """Inputs and outputs of the last layer.

        Args:
            x: Inputs.
            enable_backprop: Keep the graph to the inputs.

        Returns:
            ``None`` where the outputs are not what the last layer makes of features that it has no part in.
        """
        with self.leaving_all(), torch.set_grad_enabled(enable_backprop):
            return Features.find(self.model, x)

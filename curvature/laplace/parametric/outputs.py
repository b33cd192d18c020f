r"""Predictions for outputs with more axes than ``(M, C)``: images ``(M, C, H, W)``, tokens ``(M, T, C)``.

laplace-torch fits them with a backend of this package, and its predictions take the last axis for the classes and the
first two for all there are. Here every position is a choice of its own among the classes, whose outputs have the
covariance :math:`J \Sigma J^\top` with the Jacobian J at that position; draws are of all positions of an example
together, :math:`f + J (\theta_s - \theta^*)`.

Axis letters: M examples, R positions, C classes, K = R C outputs of an example, P parameters, S draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from laplace.baselaplace import ParametricLaplace
from laplace.lllaplace import LLLaplace
from laplace.subnetlaplace import SubnetLaplace
from laplace.utils.enums import Likelihood, LinkApprox, PredType, TuningMethod
from torch import Tensor
from torch.nn.utils import vector_to_parameters
from torch.utils.data import DataLoader

from curvature.laplace.parametric.adopted import in_front_of
from curvature.laplace.parametric.definite import refuse_indefinite
from curvature.laplace.parametric.predictions import Predictions, of_moments
from curvature.laplace.parametric.shared_fits import add_processes, shared_fit
from curvature.losses import Layout

Plain = Callable[..., Any]


def note_outputs(la: Any) -> None:
    """Keep the shape of the outputs that a posterior was fitted to.

    ``output_axes`` is their number of axes; ``class_axis`` is where the classes lie if there are more than two, else
    ``None``; ``n_outputs`` counts the numbers of an example in regression, each of which has its noise, and the classes
    in classification.
    """
    layout = la.backend.layout
    if layout is None:
        return
    la.output_axes = len(layout.output_shape)
    la.class_axis = None
    if la.output_axes > 2:
        if la.likelihood == Likelihood.REGRESSION:
            la.n_outputs = math.prod(layout.output_shape) // layout.output_shape[la.backend.batch_dim or 0]
        else:
            la.class_axis, la.n_outputs = layout.class_axes[0], layout.class_shape[0]
        la.model.output_size = la.n_outputs


def class_axis(la: Any) -> int:
    """Where the classes lie in outputs with more than two axes; on the last axis of others.

    The last axis is -1: a model may be fitted on every position ``(M, T, C)`` and asked about one of them ``(M, C)``.
    """
    axis: int | None = getattr(la, "class_axis", None)
    return -1 if axis is None or axis == la.output_axes - 1 else axis


def many_axes(la: Any) -> bool:
    """Whether the outputs have more axes than ``(M, C)``."""
    return getattr(la, "output_axes", 2) > 2


@in_front_of(ParametricLaplace)
def fit(la: Any, plain: Plain, train_loader: DataLoader, override: bool = True, progress_bar: bool = False) -> None:
    """Fit, over all processes, and keep the shape of the outputs."""
    with shared_fit(la, train_loader, override):
        plain(train_loader, override=override, progress_bar=progress_bar)
    add_processes(la)
    note_outputs(la)


@in_front_of(ParametricLaplace)
def state_dict(la: Any, plain: Plain) -> dict[str, Any]:
    """With the shape of the outputs."""
    axes = {"output_axes": la.output_axes, "class_axis": la.class_axis} if many_axes(la) else {}
    return {**plain(), **axes}


@in_front_of(ParametricLaplace)
def load_state_dict(la: Any, plain: Plain, state_dict: dict[str, Any]) -> None:
    """States of before have outputs of two axes, or the classes on the last."""
    plain(state_dict)
    for name in ("output_axes", "class_axis"):
        if name in state_dict:
            setattr(la, name, state_dict[name])


@in_front_of(ParametricLaplace)
def __call__(
    la: Any,
    plain: Plain,
    x: Any,
    pred_type: str = PredType.GLM,
    joint: bool = False,
    link_approx: str = LinkApprox.PROBIT,
    n_samples: int = 100,
    diagonal_output: bool = False,
    generator: torch.Generator | None = None,
    fitting: bool = False,
    **model_kwargs: Any,
) -> Any:
    """Probabilities in the shape of the outputs; draws from ``generator``, which laplace-torch leaves aside."""
    categorical = la.likelihood == Likelihood.CLASSIFICATION
    known = pred_type in (PredType.GLM, PredType.NN) and link_approx in list(LinkApprox)
    drawn = (pred_type == PredType.NN or categorical) and link_approx == LinkApprox.MC
    owned = generator is not None and drawn and not model_kwargs and la.likelihood != Likelihood.REWARD_MODELING
    shaped = categorical and many_axes(la) and (drawn or pred_type == PredType.GLM)
    if not (known and (owned or shaped)):
        return plain(x, pred_type, joint, link_approx, n_samples, diagonal_output, generator, fitting, **model_kwargs)
    if drawn:
        samples = la.predictive_samples(x, pred_type, n_samples, diagonal_output, generator)
        mean = samples.mean(dim=0)
        return mean if categorical else (mean, samples.var(dim=0))
    if link_approx == LinkApprox.PROBIT:
        f, variances = output_variances(la, x)
        return (f / torch.sqrt(1 + math.pi / 8 * variances.view_as(f))).softmax(class_axis(la))
    return bridged(la, x, link_approx)


@in_front_of(ParametricLaplace)
def functional_samples(
    la: Any,
    plain: Plain,
    x: Any,
    pred_type: str = PredType.GLM,
    n_samples: int = 100,
    diagonal_output: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Outputs under draws of the parameters, ``(S, *output)``."""
    if pred_type == PredType.NN and (many_axes(la) or isinstance(la, LLLaplace)):
        return outputs_of_networks(la, x, n_samples, generator)
    if pred_type == PredType.GLM and many_axes(la):
        return linearised_samples(la, x, n_samples, diagonal_output, generator)
    return plain(x, pred_type, n_samples, diagonal_output, generator)


@in_front_of(ParametricLaplace)
def predictive_samples(
    la: Any,
    plain: Plain,
    x: Any,
    pred_type: str = PredType.GLM,
    n_samples: int = 100,
    diagonal_output: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Probabilities under draws of the parameters, or outputs in regression, ``(S, *output)``.

    The score of a reward model is an output as well: its softmax over one score would be 1.
    """
    if la.likelihood == Likelihood.REWARD_MODELING and pred_type == PredType.GLM:
        return la.functional_samples(x, pred_type, n_samples, diagonal_output, generator)
    if not many_axes(la) or pred_type not in (PredType.GLM, PredType.NN):
        return plain(x, pred_type, n_samples, diagonal_output, generator)
    samples = la.functional_samples(x, pred_type, n_samples, diagonal_output, generator)
    if la.likelihood == Likelihood.REGRESSION:
        return samples
    axis = class_axis(la)
    return samples.softmax(axis + 1 if axis >= 0 else axis)


@in_front_of(ParametricLaplace)
def optimize_prior_precision(la: Any, plain: Plain, *args: Any, **kwargs: Any) -> None:
    """On a grid, by the score of such outputs; after an error the prior is that of before.

    Raises:
        IndefinitePosteriorError: If the curvature plus the prior is not positive definite; on a grid, for none of them.
    """
    gridsearch = (args[1] if len(args) > 1 else kwargs.get("method")) == TuningMethod.GRIDSEARCH
    if gridsearch and many_axes(la) and len(args) < 8 and kwargs.get("loss") is None:
        kwargs["loss"] = squared_error if la.likelihood == Likelihood.REGRESSION else _NegativeLogProbability(la)
    before = la.prior_precision
    try:
        plain(*args, **kwargs)
        if isinstance(getattr(la, "H", None), Tensor):
            refuse_indefinite(la)
    except BaseException:
        la.prior_precision = before.detach()
        raise


def squared_error(mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
    """Of predicted means."""
    return (mean - y).square().mean()


class _NegativeLogProbability:
    """Of labels under probabilities whose classes lie on the posterior's axis."""

    def __init__(self, la: Any) -> None:
        self.axis = class_axis(la)

    def __call__(self, probabilities: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.nll_loss(probabilities.movedim(self.axis, 1).log(), labels)


def output_variances(la: Any, x: Any) -> tuple[Tensor, Tensor]:
    """Outputs and their variances ``(M, K)``."""
    if isinstance(la, Predictions):
        found = la.variances(x, diagonal=True)
        if found is not None:
            return found
    Js, f = la.backend.jacobians(x, enable_backprop=la.enable_backprop)
    variances = la.functional_variance(Js.flatten(0, 1).unsqueeze(1)).reshape(Js.shape[:2])
    return (f, variances) if la.enable_backprop else (f.detach(), variances.detach())


def bridged(la: Any, x: Any, link_approx: str) -> Tensor:
    """laplace-torch's other approximations of the link, with a row for each position."""
    Js, f = la.backend.jacobians(x, enable_backprop=la.enable_backprop)
    layout = Layout.along(f.shape, class_axis(la))
    by_output = Js.unflatten(1, f.shape[1:]).movedim(-1, 0)  # (P, M, *output)
    rows = layout.rows(by_output).flatten(1, 2).movedim(0, -1)  # (M R, C, P)
    out = of_moments(la, layout.rows(f).flatten(0, 1).clone(), la.functional_variance(rows), link_approx)
    out = layout.unrows(out.unflatten(0, layout.shape[:2]))
    return out if la.enable_backprop else out.detach()


def linearised_samples(
    la: Any, x: Any, n_samples: int, diagonal_output: bool, generator: torch.Generator | None
) -> Tensor:
    """Draws of the linearised outputs, all positions of an example together; or each output by itself."""
    Js, f = la.backend.jacobians(x, enable_backprop=la.enable_backprop)
    if diagonal_output:
        variances = la.functional_variance(Js.flatten(0, 1).unsqueeze(1)).reshape(Js.shape[:2])
        noise = torch.randn((n_samples, *variances.shape), generator=generator, dtype=f.dtype, device=f.device)
        out = f + (noise * variances.sqrt()).unflatten(-1, f.shape[1:])
    else:
        deviations = la.sample(n_samples, generator) - la.mean
        if isinstance(la, SubnetLaplace):
            deviations = deviations[:, la.backend.subnetwork_indices]
        out = f + torch.einsum("mkp,sp->smk", Js, deviations.to(Js.dtype)).unflatten(-1, f.shape[1:])
    return out if la.enable_backprop else out.detach()


def outputs_of_networks(la: Any, x: Any, n_samples: int, generator: torch.Generator | None) -> Tensor:
    """Outputs of networks with drawn parameters; those of the model are put back, whatever happens."""
    model: Any = la.model
    own = list(model.last_layer.parameters()) if isinstance(la, LLLaplace) else la.params
    x = x.to(la.mean.device) if isinstance(x, Tensor) else x
    samples = []
    try:
        for sample in la.sample(n_samples, generator):
            vector_to_parameters(sample, own)
            f = model(x)
            samples.append(f if la.enable_backprop else f.detach())
    finally:
        vector_to_parameters(la.mean, own)
    return torch.stack(samples)

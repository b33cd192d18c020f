"""Every method of laplace-torch's posteriors with our backends: ``python -m tests.benchmarks.laplace_methods``.

Each is called on every structure, subset of weights, backend and likelihood: on a posterior that was just fitted, and
with the Gauss-Newton matrix on one that took back its ``state_dict``, and on one from a file. A number counts as right
if it equals what follows from the dense matrix of the precision; that of ``"full"`` and ``"diag"`` is compared with its
definition.
"""

from __future__ import annotations

import argparse
import copy
import io
import math
import pickle
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from laplace import Laplace
from laplace.curvature import CurvlinopsGGN
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvature.laplace import EFBackend, GGNBackend, HessianBackend, load, save

F64 = torch.float64
STRUCTURES = {
    "all": ("full", "kron", "diag", "kfac", "ekfac", "diagonal", "low_rank", "low_rank_diag", "lowrank"),
    "last_layer": ("full", "kron", "diag", "kfac", "ekfac", "diagonal", "low_rank_diag"),
    "subnetwork": ("full", "diag"),
}
BACKENDS = {"GGN": GGNBackend, "EF": EFBackend, "Hessian": HessianBackend}
LIKELIHOODS = ("regression", "classification", "reward_modeling")
STAGES = ("fitted", "state_dict", "file")
CHOSEN = torch.tensor([1, 4, 7, 11, 20])
NOISE = 0.7
#: Large enough for the Hessian to be positive definite with it.
PRIOR = 30.0


class Wrong(AssertionError):
    """A number that is not the expected one."""


class Absent(Exception):
    """laplace-torch's class of this structure has no such attribute."""


class Reward(nn.Module):
    """Scores of single inputs ``(M, d)``, or of pairs ``(M, 2, d)``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        scores = self.net(x)
        return scores.squeeze(-1) if x.dim() == 3 else scores


def model_of(likelihood: str) -> nn.Module:
    """A small network in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        outputs = 1 if likelihood == "reward_modeling" else 3
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
        return Reward(net) if likelihood == "reward_modeling" else net


def data_of(likelihood: str, seed: int, examples: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets."""
    generator = torch.Generator().manual_seed(seed)
    shape = (examples, 2, 3) if likelihood == "reward_modeling" else (examples, 3)
    x = torch.randn(shape, generator=generator, dtype=F64)
    if likelihood == "regression":
        return x, 0.3 * torch.randn(examples, 3, generator=generator, dtype=F64)
    return x, torch.randint(2, (examples,), generator=generator)


def loader(x: Tensor, y: Tensor) -> DataLoader:
    """Batches of unequal sizes."""
    return DataLoader(TensorDataset(x, y), batch_size=4)


@dataclass
class Subject:
    """A posterior with what is needed to check it.

    Attributes:
        la: The posterior.
        likelihood: laplace-torch's name.
        backend: Ours.
        subset: Of weights.
        structure: Of the curvature.
    """

    la: Any
    likelihood: str
    backend: str
    subset: str
    structure: str

    @classmethod
    def fitted(cls, likelihood: str, backend: str, subset: str, structure: str, stage: str = "fitted") -> Subject:
        """A posterior at one of the stages."""
        model = model_of(likelihood)
        la = make(model, likelihood, backend, subset, structure)
        la.fit(loader(*data_of(likelihood, 1, 10)))
        if stage == "state_dict":
            other = make(copy.deepcopy(model), likelihood, backend, subset, structure)
            buffer = io.BytesIO()
            torch.save(la.state_dict(), buffer)
            buffer.seek(0)
            other.load_state_dict(torch.load(buffer, weights_only=subset != "last_layer"))
            la = other
        elif stage == "file":
            with tempfile.TemporaryDirectory() as folder:
                save(la, Path(folder) / "la.safetensors")
                la = load(Path(folder) / "la.safetensors", copy.deepcopy(model))
        return cls(la, likelihood, backend, subset, structure)

    @property
    def loader(self) -> DataLoader:
        """The data that it was fitted to."""
        return loader(*data_of(self.likelihood, 1, 10))

    @cached_property
    def x(self) -> Tensor:
        """Inputs of predictions."""
        x = data_of(self.likelihood, 2, 3)[0]
        return x[:, 0] if self.likelihood == "reward_modeling" else x

    @cached_property
    def precision(self) -> Tensor:
        """The precision, dense."""
        P = self.la.posterior_precision
        if isinstance(P, tuple):
            (V, s), d = P
            return (V @ torch.diag(s) @ V.T + torch.diag(d)).detach()
        if not isinstance(P, Tensor):
            return P.to_matrix().detach()
        return (torch.diag(P) if P.dim() == 1 else P).detach()

    @cached_property
    def outputs(self) -> tuple[Tensor, Tensor]:
        """Outputs and Jacobians of predictions, row by row."""
        return self.jacobians(self.x)

    def jacobians(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs ``(M, C)`` and Jacobians ``(M, C, P)``, row by row."""
        model = model_of(self.likelihood)
        f = model(x)
        rows = torch.stack([self.flat(torch.autograd.grad(e, self.own(model), retain_graph=True)) for e in f.flatten()])
        return f.detach(), rows.view(*f.shape, -1)

    def own(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters whose entries are in the posterior, or from which a subnetwork takes some."""
        return list(model.parameters())[-2 if self.subset == "last_layer" else 0 :]

    def flat(self, tensors: Iterable[Tensor]) -> Tensor:
        """Entries of the posterior."""
        vector = torch.cat([t.flatten() for t in tensors])
        return vector[CHOSEN] if self.subset == "subnetwork" else vector

    @cached_property
    def factor(self) -> float:
        """Of the loss of laplace-torch."""
        return 0.5 if self.likelihood == "regression" else 1.0

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """The summed loss without its factor."""
        kind = nn.functional.mse_loss if self.likelihood == "regression" else nn.functional.cross_entropy
        return kind(f, y, reduction="sum")

    def curvature(self, x: Tensor, y: Tensor) -> Tensor:
        """By definition, ``(P, P)``."""
        model = model_of(self.likelihood)
        params = self.own(model)
        if self.backend == "Hessian":
            grads = torch.autograd.grad(self.loss(model(x), y), params, create_graph=True)
            rows = [
                self.flat(torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True))
                for g in self.flat(grads)
            ]
            return self.factor * torch.stack(rows)
        total: Any = 0.0
        for one in range(len(x)):
            part = slice(one, one + 1)
            if self.backend == "EF":
                rows = self.flat(torch.autograd.grad(self.loss(model(x[part]), y[part]), params)).unsqueeze(0)
                total = total + self.factor * rows.T @ rows
            else:
                f, J = self.jacobians(x[part])
                p = f[0].softmax(0)
                middle = torch.eye(len(p)) if self.likelihood == "regression" else torch.diag(p) - torch.outer(p, p)
                total = total + J[0].T @ middle.to(F64) @ J[0]
        return total

    @property
    def probabilities(self) -> bool:
        """Whether predictions are probabilities."""
        return self.likelihood == "classification"

    def covariances(self) -> Tensor:
        """Of the outputs, ``(M, C, C)``."""
        J = self.outputs[1]
        return J @ torch.linalg.inv(self.precision) @ J.mT


def make(model: nn.Module, likelihood: str, backend: str, subset: str, structure: str) -> Any:
    """A posterior that is not fitted."""
    options: dict[str, Any] = {"prior_precision": PRIOR, "backend": BACKENDS[backend]}
    if likelihood == "regression":
        options["sigma_noise"] = NOISE
    if subset == "subnetwork":
        options["subnetwork_indices"] = CHOSEN
    if structure in ("low_rank", "low_rank_diag", "lowrank"):
        options["backend_kwargs"] = {"low_rank": 4}
    return Laplace(model, likelihood, subset, structure, **options)


def same(got: Tensor, expected: Tensor, tolerance: float = 1e-8) -> None:
    """Raise unless two tensors are equal up to rounding."""
    if got.shape != expected.shape or not torch.allclose(got, expected, rtol=tolerance, atol=tolerance):
        far = float((got - expected).abs().max()) if got.shape == expected.shape else math.nan
        raise Wrong(f"{tuple(got.shape)} and {tuple(expected.shape)}, apart by {far:.2g}")


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


METHODS: dict[str, Callable[[Subject], None]] = {}


def method(title: str) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Put a check into the table."""

    def note(check: Callable[[Subject], None]) -> Callable[[Subject], None]:
        METHODS[title] = check
        return check

    return note


@method("`posterior_precision`")
def _precision(s: Subject) -> None:
    P = s.precision
    if not torch.isfinite(P).all() or not torch.allclose(P, P.T):
        raise Wrong("the precision is not symmetric")
    if s.structure in ("full", "diag", "diagonal"):
        H = s.curvature(*data_of(s.likelihood, 1, 10))
        H = H if s.structure == "full" else torch.diag(H.diagonal())
        scale = NOISE**-2 if s.likelihood == "regression" else 1.0
        same(P, scale * H + PRIOR * torch.eye(len(H), dtype=F64))


@method("`posterior_covariance`, `posterior_variance`, `posterior_scale`")
def _covariance(s: Subject) -> None:
    names = {"full": ["covariance"], "diag": ["variance", "scale"], "diagonal": ["variance", "scale"]}
    for name in names.get(s.structure, ["covariance"]):
        if not hasattr(type(s.la), f"posterior_{name}"):
            raise Absent(f"this class has no `posterior_{name}`")
        got = getattr(s.la, f"posterior_{name}")
        inverse = torch.linalg.inv(s.precision)
        expected = {"covariance": inverse, "variance": inverse.diagonal(), "scale": inverse.diagonal().sqrt()}
        same(got, expected[name])


@method("`log_likelihood`, `scatter`, `log_det_ratio`, `log_marginal_likelihood`")
def _evidence(s: Subject) -> None:
    x, y = data_of(s.likelihood, 1, 10)
    model = model_of(s.likelihood)
    with torch.no_grad():
        log_likelihood = -s.factor * s.loss(model(x), y)
        if s.likelihood == "regression":
            log_likelihood = log_likelihood / NOISE**2 - y.numel() * math.log(NOISE * math.sqrt(2 * math.pi))
        theta = s.flat(s.own(model))
    same(s.la.log_likelihood.detach(), log_likelihood)
    same(s.la.scatter.detach(), PRIOR * theta @ theta)
    ratio = torch.linalg.slogdet(s.precision / PRIOR).logabsdet
    found = s.la.log_marginal_likelihood().detach()
    same(s.la.log_det_ratio.detach(), ratio)
    same(found, log_likelihood - (ratio + PRIOR * theta @ theta) / 2)


@method("gradients of `log_marginal_likelihood`")
def _gradients(s: Subject) -> None:
    values = [torch.tensor([PRIOR], dtype=F64, requires_grad=True)]
    if s.likelihood == "regression":
        values.append(torch.tensor(NOISE, dtype=F64, requires_grad=True))
    slopes = torch.autograd.grad(s.la.log_marginal_likelihood(*values), values)
    for k, slope in enumerate(slopes):
        ends = []
        for h in (1e-5, -1e-5):
            moved = [v.detach() + (h if j == k else 0) for j, v in enumerate(values)]
            ends.append(float(s.la.log_marginal_likelihood(*moved)))
        same(slope.flatten(), torch.tensor([(ends[0] - ends[1]) / 2e-5], dtype=F64), 1e-5)


@method("`square_norm`, `log_prob`")
def _norm(s: Subject) -> None:
    value = s.la.mean + 0.1 * torch.arange(len(s.la.mean), dtype=F64).cos()
    delta = (value - s.la.mean)[CHOSEN] if s.subset == "subnetwork" else value - s.la.mean
    squared = delta @ s.precision @ delta
    same(s.la.square_norm(value).detach(), squared)
    same(s.la.log_prob(value, normalized=False).detach(), -squared / 2)
    constant = torch.linalg.slogdet(s.precision).logabsdet - len(delta) * math.log(2 * math.pi)
    same(s.la.log_prob(value).detach(), (constant - squared) / 2)


@method("`sample`")
def _sample(s: Subject) -> None:
    draws = s.la.sample(3000, seeded())
    delta = (draws - s.la.mean)[:, CHOSEN] if s.subset == "subnetwork" else draws - s.la.mean
    white = delta @ torch.linalg.cholesky(s.precision)
    if not (white.T @ white / len(white) - torch.eye(len(s.precision))).abs().max() < 0.15:
        raise Wrong("the draws have another covariance")
    same(s.la.sample(2, seeded(3)), s.la.sample(2, seeded(3)))


@method("`functional_variance`, `functional_covariance`")
def _functional(s: Subject) -> None:
    J = s.outputs[1]
    same(s.la.functional_variance(J).detach(), s.covariances())
    rows = J.flatten(0, 1)
    same(s.la.functional_covariance(J).detach(), rows @ torch.linalg.inv(s.precision) @ rows.T)


@method('`la(x)`: regression, or `link_approx="probit"`')
def _call(s: Subject) -> None:
    f, covariances = s.outputs[0], s.covariances()
    if s.probabilities:
        variances = covariances.diagonal(dim1=1, dim2=2)
        same(s.la(s.x), (f / (1 + math.pi / 8 * variances).sqrt()).softmax(-1))
        return
    for got, expected in zip(s.la(s.x), (f, covariances), strict=True):
        same(got, expected)
    mean, variance = s.la(s.x, diagonal_output=True)
    same(variance, covariances.diagonal(dim1=1, dim2=2))
    mean, joint = s.la(s.x, joint=True)
    rows = s.outputs[1].flatten(0, 1)
    same(mean, f.flatten())
    same(joint, rows @ torch.linalg.inv(s.precision) @ rows.T)


@method('`la(x, link_approx="mc")`')
def _mc(s: Subject) -> None:
    if s.probabilities:
        samples = s.la.functional_samples(s.x, n_samples=50, generator=seeded(4))
        same(s.la(s.x, link_approx="mc", n_samples=50, generator=seeded(4)), samples.softmax(-1).mean(0))
    else:
        same(s.la(s.x, link_approx="mc", generator=seeded(4))[1], s.covariances())


@method('`la(x, link_approx="bridge")`, `"bridge_norm"`')
def _bridge(s: Subject) -> None:
    for link in ("bridge", "bridge_norm"):
        got = s.la(s.x, link_approx=link)
        if s.probabilities:
            same(got, torch.stack([bridge(f, v, link) for f, v in zip(s.outputs[0], s.covariances(), strict=True)]))
        else:
            same(got[1], s.covariances())


def bridge(f: Tensor, V: Tensor, link: str) -> Tensor:
    """The Laplace bridge of one example, with laplace-torch's correction to a mean of zero."""
    K = len(f)
    f, V = f - V.sum(1) * f.sum() / V.sum(), V - torch.outer(V.sum(1), V.sum(0)) / V.sum()
    v = V.diagonal()
    if link == "bridge_norm":
        c = v.mean() / math.sqrt(K / 2)
        f, v = f / c.sqrt(), v / c
    alpha = (1 - 2 / K + f.exp() / K**2 * (-f).exp().sum()) / v
    return alpha / alpha.sum()


@method('`la(x, pred_type="nn", link_approx="mc")`')
def _networks(s: Subject) -> None:
    got = s.la(s.x, pred_type="nn", link_approx="mc", n_samples=20, generator=seeded(5))
    samples = by_networks(s, 20, 5)
    if s.likelihood != "reward_modeling":
        expected = (samples.softmax(-1).mean(0),) if s.probabilities else (samples.mean(0), samples.var(0))
        for a, b in zip((got,) if s.probabilities else got, expected, strict=True):
            same(a, b)
    same(model_of(s.likelihood)(s.x).detach(), s.la.model(s.x).detach())  # the weights are put back


def by_networks(s: Subject, draws: int, seed: int) -> Tensor:
    """Outputs of networks with drawn weights."""
    model, outputs = model_of(s.likelihood), []
    own = list(model.parameters())[-2 if s.subset == "last_layer" else 0 :]
    for sample in s.la.sample(draws, seeded(seed)):
        nn.utils.vector_to_parameters(sample, own)
        outputs.append(model(s.x).detach())
    return torch.stack(outputs)


@method("`functional_samples`, `predictive_samples`, linearised")
def _samples(s: Subject) -> None:
    draws = s.la.functional_samples(s.x, n_samples=3000, generator=seeded(6))
    delta = draws - s.outputs[0]
    found = torch.einsum("smc,smd->mcd", delta, delta) / len(delta)
    same(found / s.covariances().amax(), s.covariances() / s.covariances().amax(), 0.15)
    got = s.la.predictive_samples(s.x, n_samples=5, generator=seeded(7))
    expected = s.la.functional_samples(s.x, n_samples=5, generator=seeded(7))
    same(got, expected.softmax(-1) if s.probabilities else expected)
    s.la.functional_samples(s.x, n_samples=5, diagonal_output=True, generator=seeded(7))


@method('`functional_samples`, `predictive_samples`, `pred_type="nn"`')
def _network_samples(s: Subject) -> None:
    same(s.la.functional_samples(s.x, "nn", n_samples=5, generator=seeded(8)), by_networks(s, 5, 8))
    got = s.la.predictive_samples(s.x, "nn", n_samples=5, generator=seeded(8))
    same(got, by_networks(s, 5, 8).softmax(-1) if s.probabilities else by_networks(s, 5, 8))


@method('`optimize_prior_precision(method="marglik")`')
def _marglik(s: Subject) -> None:
    evidence = s.la.log_marginal_likelihood().detach()
    s.la.optimize_prior_precision(method="marglik", n_steps=4, lr=0.05, init_prior_prec=PRIOR)
    if not s.la.log_marginal_likelihood() > evidence:
        raise Wrong("the evidence did not grow")


@method('`optimize_prior_precision(prior_structure="layerwise")`, `"diag"`')
def _priors(s: Subject) -> None:
    evidence = s.la.log_marginal_likelihood().detach()
    refusals = []
    for structure in ("layerwise", "diag"):
        other = copy.deepcopy(s.la)
        try:
            other.optimize_prior_precision(n_steps=4, lr=0.05, init_prior_prec=PRIOR, prior_structure=structure)
        except Exception as error:
            refusals.append(error)
            continue
        if not other.log_marginal_likelihood() > evidence:
            raise Wrong("the evidence did not grow")
    if refusals:
        raise refusals[0]


@method('`optimize_prior_precision(method="gridsearch")`')
def _grid(s: Subject) -> None:
    grid = {"grid_size": 3, "log_prior_prec_min": 2.0, "log_prior_prec_max": 4.0, "val_loader": s.loader}
    s.la.optimize_prior_precision(method="gridsearch", **grid)
    if float(s.la.prior_precision) not in (1e2, 1e3, 1e4):
        raise Wrong("the prior is not of the grid")


@method("`fit` once more")
def _again(s: Subject) -> None:
    before = s.precision
    s.la.fit(s.loader)
    same(Subject(s.la, s.likelihood, s.backend, s.subset, s.structure).precision, before)


@method("`fit(override=False)` with more data")
def _more(s: Subject) -> None:
    parts = data_of(s.likelihood, 1, 10), data_of(s.likelihood, 9, 7)
    s.la.fit(loader(*parts[1]), override=False)
    once = make(model_of(s.likelihood), s.likelihood, s.backend, s.subset, s.structure)
    once.fit(loader(*(torch.cat(pair) for pair in zip(*parts, strict=True))))
    pair = [Subject(la, s.likelihood, s.backend, s.subset, s.structure) for la in (s.la, once)]
    same(pair[0].precision, pair[1].precision)
    same(s.la.log_likelihood.detach(), once.log_likelihood.detach())
    s.la.fit(loader(*parts[1]), override=False)  # and more


def copied(la: Any) -> Any:
    """A copy whose extractor of features sees its own last layer; laplace-torch's hook writes to the original."""
    other = copy.deepcopy(la)
    if getattr(other.model, "last_layer", None) is not None:
        other.model.set_last_layer(other.model._last_layer_name)
    return other


@method("`copy.deepcopy`")
def _copy(s: Subject) -> None:
    other = copy.deepcopy(s.la)
    same(Subject(other, s.likelihood, s.backend, s.subset, s.structure).precision, s.precision)
    same(other.sample(2, seeded()), s.la.sample(2, seeded()))


@method("`pickle`")
def _pickle(s: Subject) -> None:
    other = pickle.loads(pickle.dumps(s.la))
    same(Subject(other, s.likelihood, s.backend, s.subset, s.structure).precision, s.precision)


@method("`state_dict`, `load_state_dict`, `save`, `load`")
def _states(s: Subject) -> None:
    other = make(model_of(s.likelihood), s.likelihood, s.backend, s.subset, s.structure)
    other.load_state_dict(s.la.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        save(s.la, Path(folder) / "la.safetensors")
        loaded = load(Path(folder) / "la.safetensors", model_of(s.likelihood))
    for la in (other, loaded):
        if type(la) is not type(s.la):
            raise Wrong("another class")
        same(Subject(la, s.likelihood, s.backend, s.subset, s.structure).precision, s.precision, 0.0)


@dataclass(frozen=True)
class Verdict:
    """What came of a call.

    Attributes:
        word: "works", "laplace-torch refuses", "refused", "wrong" or "error".
        message: Of the error.
    """

    word: str
    message: str = ""


def verdict(run: Callable[[], Any]) -> Verdict:
    """Run it and say what happened."""
    try:
        run()
    except Wrong as error:
        return Verdict("wrong", str(error))
    except Absent as error:
        return Verdict("laplace-torch has none", str(error))
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        last, message = frames[-1], " ".join(str(error).split()) or type(error).__name__
        folder = Path(last.filename).parts
        raised = (last.line or "").startswith(("raise", "assert")) or isinstance(error, NotImplementedError)
        if "site-packages" not in folder and {"curvature", "solvers"} & set(folder) and "tests" not in folder:
            return Verdict("refused" if raised else "error", message)
        if "FeatureExtractor" in message:  # what pickle says of laplace-torch's hooks
            return Verdict("laplace-torch refuses", f"{type(error).__name__}: {message}")
        of_laplace = any("laplace" in Path(f.filename).parts and "site-packages" in f.filename for f in frames)
        return Verdict("laplace-torch refuses" if of_laplace else "error", f"{type(error).__name__}: {message}")
    return Verdict("works")


def verdicts(subset: str, structure: str, titles: Iterable[str] = ()) -> dict[str, dict[str, Verdict]]:
    """By method, and by likelihood, backend and stage; a posterior that cannot be made has only the first method."""
    found: dict[str, dict[str, Verdict]] = {MADE: {}} | {title: {} for title in titles or METHODS}
    for likelihood in LIKELIHOODS:
        for backend in BACKENDS:
            for stage in STAGES if backend == "GGN" else STAGES[:1]:
                key, made = f"{likelihood}, {backend}, {stage}", list[Subject]()

                def fit(
                    args: tuple[str, ...] = (likelihood, backend, subset, structure, stage), made: Any = made
                ) -> None:
                    made.append(Subject.fitted(*args))

                found[MADE][key] = verdict(fit)
                for title in list(found)[1:] if made else []:
                    subject = replace(made[0], la=copied(made[0].la))
                    found[title][key] = verdict(lambda title=title, subject=subject: METHODS[title](subject))
    return found


#: The row of making, fitting, saving and loading.
MADE = "`Laplace(...)`, `fit`; back from `state_dict` and from a file"


def where(keys: Iterable[str]) -> str:
    """Which likelihoods, backends and stages, as far as they are not all."""
    columns = [list(dict.fromkeys(column)) for column in zip(*(key.split(", ") for key in keys), strict=True)]
    known = (list(LIKELIHOODS), list(BACKENDS), list(STAGES))
    columns[2] = known[2] if "GGN" not in columns[1] else columns[2]  # others are only fitted
    said = [" and ".join(column) for column, every in zip(columns, known, strict=True) if column != every]
    return ", ".join(said) or "all"


class Notes:
    """Footnotes: what is behind a cell."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def cell(self, found: dict[str, Verdict]) -> str:
        """The word for a cell, and the numbers of its footnotes."""
        others: dict[Verdict, list[str]] = {}
        for key, one in found.items():
            if one.word != "works":
                message = re.sub(r"-?\d+\.\d+(e-?\d+)?|\bat 0x\w+", "...", one.message)
                others.setdefault(replace(one, message=message), []).append(key)
        marks = []
        for one, keys in others.items():
            note = f"{one.word} ({where(keys)}): {one.message}"
            marks.append(str(self.numbers.setdefault(note, len(self.numbers) + 1)))
        works = ["works"] if any(one.word == "works" for one in found.values()) else []
        return " ".join([*works, *([f"[{', '.join(marks)}]"] if marks else [])]) or "-"

    def lines(self) -> list[str]:
        """In order of their numbers, with no ``<`` that a page would take for a tag."""
        return [f"{number}. {note}".replace("<", "\\<") for note, number in self.numbers.items()]


def table(subset: str, notes: Notes, structures: Iterable[str] = ()) -> str:
    """Markdown, a row for each method and a column for each structure."""
    columns = {structure: verdicts(subset, structure) for structure in structures or STRUCTURES[subset]}
    lines = [f"| {' | '.join(['', *(f'`{s}`' for s in columns)])} |", "| --- |" + " --- |" * len(columns)]
    for title in [MADE, *METHODS]:
        lines.append(f"| {' | '.join([title, *(notes.cell(found[title]) for found in columns.values())])} |")
    return "\n".join(lines)


#: Posteriors over functions, ``hessian_structure="gp"``, with their arguments.
FUNCTIONAL: dict[str, dict[str, Any]] = {
    "sod": {"n_subset": 6},
    "nystrom": {"subsample_size": 6, "n_eigenvalues": 4},
    "variational": {"inducing_locations": data_of("regression", 3, 4)[0]},
}


def function_space(kind: str, likelihood: str, backend: Any, x: Tensor) -> dict[str, Callable[[], Any]]:
    """What can be asked of a posterior over functions, with the same draws for any backend."""
    torch.manual_seed(0)
    model = model_of(likelihood)
    la: Any = Laplace(
        model, likelihood, "all", "gp", functional_approximation=kind, backend=backend, **FUNCTIONAL[kind]
    )
    la.fit(loader(*data_of(likelihood, 1, 10)))
    other = copy.copy(la)
    other.load_state_dict(la.state_dict())
    grid = {"val_loader": loader(*data_of(likelihood, 2, 6))}
    return {
        "`la(x)`": lambda: la(x),
        '`la(x, link_approx="mc")`': lambda: la(x, link_approx="mc", n_samples=8, generator=seeded()),
        "`predictive_moments(joint=True)`": lambda: la.predictive_moments(x, joint=True),
        "`functional_samples`": lambda: la.functional_samples(x, n_samples=4, generator=seeded()),
        "`predictive_samples`": lambda: la.predictive_samples(x, n_samples=4, generator=seeded()),
        "`state_dict`, `load_state_dict`": lambda: other(x),
        "`log_marginal_likelihood`": lambda: la.log_marginal_likelihood(),
        "`optimize_prior_precision`": lambda: (la.optimize_prior_precision(**grid), la.prior_precision)[1],
    }


def functional_table(notes: Notes) -> str:
    """Markdown, compared with ``CurvlinopsGGN``; both likelihoods must agree for a word."""
    x = data_of("regression", 2, 3)[0]
    columns: dict[str, dict[str, dict[str, Verdict]]] = {}
    for kind in FUNCTIONAL:
        for likelihood in ("regression", "classification"):
            ours, theirs = dict[str, Any](), dict[str, Any]()
            args = kind, likelihood
            made = verdict(lambda a=args, o=ours: o.update(function_space(*a, GGNBackend, x)))
            theirs = function_space(*args, CurvlinopsGGN, x)
            cells = columns.setdefault(kind, {})
            cells.setdefault(MADE, {})[f"{likelihood}, GGN, fitted"] = made
            for title in ours:

                def compare(a: Any = ours[title], b: Any = theirs[title]) -> None:
                    pair = [value if isinstance(value, tuple) else (value,) for value in (a(), b())]
                    for got, expected in zip(*pair, strict=True):
                        same(got.detach(), expected.detach(), 1e-6)

                cells.setdefault(title, {})[f"{likelihood}, GGN, fitted"] = verdict(compare)
    titles = list(dict.fromkeys(title for cells in columns.values() for title in cells))
    lines = [f"| {' | '.join(['', *(f'`{kind}`' for kind in columns)])} |", "| --- |" + " --- |" * len(columns)]
    lines += [f"| {' | '.join([t, *(notes.cell(cells.get(t, {})) for cells in columns.values())])} |" for t in titles]
    return "\n".join(lines)


def main() -> None:
    """Print a table for each subset of weights, with its notes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables: dict[str, Callable[[Notes], str]] = {s: lambda notes, s=s: table(s, notes) for s in STRUCTURES}
    tables["functions"] = functional_table
    parser.add_argument("--tables", nargs="+", choices=tables, default=list(tables))
    warnings.filterwarnings("ignore")
    for title in parser.parse_args().tables:
        notes = Notes()
        print(f"\n## {title}\n\n{tables[title](notes)}\n")
        print("\n".join(notes.lines()), flush=True)


if __name__ == "__main__":
    main()

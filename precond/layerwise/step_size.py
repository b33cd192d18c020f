"""Learning rate, momentum and damping of a layer-based step from the quadratic model of its own batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from curvature.estimation.tape import Tape
from curvature.losses.loss import watched
from curvature.model.moment import Moment
from curvature.model.streams import random_state
from curvature.model.wrappers import unwrapped
from precond.distributed.exchange import whole_of
from precond.distributed.sharded import is_sharded, like, local, summed
from precond.layerwise.quadratic_model import QuadraticModel
from precond.layerwise.replay import ClosureReplay, LoopReplay, Replay
from precond.step.adapt import LevenbergMarquardt, unseen
from precond.step.graph import flatten, parameters_at, unflatten
from precond.step.trust_region import Move, kl_scale, reference_lr

# A step that raises the loss is halved so often; the last time it is taken back.
_HALVINGS = 10
# Martens and Grosse (2015), section 6.6, take the root of this on gamma, whose square is compared here.
_FACTOR_STEP = 19 / 20
# Share of the promised decrease from which on a trust region grows.
_KEPT = 0.75


class Sized(Protocol):
    """The part of an optimizer that a step model uses."""

    model: nn.Module
    loss_fn: Any
    tape: Tape
    param_groups: list[dict[str, Any]]
    state: Any
    judged: tuple[float, float] | None

    @property
    def steps(self) -> int:
        """Steps taken."""
        ...

    def option(self, name: str) -> Any:
        """The value of an option that all groups share."""
        ...

    def mean_eigenvalue(self) -> float:
        """Mean eigenvalue of C, 0 where it is not known."""
        ...

    def over_ranks(self, work: Callable[[], Tensor], width: int) -> Tensor:
        """The mean of computed numbers ``(width,)`` over the processes that take the step together."""
        ...

    def set_damping(self, damping: float) -> None:
        """Give all groups the same damping."""
        ...


def minimiser(gram: Tensor, slopes: Tensor) -> Tensor:
    r"""The shortest c that minimises :math:`s^\top c + \tfrac12 c^\top M c`, columns of V scaled to one length.

    Args:
        gram: M ``(k, k)``, symmetric positive semi-definite.
        slopes: s ``(k,)``.
    """
    size = gram.diagonal().clamp(min=0).sqrt()
    size = torch.where(size > 0, size, 1)
    return -(torch.linalg.pinv(gram / torch.outer(size, size), hermitian=True) @ (slopes / size)) / size


@dataclass
class _Trial:
    """A step that was taken but not yet judged."""

    before: Tensor  # value of what is minimised
    predicted: float | None  # decrease that the undamped model promises
    own: dict[Tensor, Tensor]  # parameters before it, as far as they lie here; empty where nobody will ask
    gradients: dict[Tensor, Tensor]  # likewise
    adapts: bool  # the damping is adapted by it
    length: float = 0.0  # m^T C m before the learning rate


@dataclass(frozen=True)
class _Model:
    """The quadratic model of a batch over the rows of V: ``V C V^T``, slopes, minimiser, and the value of the loss."""

    V: Tensor
    curved: Tensor
    slopes: Tensor
    coefficients: Tensor
    value: Tensor


class StepModel:
    """Sizes the step of a layer-based optimizer, judges it afterwards, and adapts the damping.

    Vectors are flat, and where processes share parameters out each has a part of them: inner products are summed over
    the parts, and passes on the batch take whole ones.

    Args:
        optimizer: Whose steps they are.
        quadratic: Chooses learning rate and momentum; ``None`` leaves those of the groups.
        rule: Adapts the damping by the reduction ratio, and may take steps back; ``None`` leaves it.
        guarded: Whether a step of the quadratic model that raises the loss is shortened.
    """

    def __init__(
        self,
        optimizer: Sized,
        quadratic: QuadraticModel | None,
        rule: LevenbergMarquardt | None,
        guarded: bool = False,
    ) -> None:
        self.optimizer, self.quadratic, self.rule = optimizer, quadratic, rule
        self.reject = rule is not None and rule.reject_steps
        self.guarded = guarded and quadratic is not None and not self.reject
        self.judges_next = rule is not None and quadratic is not None and rule.next_batch is not False
        what = f"{type(optimizer).__name__}'s {'damping_rule' if quadratic is None else 'step_size'}"
        watched(optimizer.loss_fn, what, "loop")
        self.loss_fn = optimizer.loss_fn
        self.coefficients: Tensor | None = None  # learning rate and momentum of the last step
        self.bounded: Move | None = None  # what the trust region did to it
        self.taken_back = False  # whether the last step was
        self._loop = LoopReplay(optimizer.tape, self.loss_fn)
        self._closure: ClosureReplay | None = None
        self._trial: _Trial | None = None

    def clear(self) -> None:
        """Forget the batch of the step."""
        self._loop.clear()
        self._closure = self._trial = None

    def evaluated(self, closure: Callable[[], Any]) -> Any:
        """Call the closure of a step, and take its batch again where its result has a graph.

        One that ran the backward pass and returns a detached loss, as trainers do, is a plain loop.
        """
        model = unwrapped(self.optimizer.model)
        random, moment = random_state(next(model.parameters()).device), Moment(model)
        with torch.enable_grad():
            loss = closure()
        if isinstance(loss, Tensor) and loss.requires_grad:
            self._closure = ClosureReplay(closure, model, self.loss_fn, random, moment)
        return loss

    @property
    def replay(self) -> Replay:
        """The batch of the step."""
        return self._closure or self._loop

    @property
    def undecided(self) -> bool:
        """Whether a move is on its way that will be judged."""
        return self._trial is not None

    def mark(self) -> Any:
        """What a step changes here, as it is now, for :meth:`back_to`."""
        return dict(vars(self)), dict(vars(self._loop))

    def back_to(self, mark: Any) -> None:
        """Undo what has changed since a mark."""
        own, loop = mark
        vars(self).update(own)
        vars(self._loop).update(loop)

    def size(self, directions: dict[Tensor, Tensor], gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """The directions of the step, given the preconditioned gradients.

        Args:
            directions: ``P g`` by parameter.
            gradients: g, L2 weight decay included.
        """
        if getattr(self.optimizer, "found_inf", None) is not None:
            raise RuntimeError(
                "a GradScaler multiplies the loss by a number that the quadratic model of the batch does not know. "
                "Train in float32 or bfloat16, or without step_size and damping_rule."
            )
        self._loop.take()
        params = list(directions)
        adapts = self.rule is not None and self.optimizer.steps % self.rule.period == 0
        keep = self.reject or self.guarded or (self.quadratic is None and adapts)
        own = {p: local(p).detach().clone() for p in params} if keep else {}
        self._trial = _Trial(torch.zeros(()), None, own, {p: local(gradients[p]) for p in params}, adapts)
        if self.quadratic is None:
            return directions
        model = self._model(directions, gradients)
        V, curved, slopes, c, value = model.V, model.curved, model.slopes, model.coefficients, model.value
        self._judge_by_next(params, value)
        length = float(c @ curved @ c)
        lr = float(self.optimizer.option("lr"))
        limit = self._limit()
        if limit is not None:
            scale = kl_scale(c.new_tensor(length), limit)
            c, length = scale * c, float(scale) ** 2 * length
            self.bounded = Move(1.0, None, {}, c.new_tensor(lr**2 * length), scale < 1)
        self.coefficients, self._trial.length = c, length
        self._trial.predicted = -float(lr * (slopes @ c) + 0.5 * lr**2 * (c @ curved @ c))
        self._trial.before = value + self._penalty(params)
        found = _parts((c.to(V) @ V).to(_flat(directions)), params)
        for p, move in found.items():
            self.optimizer.state[p]["move"] = _as(p, (lr * move).to(p.dtype))
        return {p: _as(p, -move.to(p.dtype)) for p, move in found.items()}

    @contextmanager
    def _passes(self, params: list[Tensor], values: Mapping[Tensor, Tensor] | None = None) -> Iterator[list[Tensor]]:
        """The tensors that passes on the batch use in the place of parameters, which may have other values inside."""
        shards = self.optimizer.tape.shards
        if shards is not None:
            with shards.made_whole(values):
                yield [shards.whole(p) for p in params]
        else:
            with parameters_at(values or {}):
                yield params

    def _gram_of_batch(
        self,
        params: list[Tensor],
        vectors: list[Tensor],
        stride: int = 1,
        values: Mapping[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``V^T C V`` and the loss of the batch; of the batches of all processes, whose mean gradient is followed."""
        wholes = [flatten(whole_of(_parts(vector, params))) for vector in vectors]
        k = len(vectors)
        with self._passes(params, values) as seen:

            def own() -> Tensor:
                found, value = self.replay.gram(seen, wholes, stride)
                return torch.cat([found.reshape(-1), value.to(found).reshape(1)])

            together = self.optimizer.over_ranks(own, k * k + 1)
        return together[:-1].view(k, k), together[-1]

    def _value(self, params: list[Tensor], values: Mapping[Tensor, Tensor] | None = None) -> Tensor:
        """What is minimised, the term of L2 weight decay included."""
        with self._passes(params, values):
            found = self.optimizer.over_ranks(lambda: self.replay.value().reshape(1), 1)[0]
        return found + self._penalty(params, values)

    def candidates(self) -> list[float]:
        """The dampings of the factors to be compared at this step, the present one first; none where it is not due."""
        if self.quadratic is None or self.quadratic.factor_period is None:
            return []
        period, now = self.quadratic.factor_period, self.optimizer.option("factor_damping")
        if now is None or self.optimizer.steps == 0 or self.optimizer.steps % period:
            return []
        return [now, now * _FACTOR_STEP**period, now / _FACTOR_STEP**period]

    def promise(self, directions: dict[Tensor, Tensor], gradients: dict[Tensor, Tensor]) -> float:
        """The value of the damped model at the move that it would choose with these directions; lower is better."""
        self._loop.take()
        model = self._model(directions, gradients)
        return float(0.5 * model.slopes @ model.coefficients)

    def _model(self, directions: dict[Tensor, Tensor], gradients: dict[Tensor, Tensor]) -> _Model:
        """The quadratic model of the batch over the preconditioned gradient and the previous move."""
        assert self.quadratic is not None
        params = list(directions)
        vectors = [-_flat(directions)]
        moves = {p: self.optimizer.state[p].get("move") for p in params}
        if self.quadratic.momentum and any(m is not None for m in moves.values()):
            vectors.append(_flat({p: torch.zeros_like(local(p)) if m is None else m for p, m in moves.items()}))
        curved, value = self._gram_of_batch(params, vectors, round(1 / self.quadratic.fraction))
        V = torch.stack(vectors).double()
        curved = curved + self._gram(V, params, _penalty)
        slopes = self._added(V @ _flat({p: gradients[p] for p in params}).double(), params)
        return _Model(V, curved, slopes, minimiser(curved + self._gram(V, params, _damping), slopes), value)

    def _limit(self) -> float | None:
        """Largest ``m^T C m`` of a move before the learning rate."""
        assert self.quadratic is not None
        clip, region = self.optimizer.option("kl_clip"), self.optimizer.option("region")
        reference = min(reference_lr(group) for group in self.optimizer.param_groups)
        given = [None if clip is None else clip / reference**2, self.quadratic.max_kl, region]
        return min((float(limit) for limit in given if limit is not None), default=None)

    def judge(self) -> None:
        """The parameters have moved: adapt the damping by what became of the loss, or take the move back."""
        trial, self.taken_back = self._trial, False
        if trial is None or not (trial.adapts or self.reject or self.guarded):
            return
        params = list(trial.gradients)
        if trial.predicted is None:
            self._predict(trial, params)
        assert trial.predicted is not None
        after, before = float(self._value(params)), float(trial.before)
        self.optimizer.judged = (-trial.predicted, after - before)
        if unseen(trial.predicted, before, after, torch.float32):
            return
        if self.rule is not None and trial.adapts:
            ratio = (before - after) / trial.predicted if trial.predicted > 0 else float("nan")
            if self.judges_next and ratio >= self.rule.lower:
                self._keep(trial.predicted, ratio)
            else:
                damping, mean = float(self.optimizer.option("damping")), self.optimizer.mean_eigenvalue()
                self.optimizer.set_damping(self.rule.adapted(damping, ratio, mean))
        if self.reject and not after <= before:
            self.taken_back = True
            self._keep(None, None)
            for p, value in trial.own.items():
                local(p).copy_(value)
                self.optimizer.state[p].pop("momentum_buffer", None)
                self.optimizer.state[p].pop("length", None)
                self.optimizer.state[p].pop("move", None)
        if self.guarded:
            self._guard(trial, params, before, after)

    def _guard(self, trial: _Trial, params: list[Tensor], before: float, after: float) -> None:
        """Halve a step that raised the loss until it does not, and set the trust region by what is left of it."""
        assert trial.predicted is not None
        region = self.optimizer.option("region")
        if after <= before:
            kept = before - after > _KEPT * trial.predicted
            if region is not None and kept and trial.length > 0.99 * region:
                self._set_region(4 * region)
            return
        moves, scale = {p: local(p) - trial.own[p] for p in params}, 1.0
        for attempt in range(1, _HALVINGS + 1):
            scale = 0.5**attempt if attempt < _HALVINGS else 0.0
            for p, move in moves.items():
                local(p).copy_(trial.own[p] + scale * move if scale else trial.own[p])
            if not scale or float(self._value(params)) <= before:
                break
        for p in params:
            if "move" in self.optimizer.state[p]:
                self.optimizer.state[p]["move"] = self.optimizer.state[p]["move"] * scale
        self.taken_back = not scale
        self._keep(None, None)
        self._set_region((scale or 0.5**_HALVINGS) ** 2 * trial.length)

    def _keep(self, promised: float | None, kept: float | None) -> None:
        """Keep what a step promised, and the share of it that its own batch saw, until the next batch is there."""
        for group in self.optimizer.param_groups:
            group["promised"], group["kept"] = promised, kept

    def _judge_by_next(self, params: list[Tensor], value: Tensor) -> None:
        """Judge the step before this one by the batch of this one, whose loss at the parameters is ``value``."""
        group = self.optimizer.param_groups[0]
        promised, kept = group.get("promised"), group.get("kept")
        if promised is None or kept is None or self.rule is None:
            return
        self._keep(None, None)
        moves = {p: self.optimizer.state[p]["move"] for p in params if "move" in self.optimizer.state[p]}
        before = float(self._value(params, {p: local(p).detach() - local(move) for p, move in moves.items()}))
        after = float(value + self._penalty(params))
        if unseen(promised, before, after, torch.float32):
            return
        damping, mean = float(self.optimizer.option("damping")), self.optimizer.mean_eigenvalue()
        self.optimizer.set_damping(self.rule.after_next(damping, kept, (before - after) / promised, mean))

    def _set_region(self, region: float) -> None:
        for group in self.optimizer.param_groups:
            group["region"] = region

    def _predict(self, trial: _Trial, params: list[Tensor]) -> None:
        """Compute the decrease that the model had promised for the move that was made."""
        own = {p: trial.own[p] for p in params}
        m = flatten({p: local(p) - value for p, value in own.items()})
        found, value = self._gram_of_batch(params, [m], values=own)
        trial.before = value + self._penalty(params, own)
        m = m.double()
        curved = float(found) + float(self._gram(m.unsqueeze(0), params, _penalty))
        slope = float(self._added(flatten({p: trial.gradients[p] for p in params}).double() @ m, params))
        trial.predicted = -(slope + 0.5 * curved)

    def _gram(self, V: Tensor, params: list[Tensor], option: Callable[[dict[str, Any]], float]) -> Tensor:
        """``V diag(s) V^T`` for vectors ``V (k, P)``, with a number s of each parameter's group."""
        groups = self.optimizer.param_groups
        if len({option(group) for group in groups}) == 1:
            s = option(groups[0])
            if not s:
                return torch.zeros(len(V), len(V), dtype=V.dtype)
            return s * self._added(V @ V.mT, params)
        group_of = {p: group for group in groups for p in group["params"]}
        each = [V.new_full((local(p).numel(),), option(group_of[p])) for p in params]
        return self._added((V * torch.cat(each)) @ V.mT, params)

    @staticmethod
    def _added(numbers: Tensor, params: list[Tensor]) -> Tensor:
        """Inner products of vectors of which each process has a part, as numbers of the processor."""
        first = next((p for p in params if is_sharded(p)), params[0])  # all lie on one mesh
        return summed([numbers], [first])[0].cpu()

    def _penalty(self, params: list[Tensor], values: Mapping[Tensor, Tensor] | None = None) -> Tensor:
        """The term that L2 weight decay adds to the loss; a closure's loss and that of the loop do not hold it."""
        if not any(_penalty(group) for group in self.optimizer.param_groups):
            return torch.zeros((), dtype=torch.float64)
        theta = flatten({p: local(p).detach() if values is None or p not in values else values[p] for p in params})
        return 0.5 * self._gram(theta.double().unsqueeze(0), params, _penalty).sum()


def _flat(vectors: Mapping[Tensor, Tensor]) -> Tensor:
    """The parts of this process as one vector."""
    return flatten({p: local(x) for p, x in vectors.items()})


def _parts(flat: Tensor, params: list[Tensor]) -> dict[Tensor, Tensor]:
    """Inverse of :func:`_flat`."""
    return dict(zip(params, unflatten(flat, [local(p) for p in params]).values(), strict=True))


def _as(p: Tensor, part: Tensor) -> Tensor:
    """The part of this process, laid out as a parameter is."""
    return like(part, p) if is_sharded(p) else part


def _penalty(group: dict[str, Any]) -> float:
    return float(group["weight_decay"]) if group["decay"] == "l2" else 0.0


def _damping(group: dict[str, Any]) -> float:
    return float(group["damping"])

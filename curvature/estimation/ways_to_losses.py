"""The way from a number to the output of a model, where that is affine in the statistics of an exponential family."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from math import prod
from typing import Any

from curvature.model.graph_nodes import (
    CUTS,
    PICKS,
    SHAPES,
    above,
    below,
    between,
    chain,
    cuts_columns,
    inputs_of,
    name_of,
    node_of,
    only_moves,
    shape_of,
    users_of,
)

#: Beginnings of the names of nodes that add numbers up, or pick some of them.
_LINEAR = ("Neg", "Sum", "Mean", "Gather", "NllLoss", "MaskedFill", "Index", "Where", "ToCopy")
#: Of those between losses and a sum of their multiples.
_SUMS = ("Mul", "Div", "Neg", "Add", "Sub", "Rsub", "Sum", "Mean", "Stack", "Cat", "ToCopy", *SHAPES)
#: Of those that make log probabilities, or the mean of a Poisson variable, or the logarithm of a normaliser.
_CORES = ("LogSoftmax", "Exp", "BinaryCrossEntropyWithLogits", "Logsumexp", *(_BINARY := ("LogSigmoid", "Softplus")))
#: The same by the family of the loss.
_KINDS = (("LogSoftmax", "Logsumexp"), ("BinaryCrossEntropyWithLogits", *_BINARY), ("Exp",))
#: Of losses that are none of an exponential family.
OTHERS = ("MultiMargin", "MultilabelMargin", "SoftMargin", "CtcLoss", "SmoothL1Loss", "HuberLoss", "MseLoss")
#: Of those whose slopes are one where they are not zero.
_UNIT = ("Abs", "Relu", "Clamp", "Max", "Min", "NanToNum")
#: Of those that leave some numbers out.
_PICKS = (*PICKS, "Where")
#: Of those that add a constant.
_CONSTANTS = ("Sub", "Rsub")


@dataclass(frozen=True)
class Way:
    """What the nodes between a number and an output tell, as far as names do.

    Attributes:
        affine: The number is a multiple of the loss of all terms and multiples of others, and nothing else: its value
            tells the weight.
        weighted: Products or quotients are on the way whose size nobody knows, or it is another loss.
        divergence: The entropy of the labels, which no gradient shows, is taken off.
        exponential: It is the loss of a Poisson variable.
        others: The nodes of the others.
        cores: The nodes that make log probabilities, or means.
        linear: All that is made of these is linear in them.
        picks: Some numbers are left out on the way.
    """

    affine: bool
    weighted: bool
    divergence: bool = False
    exponential: bool = False
    others: frozenset[Any] = field(default_factory=frozenset)
    cores: frozenset[Any] = field(default_factory=frozenset)
    linear: bool = False
    picks: bool = False


def way(roots: Sequence[Any], ends: Set[Any], known: Callable[[Any], bool], losses: bool = False) -> Way:
    """Look at the way from what a backward pass was called on to an output.

    Args:
        roots: The former, whose multiples are added up.
        ends: Nodes where the output ends.
        known: Whether a node is that of a loss whose value and weight will be told.
        losses: The ends give values of a loss, and no output.
    """
    after = users_of(between(roots, lambda node: node in ends or known(node)))
    leads = set(above((end for end in ends if end in after), after))
    affine, weighted, scalars, divergence, others = True, False, 0, False, set[Any]()
    cores, linear = set[Any](), True
    own = leads - ends
    added = {before for start in (map(node_of, roots), *map(inputs_of, own)) for before in start} - leads
    for besides in below(added, known):
        others |= {besides} if known(besides) else set()
        affine &= known(besides) or _adds_up(besides)  # else something else is added
    added_up = any(len(leads & {*inputs_of(node)}) > 1 for node in own)  # of several ways to the output
    for node in own:
        name, arguments = name_of(node), inputs_of(node)
        if name.startswith(_CORES) and not losses:
            turned = name.startswith(_BINARY) and name_of(arguments[0]).startswith("Neg")  # the other class
            direct = only_moves(inputs_of(arguments[0])[0] if turned else arguments[0], ends)
            direct &= not any(map(_picks_columns, between(arguments, ends)))
            affine, weighted = affine and direct, weighted or not direct  # at a temperature
            cores, linear = cores | {node}, linear and direct
            continue
        linear &= _is_linear(node)
        if name.startswith(("Mul", "Div")) and len(arguments) == 1:
            internal = name.endswith("1") or (not losses and _is_core(arguments[0], ends))  # of torch, or by labels
            scalar = prod(shape_of(node)) == 1
            scalars += scalar and not internal
            affine, weighted = affine and (scalar or internal), weighted or not (scalar or internal)
        elif name.startswith(("Add", *_CONSTANTS)):
            entropy = name.startswith(_CONSTANTS) and len(arguments) == 1 and _of_labels(node, leads, ends)
            divergence |= entropy
            affine &= len(arguments) == 2 or entropy
        elif not name.startswith(_LINEAR) and not only_moves(node, {*arguments}):
            affine, weighted = False, weighted or added_up or not name.startswith(_UNIT)
    probable = any(name_of(node).startswith(_CORES[:1]) for node in leads)  # whose mean by torch is a quotient
    quotients = (n for n in leads if n.name() == "DivBackward0" and prod(shape_of(n)) == 1)
    divided = scalars == 1 and probable and any(quotients)
    affine &= len(leads) > len(leads & ends) > 0
    kinds = {kind for kind in _KINDS for node in cores if name_of(node).startswith(kind)}
    if len(kinds) > 1 or any(node.name().startswith(OTHERS) for node in own):
        affine, weighted = False, True
    if divergence:  # of one distribution, which a sum of several losses of an output is not
        logs = [node for node in own if name_of(node).startswith(_CORES[:1])]
        affine &= len(logs) == 1 == len(after[logs[0]])
    exponential = any(node.name().startswith("Exp") for node in own)
    picks = any(node.name().startswith(_PICKS) for node in own)
    weighted |= scalars > 0 and not divided
    return Way(affine, weighted, divergence, exponential, frozenset(others), frozenset(cores), linear, picks)


def _picks_columns(node: Any) -> bool:
    """Whether a node picks some of the last axis, whose numbers belong together."""
    return name_of(node).startswith(CUTS) and cuts_columns(node)


def _adds_up(node: Any) -> bool:
    """Whether a node is one of those between losses and a sum of their multiples, which adds no constant."""
    name = name_of(node)
    return name.startswith(_SUMS) and not (name.startswith(("Add", *_CONSTANTS)) and len(inputs_of(node)) < 2)


def _of_labels(node: Any, leads: Set[Any], ends: Set[Any]) -> bool:
    """Whether a difference is that of the logarithms of labels and probabilities, entry by entry, times the labels."""
    logs = [n for n in below([node], ends) if n in leads and name_of(n).startswith(_CORES[:1])]
    return len(logs) == 1 and shape_of(node) == shape_of(logs[0])


def soft_labels(nodes: Sequence[Any], ends: Set[Any]) -> set[Any]:
    """Outputs of which a backward pass takes log probabilities, to which all else is linear: with labels in between.

    Args:
        nodes: Those of the pass, down to those of outputs and of known losses.
        ends: The former.
    """
    own = [node for node in nodes if node not in ends]
    users = users_of(own)
    found: set[Any] = set()
    for node in own:
        if name_of(node).startswith("LogSoftmax"):
            made = set(above([node], users)) - {node}
            plain = only_moves(inputs_of(node)[0], ends) and all(map(_is_linear, made))
            if plain and not any(user.name().startswith("NllLoss") for user in made):
                found |= ends & set(below([node], ends))
    return found


def at_temperatures(nodes: Sequence[Any], ends: Set[Any]) -> set[Any]:
    """Outputs of multiples of which a backward pass takes log probabilities; arguments as for :func:`soft_labels`."""
    starts = (inputs_of(node)[0] for node in nodes if node not in ends and name_of(node).startswith("LogSoftmax"))
    return {_multiplied(start, ends) for start in starts} - {None}


def _multiplied(start: Any, ends: Set[Any]) -> Any:
    """The end of which a node gives a multiple, moved maybe, or ``None``."""
    factors = False
    for node, _ in chain(start):
        if node in ends:
            return node if factors else None
        multiplies = name_of(node).startswith(("Mul", "Div"))
        if not multiplies and not only_moves(node, {*inputs_of(node)}):
            return None
        factors |= multiplies
    return None


def _is_linear(node: Any) -> bool:
    """Whether what a node gives is linear in what it gets, or adds a constant, by its name."""
    name, arguments = name_of(node), inputs_of(node)
    if name.startswith(("Mul", "Div")):
        return len(arguments) == 1
    return name.startswith((*_LINEAR, "Add", *_CONSTANTS)) or only_moves(node, {*arguments})


def _is_core(node: Any, ends: Set[Any]) -> bool:
    """Whether a node gives log probabilities, or what they are less than a constant, or the output."""
    after = inputs_of(node)
    if name_of(node).startswith(_CONSTANTS) and len(after) == 1:
        return _is_core(after[0], ends)
    return name_of(node).startswith((*_CORES[:1], *_BINARY[:1])) or only_moves(node, ends)

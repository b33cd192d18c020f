"""From recorded uses to blocks: which parameters are estimated together, and from which uses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from curvature.layers import OuterSite, Site
from curvature.layers.block import Block, BlockPart
from curvature.model.parameters import Parameters
from curvature.structures.estimator import Form

#: Why a weight and its bias are blocks of their own.
_APART = "uses of one without the other"


@dataclass(frozen=True)
class Use:
    """One use of a block: the site, which piece of it, and whether it sees the block's transpose."""

    site: Site
    piece: str
    flipped: bool = False


@dataclass
class Group:
    """A block and its uses in one pass; no uses means per-sample gradients by autograd (``form="per_sample"``)."""

    block: Block
    form: Form
    uses: list[Use] = field(default_factory=list)

    @property
    def operations(self) -> tuple[str, ...]:
        """Operations the block was used by."""
        return tuple(dict.fromkeys(use.site.operation for use in self.uses))


class BlockPlan:
    """Assigns uses to blocks, and keeps the assignment over steps.

    Weight and bias of a layer share a block if ``joint`` and neither is used elsewhere without the other. A parameter
    some of whose uses no rule covers is a block of its own without uses: its gradients are taken by autograd.

    Args:
        parameters: The tracked parameters.
        joint: Keep weight and bias together.

    Attributes:
        without_rule: Parameters whose gradients are taken by autograd, and why no rule serves.
        apart: Parameters that are in no joint block, because some pass uses them without the others of it.
    """

    def __init__(self, parameters: Parameters, joint: bool) -> None:
        self.parameters = parameters
        self.joint = joint
        self._blocks: dict[tuple[str, int, int], Block] = {}  # segment -> its block
        self.without_rule: dict[str, str] = {}
        self.apart: set[str] = set()
        self._lost: set[str] = set()
        self.changed = False  # since the last assignment

    def assign(self, sites: Iterable[Site], unknown: Mapping[str, set[str]]) -> list[Group]:
        """Groups of one pass.

        Raises:
            RuntimeError: If a layer is used in a way that contradicts its block from an earlier pass.
        """
        sites, self.changed = list(sites), False
        self._mark_apart(sites)
        self._mark_generic(sites, unknown)
        joint = {id(site): self._is_joint(site, sites) for site in sites}
        groups: dict[str, Group] = {}
        # A layer fixes the orientation of a matrix before an embedding does.
        for site in sorted(sites, key=lambda s: s.operation == "embedding"):
            for piece, block in site.blocks(joint[id(site)]):
                if not self.without_rule.keys().isdisjoint(block.names):
                    continue
                known = self._register(block)
                flipped = known.parts[0] != block.parts[0]
                form: Form = "outer" if isinstance(site, OuterSite) else "per_sample"
                group = groups.setdefault(known.name, Group(known, form))
                group.uses.append(Use(site, piece, flipped))
        for name, p in self.parameters.items():
            if name in self.without_rule:
                block = Block(name, (BlockPart(name, 0, (p.numel(),), (0,), (p.numel(),)),))
                groups[name] = Group(block, "per_sample")
        return list(groups.values())

    def distrust(self, reasons: Mapping[str, str]) -> None:
        """From now on take the gradients of these parameters by autograd, and why."""
        for name, reason in reasons.items():
            self.without_rule.setdefault(name, reason)
            self.changed = True
        self._part()

    @property
    def reasons(self) -> dict[str, str]:
        """What was found out about parameters, by name, for :meth:`begin_with`."""
        return {**dict.fromkeys(self.apart, _APART), **self.without_rule}

    def begin_with(self, reasons: Mapping[str, str]) -> None:
        """Assign from the first pass on by what an earlier run over the same data has found out."""
        self.apart |= {name for name, reason in reasons.items() if reason == _APART}
        self.without_rule |= {name: reason for name, reason in reasons.items() if reason != _APART}

    def adopt(self, block: Block) -> None:
        """Take a block that another process has assigned.

        Raises:
            RuntimeError: If it contradicts one of this process.
        """
        if self.without_rule.keys().isdisjoint(block.names):
            self._register(block)

    def lost(self) -> set[str]:
        """Names of the blocks that were given up since the last call: a later pass used their parameters otherwise."""
        lost, self._lost = self._lost, set()
        return lost

    def mark(self) -> Any:
        """The assignment as it is now, for :meth:`back_to`."""
        return dict(self._blocks), dict(self.without_rule), set(self.apart)

    def back_to(self, mark: Any) -> None:
        """Forget what was assigned since a mark."""
        self._blocks, self.without_rule, self.apart = mark

    def _part(self) -> None:
        """Give up the blocks of parameters that are taken by autograd now, and joint ones of those that are not."""
        given_up = {
            block.name
            for block in self._blocks.values()
            if any(name in self.without_rule for name in block.names)
            or (len(block.parts) > 1 and not self.apart.isdisjoint(block.names))
        }
        if given_up:
            self._blocks = {key: block for key, block in self._blocks.items() if block.name not in given_up}
            self._lost |= given_up

    def state(self) -> dict[str, Any]:
        """The assignment so far, as names and numbers."""
        blocks = {block.name: block.state() for block in self._blocks.values()}
        return {
            "blocks": blocks,
            "generic": sorted(self.without_rule),
            "reasons": self.without_rule,
            "apart": sorted(self.apart),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take up :meth:`state`."""
        reasons = saved.get("reasons", {})  # files of version 0.1 have none
        self.without_rule = {name: reasons.get(name, "no rule for its use") for name in saved["generic"]}
        self.apart = set(saved.get("apart", ()))
        self._blocks.clear()
        for name, parts in saved["blocks"].items():
            self._register(Block.from_state(name, parts))

    def _register(self, block: Block) -> Block:
        """The block known for these segments, which must be the same one, possibly transposed."""
        known = self._blocks.get(_key(block.parts[0]))
        if known is None:
            for part in block.parts:
                self._blocks[_key(part)] = block
            return block
        if known.name != block.name or (known.parts != block.parts and known.shape != block.shape[::-1]):
            raise RuntimeError(
                f"{block.name} was seen as block {known.name} of shape {known.shape} before, now with shape "
                f"{block.shape}: the model uses it in different ways in different passes. Leave this parameter out "
                "with params=."
            )
        return known

    def _mark_apart(self, sites: list[Site]) -> None:
        """Parameters of joint blocks of earlier passes that a use of this one does not have together."""
        for site in sites:
            keys = {ref.key for ref in site.refs}
            for known in {block.name: block for key in keys if (block := self._blocks.get(key))}.values():
                if len(known.parts) > 1 and keys != {_key(part) for part in known.parts}:
                    self.apart.update(known.names)

    def _mark_generic(self, sites: list[Site], unknown: Mapping[str, set[str]]) -> None:
        """Parameters with a use no rule covers, with overlapping segments, or with uses of different kinds."""
        for name, operations in unknown.items():
            self.without_rule.setdefault(name, f"no rule for {', '.join(sorted(operations))}")
        segments: dict[str, dict[tuple[int, int], str]] = {}
        for site in sites:
            kind = "outer" if isinstance(site, OuterSite) else type(site).__name__
            for ref in site.refs:
                role = "bias" if ref is site.bias else "weight"
                seen = segments.setdefault(ref.name, {})
                span = (ref.start, ref.start + ref.numel)
                if seen.setdefault(span, f"{kind} {role}") != f"{kind} {role}":
                    self.without_rule.setdefault(ref.name, "uses of different kinds")
        for name, seen in segments.items():
            spans = sorted(seen)
            if any(right[0] < left[1] for left, right in pairwise(spans)):
                self.without_rule.setdefault(name, "uses of segments that overlap")
        # Shapes of one matrix that are neither equal nor transposed (a kernel seen as a matrix, say).
        shapes: dict[tuple[str, int, int], set[tuple[int, ...]]] = {}
        for site in sites:
            if site.weight is not None:
                block, known = site.blocks(False)[0][1], self._blocks.get(site.weight.key)
                shapes.setdefault(site.weight.key, set()).add(block.shape)
                if known is not None and _key(known.parts[0]) == site.weight.key:  # in an earlier pass
                    shapes[site.weight.key].add(known.parts[0].shape)
        for key, found in shapes.items():
            first = next(iter(found))
            if any(shape not in (first, first[::-1]) for shape in found):
                self.without_rule.setdefault(key[0], "uses as matrices of different shapes")
        self._part()

    def _is_joint(self, site: Site, sites: list[Site]) -> bool:
        if not self.joint or site.weight is None or site.bias is None:
            return False
        names = site.weight.name, site.bias.name
        if not (self.without_rule.keys() | self.apart).isdisjoint(names):
            return False
        known = self._blocks.get(site.weight.key)
        if known is not None:
            return len(known.parts) == 2
        if site.bias.key in self._blocks:
            return False
        weight, bias = site.weight.key, site.bias.key
        for other in sites:
            keys = (other.weight.key if other.weight else None, other.bias.key if other.bias else None)
            if (keys[0] == weight) != (keys[1] == bias) or bias == keys[0]:
                return False
        return True


def _key(part: BlockPart) -> tuple[str, int, int]:
    return (part.name, part.start, part.numel)

"""What a compression gives back: the model, its codes, and what each layer costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from curvature.compression.grid import Codes


@dataclass(frozen=True)
class CompressedLayer:
    r"""One matrix of a compressed model.

    Attributes:
        name: Name of the parameter.
        shape: ``(d_out, d_in)``.
        bits: Bits of a weight on the grid; ``None`` where it was pruned.
        kept: Share of the weights that are not zero.
        predicted: The increase of the loss by the quadratic form, :math:`\tfrac12 \langle E, C E \rangle`, with the
            weights that were written. Under ``structure="foof"`` C knows no loss, and this is half the mean squared
            error of the layer's outputs.
        measured: The increase of the loss when this layer alone is compressed; ``None`` where it was not measured.
        damping: Damping that its factors took, as a fraction of their mean diagonals.
        singular: Whether a factor is singular without damping: the data left directions open.
        seconds: Time of its rounding or pruning.
    """

    name: str
    shape: tuple[int, int]
    bits: int | None
    kept: float
    predicted: float
    measured: float | None
    damping: float
    singular: bool
    seconds: float


@dataclass(frozen=True)
class Compression:
    """A compressed model, and what is known of it; print it for a table.

    Attributes:
        model: A copy of the model with plain weights: rounded, or zero where they were pruned.
        layers: One row for each matrix.
        loss_before: Loss of the original model over the data; ``None`` where nothing was measured.
        loss_after: Loss of the compressed model.
        codes: ``{name: codes}`` of quantised matrices.
        masks: ``{name: (d_out, d_in) bool}`` of pruned matrices: True where a weight was kept.
    """

    model: nn.Module
    layers: tuple[CompressedLayer, ...]
    loss_before: float | None = None
    loss_after: float | None = None
    codes: Mapping[str, Codes] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def bits(self) -> float:
        """Mean bits of a quantised weight, without scales."""
        sizes = {layer.name: layer.shape[0] * layer.shape[1] for layer in self.layers if layer.bits is not None}
        bits = sum(sizes[layer.name] * layer.bits for layer in self.layers if layer.bits is not None)
        return bits / max(sum(sizes.values()), 1)

    @property
    def predicted(self) -> float:
        """Sum of the predictions over the layers."""
        return sum(layer.predicted for layer in self.layers)

    def tensors(self) -> dict[str, Tensor]:
        """Codes, scales, zeros and masks as a flat dict, to be stored by ``torch.save`` or as safetensors."""
        out: dict[str, Tensor] = {}
        for name, codes in self.codes.items():
            out |= {f"{name}.codes": codes.codes, f"{name}.scale": codes.scale, f"{name}.zero": codes.zero}
        return out | {f"{name}.mask": mask for name, mask in self.masks.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "loss_before": self.loss_before,
            "loss_after": self.loss_after,
            "predicted": self.predicted,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        """A table."""
        head = ("layer", "shape", "bits", "kept", "predicted", "measured", "damping", "seconds")
        body = [
            (
                layer.name,
                "x".join(map(str, layer.shape)),
                "-" if layer.bits is None else str(layer.bits),
                f"{layer.kept:.0%}",
                f"{layer.predicted:.3g}",
                "-" if layer.measured is None else f"{layer.measured:.3g}",
                f"{layer.damping:g}{' (singular)' if layer.singular else ''}",
                f"{layer.seconds:.2f}",
            )
            for layer in self.layers
        ]
        widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(w) if i in (0, 6) else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in [head, tuple("-" * w for w in widths), *body]
        ]
        if self.loss_before is not None and self.loss_after is not None:
            lines.append(
                f"Loss {self.loss_before:.6g} -> {self.loss_after:.6g} ({self.loss_after - self.loss_before:+.3g}); "
                f"predicted by the layers {self.predicted:+.3g}."
            )
        return "\n".join(lines)

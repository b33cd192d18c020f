"""Finished sections and a running search for eigenvalues, kept in a file if there is one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from curvature.estimation.checkpoint import Checkpoint
from curvature.estimation.probe import Sketches, different


class Store:
    """Results by name, and the state of the running search.

    Args:
        place: The file, or None to keep all in memory.

    Attributes:
        content: Encoded sections, eigenvectors by matrix, and states of searches by name.
        kept: Whether there is a file.
    """

    def __init__(self, place: str | os.PathLike[str] | Checkpoint | None = None) -> None:
        self._file = None if place is None else Checkpoint.at(place)
        self.kept = self._file is not None
        self.content: dict[str, dict[str, Any]] = {"sections": {}, "vectors": {}, "running": {}}

    def open(self, identity: Mapping[str, Any], probe: Mapping[str, Sketches], order: str) -> None:
        """Load the file if it exists.

        Args:
            identity: See :func:`~curvature.estimation.checkpoint.problem_identity`.
            probe: What is computed on the data.
            order: Digest of the data in their order.

        Raises:
            CheckpointError: If it belongs to another model, data or options.
        """
        if self._file is None:
            return
        self._file = self._file.of(identity)
        self.content = self._file.load() or self.content
        known = self.content.get("seen", {})
        compared = ["all data"]
        if known.get("order") == order:
            compared.append("first batch")
        elif known:
            self.content["sections"].pop("noise", None)  # counts the examples in the order of the data
        self._file.refuse(
            {
                f"{name} on the {where}": ("another function, or other data", "these")
                for where in compared
                for name in different(known.get(where, {}), probe.get(where, {}))
                if known
            }
        )
        self.content["seen"] = {**probe, "order": order}

    def save(self) -> None:
        """Write the file at once."""
        if self._file is not None:
            self._file.save(self.content)

    def offer(self) -> None:
        """Write the file if it is time to."""
        if self._file is not None:
            self._file.offer(lambda: self.content)

"""Finished sections and a running search for eigenvalues, kept in a file if there is one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from curvature.estimation.checkpoint import Checkpoint


class Store:
    """Results by name, and the state of the running search.

    Args:
        place: The file, or None to keep all in memory.

    Attributes:
        content: Encoded sections, eigenvectors by matrix, and states of searches by name.
    """

    def __init__(self, place: str | os.PathLike[str] | Checkpoint | None = None) -> None:
        self._file = None if place is None else Checkpoint.at(place)
        self.content: dict[str, dict[str, Any]] = {"sections": {}, "vectors": {}, "running": {}}

    def open(self, identity: Mapping[str, Any]) -> None:
        """Load the file if it exists.

        Raises:
            CheckpointError: If it belongs to another model, data or options.
        """
        if self._file is not None:
            self._file = self._file.of(identity)
            self.content = self._file.load() or self.content

    def save(self) -> None:
        """Write the file at once."""
        if self._file is not None:
            self._file.save(self.content)

    def offer(self) -> None:
        """Write the file if it is time to."""
        if self._file is not None:
            self._file.offer(lambda: self.content)

"""Where many long vectors are kept: in memory, or in files."""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_CHUNK = 1 << 20  # columns at a time, so that rows are rotated without a second copy of all of them


@dataclass(frozen=True)
class Storage:
    """Makes rows of ``n`` numbers.

    Args:
        n: Length of a row.
        dtype: Type of the numbers.
        device: Where rows in memory live; rows in files are CPU tensors.
        folder: Folder for the files; None keeps rows in memory. A file is unlinked: it vanishes with its tensor,
            however the process ends.

    Raises:
        NotADirectoryError: If the folder does not exist.
    """

    n: int
    dtype: torch.dtype
    device: torch.device
    folder: Path | None = None

    def __post_init__(self) -> None:
        """Validate the arguments."""
        if self.folder is not None and not self.folder.is_dir():
            raise NotADirectoryError(f"storage={str(self.folder)!r} is no folder; name one on a disk with room.")

    @property
    def home(self) -> torch.device:
        """Device of the rows."""
        return self.device if self.folder is None else torch.device("cpu")

    def rows(self, count: int) -> Tensor:
        """Zeros ``(count, n)``.

        Raises:
            OSError: If the disk has no room for them.
        """
        if self.folder is None or count == 0:
            return torch.zeros(count, self.n, dtype=self.dtype, device=self.home)
        size = count * self.n
        nbytes = size * self.dtype.itemsize
        handle, name = tempfile.mkstemp(prefix="vectors-", dir=self.folder)
        try:
            # Room is taken now: a disk that fills up under a mapped file would kill the process without a message.
            (os.posix_fallocate if hasattr(os, "posix_fallocate") else _truncate)(handle, 0, nbytes)
            return torch.from_file(name, shared=True, size=size, dtype=self.dtype).reshape(count, self.n)
        except OSError as error:
            raise OSError(
                error.errno, f"storage={str(self.folder)!r} has no room for {count} vectors, {nbytes / 2**30:.3g} GiB"
            ) from error
        finally:
            os.close(handle)
            with contextlib.suppress(OSError):  # some systems cannot unlink a mapped file
                os.unlink(name)


def _truncate(handle: int, start: int, nbytes: int) -> None:
    os.ftruncate(handle, start + nbytes)


def rotate(out: Tensor, rotation: Tensor, rows: Tensor) -> None:
    """``out[:] = rotation @ rows``, a few columns at a time; ``out`` may share the memory of ``rows``.

    Args:
        out: ``(m, n)``.
        rotation: ``(m, r)``.
        rows: ``(r, n)``.
    """
    for target, source in zip(out.split(_CHUNK, dim=1), rows.split(_CHUNK, dim=1), strict=True):
        target.copy_(rotation @ source)


def orthonormalize(rows: Tensor) -> None:
    """Make nearly orthonormal rows ``(m, n)`` orthonormal to rounding, in place, by a Cholesky factor of their Gram."""
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for columns in rows.split(_CHUNK, dim=1):
        part = columns.double()
        gram += part @ part.mT
    inverse = torch.linalg.solve_triangular(
        torch.linalg.cholesky(gram), torch.eye(len(rows), dtype=gram.dtype, device=gram.device), upper=False
    )
    rotate(rows, inverse.to(rows.dtype), rows)

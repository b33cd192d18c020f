"""Files in which a long computation keeps its state: whole or absent after a crash, and of one problem only."""

from __future__ import annotations

import hashlib
import os
import re
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from curvature.losses import BatchDim, Loss
from curvature.model.arguments import checked, real
from curvature.model.arguments import path as is_path
from curvature.model.parameters import Parameters
from curvature.model.wrappers import unwrapped
from solvers.files import write_whole
from solvers.outcome.memory import is_out_of_memory
from solvers.tree import pieces, plain

#: Names of an identity that files of version 0.1 do not have.
LATER = frozenset({"modules", "form", "order"})
#: Share of the running time that saving may take, at most.
_SHARE = 0.05


class CheckpointError(ValueError):
    """A file is not a checkpoint, or belongs to another problem; the message says what differs."""


def save(path: str | os.PathLike[str], state: Any) -> None:
    """Write a state to a file that is at any time either the old one or the new one, whole.

    The file carries a digest of all its bytes, which :func:`load` compares; ``torch.load`` reads it as well.

    Args:
        path: The file; its folder must exist.
        state: Nested dicts, lists and tuples of tensors, numbers, strings, booleans and ``None``.

    Raises:
        TypeError: If something else is in the state.
        OSError: If it cannot be written, the disk being full for instance; the old file is as it was.
    """
    for where, piece in pieces(state):
        plain(piece, where)
    write_whole(path, lambda file: _write_sealed(state, file))


def load(path: str | os.PathLike[str]) -> Any:
    """Read what :func:`save` wrote, on the CPU; where files can be mapped, large tensors are read as they are used.

    Nothing in the file is executed. A file that was changed, by a bit or by all of them, is refused.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged, or not a checkpoint.
    """
    try:
        with open(path, "rb") as file:
            if not _is_sealed(file):
                raise CheckpointError("its bytes are not those that were written")
            # Torch opens a path twice to map it, and by then another process may have given the name to a newer file.
            own = f"/proc/self/fd/{file.fileno()}"
            if os.path.exists(own):
                return torch.load(own, map_location="cpu", weights_only=True, mmap=True)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        why = f" ({error})" if isinstance(error, CheckpointError) else ""
        raise CheckpointError(
            f"{os.fspath(path)} is no checkpoint: it is damaged{why}, or was written by something else. Name another "
            "file, or remove it to start anew."
        ) from error


class _Hashed:
    """A file that is hashed while it is written; it keeps the error of the disk, which torch gives another name."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        """Write and hash."""
        self.sha256.update(content)
        try:
            return self.file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """The file is flushed by its owner."""


_SEAL = b"sha256="
_END_OF_ZIP = b"PK\5\6"  # 22 bytes, of which the last two are the length of the comment that follows


def _write_sealed(state: Any, file: BinaryIO) -> None:
    """Write a state as ``torch.save`` does, with the digest of all that as the comment of the archive."""
    hashed = _Hashed(file)
    try:
        torch.save(state, hashed)  # type: ignore[arg-type]
    except RuntimeError as error:
        if hashed.error is None:
            raise
        raise hashed.error from error
    seal = _SEAL + hashed.sha256.hexdigest().encode()
    file.seek(-2, os.SEEK_END)
    file.write(len(seal).to_bytes(2, "little") + seal)


def _is_sealed(file: BinaryIO) -> bool:
    """Whether a file has the digest that its seal says; older versions wrote none, but sums of every tensor."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1024))
    tail = file.read()
    end = tail.rfind(_END_OF_ZIP)
    seal = tail[end + 22 :]
    if end < 0 or int.from_bytes(tail[end + 20 : end + 22], "little") != len(seal):
        return False
    if not seal:
        return zipfile.ZipFile(file).testzip() is None
    hashed, left = hashlib.sha256(), size - len(seal) - 2
    file.seek(0)
    while left:
        chunk = file.read(min(left, 1 << 22))
        if not chunk:
            return False  # it was cut off while it was read
        hashed.update(chunk)
        left -= len(chunk)
    hashed.update(b"\0\0")
    return seal == _SEAL + hashed.hexdigest().encode()


class Checkpoint:
    """The file of one computation, to be taken up after a crash.

    >>> import tempfile
    >>> file = Checkpoint(Path(tempfile.mkdtemp()) / "run.pt", seconds=0).of({"k": 3})
    >>> file.load() is None, file.offer(lambda: {"step": 10}), file.load()
    (True, True, {'step': 10})

    Args:
        path: The file. Its folder must exist; the file need not.
        seconds: How often to save. Where saving takes long it is done less often: 5 % of the time at most.

    Raises:
        ValueError: If ``seconds`` is negative.
        FileNotFoundError: If there is no such folder.
    """

    @checked(path=is_path, seconds=real(low=0.0))
    def __init__(self, path: str | os.PathLike[str], seconds: float = 60.0) -> None:
        self.path, self.seconds = Path(path), seconds
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"{self.path} cannot be written: there is no folder {self.path.parent}.")
        self.identity: dict[str, Any] = {}
        self._next = time.monotonic() + seconds

    @classmethod
    def at(cls, place: Resume) -> Checkpoint:
        """A checkpoint as it is, or the one at a path with its default options."""
        return place if isinstance(place, Checkpoint) else cls(place)

    def of(self, identity: Mapping[str, Any]) -> Checkpoint:
        """The same file, for the computation that is described by these names and values.

        Args:
            identity: Strings, numbers and booleans that a later run must agree with, see :func:`problem_identity`.
        """
        other = Checkpoint(self.path, self.seconds)
        other.identity = dict(identity)
        return other

    def load(self) -> Any:
        """The state that was saved last; ``None`` if the file does not exist.

        Raises:
            CheckpointError: If the file is damaged or belongs to another computation.
        """
        if not self.path.exists():
            return None
        saved = load(self.path)
        if not (isinstance(saved, dict) and saved.keys() == {"identity", "state"}):
            raise CheckpointError(f"{self.path} is no checkpoint of a computation. Name another file.")
        known, asked = saved["identity"], self.identity
        names = [name for name in asked if name in known or name not in LATER]
        self.refuse({name: (known.get(name), asked[name]) for name in names})
        return saved["state"]

    def refuse(self, pairs: Mapping[str, tuple[Any, Any]]) -> None:
        """Raise if some pair (what the file has, what is asked for) is unequal.

        Raises:
            CheckpointError: Naming all differences.
        """
        different = [
            f"{name} ({_short(old)} there, {_short(new)} here)" for name, (old, new) in pairs.items() if old != new
        ]
        if different:
            raise CheckpointError(
                f"{self.path} belongs to another computation. Different are {', '.join(different)}. Name another file, "
                "or remove this one to start anew."
            )

    def save(self, state: Any) -> None:
        """Write a state at once."""
        start = time.monotonic()
        save(self.path, {"identity": self.identity, "state": state})
        end = time.monotonic()
        self._next = end + max(self.seconds, (end - start) / _SHARE) if self.seconds else end

    def offer(self, state: Callable[[], Any]) -> bool:
        """Save ``state()`` if it is time to; returns whether it was."""
        due = time.monotonic() >= self._next
        if due:
            self.save(state())
        return due


#: Where a computation is kept: a path, or a checkpoint with its options.
Resume = str | os.PathLike[str] | Checkpoint


def problem_identity(model: nn.Module, loss_fn: Any, params: Any = None, batch_dim: BatchDim = None) -> dict[str, Any]:
    """Names and values that tell one curvature problem from another before its data are seen.

    Args:
        model: The model; its parameters and buffers are hashed, which reads each of them once.
        loss_fn: The loss.
        params: Restriction of the parameters.
        batch_dim: Axis of the output that counts the examples, as the caller said.

    Returns:
        Strings: names and shapes of the parameters, hashes of all values, the loss, the modules with their options
        and modes.
    """
    parameters = params if isinstance(params, Parameters) else Parameters(model, params)
    shapes = ", ".join(f"{name} {tuple(p.shape)} {p.dtype}" for name, p in parameters.items())
    modes = "".join("t" if module.training else "e" for module in model.modules())
    return {
        "parameters": shapes,
        "values of the parameters": digest(p for p in model.parameters()),
        "buffers": digest(b for b in model.buffers()),
        "train mode": "all" if set(modes) == {"t"} else "none" if set(modes) == {"e"} else modes,
        "loss": _loss_name(loss_fn),
        "modules": digest([], re.sub(r" at 0x[0-9a-f]+", "", repr(unwrapped(model)))),
        **({} if batch_dim is None else {"batch_dim": repr(batch_dim)}),
    }


def digest(tensors: Iterable[Tensor], start: str = "") -> str:
    """Hash of the bytes, shapes and dtypes of tensors, and of ``start``: one that went before."""
    hashed = hashlib.sha256(start.encode())
    for tensor in tensors:
        plain = tensor.detach()
        hashed.update(f"{tuple(plain.shape)} {plain.dtype}".encode())
        if plain.numel():
            hashed.update(plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return hashed.hexdigest()[:16]


def _loss_name(loss_fn: Any) -> str:
    """The loss with its options; a function by its name."""
    if isinstance(loss_fn, Loss):
        return f"{type(loss_fn).__qualname__} of {_loss_name(loss_fn.loss_fn)}"
    if not isinstance(loss_fn, nn.Module):
        return str(getattr(loss_fn, "__qualname__", type(loss_fn).__qualname__))
    tensors = [*loss_fn.parameters(), *loss_fn.buffers()]
    parts = [_options(module) for module in loss_fn.modules()] + ([digest(tensors)] if tensors else [])
    return ", ".join(parts)


def _options(module: nn.Module) -> str:
    """A module's name and its options that are numbers or strings."""
    plain = {name: value for name, value in vars(module).items() if type(value) in (bool, int, float, str)}
    shown = [f"{name}={value!r}" for name, value in sorted(plain.items()) if name[0] != "_" and name != "training"]
    return f"{type(module).__qualname__}({', '.join(shown)})"


def _short(value: Any, most: int = 60) -> str:
    shown = repr(value)
    return shown if len(shown) <= most else f"{shown[: most // 2]} ... {shown[-most // 2 :]}"

"""Files that are at any time either the old one or the new one, whole."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

fcntl: Any
try:
    import fcntl
except ImportError:  # no such locks here: drafts of killed processes stay
    fcntl = None

_ENDING = ".draft"
_AGE = 60.0  # seconds; a draft is created a moment before it is locked


def write_whole(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a file that is at any time either the old one or the new one, whole.

    Everything goes to a draft in the same folder, to the disk, and then takes the name of the file. If anything fails
    (a full disk, an interrupt, a process that is killed), the old file is still there and the draft is not: it has no
    name while it is written (on Linux), or is removed. Each call has a draft of its own, so processes and threads that
    write one file at the same time leave the whole file of one of them. A symbolic link stays one, a file keeps its
    permissions, and what is no regular file (a pipe, ``/dev/stdout``) is written as it is.

    Args:
        path: The file; its folder must exist.
        write: Called with a binary file, open for writing.

    Raises:
        FileNotFoundError: If there is no such folder.
        PermissionError: If the old file must not be written.
        OSError: If the disk is full, or ``write`` raises it.
    """
    target = os.path.realpath(path)
    before = _status(target)
    if before is not None and not stat.S_ISREG(before.st_mode):
        with open(target, "wb") as special:
            write(special)
        return
    if before is not None and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "the file must not be written", os.fspath(path))
    folder, name = os.path.split(target)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{os.fspath(path)} cannot be written: there is no folder {folder}.")
    _remove_abandoned(folder, name)
    draft = os.path.join(folder, f"{_start(name)}{secrets.token_hex(6)}{_ENDING}")
    with contextlib.ExitStack() as stack:
        file, named = _open(folder, draft, stack)
        write(file)
        file.flush()
        if before is not None:
            _keep(file, before)
        os.fsync(file.fileno())
        if not named:
            _name(file, folder, draft, stack)
        os.replace(draft, target)
        _flush_folder(folder)  # the new name, too, has to reach the disk


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """The same for a text, in UTF-8."""
    content = text.encode()
    write_whole(path, lambda file: file.write(content))


def save_figure(figure: object, path: str | os.PathLike[str], **options: object) -> None:
    """The same for a figure of matplotlib; the suffix of the name says the format.

    Args:
        figure: A figure.
        path: The file.
        options: Further ones of ``savefig``.
    """
    kind = Path(path).suffix.removeprefix(".") or None
    write_whole(path, lambda file: figure.savefig(file, format=kind, **options))  # type: ignore[attr-defined]


def _open(folder: str, draft: str, stack: contextlib.ExitStack) -> tuple[BinaryIO, bool]:
    """An empty draft, and whether it has a name yet."""
    if hasattr(os, "O_TMPFILE") and os.path.isdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # not on this file system
            handle = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666)
            return _locked(_opened(handle, stack)), False
    handle = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
    stack.enter_context(_removed(draft))
    return _locked(_opened(handle, stack)), True


def _opened(handle: int, stack: contextlib.ExitStack) -> BinaryIO:
    return cast(BinaryIO, stack.enter_context(os.fdopen(handle, "w+b")))


def _locked(file: BinaryIO) -> BinaryIO:
    """The draft, with a lock that ends with the process and says that it lives."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def _name(file: BinaryIO, folder: str, draft: str, stack: contextlib.ExitStack) -> None:
    """Give a draft without a name one for the moment of its renaming: a link cannot replace a file."""
    stack.enter_context(_removed(draft))
    at = os.open(folder, os.O_RDONLY)
    try:
        # With a folder's handle, links are followed: /proc/self/fd/3 is one.
        os.link(f"/proc/self/fd/{file.fileno()}", os.path.basename(draft), dst_dir_fd=at)
    finally:
        os.close(at)


@contextlib.contextmanager
def _removed(draft: str) -> Iterator[None]:
    """Remove a draft that is still there at the end."""
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)


def _remove_abandoned(folder: str, name: str) -> None:
    """Remove the drafts of this file whose processes are gone."""
    if fcntl is None:
        return
    for entry in os.listdir(folder):
        if entry.startswith(_start(name)) and entry.endswith(_ENDING):
            draft = os.path.join(folder, entry)
            with contextlib.suppress(OSError), open(draft, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(file.fileno()).st_mtime > _AGE:
                    os.unlink(draft)


def _start(name: str) -> str:
    return f".{name[:64]}."  # names are limited to 255 bytes


def _status(target: str) -> os.stat_result | None:
    try:
        return os.stat(target)
    except FileNotFoundError:
        return None


def _keep(file: BinaryIO, before: os.stat_result) -> None:
    """Permissions, and the owner where we may."""
    if hasattr(os, "fchown"):
        with contextlib.suppress(OSError):
            os.fchown(file.fileno(), before.st_uid, before.st_gid)
    if hasattr(os, "fchmod"):
        os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))


def _flush_folder(folder: str) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

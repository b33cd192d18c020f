"""What happens to files when the disk is full, a process dies, bits flip, or two write at once?"""

from __future__ import annotations

import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvature
from curvature import Checkpoint, CheckpointError, Report
from curvature.cli import main
from curvature.estimation.checkpoint import load, save
from curvature.training.history import History
from solvers.files import save_figure, write_text, write_whole

pytestmark = pytest.mark.skipif(os.name != "posix", reason="files of another kind")
CE = nn.CrossEntropyLoss()
F64 = torch.float64


def model() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=F64))
    return made


def data() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, generator=g, dtype=F64), torch.randint(3, (n,), generator=g)) for n in (4, 3)]


@cache
def report() -> Report:
    found = curvature.report(model(), CE, data(), sections=("eigenvalues", "trace"), k=2, seed=0)
    assert isinstance(found, Report)
    return found


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


# Formats: how a file is made, and what is read from it.


def _sums(path: Path) -> bytes:
    return bits(curvature.fisher(model(), CE, data(), structure="kfac", resume=path).to_dense())


def _eigenpairs(path: Path) -> bytes:
    return bits(curvature.resumable_eigsh(curvature.ggn(model(), CE, data()), path, 2, rtol=1e-9).values)


def _stored_report(path: Path) -> bytes:
    found = curvature.report(model(), CE, data(), sections=("eigenvalues", "trace"), k=2, resume=path)
    return repr([found.eigenvalues, found.traces]).encode()  # type: ignore[union-attr]


def _influence(path: Path) -> bytes:
    """All files of the folder are the one beside it."""
    return bits(curvature.influence(model(), CE, data(), data()[0], store=path.with_suffix(".folder")).scores)


def _saved_report(path: Path) -> bytes:
    if not path.exists():
        report().save(path)
    read = Report.load(path)
    return repr([read.to_dict(), {m: bits(v) for m, v in read.eigenvectors.items()}]).encode()


@cache
def _fitted() -> Any:
    pytest.importorskip("laplace")
    from laplace import Laplace

    from curvature.laplace import GGNBackend

    la = Laplace(model(), "classification", "all", "kron", backend=GGNBackend)
    la.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()[0]), batch_size=4))
    return la


def _save_posterior(path: Path) -> None:
    fitted = _fitted()
    from curvature.laplace import save as save_posterior

    save_posterior(fitted, path)


def _posterior(path: Path) -> bytes:
    from curvature.laplace import load as load_posterior

    if not path.exists():
        _save_posterior(path)
    loaded = load_posterior(path, model())
    return bits(loaded(data()[0][0]))


FORMATS: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "sums": ("sums.pt", _sums),
    "eigenpairs": ("pairs.pt", _eigenpairs),
    "stored report": ("stored.pt", _stored_report),
    "report as pt": ("report.pt", _saved_report),
    "report as json": ("report.json", _saved_report),
    "posterior": ("la.safetensors", _posterior),
}


def made(name: str, folder: Path) -> tuple[Path, Callable[[Path], bytes], bytes]:
    """A file, how it is read, and what was read from it."""
    if name == "posterior":
        pytest.importorskip("laplace")
    file, read = FORMATS[name]
    path = folder / file
    read(path)
    return path, read, read(path)


def outcome(path: Path, read: Callable[[Path], bytes], right: bytes) -> str:
    try:
        return "right" if read(path) == right else "another number"
    except CheckpointError as error:
        message = str(error)
        assert str(path) in message and any(
            w in message for w in ("damaged", "no checkpoint", "something else", "holds")
        )
        return "refused"


FLIPS = 40


@pytest.mark.parametrize("name", FORMATS)
def test_a_flipped_bit_is_refused_or_harmless(name: str, tmp_path: Path) -> None:
    """Anywhere in the file: its numbers, its names, its tables of contents."""
    path, read, right = made(name, tmp_path)
    whole = path.read_bytes()
    draw = random.Random(0)
    ends = [*range(8), *range(len(whole) - 100, len(whole), 9)]
    found = []
    for at in [*ends, *(draw.randrange(len(whole)) for _ in range(FLIPS))]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        found.append(outcome(path, read, right))
        assert found[-1] != "another number", at
    path.write_bytes(whole)
    assert read(path) == right and found.count("refused") > 0.9 * len(found)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_was_cut_off_or_mixed_up_is_refused(name: str, tmp_path: Path) -> None:
    path, read, right = made(name, tmp_path)
    whole = path.read_bytes()
    half = len(whole) // 2
    cuts = [whole[: len(whole) * i // 12] for i in range(12)] + [whole[:-1], whole[1:], whole[:-2]]
    mixed = [whole[half:] + whole[:half], whole + b"x", b"nonsense", whole[::-1], whole + whole[8:]]
    zeros = [whole[:at] + bytes(64) + whole[at + 64 :] for at in range(0, len(whole) - 64, max(64, len(whole) // 8))]
    for content in [*cuts, *mixed, *zeros]:
        if content == whole:
            continue
        path.write_bytes(content)
        # What ends a text, or a line of it, is no content.
        assert outcome(path, read, right) == ("right" if content.strip() == whole.strip() else "refused")
    for other in FORMATS:  # a whole file, of another kind
        if other == name or Path(FORMATS[other][0]).suffix != path.suffix:
            continue
        (tmp_path / "other").mkdir(exist_ok=True)
        other_path, _, _ = made(other, tmp_path / "other")
        shutil.copy(other_path, path)
        try:
            assert read(path) == right
        except ValueError as error:  # CheckpointError, or of another kind of report
            assert "checkpoint" in str(error) or "another computation" in str(error) or "report" in str(error)
        other_path.unlink()


def test_a_flipped_bit_in_a_store_of_influences(tmp_path: Path) -> None:
    path = tmp_path / "x"
    right = _influence(path)
    folder, draw = path.with_suffix(".folder"), random.Random(0)
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        for _ in range(20):
            damaged = bytearray(whole)
            damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            file.write_bytes(damaged)
            if file.name == "curvature.pt":
                with pytest.raises(CheckpointError, match="damaged"):
                    load(file)
                continue
            with pytest.raises(CheckpointError, match="damaged"):
                _influence(path)
        file.write_bytes(whole)
    assert _influence(path) == right


class Bomb:
    """What a pickle runs when it is read carelessly."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("form", ["torch.save", "legacy", "pickle", "inside a state"])
def test_no_file_is_executed(name: str, form: str, tmp_path: Path) -> None:
    path, read, _ = made(name, tmp_path)
    mark = tmp_path / "executed"
    match form:
        case "pickle":
            path.write_bytes(pickle.dumps(Bomb(mark)))
        case "inside a state":
            torch.save({"identity": {}, "state": Bomb(mark), "report": Bomb(mark), "eigenvectors": {}}, path)
        case _:
            torch.save(Bomb(mark), path, _use_new_zipfile_serialization=form == "torch.save")
    with pytest.raises(CheckpointError):
        read(path)
    assert not mark.exists()
    with pytest.raises(CheckpointError):
        load(path)
    assert not mark.exists()


def test_the_command_line_executes_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the function that it is given."""
    problem, path, mark = tmp_path / "problem.py", tmp_path / "run.pt", tmp_path / "executed"
    problem.write_text("from tests.faults.test_files import CE, data, model\ndef make(): return model(), CE, data()\n")
    torch.save({"identity": {}, "state": Bomb(mark)}, path)
    for command in (["eigs", "-k", "1"], ["report", "--budget", "1"]):
        assert main([command[0], f"{problem}:make", *command[1:], "--resume", str(path)]) == 1
        assert "no checkpoint" in capsys.readouterr().err and not mark.exists()


# Whole or absent


def _figure() -> Any:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().plot(range(100))
    return figure


WRITERS: dict[str, Callable[[Path], object]] = {
    "state.pt": lambda p: save(p, {"x": torch.randn(5000)}),
    "report.html": lambda p: report().save(p),
    "report.json": lambda p: report().save(p),
    "report.pt": lambda p: report().save(p),
    "figure.png": lambda p: save_figure(_figure(), p),
    "figure.svg": lambda p: save_figure(_figure(), p),
    "sums.pt": lambda p: curvature.fisher(model(), CE, data(), structure="kfac", resume=p),
    "posterior.safetensors": _save_posterior,
    "text.txt": lambda p: write_text(p, "x" * 9000),
}


@pytest.fixture
def full_disk() -> Any:
    """No file may grow beyond 2000 bytes."""
    resource = pytest.importorskip("resource")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("room", [0, 100, 700])
def test_a_full_disk_leaves_the_old_file(name: str, room: int, tmp_path: Path, full_disk: Any) -> None:
    path = tmp_path / name
    if name != "sums.pt":
        path.write_bytes(b"old")
    full_disk(room)
    with pytest.raises(OSError, match="large"):
        WRITERS[name](path)
    full_disk(2**40)
    if name != "sums.pt":
        assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ([] if name == "sums.pt" else [name])


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "sums.pt"])
@pytest.mark.parametrize("moment", ["fsync", "link", "replace"])
def test_an_interrupt_leaves_the_old_file(
    name: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.write_bytes(b"old")

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, moment, interrupted)
    with pytest.raises(KeyboardInterrupt):
        WRITERS[name](path)
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == [name]
    WRITERS[name](path)
    assert path.read_bytes() != b"old" and [p.name for p in tmp_path.iterdir()] == [name]


KILLED = """
import os, signal, sys
from solvers.files import write_whole
def write(file):
    file.write(b"n" * 100_000)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "named":
    del os.O_TMPFILE
write_whole(sys.argv[1], write)
"""


@pytest.mark.parametrize("kind", ["unnamed", "named"])
def test_a_killed_process_leaves_the_old_file(kind: str, tmp_path: Path) -> None:
    if kind == "unnamed" and not hasattr(os, "O_TMPFILE"):
        pytest.skip("no files without a name here")
    path = tmp_path / "file"
    path.write_bytes(b"old")
    root = Path(__file__).resolve().parents[2]
    process = subprocess.run([sys.executable, "-c", KILLED, str(path), kind], cwd=root)
    assert process.returncode == -signal.SIGKILL and path.read_bytes() == b"old"
    drafts = [p for p in tmp_path.iterdir() if p != path]
    assert len(drafts) == (kind == "named")
    for draft in drafts:  # where a draft needs a name, the next one to write removes it
        os.utime(draft, (0, 0))
    write_text(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_links_permissions_and_special_files_stay(tmp_path: Path) -> None:
    real, link = tmp_path / "folder" / "real.json", tmp_path / "link.json"
    real.parent.mkdir()
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    write_text(link, "new")
    assert link.is_symlink() and real.read_text() == "new" and real.stat().st_mode & 0o777 == 0o640
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "fresh", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "fresh").stat().st_mode & 0o777 == 0o640
    write_text("/dev/null", "x")
    assert not Path("/dev/null").is_file()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(pipe.read_text)
        write_text(pipe, "through")
        assert got.result() == "through"
    write_text(tmp_path / ("n" * 250), "long names too")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_text(tmp_path / "gone" / "file", "x")
    with pytest.raises(IsADirectoryError):
        write_text(real.parent, "x")


def test_many_writers_leave_the_whole_file_of_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([65 + i]) * 50_000 for i in range(8)]

    def write(content: bytes) -> None:
        for _ in range(5):
            write_whole(path, lambda file: [file.write(content[at : at + 5000]) for at in range(0, 50_000, 5000)])

    stop, torn = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            if path.exists() and path.read_bytes() not in contents:
                torn.append(path.read_bytes()[:10])

    reader = threading.Thread(target=read)
    reader.start()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, contents))
    stop.set()
    reader.join()
    assert torn == [] and path.read_bytes() in contents and list(tmp_path.iterdir()) == [path]


TWICE = """
import sys, torch
from tests.faults.test_files import CE, data, model
import curvature
found = curvature.fisher(model(), CE, data() * 5, structure="ekfac", progress=False,
                         resume=curvature.Checkpoint(sys.argv[1], seconds=0))
print(found.to_dense().sum().item())
"""


def test_two_processes_on_one_file_give_the_same_number(tmp_path: Path) -> None:
    root, path = Path(__file__).resolve().parents[2], tmp_path / "run.pt"
    command = [sys.executable, "-c", TWICE, str(path)]
    running = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = [process.communicate()[0] for process in running]
    whole = curvature.fisher(model(), CE, data() * 5, structure="ekfac", progress=False)
    assert [float(number) for number in found] == pytest.approx([float(whole.to_dense().sum())] * 2, rel=1e-12)
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]
    load(path)


def test_a_file_that_is_replaced_while_it_is_read_is_read_whole(tmp_path: Path, monkeypatch: Any) -> None:
    """Torch opens a path twice to map it; between the two another process may give the name to a newer file."""
    old, new = {"a": torch.arange(50), "b": torch.ones(3)}, {"a": torch.zeros(9), "more": torch.zeros(700)}
    path, newer, plain = tmp_path / "run.pt", tmp_path / "newer.pt", torch.UntypedStorage.from_file
    save(path, old)
    save(newer, new)

    def replacing(*args: Any, **kwargs: Any) -> Any:
        newer.replace(path)
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", replacing)
    found = load(path)
    assert found.keys() == old.keys() and all(torch.equal(found[name], value) for name, value in old.items())
    monkeypatch.undo()
    assert load(path).keys() == new.keys()


def test_two_threads_on_one_file_give_the_same_number(tmp_path: Path) -> None:
    def run(_: int) -> bytes:
        keep = Checkpoint(tmp_path / "run.pt", seconds=0)
        return bits(curvature.fisher(model(), CE, data() * 3, structure="kfac", resume=keep).to_dense())

    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(run, range(8)))
    assert found == {bits(curvature.fisher(model(), CE, data() * 3, structure="kfac").to_dense())}
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]


def test_a_history_on_a_full_disk_keeps_its_rows(tmp_path: Path, full_disk: Any) -> None:
    path = tmp_path / "history.csv"
    history = History(path)
    for step in range(5):
        history.append({"step": step, "loss": 0.5})
    before = path.read_bytes()
    full_disk(len(before) + 2)
    with pytest.raises(OSError, match="large"):
        history.append({"step": 5, "loss": 0.25})
    full_disk(2**40)
    assert path.read_bytes() == before and len(history.rows) == 5
    history.append({"step": 5, "loss": 0.25})
    assert History(path).rows == history.rows and len(history.rows) == 6


def test_a_history_with_half_a_line_goes_on(tmp_path: Path) -> None:
    """A process killed while it wrote."""
    path = tmp_path / "history.csv"
    history = History(path)
    for step in range(3):
        history.append({"step": step, "loss": 0.5})
    path.write_bytes(path.read_bytes()[:-4])
    resumed = History(path)
    for step in (2, 3):
        resumed.append({"step": step, "loss": 0.25})
    assert [row["step"] for row in History(path).rows] == [0, 1, 2, 3]

"""The monitor: right numbers, at its times, and a training run that does not know of it."""

from __future__ import annotations

import copy
import csv
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian

import precond
from curvature import Monitor, NotOneLossWarning
from curvature.training.history import History

F64 = torch.float64
Run = tuple[nn.Module, list[tuple[Tensor, Tensor]]]


def run(seed: int = 0, batches: int = 2) -> Run:
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(F64)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=F64) / 2
    data = [
        (torch.randn(5 + i, 4, generator=g, dtype=F64), torch.randint(3, (5 + i,), generator=g)) for i in range(batches)
    ]
    return model, data


def dense(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and Hessian of the data as one batch, from torch.func."""
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def loss(theta: Tensor) -> Tensor:
        pieces = theta.split([shape.numel() for shape in shapes])
        given = {name: piece.reshape(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
        return nn.functional.cross_entropy(functional_call(model, given, x), y)

    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return loss(theta), grad(loss)(theta), hessian(loss)(theta)


def steps(
    model: nn.Module, data: list[tuple[Tensor, Tensor]], optimizer: Any, count: int, after: Callable[[int], Any]
) -> None:
    loss_fn = nn.CrossEntropyLoss()
    for step in range(count):
        x, y = data[step % len(data)]
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
        after(step)


# Numbers


@pytest.mark.parametrize("k", [1, 3])
def test_every_number_is_that_of_the_dense_matrix(k: int) -> None:
    model, data = run()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    monitor = Monitor(
        model, nn.CrossEntropyLoss(), data, every=4, k=k, rtol=1e-9, samples=20, optimizer=optimizer, max_fraction=None
    )
    expected: list[tuple[Tensor, Tensor, Tensor]] = []

    def after(step: int) -> None:
        row = monitor.step()
        assert (row is None) == bool(step % 4)
        if row is not None:
            expected.append(dense(model, data))

    steps(model, data, optimizer, 14, after)
    history = monitor.history
    assert history["step"] == [0, 4, 8, 12] and len({len(column) for column in history.values()}) == 1
    for i, (loss, gradient, matrix) in enumerate(expected):
        row = {name: column[i] for name, column in history.items()}
        values, vectors = torch.linalg.eigh(matrix)
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-12)
        assert row["gradient_norm"] == pytest.approx(gradient.norm().item(), rel=1e-12)
        assert row["sharpness"] == pytest.approx(values[-1].item(), rel=1e-12)
        assert row["stability"] == pytest.approx(0.3 * values[-1].item() / 2, rel=1e-12)
        for j in range(2, k + 1):
            assert row[f"eigenvalue_{j}"] == pytest.approx(values[-j].item(), rel=1e-12)
        share = (vectors[:, -k:].mT @ gradient).square().sum() / gradient.square().sum()
        assert row["alignment"] == pytest.approx(share.item(), rel=1e-6)
        assert row["converged"] == 1 and row["sharpness_residual"] <= 1e-9 * row["sharpness"]
        assert abs(row["trace"] - matrix.trace().item()) <= 4 * row["trace_stderr"]
        assert row["seconds"] > 0 and row["lr"] == 0.3
    assert "eigenvalue_4" not in history and "damping" not in history


def test_stability_is_that_of_the_optimizers_own_step() -> None:
    """Gradient descent with momentum, AdamW and K-FAC by their formulas; NaN for steps that are no linear map."""

    def adamw(model: nn.Module, optimizer: Any, H: Tensor) -> float:
        states = [optimizer.state[p] for p in model.parameters()]
        v = torch.cat([s["exp_avg_sq"].reshape(-1) for s in states])
        step = float(states[0]["step"]) + 1
        D = ((v / (1 - 0.99**step)).sqrt() + 1e-8) * (1 - 0.3**step)
        S = (0.03 * 0.7 / D).sqrt()
        return float(torch.linalg.eigvalsh(S[:, None] * H * S)[-1]) / (1.3 * (2 - 0.03 * 0.1))

    def sgd(model: nn.Module, optimizer: Any, H: Tensor) -> float:
        return 0.1 * float(torch.linalg.eigvalsh(H + 0.2 * torch.eye(len(H)).to(F64))[-1]) / (2 * 1.6)

    def kfac(model: nn.Module, optimizer: Any, H: Tensor) -> float:
        P = torch.block_diag(*(p.inverse.to_dense() for p in optimizer.preconditioners.values()))
        order = torch.cat([torch.arange(24).reshape(6, 4), torch.arange(24, 30)[:, None]], 1).reshape(-1)
        last = 30 + torch.cat([torch.arange(18).reshape(3, 6), torch.arange(18, 21)[:, None]], 1).reshape(-1)
        order = torch.cat([order, last])
        return float(torch.linalg.eigvals(0.05 * P @ H[order][:, order]).real.max()) / (2 * 1.9)

    for make, expected in (
        (lambda m: torch.optim.AdamW(m.parameters(), lr=0.03, betas=(0.3, 0.99), weight_decay=0.1), adamw),
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.6, weight_decay=0.2), sgd),
        (lambda m: precond.KFAC(m, nn.CrossEntropyLoss(), lr=0.05, momentum=0.9), kfac),
        (lambda m: precond.SOAP(m.parameters()), None),
    ):
        model, data = run()
        optimizer: Any = make(model)
        options: dict[str, Any] = {"quantities": "sharpness", "rtol": 1e-8, "every": 2, "max_fraction": None}
        monitor = Monitor(model, nn.CrossEntropyLoss(), data, optimizer=optimizer, **options)
        wanted = []

        def after(step: int, **_: Any) -> None:
            if monitor.step() is not None:  # noqa: B023
                H = dense(copy.deepcopy(model), data)[2]  # noqa: B023, without the hooks of the optimizer
                wanted.append(math.nan if expected is None else expected(model, optimizer, H))  # noqa: B023

        if expected is adamw:  # whose momentum builds up in the first steps
            steps(model, data, optimizer, 1, monitor.step)
            assert math.isnan(monitor.history["stability"][0])
        monitor.measure(0)  # before a step there is nothing to go by but gradient descent's rate
        assert math.isnan(monitor.history["stability"][0]) == (expected is not sgd)
        steps(model, data, optimizer, 5, after)
        assert monitor.history["stability"][-len(wanted) :] == pytest.approx(wanted, rel=1e-6, nan_ok=True)
        assert len(wanted) == 2


def test_ggn_and_exact_trace() -> None:
    model, data = run()
    row = Monitor(model, nn.CrossEntropyLoss(), data, matrix="ggn", samples=100, params="2.*", rtol=1e-9).measure()
    # The last layer is linear in its parameters, so its GGN is its Hessian.
    block = dense(model, data)[2][30:, 30:]
    assert row["sharpness"] == pytest.approx(torch.linalg.eigvalsh(block)[-1].item(), rel=1e-12)
    assert row["trace"] == pytest.approx(block.trace().item(), rel=1e-12) and row["trace_stderr"] == 0


def test_warm_starts_take_fewer_products() -> None:
    model, data = run()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    monitor = Monitor(
        model, nn.CrossEntropyLoss(), data, every=1, quantities=("sharpness",), max_fraction=None, rtol=1e-3
    )
    steps(model, data, optimizer, 5, monitor)
    products = monitor.history["products"]
    assert max(products[1:]) < products[0], products
    assert monitor.history["converged"] == [1] * 5


def test_a_new_largest_eigenvalue_is_not_missed() -> None:
    """Of a function whose Hessian is diagonal, so that no product leads from the old eigenvector to the new one."""

    class Quadratic(nn.Module):
        scale: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.ones(30, dtype=F64))
            self.register_buffer("scale", torch.linspace(1, 2, 30, dtype=F64))

        def forward(self, x: Tensor) -> Tensor:
            return (self.scale * self.p.square() * x).sum(-1)

    model = Quadratic()
    data = (torch.ones(1, 30, dtype=F64), torch.zeros(1, dtype=F64))

    def loss_fn(z: Tensor, y: Tensor) -> Tensor:
        return z.sum()

    monitor = Monitor(model, loss_fn, data, every=1, quantities=("sharpness",), max_fraction=None)
    first = monitor.step()
    model.scale[3] = 5.0
    second = monitor.step()
    assert first is not None and second is not None
    assert first["sharpness"] == pytest.approx(4, rel=1e-3) and second["sharpness"] == pytest.approx(10, rel=1e-3)


def test_what_has_not_converged_says_so() -> None:
    model, data = run()
    monitor = Monitor(model, nn.CrossEntropyLoss(), data, k=3, rtol=1e-12, max_products=8, quantities="sharpness")  # type: ignore[arg-type]
    row = monitor.measure()
    assert row["converged"] == 0 and row["sharpness_residual"] > 1e-12 * row["sharpness"]


@pytest.mark.parametrize("name", ["KFAC", "EKFAC"])
def test_spectra_of_the_factors(name: str) -> None:
    model, data = run()
    optimizer = getattr(precond, name)(model, nn.CrossEntropyLoss(), lr=0.01, damping=1e-2)
    monitor = Monitor(model, nn.CrossEntropyLoss(), data, every=3, optimizer=optimizer, max_fraction=None)
    steps(model, data, optimizer, 4, monitor)
    history = monitor.history
    assert set(optimizer.preconditioners) == {"0.weight+0.bias", "2.weight+2.bias"}
    for block, preconditioner in optimizer.preconditioners.items():
        values = torch.linalg.eigvalsh(preconditioner.estimator.operator().to_dense())
        damping = history["damping"][-1]
        assert damping == optimizer.param_groups[0]["damping"]
        low, high = values[0].clamp(min=0) + damping, values[-1] + damping
        assert history[f"{block}/trace"][-1] == pytest.approx(values.sum().item(), rel=1e-9)
        assert history[f"{block}/largest"][-1] == pytest.approx(values[-1].item(), rel=1e-9)
        assert history[f"{block}/condition"][-1] == pytest.approx((high / low).item(), rel=1e-9)


# Training does not notice


def trainable() -> Run:
    """With batches so small that K-FAC applies the inverse of the first layer to the rows of the gradient."""
    g = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.BatchNorm1d(20), nn.Dropout(0.2), nn.Linear(20, 3)).double()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=F64) / 4
    data = [(torch.randn(3, 24, generator=g, dtype=F64), torch.randint(3, (3,), generator=g)) for _ in range(3)]
    return model.train(), data


OPTIMIZERS: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    "SGD": lambda model, loss_fn: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "KFAC": lambda model, loss_fn: precond.KFAC(model, loss_fn, lr=0.02, damping=1e-2),
    "EKFAC empirical": lambda model, loss_fn: precond.EKFAC(model, loss_fn, lr=0.02, damping=1e-2, fisher="empirical"),
    "KFAC shadow": lambda model, loss_fn: precond.KFAC(
        model, loss_fn, lr=0.02, damping=1e-2, loop=precond.Loop(capture="shadow")
    ),
    "KBFGS": lambda model, loss_fn: precond.KBFGS(model, loss_fn, lr=0.01),
    "SOAP": lambda model, loss_fn: precond.SOAP(model.parameters(), lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("where", ["after the step", "before the step", "before backward", "before forward"])
def test_training_is_bit_identical(name: str, where: str) -> None:
    def train(monitored: bool) -> list[Tensor]:
        torch.manual_seed(5)
        model, data = trainable()
        loss_fn = nn.CrossEntropyLoss()
        optimizer = OPTIMIZERS[name](model, loss_fn)
        monitor = Monitor(model, loss_fn, data, every=2, optimizer=optimizer, max_fraction=None)

        def at(place: str) -> None:
            if monitored and place == where:
                before = [(m, m.training) for m in model.modules()]
                gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
                monitor.step()
                assert all(m.training == training for m, training in before)
                for p, g in zip(model.parameters(), gradients, strict=True):
                    assert (p.grad is None and g is None) or torch.equal(p.grad, g)  # type: ignore[arg-type]

        for step in range(6):
            x, y = data[step % 3]
            optimizer.zero_grad()
            at("before forward")
            loss = loss_fn(model(x), y)
            at("before backward")
            loss.backward()
            at("before the step")
            optimizer.step()
            at("after the step")
        assert not monitored or len(monitor.history["step"]) == 3
        return [*(t.clone() for t in model.state_dict().values()), torch.get_rng_state()]

    with torch.random.fork_rng():
        plain, watched = train(False), train(True)
    assert all(torch.equal(left, right) for left, right in zip(plain, watched, strict=True))


def test_modes_come_back_after_an_error() -> None:
    model, data = trainable()
    model[1].eval()  # type: ignore[index]
    before = [m.training for m in model.modules()]
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        Monitor(model, nn.CrossEntropyLoss(), [(x[:, :2], y) for x, y in data]).step()
    assert [m.training for m in model.modules()] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_diverged_run_goes_on() -> None:
    model, data = run()
    monitor = Monitor(model, nn.CrossEntropyLoss(), data, every=1, max_fraction=None)
    monitor.step()
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    monitor.step()
    assert math.isfinite(monitor.history["sharpness"][0]) and math.isnan(monitor.history["sharpness"][1])
    assert math.isnan(monitor.history["loss"][1]) and monitor.history["step"] == [0, 1]


def test_eval_mode_or_the_mode_of_training() -> None:
    model, data = trainable()
    x, y = data[0]
    with torch.random.fork_rng():
        row = Monitor(model, nn.CrossEntropyLoss(), data[0], quantities=()).measure()
        with pytest.warns(NotOneLossWarning, match="dropout is active in 3"):
            as_it_is = Monitor(model, nn.CrossEntropyLoss(), data[0], quantities=(), eval_mode=False).measure()
        model.eval()
        expected = nn.functional.cross_entropy(model(x), y).item()
    assert row["loss"] == pytest.approx(expected, rel=1e-12) and as_it_is["loss"] != pytest.approx(expected, rel=1e-3)


# When


def test_measurements_keep_to_their_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    model, data = run()
    monitor = Monitor(model, nn.CrossEntropyLoss(), data, every=10, quantities=(), max_fraction=0.125)
    plain = monitor._of_loss

    def slow() -> dict[str, float]:
        now[0] += 2.0
        return plain()

    monkeypatch.setattr(monitor, "_of_loss", slow)
    with pytest.warns(
        UserWarning, match=r"took 2 s, and 10 training steps 1.25 s: .* about every 128 steps in place of 10"
    ) as seen:
        for step in range(640):
            monitor.step(step)
            now[0] += 0.125
    assert len(seen) == 1, "it is said once"
    assert monitor.history["step"] == [0, 128, 256, 384, 512]
    assert monitor.history["seconds"] == [2.0] * 5
    unlimited = Monitor(model, nn.CrossEntropyLoss(), data, every=10, quantities=(), max_fraction=None)
    monkeypatch.setattr(unlimited, "_of_loss", slow)
    for step in range(30):
        unlimited.step(step)
    assert unlimited.history["step"] == [0, 10, 20]


def test_a_resumed_run_measures_as_the_uninterrupted_one(tmp_path: Path) -> None:
    def train(monitor: Monitor, model: nn.Module, data: Any, optimizer: Any, count: int) -> None:
        steps(model, data, optimizer, count, lambda step: monitor.step())

    def fresh(file: str) -> tuple[Monitor, nn.Module, Any, Any]:
        model, data = run()
        options: dict[str, Any] = {"every": 3, "csv": tmp_path / file, "max_fraction": None, "rtol": 1e-6}
        return (
            Monitor(model, nn.CrossEntropyLoss(), data, **options),
            model,
            data,
            torch.optim.SGD(model.parameters(), lr=0.1),
        )

    whole, model, data, optimizer = fresh("whole.csv")
    train(whole, model, data, optimizer, 12)
    first, model, data, optimizer = fresh("run.csv")
    train(first, model, data, optimizer, 6)
    saved = (first.state_dict(), {name: t.clone() for name, t in model.state_dict().items()})
    train(first, model, data, optimizer, 6)  # goes on beyond its checkpoint, and dies
    second, model, data, optimizer = fresh("run.csv")
    second.load_state_dict(saved[0])
    model.load_state_dict(saved[1])
    train(second, model, data, optimizer, 6)

    def lines(name: str) -> list[list[str]]:
        with open(tmp_path / name, newline="") as file:
            return [line[:1] + line[2:] for line in csv.reader(file)]  # all but the seconds

    assert lines("run.csv") == lines("whole.csv") and len(lines("run.csv")) == 5
    assert second.history["sharpness"] == whole.history["sharpness"]


# Where to


class Scalars:
    """What TensorBoard's writer looks like."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.seen.append((tag, scalar_value, global_step))


def test_writers_files_and_callbacks(tmp_path: Path) -> None:
    model, data = run()
    scalars = Scalars()
    rows: list[dict[str, float]] = []
    monitor = Monitor(
        model,
        nn.CrossEntropyLoss(),
        data,
        every=2,
        writer=scalars,
        callback=rows.append,
        csv=tmp_path / "run.csv",
        max_fraction=None,
    )
    for step in (100, 101, 102, 103):
        monitor(step)
    history = monitor.history
    assert history["step"] == [100, 102] and [row["step"] for row in rows] == [100, 102]
    assert rows[1] == {name: column[1] for name, column in history.items()}
    assert ("curvature/sharpness", history["sharpness"][1], 102) in scalars.seen
    assert len(scalars.seen) == 2 * (len(history) - 1)
    assert History(tmp_path / "run.csv").table() == history, "the file holds every bit"


def test_tensorboard(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard writes the events")
    model, data = run()
    with tensorboard.SummaryWriter(tmp_path) as writer:
        Monitor(model, nn.CrossEntropyLoss(), data, writer=writer).step()
    assert any(tmp_path.iterdir())


def test_history_files(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    history = History(path)
    history.append({"step": 0, "a": 0.1})
    history.append({"step": 1, "a": math.inf, "b/c, d": 1e-300})
    history.append({"step": 2, "b/c, d": 2.0})
    assert path.read_text().splitlines() == ['step,a,"b/c, d"', "0,0.1,", "1,inf,1e-300", "2,,2.0"]
    again = History(path)
    assert again.rows == history.rows and again.columns == ["step", "a", "b/c, d"]
    assert math.isnan(again.table()["a"][2])
    with open(path, "a") as file:
        file.write("3,0.")  # killed
    again = History(path)
    assert again.rows == history.rows
    again.append({"step": 1, "a": 3.0})
    assert History(path).rows == [{"step": 0, "a": 0.1}, {"step": 1, "a": 3.0}]
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.csv"]
    path.write_text("name,age\nx,3\n")
    with pytest.raises(ValueError, match="is no history: it has no column 'step'"):
        History(path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        History(tmp_path / "absent" / "run.csv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every is at least 1, not 0"),
        ({"k": 0}, "k is at least 1"),
        ({"max_fraction": 0}, "max_fraction is a finite number above 0"),
        ({"matrix": "fisher"}, "matrix is one of hessian, ggn"),
        (
            {"quantities": ("sharpnes",)},
            "each of quantities is one of sharpness, .*, not 'sharpnes'",
        ),
        ({"quantities": ("alignment",)}, "name both"),
        ({"quantities": ("factors",)}, "NoneType has none. Pass optimizer="),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    model, data = run()
    with pytest.raises(ValueError, match=message):
        Monitor(model, nn.CrossEntropyLoss(), data, **arguments)


def test_pictures() -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib draws")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from curvature import plots

    model, data = run()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    monitor = Monitor(model, nn.CrossEntropyLoss(), data, every=2, k=2, optimizer=optimizer, max_fraction=None)
    steps(model, data, optimizer, 7, monitor)
    history = monitor.history
    history["converged"][1] = 0
    try:
        ax: Any = plots.monitor(history)
        lines = {str(line.get_label()): line for line in ax.lines}
        assert list(lines["eigenvalue 1"].get_ydata()) == history["sharpness"]
        assert list(lines["eigenvalue 2"].get_ydata()) == history["eigenvalue_2"]
        assert list(lines["2 / learning rate"].get_ydata()) == [8.0] * 4
        hollow = [line for line in ax.lines if line.get_markerfacecolor() == "none"]
        assert [list(line.get_xdata()) for line in hollow] == [[2], [2]], "what has not converged"
        outline: Any = plots.monitor(monitor, quantity="trace").collections[0].get_paths()[0].vertices
        tops = [v + 2 * e for v, e in zip(history["trace"], history["trace_stderr"], strict=True)]
        assert outline[:, 1].max() == pytest.approx(max(tops))
        assert plots.monitor(monitor, quantity="loss", log=True).get_yscale() == "log"
        with pytest.raises(KeyError, match="the history has no 'flatness'; it has step, seconds"):
            plots.monitor(monitor, quantity="flatness")
    finally:
        plt.close("all")

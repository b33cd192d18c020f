"""Does a step dispatch no more than it needs, wait for the device a fixed number of times, and multiply in full?"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from precond import KFAC, Refresh, methods
from precond.layerwise.blocks import rows as rows_of_layers
from solvers.outcome import checks
from solvers.outcome.arguments import number
from tests.peak_memory import peak_of_tensors

ROOT = Path(__file__).resolve().parents[2]
METHODS = {method.name: method for method in methods()}
#: Operations by which the host gets a number of the device.
WAITS = ("aten._local_scalar_dense.default", "aten.is_nonzero.default", "aten.equal.default")


def callers() -> list[CodeType]:
    """The code of the functions that are running."""
    found, frame = [], sys._getframe(1)
    while frame is not None:
        found.append(frame.f_code)
        frame = frame.f_back  # type: ignore[assignment]
    return found


class Operations(TorchDispatchMode):
    """Counts what is dispatched, by name; not the checks of arguments, which read numbers of the processor alone."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name not in WAITS or number.__code__ not in callers():
            self.found[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def waits(self) -> int:
        return sum(self.found[name] for name in WAITS)


def network(depth: int, width: int = 5) -> nn.Sequential:
    """Hidden layers of one shape, between two others."""
    torch.manual_seed(0)
    hidden = [layer for _ in range(depth) for layer in (nn.Tanh(), nn.Linear(width, width))]
    return nn.Sequential(nn.Linear(4, width), *hidden, nn.Linear(width, 2)).double()


def made(name: str, model: nn.Module, **options: Any) -> Any:
    method = METHODS[name]
    given = (model, nn.MSELoss()) if method.needs == "layers" else (model.parameters(),)
    return method.cls(*given, lr=1e-3, **options)


def step(optimizer: Any, model: nn.Module, seed: int) -> Operations:
    """One step on a batch of its own; what ``step()`` alone dispatches."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(8, 2, generator=generator, dtype=torch.float64)
    optimizer.zero_grad()
    (optimizer.loss_fn if optimizer.needs == "layers" else nn.MSELoss())(model(x), y).backward()
    with Operations() as operations:
        optimizer.step()
    return operations


#: Waits for the device in a step, whatever the number of layers: the norm of the gradients, the look at the results,
#: and what single methods ask besides (the level of the loss, which is read three times on the processor; the checks of
#: all decompositions together). Steps in which a basis or root comes from ``torch.linalg.eigh`` or ``qr`` are left out,
#: since these wait by themselves.
BETWEEN_BASES = {
    "EKFAC": 7,
    "KFAC": 7,
    "KLShampoo": 2,
    "Muon": 2,
    "NaturalGradient": 7,
    "PSGD": 2,
    "SENG": 2,
    "SINGD": 3,
    "SMWNaturalGradient": 7,
    "SOAP": 2,
    "SPlus": 2,
    "Shampoo": 2,
    "TNT": 7,
}
#: Methods that still wait for each layer.
FOR_EACH_LAYER = {"GaLore", "KBFGS", "MFAC", "SOAPMuon"}  # the last has new bases in every step


@pytest.mark.parametrize("name", BETWEEN_BASES)
def test_no_layer_makes_a_step_wait_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "waits", lambda ok: True)  # as on a device; the processor reads checks as they come
    for depth in (1, 4):
        model = network(depth)
        optimizer = made(name, model)
        waits = [step(optimizer, model, seed).waits for seed in range(9)][2:]
        # Bases are spread over the steps; so are decompositions, and steps without any have one wait less.
        assert (min(waits) if name in ("EKFAC", "SENG") else sorted(waits)[-2]) == BETWEEN_BASES[name]


def test_every_method_with_a_plain_loop_is_looked_at() -> None:
    plain = {name for name, method in METHODS.items() if method.needs != "closure"}
    assert BETWEEN_BASES.keys() | FOR_EACH_LAYER == plain


@pytest.mark.parametrize("name", ["KFAC", "TNT"])
def test_a_refresh_of_all_blocks_waits_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "waits", lambda ok: True)  # as on a device
    for depth in (1, 4):
        model = network(depth)
        optimizer = made(name, model, inverse_update_period=Refresh(1, stagger=False), curvature_update_period=1)
        assert [step(optimizer, model, seed).waits for seed in range(5)][2:] == [7, 7, 7]


@pytest.mark.parametrize(("name", "most"), [("KFAC", 103), ("EKFAC", 123)])
def test_a_plain_step_dispatches_no_more_where_there_are_more_layers_of_a_shape(name: str, most: int) -> None:
    found = []
    for depth in (2, 6):
        model = network(depth)
        optimizer = made(
            name, model, curvature_update_period=9, inverse_update_period=Refresh(9, stagger=False), damping=1e-2
        )
        counts = [sum(step(optimizer, model, seed).found.values()) for seed in range(9)]
        found.append(min(counts[3:]))
    assert found[0] == pytest.approx(found[1], abs=1) and max(found) <= most


class Block(nn.Module):
    """Attention without heads, and a feed-forward layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        x = x + self.out((self.q(z) @ self.k(z).mT).softmax(-1) @ self.v(z))
        return x + self.down(torch.tanh(self.up(x)))


# A refresh of K-FAC renews blocks of one shape together; EKFAC decomposes each by itself.
@pytest.mark.parametrize(("name", "most", "refresh"), [("KFAC", 185, 1200), ("EKFAC", 225, 2850)])
def test_what_a_step_of_a_small_transformer_dispatches(name: str, most: int, refresh: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 8), *(Block(8) for _ in range(3)), nn.Linear(8, 7))
    period = {"curvature_update_period": 9, "inverse_update_period": Refresh(9, stagger=False)}
    optimizer: Any = METHODS[name].cls(model, nn.CrossEntropyLoss(), lr=1e-3, **period)
    x = torch.randint(7, (2, 5))
    counts = []
    for _ in range(19):
        optimizer.zero_grad()
        optimizer.loss_fn(model(x).flatten(0, 1), x.flatten()).backward()
        with Operations() as operations:
            optimizer.step()
        counts.append(sum(operations.found.values()))
    assert max(counts[12:18]) <= most and counts[18] <= refresh, counts[12:]


def products(model: nn.Module, rows: int, inputs: int) -> int:
    """Floating-point operations of the matrix products in a K-FAC step between two refreshes."""
    options: dict[str, Any] = {"momentum": 0.0, "kl_clip": None, "damping": 0.1, "curvature_update_period": 5}
    optimizer = KFAC(model, nn.MSELoss(), lr=1e-3, inverse_update_period=Refresh(5, stagger=False), **options)
    for _ in range(4):
        optimizer.zero_grad()
        z = model(torch.randn(rows, inputs))
        optimizer.loss_fn(z, torch.randn_like(z)).backward()
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
    return counter.get_total_flops()


def test_products_of_a_step_are_those_of_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_of_layers, "WORTH", 0)
    m, n, rows = 30, 40, 4
    assert products(nn.Linear(n, m, bias=False), 400, n) == 2 * (m * m * n + m * n * n)
    assert products(nn.Linear(n, m, bias=False), rows, n) == 2 * rows * (m * m + n * n + m * n)
    stacked = nn.Sequential(*(nn.Linear(20, 20, bias=False) for _ in range(3)))
    assert products(stacked, 400, 20) == 3 * 2 * 2 * 20**3


class Precisions(TorchDispatchMode):
    """Notes the precision of every product that our code takes beside the passes of the model."""

    ours = tuple(str(ROOT / folder) for folder in ("curvature/structures", "precond", "solvers"))
    #: Takes products in new memory for others, so that these decide: gradients are formed again as the user's were.
    pages = str(ROOT / "solvers/pages.py")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        files = [code.co_filename for code in callers() if code.co_filename != self.pages]
        inside = any(file.startswith(self.ours) for file in files)
        if func._opname in ("mm", "bmm", "addmm", "baddbmm", "mv") and inside:
            self.found[torch.backends.mkldnn.matmul.fp32_precision] += 1  # type: ignore[attr-defined]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", sorted(BETWEEN_BASES.keys() | FOR_EACH_LAYER))
def test_products_are_full_whatever_the_process_has_asked_for(name: str) -> None:
    model = network(2).float()
    options: dict[str, Any] = {"GaLore": {"rank": 2}, "MFAC": {"window": 4}}
    optimizer = made(name, model, **options.get(name, {}))
    torch.set_float32_matmul_precision("medium")
    try:
        for _ in range(3):
            optimizer.zero_grad()
            with Precisions() as precisions:
                z = model(torch.randn(8, 4))
                (optimizer.loss_fn if optimizer.needs == "layers" else nn.MSELoss())(z, torch.randn(8, 2)).backward()
                optimizer.step()
            assert precisions.found.keys() == {"ieee"}
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_directions_make_room_for_the_values_that_follow_from_them() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(200, 200, bias=False), nn.Tanh())]
    model, loss_fn, x = nn.Sequential(*layers), nn.MSELoss(), torch.randn(256, 200)
    optimizer = KFAC(model, loss_fn, momentum=0.9, curvature_update_period=100, inverse_update_period=100)
    peaks = []
    for _ in range(3):
        optimizer.zero_grad()
        loss_fn(model(x), x).backward()
        peaks.append(peak_of_tensors(optimizer.step))
    # A new momentum and new values for all, and what one layer needs.
    assert peaks[-1] < 2.5 * sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_sums_of_accumulated_passes_take_no_more_room_than_two(parts: int) -> None:
    torch.manual_seed(0)
    model, loss_fn, x, y = nn.Linear(8, 1000), nn.CrossEntropyLoss(), torch.randn(8, 8), torch.randint(1000, (8,))
    optimizer = KFAC(model, loss_fn, inverse_update_period=100)

    def accumulate() -> None:
        for _ in range(parts):
            (loss_fn(model(x), y) / parts).backward()

    accumulate()
    optimizer.step()
    optimizer.zero_grad()
    # A gradient may be taken back as long as its pass was not the only one.
    assert peak_of_tensors(accumulate) < (1.2 if parts == 1 else 2.2) * 1000**2 * 4

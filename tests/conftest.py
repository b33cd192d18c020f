"""What every test relies on: seeded randomness, one thread or ``OMP_NUM_THREADS``, settings of torch as they were."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch

# One thread makes sums, and so results, independent of the machine; a run of the suite repeats the one before it.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no accelerator."""
    if torch.accelerator.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


# name: (read, write)
_GLOBAL_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (torch.get_default_device, torch.set_default_device),
    "number of threads": (torch.get_num_threads, torch.set_num_threads),
    "grad mode": (torch.is_grad_enabled, lambda value: torch._C._set_grad_enabled(value)),
    "deterministic algorithms": (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    "cudnn.deterministic": (
        lambda: torch.backends.cudnn.deterministic,
        lambda value: setattr(torch.backends.cudnn, "deterministic", value),
    ),
    "cudnn.benchmark": (
        lambda: torch.backends.cudnn.benchmark,
        lambda value: setattr(torch.backends.cudnn, "benchmark", value),
    ),
}


@pytest.fixture(autouse=True)
def _global_settings_stay() -> Iterator[None]:
    """Fail a test that leaves one of torch's global settings changed, and mend it for the next one."""
    before = {name: read() for name, (read, _) in _GLOBAL_SETTINGS.items()}
    yield
    changed = []
    for name, (read, write) in _GLOBAL_SETTINGS.items():
        if (value := read()) != before[name]:
            changed.append(f"{name}: {before[name]} -> {value}")
            write(before[name])
    if changed:
        pytest.fail(f"the test left torch's global settings changed ({'; '.join(changed)})")


@pytest.fixture
def generator() -> torch.Generator:
    """A generator on the CPU with a fixed seed."""
    return torch.Generator().manual_seed(0)

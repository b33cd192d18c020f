"""Do two processes under DistributedDataParallel train, and stay equal where their statistics are?"""

from __future__ import annotations

import os
import socket
import traceback
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from precond import EKFAC, KFAC
from tests.curvature.loops import batch, mlp

pytestmark = pytest.mark.distributed

METHODS: dict[str, Any] = {"kfac": KFAC, "ekfac": EKFAC}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return int(s.getsockname()[1])


def worker(rank: int, port: int, results: Any) -> None:
    """Each method twice: with the same data on both ranks, and with one half each."""
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        for method in METHODS:
            for same in (True, False):
                rows = slice(None) if same else slice(8 * rank, 8 * rank + 8)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    losses, params = train(nn.parallel.DistributedDataParallel(mlp()), method, rows)
                messages = [str(w.message) for w in caught]
                results.put(((method, rank, same), losses, [p.tolist() for p in params], messages))
    except Exception:
        results.put((None, traceback.format_exc(), None, None))
        raise
    finally:
        dist.destroy_process_group()


def train(model: nn.Module, method: str, rows: slice) -> tuple[list[float], list[Tensor]]:
    """Five steps. The Fisher is exact, since draws differ from rank to rank on purpose."""
    loss_fn = nn.CrossEntropyLoss()
    optimizer = METHODS[method](model, loss_fn, lr=0.1, fisher="exact", kl_clip=0.01)
    x, y = batch(16)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = loss_fn(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach().clone() for p in model.parameters()]


def test_two_processes_train_and_stay_equal_where_their_data_are() -> None:
    context, port = mp.get_context("spawn"), free_port()
    results = context.Queue()
    processes = [context.Process(target=worker, args=(rank, port, results)) for rank in (0, 1)]
    for process in processes:
        process.start()
    runs = {}
    for _ in range(4 * len(METHODS)):
        key, losses, params, messages = results.get(timeout=120)
        assert key is not None, losses
        assert losses[-1] < losses[0]
        assert sum("their parameters drift apart" in message for message in messages) == 1
        runs[key] = [torch.tensor(p, dtype=torch.float64) for p in params]
    for process in processes:
        process.join(30)
    for method in METHODS:
        alone = train(mlp(), method, slice(None))[1]
        assert difference(runs[method, 0, True], runs[method, 1, True]) == 0
        assert difference(runs[method, 0, True], alone) < 1e-12


def difference(left: list[Tensor], right: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))

"""Does what one thread computes depend on what another one does?"""

from __future__ import annotations

import copy
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import curvature
import solvers
from curvature.model.streams import own_stream, random_state
from curvature.model.wrappers import plain_checkpoints
from precond import EKFAC, KFAC, SOAP, Shampoo

F64 = torch.float64
CE = nn.CrossEntropyLoss()

pytestmark = pytest.mark.filterwarnings("ignore:not one loss")  # some of the models drop out on purpose


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    with torch.random.fork_rng():
        yield
    sys.setswitchinterval(before)


class Attention(nn.Module):
    """Everything that has a switch of the process: attention, dropout, recurrence, encoder layers, weight norm."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(6, 2, 8, dropout, batch_first=True)
        self.recurrent = nn.GRU(6, 4, batch_first=True)
        self.out = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        h = self.recurrent(self.encoder(x))[0].mean(1)
        return self.out(F.dropout(h, self.dropout, self.training))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def made(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 2)
    return model


def batches(*shape: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, *shape, generator=g), torch.randint(3, (n,), generator=g)) for n in (4, 3)]


def trained(optimizer: Any, model: nn.Module, data: Any, steps: int = 4) -> Tensor:
    for step in range(steps):
        x, y = data[step % len(data)]
        optimizer.zero_grad()
        CE(model(x), y).backward()
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def ones(op: solvers.LinearOperator) -> Tensor:
    return op @ torch.ones(op.shape[1], dtype=op.dtype)


def seen(found: curvature.Report) -> Tensor:
    pairs = [pair.value for m in found.eigenvalues for pair in found.eigenvalues[m].largest]
    return torch.tensor([*pairs, *(t.trace.value for t in found.traces.values())])


#: Name -> makes a model and a function of it.
JOBS: dict[str, Callable[[int], tuple[nn.Module, Callable[[nn.Module], Tensor]]]] = {
    "hessian": lambda s: (Attention(), lambda m: ones(curvature.hessian(m, CE, batches(5, 6, seed=s)))),
    "hessian with dropout": lambda s: (Attention(0.3), lambda m: ones(curvature.hessian(m, CE, batches(5, 6, seed=s)))),
    "ggn": lambda s: (Attention(0.3), lambda m: ones(curvature.ggn(m, CE, batches(5, 6, seed=s)))),
    "fisher": lambda s: (mlp(), lambda m: ones(curvature.fisher(m, CE, batches(4, seed=s), structure="ekfac"))),
    "layer": lambda s: (mlp(), lambda m: ones(curvature.ggn(m, CE, batches(4, seed=s), structure="layer"))),
    "jacobian": lambda s: (
        Attention(0.3),
        lambda m: ones(curvature.jacobian(m, batches(5, 6, seed=s)[0][0])).flatten(),
    ),
    "report": lambda s: (
        mlp(),
        lambda m: seen(curvature.report(m, CE, batches(4, seed=s), sections=("eigenvalues", "trace"), k=2)),
    ),
    "shuffling loader": lambda s: (
        mlp(),
        lambda m: ones(
            curvature.ggn(
                m, CE, DataLoader(TensorDataset(*batches(4, seed=s)[0]), batch_size=2, shuffle=True), structure="kfac"
            )
        ),
    ),
    "KFAC": lambda s: (mlp(), lambda m: trained(KFAC(m, CE, lr=0.1), m, batches(4, seed=s))),
    "EKFAC": lambda s: (Attention(), lambda m: trained(EKFAC(m, CE, lr=0.01), m, batches(5, 6, seed=s))),
    "SOAP": lambda s: (mlp(), lambda m: trained(SOAP(m.parameters(), lr=0.01), m, batches(4, seed=s))),
    "Shampoo": lambda s: (mlp(), lambda m: trained(Shampoo(m.parameters(), lr=0.01), m, batches(4, seed=s))),
}


def run(name: str, seed: int) -> Tensor:
    model, use = JOBS[name](seed)
    return use(made(model, seed))


def prepared(name: str, seed: int) -> Callable[[], Tensor]:
    """The job with its model made here: making one draws from the stream of the process."""
    model, use = JOBS[name](seed)
    made(model, seed)
    return lambda: use(copy.deepcopy(model))


def test_all_jobs_at_once_give_what_each_gives_alone() -> None:
    names = [(name, seed) for seed in range(2) for name in JOBS]
    jobs = [prepared(name, seed) for name, seed in names]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    alone = []
    for job in jobs:
        alone.append(job())
        assert torch.equal(torch.get_rng_state(), state)
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda job: job(), jobs))
    assert torch.equal(torch.get_rng_state(), state), "the stream of the process stays where it is"
    different = [n for n, a, b in zip(names, alone, together, strict=True) if not torch.equal(a, b)]
    assert different == []


@pytest.mark.parametrize("name", ["hessian with dropout", "fisher", "report", "jacobian", "KFAC", "SOAP"])
def test_a_training_loop_in_another_thread_draws_its_own_numbers(name: str) -> None:
    """Its dropout, its fused attention, its warnings: as if nothing else ran."""
    model = made(Attention(0.3), 7)
    job, data = prepared(name, 0), batches(5, 6, seed=1)

    def train() -> Tensor:
        own = copy.deepcopy(model)
        return trained(torch.optim.SGD(own.parameters(), lr=0.1), own, data, 12)

    torch.manual_seed(3)
    expected = train()
    torch.manual_seed(3)
    job()  # and alone, before the loop
    assert torch.equal(train(), expected)
    torch.manual_seed(3)
    filters, flags = list(warnings.filters), torch.backends.cuda.flash_sdp_enabled()
    stop = threading.Event()

    def again() -> None:
        while not stop.is_set():
            job()

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(again)
        found = train()
        stop.set()
        running.result()
    assert torch.equal(found, expected)
    assert list(warnings.filters) == filters and torch.backends.cuda.flash_sdp_enabled() == flags


DRAWS: dict[str, Callable[[], Any]] = {
    "dropout": lambda: F.dropout(torch.ones(9), 0.4),
    "alpha dropout": lambda: F.alpha_dropout(torch.ones(9), 0.4, True),
    "rrelu": lambda: F.rrelu(-torch.ones(9), training=True),
    "gumbel": lambda: F.gumbel_softmax(torch.ones(9)),
    "attention": lambda: F.scaled_dot_product_attention(*[torch.ones(1, 3, 4)] * 3, dropout_p=0.4),
    "rand": lambda: torch.rand(4),
    "rand_like": lambda: torch.rand_like(torch.ones(4)),
    "randn_like": lambda: torch.randn_like(torch.ones(4)),
    "randint": lambda: torch.randint(2, 9, (4,)),
    "randint of one bound": lambda: torch.randint(9, (4,)),
    "randint_like": lambda: torch.randint_like(torch.ones(4), 9),
    "randint_like of two bounds": lambda: torch.randint_like(torch.ones(4), 2, 9),
    "randperm": lambda: torch.randperm(7),
    "normal": lambda: torch.normal(torch.zeros(3), torch.ones(3)),
    "multinomial": lambda: torch.multinomial(torch.ones(6), 3),
    "poisson": lambda: torch.poisson(torch.ones(5)),
    "binomial": lambda: torch.binomial(torch.full((4,), 5.0), torch.full((4,), 0.5)),
    "in place": lambda: (torch.empty(4).uniform_(), torch.empty(4).exponential_(), torch.empty(3).log_normal_()),
    "fractional pooling": lambda: F.fractional_max_pool2d(torch.rand(1, 1, 6, 6), 2, output_size=3),
    "distribution": lambda: torch.distributions.Gamma(2.0, 1.0).sample((4,)),
    "recurrence": lambda: nn.LSTM(3, 4, 2, dropout=0.5)(torch.ones(2, 3, 3))[0],
    "vmap": lambda: torch.func.vmap(lambda x: F.dropout(x, 0.4), randomness="different")(torch.ones(3, 4)),
}


@pytest.mark.parametrize("name", DRAWS)
def test_every_draw_beside_other_threads_is_the_one_alone(name: str) -> None:
    """The numbers of the process's stream, from a stream of one's own."""
    model, cpu = nn.Identity(), torch.device("cpu")
    states = [torch.Generator().manual_seed(5).get_state()]
    draw = DRAWS[name]

    def drawn() -> list[Any]:
        with own_stream(model, cpu, states):
            return [draw(), draw(), random_state(cpu)[0]]

    alone = drawn()
    before = torch.get_rng_state()
    stop = threading.Event()
    other = threading.Thread(target=stop.wait)
    other.start()
    beside = drawn()
    stop.set()
    other.join()
    torch.testing.assert_close(beside, alone, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before)


class Checkpointed(nn.Module):
    def __init__(self, dropout: float, reentrant: bool = False) -> None:
        super().__init__()
        self.inner, self.out = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(dropout)), nn.Linear(5, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.out(checkpoint.checkpoint(self.inner, x, use_reentrant=self.reentrant))


def test_draws_inside_a_checkpoint_are_exact_or_refused() -> None:
    """A checkpoint is computed again with numbers of the process, which other threads move."""
    dropping, plain = made(Checkpointed(0.5), 0), made(Checkpointed(0.0), 0)
    drawn, calm = (ones(curvature.ggn(m, CE, batches(4)[0])) for m in (dropping, plain))
    assert not torch.equal(drawn, calm)
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(lambda: ones(curvature.ggn(plain, CE, batches(4)[0]))).result(), calm)
        with pytest.raises(RuntimeError, match=r"dropout.*inside an activation checkpoint.*model.eval\(\)"):
            pool.submit(lambda: ones(curvature.ggn(dropping, CE, batches(4)[0]))).result()


def test_checkpoints_of_another_thread_stay_checkpoints() -> None:
    model, x = made(Checkpointed(0.0, reentrant=True), 0), batches(4)[0][0].requires_grad_()
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with plain_checkpoints():
            entered.set()
            leave.wait()

    other = threading.Thread(target=hold)
    other.start()
    entered.wait()
    names = [node.name() for node, _ in model(x).grad_fn.next_functions if node is not None]  # type: ignore[union-attr]
    with plain_checkpoints():
        inside = [node.name() for node, _ in model(x).grad_fn.next_functions if node is not None]  # type: ignore[union-attr]
    leave.set()
    other.join()
    assert "CheckpointFunctionBackward" in names and "CheckpointFunctionBackward" not in inside
    assert "apply" not in vars(checkpoint.CheckpointFunction)

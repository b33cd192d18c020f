"""Does the first use in a new process load torch's compiler, which takes seconds and is needed by nothing here?"""

from __future__ import annotations

import subprocess
import sys

SCRIPT = '''
import sys
import torch
from torch import nn
import curvature, precond

model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
x, y, loss_fn = torch.randn(5, 4), torch.randint(2, (5,)), nn.CrossEntropyLoss()
parameters = list(model.parameters())

# What torch loads for a second derivative by hand is not ours.
gradient = torch.autograd.grad(loss_fn(model(x), y), parameters, create_graph=True)
torch.autograd.grad(gradient, parameters, [torch.ones(3, *g.shape) for g in gradient], is_grads_batched=True)
assert "torch._dynamo" not in sys.modules, "torch loads its compiler by itself: this test shows nothing"

def unloaded(what):
    assert "torch._dynamo" not in sys.modules, what

def others():
    """Modules that are not ours, which are loaded when they are first used."""
    return {name for name in sys.modules if name.split(".")[0] not in ("solvers", "curvature", "precond")}

before = others()
for matrix in (curvature.hessian, curvature.ggn, curvature.fisher):
    operator = matrix(model, loss_fn, (x, y))
    operator @ torch.ones(operator.shape[1])
    operator.to_dense()
    unloaded(matrix.__name__)
for structure in ("kfac", "ekfac", "layer", "diagonal", "dense"):
    curvature.ggn(model, loss_fn, [(x, y)], structure=structure)
    unloaded(structure)
curvature.jacobian(model, x, mode="forward") @ torch.ones(operator.shape[1])
unloaded("jacobian")
assert len(others() - before) < 50, sorted(others() - before)
curvature.report(model, loss_fn, [(x, y)], budget=1, progress=False)
unloaded("report")

# Every optimizer of torch's loads the compiler when it is made; a step of ours adds nothing to that.
torch.optim.SGD(parameters, lr=0.1)
before = others()
closure = lambda: loss_fn(model(x), y)
for optimizer in (precond.KFAC(model, loss_fn, lr=0.1), precond.SOAP(parameters, lr=0.1)):
    closure().backward()
    optimizer.step()
for optimizer in (precond.Sophia(parameters), precond.HessianFree(model, loss_fn)):
    optimizer.step(closure)
assert len(others() - before) < 50, sorted(others() - before)
print("done")
'''


def test_nothing_wakes_the_compiler() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.strip() == "done", done.stderr[-2000:]

"""Whether recorded uses explain a parameter's gradient: against the sum of the gradients of the uses, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from curvature.layers.explained import Explained, nodes_of_call, now
from curvature.layers.recorder import tensors_in

USES = {
    *(F.linear, F.embedding, F.layer_norm, F.batch_norm, F.group_norm, torch.conv1d, torch.conv2d, torch.addmm),
    *(Tensor.add, Tensor.add_, Tensor.mul, Tensor.__radd__, Tensor.expand, torch.bilinear, torch.prelu, torch.matmul),
}
VIEWS = {Tensor.t, Tensor.T.__get__, Tensor.chunk, Tensor.__getitem__, Tensor.view, Tensor.unbind, torch.chunk}


class Uses(TorchFunctionMode):
    """Records uses of parameters, and of views of them, with what is needed to repeat each on its own."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.explained = Explained()
        self.tracked = {id(p): p for p in parameters.values()}
        self.keep: list[Tensor] = []
        self.uses: list[tuple[Any, Any, Any, Any, list[Tensor]]] = []
        self.off = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, since = kwargs or {}, now()
        own = [t for t in tensors_in((args, kwargs)) if id(t) in self.tracked]
        before = _repeatable((args, kwargs), own) if own and func in USES else None
        output = func(*args, **kwargs)
        if not own or not torch.is_grad_enabled():
            return output
        results = [t for t in tensors_in(output) if t.requires_grad]
        if before is not None and results:
            self.explained.add_use(results[0], since)
            base = results[0]._base  # of a view that is changed in place only the base stays in the graph
            whole = base is not None and base.requires_grad and base.numel() == results[0].numel()
            edge = torch.autograd.graph.get_gradient_edge(base if whole else results[0])  # type: ignore[arg-type]
            self.uses.append((func, *before, edge, torch.is_autocast_enabled("cpu")))  # type: ignore[arg-type]
        elif func in VIEWS:
            for result in results:
                self.explained.add_view(result, since)
                self.tracked[id(result)] = result
        return output

    def sums(self, outputs: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum over the uses of each parameter's gradient through this use alone."""
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        edges = [edge for *_, edge, _ in self.uses]
        arrived = torch.autograd.grad(outputs, edges, retain_graph=True, allow_unused=True) if edges else ()
        for (func, args, kwargs, _, cast), g in zip(self.uses, arrived, strict=True):
            if g is None:
                continue
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):  # type: ignore[arg-type]
                again = func(*args, **kwargs)
            grads = torch.autograd.grad(again, [*parameters.values()], g.reshape(again.shape), allow_unused=True)
            for name, part in zip(parameters, grads, strict=True):
                total[name] += 0 if part is None else part
        return total


def _repeatable(tree: Any, own: list[Tensor]) -> Any:
    """Arguments with copies in place of tensors, but for those that lead to parameters."""
    if isinstance(tree, Tensor):
        return tree if any(tree is t for t in own) else tree.detach().clone()
    if isinstance(tree, (tuple, list)):
        return type(tree)(_repeatable(item, own) for item in tree)
    return {k: _repeatable(v, own) for k, v in tree.items()} if isinstance(tree, dict) else tree


class Kernel(torch.autograd.Function):
    """``x @ w.T``, unseen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return grads[0] @ w, grads[0].flatten(0, -2).T @ x.flatten(0, -2)


def unseen(f: Callable[..., Tensor], *args: Any) -> Tensor:
    """A call that function modes do not see, though it is made of ordinary nodes."""
    with torch._C.DisableTorchFunction():
        return f(*args)


class Model(nn.Module):
    """Two layers, a table, a bias and a gate, put together by a function."""

    def __init__(self, f: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.table, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
        self.bias, self.gate = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(1))
        self.packed = nn.Parameter(torch.randn(8, 4))
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)


def _in_place(m: Any, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(x).mul_(2), inplace=True))


def _part_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y[:, 0] = 0.0
    return m.b(y)


def _added_in_place(m: Any, x: Tensor) -> Tensor:
    y = x * 2
    y += m.bias
    return m.a(y)


def _packed(m: Any, x: Tensor) -> Tensor:
    q, k = m.packed.chunk(2)
    return F.linear(F.linear(x, q), k)


def _packed_and_kernel(m: Any, x: Tensor) -> Tensor:
    q, k = m.packed.chunk(2)
    return F.linear(x, q) + Kernel.apply(x, k)


def _nested_views(m: Any, x: Tensor) -> Tensor:
    return torch.matmul(x, m.packed[:4].t()) + F.linear(x, m.packed.view(2, 4, 4)[1])


def _cast(f: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def inside(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return f(m, x.float()).double()

    return inside


def _checkpointed(f: Callable[..., Tensor]) -> Callable[[Any, Tensor], Tensor]:
    def again(m: Any, x: Tensor) -> Tensor:
        def inside(x: Tensor) -> Tensor:
            return f(m, x)

        return checkpoint(inside, x, use_reentrant=False)  # type: ignore[no-any-return]

    return again


EXPLAINED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "two layers": lambda m, x: m.b(F.relu(m.a(x))),
    "no input gradient": lambda m, x: m.a(x),
    "sequences": lambda m, x: m.b(m.a(x[:, None].expand(-1, 3, -1)).relu()).sum(1),
    "in place": _in_place,
    "part in place": _part_in_place,
    "in place on a view": lambda m, x: m.b(m.a(x[:, None]).relu_()).sum(1),
    "added in place": _added_in_place,
    "twice in one pass": lambda m, x: m.a(m.a(x).tanh()),
    "tied table": lambda m, x: F.linear(m.table((x[:, 0] > 0).long()), m.table.weight),
    "bias": lambda m, x: m.a(x) + m.bias,
    "bias from the left": lambda m, x: m.bias + m.a(x),
    "expanded": lambda m, x: torch.cat([m.bias.expand(len(x), -1), x], 0),
    "scaled": lambda m, x: m.a(x) * m.bias,
    "norm": lambda m, x: m.norm(m.a(x)),
    "addmm": lambda m, x: torch.addmm(m.bias, x, m.a.weight),
    "packed": _packed,
    "nested views": _nested_views,
    "view of a use": lambda m, x: m.a(x).view(2, -1)[:1],
    "part of it detached": lambda m, x: m.b(m.a(x).detach()),
    "not used at all": lambda m, x: m.a(x),
    "kernel on activations": lambda m, x: Kernel.apply(m.a(x), torch.eye(4, dtype=x.dtype)),
    "unseen on activations": lambda m, x: m.b(unseen(torch.sin, m.a(x))),
    "checkpoint": _checkpointed(lambda m, x: m.b(m.a(x).relu())),
    "autocast": _cast(lambda m, x: m.b(m.a(x).relu())),
    "autocast, twice": _cast(lambda m, x: m.a(m.a(x).tanh())),
    "kernel for other batches": lambda m, x: Kernel.apply(x, m.a.weight) if x.sum() > 1e6 else m.a(x),
}

HIDDEN: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, list[str]]]] = {
    "kernel": (lambda m, x: Kernel.apply(x, m.a.weight), {"a.weight": ["KernelBackward"]}),
    "kernel beside a use": (lambda m, x: m.a(x) + Kernel.apply(x, m.a.weight), {"a.weight": ["KernelBackward"]}),
    "kernel twice": (
        lambda m, x: Kernel.apply(Kernel.apply(x, m.a.weight), m.b.weight),
        {"a.weight": ["KernelBackward"], "b.weight": ["KernelBackward"]},
    ),
    "kernel behind a closed gate": (
        lambda m, x: m.a(x) + m.gate * Kernel.apply(x, m.a.weight),
        {"a.weight": ["KernelBackward"]},
    ),
    "kernel for such batches": (
        lambda m, x: Kernel.apply(x, m.a.weight) if x.sum() < 1e6 else m.a(x),
        {"a.weight": ["KernelBackward"]},
    ),
    "kernel on a view": (_packed_and_kernel, {"packed": ["KernelBackward"]}),
    "kernel in a checkpoint": (
        _checkpointed(lambda m, x: m.a(x) + Kernel.apply(x, m.a.weight)),
        {"a.weight": ["KernelBackward"]},
    ),
    "ordinary nodes": (lambda m, x: m.a(x) + unseen(F.linear, x, m.a.weight), {"a.weight": ["TBackward0"]}),
    "penalty": (lambda m, x: m.a(x) + unseen(torch.norm, m.a.weight), {"a.weight": ["LinalgVectorNormBackward0"]}),
    "call without a rule": (lambda m, x: m.a(x) * m.bias.exp(), {"bias": ["ExpBackward0"]}),
    "unseen view": (lambda m, x: F.linear(x, unseen(torch.t, m.a.weight)), {"a.weight": ["TBackward0"]}),
    "a parameter is returned": (lambda m, x: m.bias, {"bias": ["the output"]}),
    "unseen before the cast": (
        _cast(lambda m, x: m.a(x) + unseen(torch.exp, m.a.weight).sum()),
        {"a.weight": ["ExpBackward0"]},
    ),
    "unseen with the lent cast": (
        _cast(lambda m, x: m.a(x) + unseen(F.linear, x, m.a.weight)),
        {"a.weight": ["TBackward0"]},
    ),
    "unseen makes the cast": (
        _cast(lambda m, x: unseen(F.linear, x, m.a.weight) + m.a(x)),
        {"a.weight": ["TBackward0"]},
    ),
}


def _run(f: Callable[[Any, Tensor], Tensor]) -> tuple[Uses, Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Model(f)
    model = model.float() if f.__qualname__.startswith("_cast") else model.double()
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    x = torch.randn(6, 4, dtype=next(model.parameters()).dtype)
    with Uses(parameters) as uses:
        output = model(x)
    return uses, output, parameters


@pytest.mark.parametrize("name", EXPLAINED)
def test_where_nothing_is_missing_the_uses_sum_up_to_the_gradient(name: str) -> None:
    uses, output, parameters = _run(EXPLAINED[name])
    assert uses.explained.unexplained([output], parameters) == {}
    weights = torch.randn(output.shape, dtype=output.dtype)
    value = (output * weights).sum()
    sums = uses.sums(value, parameters)
    value.backward()
    for key, p in parameters.items():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        # bfloat16 sums the uses of a lent cast before it casts back.
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if "autocast" in name else {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(sums[key], grad, **tolerance)


@pytest.mark.parametrize("name", HIDDEN)
def test_what_is_missing_is_named(name: str) -> None:
    f, expected = HIDDEN[name]
    uses, output, parameters = _run(f)
    assert uses.explained.unexplained([output], parameters) == expected
    value = output.sin().sum()
    sums = uses.sums(value, parameters)
    value.backward()
    closed = "closed gate" in name  # nothing arrives through it, today
    for key in expected:
        grad = parameters[key].grad
        assert grad is not None
        assert torch.allclose(sums[key], grad) == closed
    for key in parameters.keys() - expected.keys():
        grad = parameters[key].grad
        if grad is not None:
            torch.testing.assert_close(sums[key], grad, rtol=2e-2, atol=2e-2)


def test_casts_of_an_earlier_pass_in_one_autocast() -> None:
    layer = nn.Linear(4, 4)
    parameters: dict[str, Tensor] = dict(layer.named_parameters())
    x = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        first = layer(x)
        with Uses(parameters) as uses:
            output = layer(x)
        assert uses.explained.unexplained([output], parameters) == {}
        assert set(uses.explained.unexplained([output, first], parameters)) == {"weight", "bias"}


def test_parametrised_weights_are_not_explained_by_the_layer() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    parameters: dict[str, Tensor] = dict(layer.named_parameters())
    with Uses(parameters) as uses:
        output = layer(torch.randn(3, 4))
    assert set(uses.explained.unexplained([output], parameters)) == {k for k in parameters if k != "bias"}


def test_custom_functions_are_named() -> None:
    uses, output, parameters = _run(lambda m, x: Kernel.apply(m.a(x), torch.eye(4, dtype=x.dtype)))
    assert uses.explained.unexplained([output], parameters) == {}
    assert uses.explained.custom == {"KernelBackward"}
    layer = nn.Linear(4, 4)
    hidden = checkpoint(layer, torch.randn(3, 4, requires_grad=True), use_reentrant=True)
    explained = Explained()
    assert explained.unexplained([hidden], dict(layer.named_parameters())) == {}
    assert explained.custom == {"CheckpointFunctionBackward"}


def test_frozen_parameters_and_detached_outputs_are_left_alone() -> None:
    layer = nn.Linear(4, 4)
    layer.bias.requires_grad_(False)
    since = now()
    output = layer(torch.randn(3, 4))
    explained = Explained()
    assert explained.unexplained([output.detach()], dict(layer.named_parameters())) == {}
    assert set(explained.unexplained([output], dict(layer.named_parameters()))) == {"weight"}
    explained.add_use(output, since)
    assert explained.unexplained([output], dict(layer.named_parameters())) == {}


def test_nodes_of_a_call() -> None:
    layer = nn.Linear(4, 4)
    x = torch.randn(2, 3, 4, requires_grad=True).sin()
    since = now()
    output = layer(x)
    made = {n.name() for n in nodes_of_call(output.grad_fn, since)}
    assert made == {"ViewBackward0", "AddmmBackward0", "TBackward0"} | {n for n in made if n.startswith("View")}
    since = now()
    output.add_(1)
    assert "AddmmBackward0" not in {n.name() for n in nodes_of_call(output.grad_fn, since)}


def test_parameters_that_are_no_leaves() -> None:
    flat = torch.randn(20, requires_grad=True)
    weight, bias = flat.split([16, 4])
    parameters = {"weight": weight, "bias": bias}
    x = torch.randn(3, 4)
    with Uses(parameters) as uses:
        w = weight.view(4, 4)
        output = F.linear(x, w, bias)
    assert uses.explained.unexplained([output], parameters) == {}
    assert uses.explained.unexplained([output, bias], parameters) == {"bias": ["the output"]}
    assert uses.explained.unexplained([output + unseen(torch.exp, bias)], parameters) == {"bias": ["ExpBackward0"]}
    assert uses.explained.unexplained([output], {**parameters, "flat": flat}) == {"flat": ["SplitWithSizesBackward0"]}

"""C is the curvature of the loss whose gradient stands in ``p.grad``, block by block, however it came to stand there.

The reference is written down from the definition: one backward pass for each column of a root of the loss's Hessian.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from precond import KFAC, NaturalGradient, SMWNaturalGradient

MEAN = nn.CrossEntropyLoss()
with torch.random.fork_rng():
    torch.manual_seed(1)
    X, OTHER = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    Y, SOFT = torch.randint(3, (6,)), torch.rand(6, 3).double().softmax(1)
#: What was minimised: outputs with their graph, and the loss as a function of them.
Counts = list[tuple[Tensor, Callable[[Tensor], Tensor]]]


def mlp() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def watching(model: nn.Module, loss_fn: nn.Module = MEAN, **options: object) -> NaturalGradient:
    """Learns the whole block of each layer, exactly, and moves nothing."""
    return NaturalGradient(
        model, loss_fn, lr=0.0, fisher="exact", structure="layer", curvature_ema=0.0, kl_clip=None, **options
    )


def learned(optimizer: NaturalGradient | KFAC) -> dict[str, Tensor]:
    return {name: p.estimator.operator().to_dense() for name, p in optimizer.preconditioners.items()}


def dense(layer: nn.Module, counts: Counts) -> Tensor:
    """The block of one layer, weight before bias."""
    own = list(layer.parameters())
    total = torch.zeros(sum(p.numel() for p in own), sum(p.numel() for p in own)).double()
    for z, loss in counts:
        hessian = torch.autograd.functional.hessian(lambda v, z=z, f=loss: f(v.view_as(z)), z.detach().flatten())
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(z, own, v.view_as(z), retain_graph=True)])
            for v in torch.eye(z.numel()).double()
        ]
        J = torch.stack(rows)
        total += J.T @ hessian @ J
    return total


def assert_block(found: Tensor, layer: nn.Module, counts: Counts) -> None:
    """By eigenvalues, which no order of the numbers of a block changes."""
    right = torch.linalg.eigvalsh(dense(layer, counts))
    torch.testing.assert_close(torch.linalg.eigvalsh(found), right, rtol=1e-9, atol=1e-12 * float(right.max()))


@pytest.mark.parametrize(
    "minimised",
    [
        lambda z: 0.5 * MEAN(z, Y) + 2 * MEAN(z / 2, SOFT),
        lambda z: MEAN(z / 2, SOFT) + MEAN(z / 2, Y),
        lambda z: MEAN(z, Y) + MEAN(z.exp(), Y),
        lambda z: MEAN(z[:3].tanh(), Y[:3]) + MEAN(z.sigmoid(), SOFT),
    ],
    ids=["softened", "both softened", "exponential", "parts"],
)
def test_losses_of_one_pass_may_each_see_something_else_made_of_its_output(
    minimised: Callable[[Tensor], Tensor],
) -> None:
    # No layer has positions, so that the choice of the positions' treatment makes no difference.
    found = []
    for options in ({}, {"sharing": "expand"}):
        model = mlp()
        optimizer = KFAC(model, MEAN, lr=0.0, fisher="exact", **options)
        minimised(model(X)).backward()
        optimizer.step()
        found.append(learned(optimizer))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("unfrozen", ["before backward", "after backward", "frozen after the pass"])
def test_a_gradient_that_passes_through_a_frozen_model_leaves_nothing(unfrozen: str) -> None:
    model = mlp()
    optimizer = watching(model)
    for _ in range(2):
        optimizer.zero_grad()
        x = OTHER.clone().requires_grad_()
        model.requires_grad_(unfrozen == "frozen after the pass")
        loss = MEAN(model(x), Y)
        model.requires_grad_(unfrozen == "before backward")
        loss.backward()
        model.requires_grad_(True)
        MEAN(model(X), Y).backward()
        optimizer.step()
        assert x.grad is not None
        for block, layer in zip(learned(optimizer).values(), (model[0], model[2]), strict=True):
            assert_block(block, layer, [(model(X), lambda z: MEAN(z, Y))])


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first, self.inner, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        hidden = lambda h: self.inner(h).tanh()  # noqa: E731
        return self.last(checkpoint(hidden, h, use_reentrant=True) if self.reentrant else hidden(h))


def test_a_pass_that_is_repeated_counts_its_loss_once() -> None:
    levels = []
    for reentrant in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Checkpointed(reentrant).double()
        optimizer = KFAC(model, nn.MSELoss(), lr=0.05, fisher="exact")
        for _ in range(2):
            optimizer.zero_grad()
            optimizer.loss_fn(model(X), SOFT).backward()
            optimizer.step()
            levels.append(float(optimizer.bound_level()))
    torch.testing.assert_close(levels[:2], levels[2:])


class WholeCheckpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layers, self.reentrant = mlp(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layers, x, use_reentrant=True) if self.reentrant else self.layers(x)


def test_backward_passes_inside_of_reentrant_checkpoints_hide_no_other_pass() -> None:
    found = []
    for reentrant in (False, True):
        model = WholeCheckpointed(reentrant)
        optimizer = KFAC(model, MEAN, lr=0.0, fisher="exact", curvature_ema=0.0, kl_clip=None)
        z, other = (model(x.clone().requires_grad_()) for x in (X, OTHER))
        function = nn.functional.cross_entropy
        (function(z, Y) + 0.3 * function(other, Y)).backward()
        optimizer.step()
        found.append(learned(optimizer))
    torch.testing.assert_close(found[1], found[0])


def through_data(model: nn.Module, saved: list[Tensor]) -> None:
    for p in model.parameters():
        p.grad.data.zero_()


def by_zeros(model: nn.Module, saved: list[Tensor]) -> None:
    for p in model.parameters():
        p.grad.data = torch.zeros_like(p)


def through_numpy(model: nn.Module, saved: list[Tensor]) -> None:
    for p in model.parameters():
        p.grad.numpy()[...] = 0


def to_what_was_saved(model: nn.Module, saved: list[Tensor]) -> None:
    for p, gradient in zip(model.parameters(), saved, strict=True):
        p.grad = gradient


def copied_from_what_was_saved(model: nn.Module, saved: list[Tensor]) -> None:
    for p, gradient in zip(model.parameters(), saved, strict=True):
        p.grad.data.copy_(gradient)


RESTORE = (to_what_was_saved, copied_from_what_was_saved)


@pytest.mark.parametrize("before", [False, True], ids=["first", "accumulated"])
@pytest.mark.parametrize("drop", [through_data, by_zeros, through_numpy, *RESTORE])
def test_a_batch_is_dropped_by_whatever_takes_its_gradient_back(
    drop: Callable[[nn.Module, list[Tensor]], None], before: bool
) -> None:
    model = mlp()
    optimizer = watching(model)
    if before:
        (0.5 * MEAN(model(X.flip(1)), Y)).backward()
    saved = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    MEAN(model(10 * OTHER), Y).backward()
    drop(model, saved)
    MEAN(model(X), Y).backward()
    optimizer.step()
    counts: Counts = [(model(X), lambda z: MEAN(z, Y))]
    if before and drop in RESTORE:
        counts.append((model(X.flip(1)), lambda z: 0.5 * MEAN(z, Y)))
    for block, layer in zip(learned(optimizer).values(), (model[0], model[2]), strict=True):
        assert_block(block, layer, counts)


def test_a_gradient_that_is_zero_stands() -> None:
    model = mlp()
    optimizer = watching(model, nn.MSELoss())
    optimizer.loss_fn(model(X), model(X).detach()).backward()  # fits exactly
    optimizer.step()
    for block, layer in zip(learned(optimizer).values(), (model[0], model[2]), strict=True):
        assert_block(block, layer, [(model(X), lambda z: (z - z.detach()).square().mean())])


WEIGHTS, BIASES = ["0.weight", "2.weight"], ["0.bias", "2.bias"]
PARTS = [
    *([["2"], ["0"]], [WEIGHTS, BIASES], [BIASES, WEIGHTS], [["2.bias"], ["0", "2.weight"]]),
    [["2.bias", "0.weight"], ["2.weight"], ["0.bias"]],
]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("maker", [watching, lambda m, f: KFAC(m, f, lr=0.0, fisher="exact", curvature_ema=0.0)])
def test_gradients_that_come_in_parts_count_once(maker: Callable[..., KFAC], reduction: str) -> None:
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    found, levels = [], []
    for parts in ([["0", "2"]], *PARTS):
        model = mlp()
        optimizer = maker(model, loss_fn)
        for x in (X, OTHER):
            loss = loss_fn(model(x), Y)
            for part in parts:
                inputs = [p for name, p in model.named_parameters() if name.startswith(tuple(part))]
                loss.backward(inputs=inputs, retain_graph=True)
        optimizer.step()
        found.append(learned(optimizer))
        levels.append(optimizer.bound_level())
    for other, level in zip(found[1:], levels[1:], strict=True):
        torch.testing.assert_close(found[0], other)
        torch.testing.assert_close(levels[0], level)


def test_parts_of_gradients_that_are_dropped_have_brought_nothing() -> None:
    model = mlp()
    optimizer = watching(model)
    loss = MEAN(model(X), Y)
    loss.backward(inputs=[model[0].weight, model[2].weight], retain_graph=True)
    optimizer.zero_grad()
    loss.backward(inputs=[model[0].bias, model[2].bias], retain_graph=True)
    loss.backward(inputs=[model[0].weight, model[2].weight])
    optimizer.step()
    for block, layer in zip(learned(optimizer).values(), (model[0], model[2]), strict=True):
        assert_block(block, layer, [(model(X), lambda z: MEAN(z, Y))])


def test_parts_of_one_block_are_of_one_loss() -> None:
    model = mlp()
    optimizer = watching(model)
    one, two = MEAN(model(X), Y), MEAN(model(OTHER), Y)
    one.backward(inputs=[model[0].weight, model[2].weight], retain_graph=True)
    with pytest.raises(ValueError, match="asked for in parts, and the parts are of different losses"):
        (one + two).backward(inputs=[model[0].bias, model[2].bias])
    assert optimizer is not None


@pytest.mark.parametrize("how", ["inputs=", "frozen since", "inputs= at last", "zero_grad of a layer", "grad = None"])
def test_each_block_has_the_losses_whose_gradients_stand_in_its_own_parameters(how: str) -> None:
    model = mlp()
    optimizer = watching(model)
    if how == "inputs= at last":
        MEAN(model(X), Y).backward()
    loss = MEAN(model(OTHER), Y)
    if how.startswith("inputs="):
        loss.backward(inputs=list(model[2].parameters()))
    else:
        model[0].requires_grad_(how != "frozen since")
        loss.backward()
        model[0].requires_grad_(True)
        if how != "frozen since":
            model[0].zero_grad(set_to_none=how == "grad = None")
    if how != "inputs= at last":
        MEAN(model(X), Y).backward()
    optimizer.step()
    one, two = (model(X), lambda z: MEAN(z, Y)), (model(OTHER), lambda z: MEAN(z, Y))
    found = learned(optimizer)
    assert_block(found["0.weight+0.bias"], model[0], [one])
    assert_block(found["2.weight+2.bias"], model[2], [one, two])


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 2), nn.Linear(2, 4)

    def decode(self, code: Tensor) -> Tensor:
        return self.decoder(code)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encoder(x).tanh())


def test_a_part_of_the_loss_that_forward_did_not_compute_is_told_once() -> None:
    model = Autoencoder().double()
    optimizer = watching(model, nn.MSELoss())
    for k in range(2):
        optimizer.zero_grad()
        optimizer.loss_fn(model.decode(X[:, :2]), X)  # for the log
        loss = optimizer.loss_fn(model(X), X)
        if k == 1:
            loss = loss + optimizer.loss_fn(model.decode(X[:, :2]), X)
        loss.backward()
        if k == 0:
            optimizer.step()
    with pytest.warns(UserWarning, match="computed by the model without its forward") as told:
        optimizer.step()
    optimizer.zero_grad()
    (optimizer.loss_fn(model(X), X) + optimizer.loss_fn(model.decode(X[:, :2]), X)).backward()
    optimizer.step()  # warnings are errors
    assert len(told) == 1


class Headed(nn.Module):
    """A trunk that several models may share, and a head."""

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x).tanh())


@pytest.mark.parametrize("first", [True, False])
def test_a_backward_pass_of_another_model_that_shares_layers_is_told(first: bool) -> None:
    trunk, *heads = mlp()[0], nn.Linear(5, 3).double(), nn.Linear(5, 3).double()
    one, two = (Headed(trunk, head) for head in heads)
    optimizer = watching(one)
    for taken_back in (True, False):
        own, other = MEAN(one(X), Y), nn.functional.cross_entropy(two(OTHER), Y)
        (other if first or taken_back else own).backward()
        if taken_back:
            optimizer.zero_grad(set_to_none=first)
        (own if first or taken_back else other).backward()
        if taken_back:
            optimizer.step()  # warnings are errors
            optimizer.zero_grad()
    with pytest.warns(UserWarning, match="by another model that has some"):
        optimizer.step()


class Both(nn.Module):
    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [model(x) for model, x in zip(self.models, inputs, strict=True)]


@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), nn.functional.cross_entropy, nn.functional.mse_loss])
def test_the_loss_of_another_model_that_shares_layers_is_told(loss_fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    target = SOFT if loss_fn is nn.functional.mse_loss else Y
    trunk, *heads = mlp()[0], nn.Linear(5, 3).double(), nn.Linear(5, 3).double()
    one, two = (Headed(trunk, head) for head in heads)
    optimizer = watching(one)
    penalty = nn.functional.mse_loss(trunk.weight, torch.zeros_like(trunk.weight))
    (MEAN(one(X), Y) + penalty).backward()
    optimizer.step()  # warnings are errors
    optimizer.zero_grad()
    (MEAN(one(X), Y) + loss_fn(two(OTHER), target)).backward()
    with pytest.warns(UserWarning, match="by another model that has some"):
        optimizer.step()
    optimizer.detach()
    if loss_fn is not nn.functional.mse_loss:
        both = Both(one, two)
        optimizer = watching(both)
        z, other = both(X, OTHER)
        (MEAN(z, Y) + MEAN(other, Y)).backward()
        optimizer.step()
        found = learned(optimizer)["models.0.trunk.weight+models.0.trunk.bias"]
        assert_block(found, trunk, [(one(X), lambda z: MEAN(z, Y)), (two(OTHER), lambda z: MEAN(z, Y))])


def kept_and_added(model: nn.Module, optimizer: NaturalGradient) -> None:
    total = [torch.zeros_like(p) for p in model.parameters()]
    for i in range(0, 6, 2):
        optimizer.zero_grad()
        (MEAN(model(X[i : i + 2]), Y[i : i + 2]) / 3).backward()
        for into, p in zip(total, model.parameters(), strict=True):
            into += p.grad
    for into, p in zip(total, model.parameters(), strict=True):
        p.grad = into


def half_by_autograd_grad(model: nn.Module, optimizer: NaturalGradient) -> None:
    found = torch.autograd.grad(MEAN(model(X[:3]), Y[:3]) / 2, list(model.parameters()))
    (MEAN(model(X[3:]), Y[3:]) / 2).backward()
    for p, g in zip(model.parameters(), found, strict=True):
        p.grad += g


def accumulated(model: nn.Module, optimizer: NaturalGradient) -> None:
    for i in range(0, 6, 2):
        (MEAN(model(X[i : i + 2]), Y[i : i + 2]) / 3).backward()


def the_sum_at_last(model: nn.Module, optimizer: NaturalGradient) -> None:
    losses = [MEAN(z, y) / 2 for z, y in zip(model(X).chunk(2), Y.chunk(2), strict=True)]
    losses[0].backward(retain_graph=True)
    kept = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    sum(losses).backward()
    for p, g in zip(model.parameters(), kept, strict=True):
        p.grad = p.grad - 0.1 * g


def clipped_after_a_dropped_batch(model: nn.Module, optimizer: NaturalGradient) -> None:
    MEAN(model(10 * OTHER), Y).backward()
    optimizer.zero_grad()
    MEAN(model(X), Y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def noisy(model: nn.Module, optimizer: NaturalGradient) -> None:
    MEAN(model(X), Y).backward()
    for p in model.parameters():
        p.grad += torch.ones_like(p)


def edited_beside_a_logged_norm(
    edit: Callable[[Tensor], object], first: bool = False
) -> Callable[[nn.Module, NaturalGradient], None]:
    def loop(model: nn.Module, optimizer: NaturalGradient) -> None:
        own = list(model.parameters())
        for logs in (first, not first):
            if logs:
                torch.stack([g.norm() for g in torch.autograd.grad(MEAN(model(OTHER), Y), own)]).norm()
            else:
                MEAN(model(X), Y).backward()
        for p in own:
            edit(p.grad)

    return loop


EDITED = [
    edited_beside_a_logged_norm(lambda g: g.masked_fill_(torch.arange(g.numel()).view_as(g) % 2 == 0, 0), True),
    edited_beside_a_logged_norm(lambda g: g.clamp_(-1e-2, 1e-2)),
    edited_beside_a_logged_norm(lambda g: g.add_(torch.arange(g.numel()).view_as(g)), True),
    edited_beside_a_logged_norm(lambda g: g.div_(g.norm())),
]


def noisy_after_an_adversarial_example(model: nn.Module, optimizer: NaturalGradient) -> None:
    x = X.clone().requires_grad_()
    torch.autograd.grad(MEAN(model(x), Y), x)
    noisy(model, optimizer)


def penalized(model: nn.Module, optimizer: NaturalGradient) -> None:
    loss = MEAN(model(X), Y)
    found = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    (loss + 0 * sum(g.square().sum() for g in found)).backward()


@pytest.mark.parametrize(
    "loop",
    [
        *(kept_and_added, half_by_autograd_grad, accumulated, the_sum_at_last, clipped_after_a_dropped_batch, noisy),
        *(noisy_after_an_adversarial_example, penalized, *EDITED),
    ],
)
def test_gradients_put_together_by_hand_are_told_once(loop: Callable[[nn.Module, NaturalGradient], None]) -> None:
    model = mlp()
    optimizer = watching(model)
    if loop in (kept_and_added, half_by_autograd_grad):
        loop(model, optimizer)
        with pytest.warns(UserWarning, match="put together by hand"):
            optimizer.step()
        optimizer.zero_grad()
        loop(model, optimizer)
        optimizer.step()  # warnings are errors
        return
    loop(model, optimizer)
    optimizer.step()
    for block, layer in zip(learned(optimizer).values(), (model[0], model[2]), strict=True):
        assert_block(block, layer, [(model(X), lambda z: MEAN(z, Y))])


def assigned(model: nn.Module, loss: Tensor) -> None:
    for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
        p.grad = g if p.grad is None else p.grad + g


def in_the_place_of_the_last(model: nn.Module, loss: Tensor) -> None:
    """Never zeroed."""
    for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
        p.grad = g


def through_data_of_the_last(model: nn.Module, loss: Tensor) -> None:
    for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        p.grad.data = g


@pytest.mark.parametrize("write", [in_the_place_of_the_last, through_data_of_the_last])
def test_what_autograd_grad_returns_counts_in_the_place_of_an_earlier_gradient(
    write: Callable[[nn.Module, Tensor], None],
) -> None:
    model = mlp()
    optimizer = watching(model)
    for x in (OTHER, X):
        write(model, MEAN(model(x), Y))
        optimizer.step()
    for block, layer in zip(learned(optimizer).values(), (model[0], model[2]), strict=True):
        assert_block(block, layer, [(model(X), lambda z: MEAN(z, Y))])


@pytest.mark.parametrize(
    ("how", "clips"),
    [(how, clips) for how in ("unscaled", "divided", "data") for clips in (False, True)] + [("averaged", False)],
)
def test_a_scale_that_is_taken_off_before_a_plain_step_is_divided_out(how: str, clips: bool) -> None:
    model = mlp()
    optimizer, scaler = watching(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x in (OTHER, X):
        optimizer.zero_grad()
        loss = MEAN(model(x), Y)
        (scaler.scale(loss) if how == "unscaled" else 1024 * loss if how != "averaged" else 3 * loss).backward()
        if how == "unscaled":
            scaler.unscale_(optimizer)
        for p in model.parameters() if how != "unscaled" else ():
            if how == "data":
                p.grad.data /= 1024
            else:
                p.grad.div_(3 if how == "averaged" else 1024)
        if clips:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
        optimizer.step()
        if how == "unscaled":
            scaler.update()
    for block, layer in zip(learned(optimizer).values(), (model[0], model[2]), strict=True):
        assert_block(block, layer, [(model(X), lambda z: MEAN(z, Y))])


@pytest.mark.parametrize(("divisor", "clips"), [(4.0, False), (3.0, False), (1.7, True), (2.6, True), (40.3, True)])
def test_gradients_in_bfloat16_that_are_clipped_are_not_divided(divisor: float, clips: bool) -> None:
    """Their lengths alone are whole multiples of any others, within rounding."""
    traces = []
    for changes in (False, True):
        model = mlp().bfloat16()
        optimizer = KFAC(model, MEAN, lr=0.0, fisher="exact", curvature_ema=0.0, kl_clip=None)
        MEAN(model(X.bfloat16()), Y).backward()
        if changes and clips:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            nn.utils.clip_grad_norm_(model.parameters(), float(nn.utils.get_total_norm(gradients)) / divisor)
        elif changes:
            for p in model.parameters():
                p.grad /= divisor
        optimizer.step()
        traces.append(sum(block.trace() for block in learned(optimizer).values()))
    torch.testing.assert_close(traces[1] * (1 if clips else divisor), traces[0])


def added_in_place(model: nn.Module, loss: Tensor) -> None:
    for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        p.grad.add_(g)


@pytest.mark.parametrize("fisher", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("write", [assigned, added_in_place])
def test_what_autograd_grad_returns_counts_where_it_is_written_as_it_is(
    write: Callable[[nn.Module, Tensor], None], fisher: str
) -> None:
    # One pass as it is or clipped, two that add up, one beside a backward pass, one after another that was dropped.
    kinds = ["one", "clipped", "two", "beside", "dropped"]
    for kind in kinds:
        moved = []
        for by_hand in (False, True):
            model = mlp()
            optimizer = KFAC(model, MEAN, lr=0.1, fisher=fisher)
            for step in range(2):
                optimizer.zero_grad()
                for number, x in enumerate((OTHER, X.flip(1), X) if kind in ("two", "beside") else (X + step,)):
                    if kind == "dropped" and by_hand:
                        torch.autograd.grad(MEAN(model(OTHER), Y), list(model.parameters()))
                    loss = MEAN(model(x), Y) / 2
                    if by_hand and not (kind == "beside" and number == 1):
                        write(model, loss)
                    else:
                        loss.backward()
                if kind == "clipped":
                    nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
                optimizer.step()
            moved.append(list(model.parameters()))
        torch.testing.assert_close(*moved, rtol=1e-9, atol=1e-12)


def test_gradients_that_autograd_grad_returns_and_somebody_projects_are_refused() -> None:
    model = mlp()
    optimizer = KFAC(model, MEAN, lr=0.1)
    own = list(model.parameters())
    one, two = (torch.autograd.grad(MEAN(model(x), Y), own) for x in (X, OTHER))
    for p, a, b in zip(own, one, two, strict=True):
        p.grad = 0.7 * a + b
    with pytest.raises(RuntimeError, match="stands where all that it returns is written"):
        optimizer.step()


def test_gradients_that_come_in_parts_meet_where_one_matrix_spans_all_layers() -> None:
    moved = []
    for parts in ([["0", "2"]], *PARTS):
        model = mlp()
        optimizer = SMWNaturalGradient(model, MEAN, lr=0.1, fisher="exact")
        loss = MEAN(model(X), Y)
        for part in parts:
            inputs = [p for name, p in model.named_parameters() if name.startswith(tuple(part))]
            loss.backward(inputs=inputs, retain_graph=True)
        optimizer.step()
        moved.append(list(model.parameters()))
    for other in moved[1:]:
        torch.testing.assert_close(moved[0], other)

"""Groups of parameters: is every role found by what a parameter does, and does each method get what its authors use?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precond import KFAC, SOAP, GaLore, Muon, SecondOrderOptimizer, WeightDecay, methods, param_groups

WORDS, WIDTH = 11, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.ln(x)).chunk(3, -1)
        return x + self.mlp(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class GPT(nn.Module):
    def __init__(self, layers: int = 2, tied: bool = False) -> None:
        super().__init__()
        self.wte = nn.Embedding(WORDS, WIDTH)
        self.wpe = nn.Embedding(6, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


IDS = torch.arange(18).reshape(3, 6) % WORDS


def roles(groups: list[dict[str, Any]]) -> dict[str, str]:
    return {name: group["name"] for group in groups for name, _ in group["params"]}


def gpt_roles(layers: int = 2) -> dict[str, str]:
    out = {"wte.weight": "embedding", "wpe.weight": "embedding", "head.weight": "head"}
    for i in range(layers):
        out |= {f"blocks.{i}.ln.{key}": "norm" for key in ("weight", "bias")}
        out |= {f"blocks.{i}.{key}.weight": "matrix" for key in ("qkv", "mlp.0", "mlp.2")}
        out |= {f"blocks.{i}.{key}.bias": "bias" for key in ("qkv", "mlp.0")}
    return out


def test_roles_of_a_language_model() -> None:
    assert roles(param_groups(GPT(), data=(IDS, IDS))) == gpt_roles()
    assert roles(param_groups(GPT())) == gpt_roles() | {"head.weight": "matrix"}


@pytest.mark.parametrize("data", [None, (IDS, IDS)])
def test_a_table_that_is_tied_to_the_head_is_an_embedding(data: Any) -> None:
    expected = {name: role for name, role in gpt_roles().items() if role != "head"}
    assert roles(param_groups(GPT(tied=True), Muon, data)) == expected


class Custom(nn.Module):
    """One parameter ``p``, by the use of a function, between an input layer and a head."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.norm = nn.Linear(WIDTH, WIDTH)  # a name that means nothing
        self.p = nn.Parameter(torch.randn(shape))
        self.embedding = nn.Linear(WIDTH, 2)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(self.use(self.norm(x).relu(), self.p))


class Routed(nn.Module):
    def forward(self, x: Tensor, p: Tensor) -> Tensor:
        return sum((F.linear(x, p[i]) for i in range(len(p))), torch.zeros(()))


PICKED = torch.tensor([0, 2, 1])
USES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], str]] = {
    "product from the right": (lambda x, p: x @ p, (WIDTH, WIDTH), "matrix"),
    "functional linear": (F.linear, (WIDTH, WIDTH), "matrix"),
    "einsum": (lambda x, p: torch.einsum("nti,io->nto", x, p), (WIDTH, WIDTH), "matrix"),
    "scaled first": (lambda x, p: F.linear(x, p * 0.5), (WIDTH, WIDTH), ""),
    "experts in a batch": (lambda x, p: torch.bmm(x, p), (3, WIDTH, WIDTH), "experts"),
    "experts in turn": (Routed(), (4, WIDTH, WIDTH), "experts"),
    "positions": (lambda x, p: x + p, (1, 5, WIDTH), "vector"),
    "positions, cut": (lambda x, p: x + p[:, :5], (1, 9, WIDTH), "vector"),
    "table by index": (lambda x, p: x + p[PICKED][:, None], (4, WIDTH), "embedding"),
    "scale of a norm": (lambda x, p: p * x / x.square().mean(-1, keepdim=True).sqrt(), (WIDTH,), "vector"),
    "scale with axes": (lambda x, p: p * x, (1, 1, WIDTH), "vector"),
    "token": (lambda x, p: torch.cat([p.expand(3, 1, WIDTH), x], 1), (1, 1, WIDTH), "vector"),
    "number": (lambda x, p: p * x, (), "vector"),
}


@pytest.mark.parametrize("use", USES)
def test_parameters_of_ones_own_have_the_role_that_their_use_shows(use: str) -> None:
    function, shape, role = USES[use]
    model = Custom(function, *shape)
    data = (torch.randn(3, 5, WIDTH), torch.zeros(3, 5, 2))
    expected = {"norm.weight": "matrix", "norm.bias": "bias", "embedding.weight": "head", "embedding.bias": "bias"}
    if not role:
        with pytest.raises(ValueError, match=r"cannot tell from their uses by mul what p \(8x8\) of Custom do: say it"):
            param_groups(model, data=data)
        role = "matrix"
        found = param_groups(model, data=data, roles={"matrix": "p"})
    else:
        found = param_groups(model, data=data)
    assert roles(found) == expected | {"p": role}


def test_what_the_types_leave_open_is_asked_for() -> None:
    model = Custom(F.linear, WIDTH, WIDTH)
    with pytest.raises(ValueError, match=r"cannot tell from the types of their modules what p \(8x8\) .*pass data="):
        param_groups(model)
    said = param_groups(model, roles={"matrix": model.p})
    assert roles(said)["p"] == "matrix"
    with pytest.raises(ValueError, match=r"which matrix makes the output, and GPT does not show it"):
        param_groups(GPT(), GaLore)
    assert {*roles(param_groups(GPT(), Muon)).values()} >= {"matrix", "embedding"}  # whose heads are matrices
    assert roles(param_groups(GPT(), GaLore, roles={"head": "head.*"})) == gpt_roles()
    with pytest.raises(ValueError, match=r"cannot tell from a batch that does not use them what p"):
        param_groups(Custom(lambda x, p: x, 3, 4), data=(torch.randn(2, WIDTH), torch.zeros(2, 2)))


@pytest.mark.parametrize(
    ("output", "heads"),
    [
        (lambda m, h: m.a(h), {"a.weight"}),
        (lambda m, h: m.a(h).softmax(-1) * 3, {"a.weight"}),
        (lambda m, h: (m.a(h), m.b(h)), {"a.weight", "b.weight"}),
        (lambda m, h: {"one": m.a(h), "two": m.b(h)}, {"a.weight", "b.weight"}),
        (lambda m, h: torch.cat([m.a(h), m.b(h)], -1), {"a.weight", "b.weight"}),
        (lambda m, h: torch.stack([m.a(row) for row in h]), {"a.weight"}),
        (lambda m, h: m.b(m.a(h)), {"b.weight"}),
        (lambda m, h: h + m.a(h), set()),  # the last state of a residual network
        (lambda m, h: m.norm(h + m.a(h)), set()),
    ],
)
def test_heads(output: Callable[[Any, Tensor], Any], heads: set[str]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.norm = nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Any:
            return output(self, self.inner(x).tanh())

    found = roles(param_groups(Model(), data=(torch.randn(3, 4), torch.zeros(3, 4))))
    assert {name for name, role in found.items() if role == "head"} == heads


def test_modules_of_every_kind() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.up = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 3)
            self.ln, self.act = nn.LayerNorm((2, 6, 6)), nn.PReLU(2)
            self.rnn, self.attention = nn.LSTM(36, 8, batch_first=True), nn.MultiheadAttention(8, 2, batch_first=True)
            self.fc = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.rnn(self.act(self.ln(self.up(self.bn(self.conv(x))))).flatten(2))[0]
            return self.fc(self.attention(h, h, h)[0].mean(1))

    expected = {"conv.weight": "matrix", "conv.bias": "bias", "up.weight": "matrix", "up.bias": "bias"}
    expected |= {f"{norm}.{key}": "norm" for norm in ("bn", "ln") for key in ("weight", "bias")}
    expected |= {f"rnn.weight_{key}_l0": "matrix" for key in ("ih", "hh")}
    expected |= {f"rnn.bias_{key}_l0": "bias" for key in ("ih", "hh")}
    expected |= {f"attention.{key}": "matrix" for key in ("in_proj_weight", "out_proj.weight")}
    expected |= {f"attention.{key}": "bias" for key in ("in_proj_bias", "out_proj.bias")}
    expected |= {"act.weight": "vector", "fc.weight": "matrix", "fc.bias": "bias"}
    model = Model()
    assert roles(param_groups(model)) == expected
    data = (torch.randn(2, 1, 6, 6), torch.zeros(2, 3))
    assert roles(param_groups(model, Muon, data)) == expected | {"fc.weight": "head"}


def test_nothing_is_changed_by_looking() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    param_groups(model, Muon, (torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 2)))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and all(p.grad is None for p in model.parameters())


def test_decay_and_options() -> None:
    model = GPT()
    model.blocks[0].qkv.weight.requires_grad_(False)
    form = WeightDecay(0.1, "independent")
    groups = {
        group["name"]: group
        for group in param_groups(model, data=(IDS, IDS), weight_decay=form, options={"head": {"lr": 1e-3}})
    }
    assert [groups[name]["weight_decay"].strength for name in groups] == [0.1, 0.0, 0.1, 0.0, 0.0]
    assert all(group["weight_decay"].form == "independent" for group in groups.values())
    assert [name for name, group in groups.items() if "lr" in group] == ["head"]
    assert "blocks.0.qkv.weight" not in roles(list(groups.values()))
    everything = param_groups(model, weight_decay=0.3, undecayed=())
    assert all(group["weight_decay"] == 0.3 for group in everything)
    for arguments, message in (
        ({"undecayed": "norm"}, r"undecayed= of param_groups is about the roles matrix, .* got the string 'norm'"),
        ({"options": {"heads": {}}}, r"options= of param_groups .* got 'heads'"),
        ({"roles": {"gate": "p"}}, r"roles= of param_groups .* got 'gate'"),
    ):
        with pytest.raises(ValueError, match=message):
            param_groups(model, **arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"takes an optimizer class of precond such as Muon, not \(tensor"):
        param_groups(model, (IDS, IDS))  # type: ignore[arg-type]


def step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    for _ in range(3):
        F.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def seeded(model: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return model().double()


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_muon_gives_embeddings_and_vectors_the_step_of_adamw() -> None:
    ours, theirs = seeded(GPT), seeded(GPT)
    step(ours, Muon(param_groups(ours, Muon, (IDS, IDS), weight_decay=0.1), lr=1e-2))
    found, named = gpt_roles(), dict(theirs.named_parameters())
    of = {role: [named[name] for name, r in found.items() if r == role] for role in set(found.values())}
    others = [*of["embedding"], *of["norm"], *of["bias"]]
    adam = torch.optim.AdamW(others, weight_decay=0.0, lr=1e-2, betas=(0.9, 0.95))
    step(theirs, Muon([*of["matrix"], *of["head"]], lr=1e-2, weight_decay=0.1), adam)
    assert torch.allclose(parameters(ours), parameters(theirs), rtol=1e-12, atol=1e-12)
    plain = seeded(GPT)
    step(plain, Muon(plain.parameters(), lr=1e-2))
    assert not torch.allclose(parameters(ours), parameters(plain), atol=1e-4)


def test_galore_projects_matrices_alone() -> None:
    model = GPT()
    optimizer = GaLore(param_groups(model, GaLore, (IDS, IDS)), rank=2)
    step(model, optimizer)
    projected = {name for name, p in model.named_parameters() if "projection" in optimizer.state[p]}
    assert projected == {name for name, role in gpt_roles().items() if role == "matrix"}


def test_layer_based_methods_and_torch_take_the_groups() -> None:
    def by_hand(model: nn.Module) -> list[dict[str, Any]]:
        named, found = dict(model.named_parameters()), gpt_roles()
        decays = {"matrix": 0.2, "head": 0.2}
        return [
            {"params": [named[n] for n, r in found.items() if r == role], "weight_decay": decays.get(role, 0.0)}
            for role in ("matrix", "embedding", "head", "norm", "bias")
        ]

    loss = nn.CrossEntropyLoss()
    makers: list[Callable[[nn.Module, Any], torch.optim.Optimizer]] = [
        lambda model, groups: KFAC(model, loss, lr=0.1, params=groups, fisher="empirical"),
        lambda model, groups: SOAP(groups, lr=0.1),
        lambda model, groups: torch.optim.AdamW(groups, lr=0.1),
    ]
    for make in makers:
        ours, theirs = seeded(GPT), seeded(GPT)
        step(ours, make(ours, param_groups(ours, data=(IDS, IDS), weight_decay=0.2)))
        step(theirs, make(theirs, by_hand(theirs)))
        assert torch.allclose(parameters(ours), parameters(theirs), rtol=1e-9, atol=1e-12)


def test_treatments_name_roles_and_options_that_exist() -> None:
    for method in methods():
        for role, options in method.cls.by_role.items():
            groups = param_groups(nn.Linear(3, 2), roles={role: "weight"}, options={role: options})  # type: ignore[dict-item]
            assert method.needs == "grad"
            made: SecondOrderOptimizer = method.cls(groups, lr=0.1)
            assert options.keys() <= made.defaults.keys()


@pytest.mark.parametrize("head", ["lm", "classification"])
def test_hugging_face(head: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": WORDS, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8, "pad_token_id": 0}
    config = transformers.GPT2Config(**sizes, num_labels=3)
    if head == "lm":
        model = transformers.GPT2LMHeadModel(config)
        found = roles(param_groups(model, Muon))
        batch = {"input_ids": IDS, "labels": IDS}
    else:
        model = transformers.GPT2ForSequenceClassification(config)
        batch = {"input_ids": IDS, "labels": torch.arange(3)}
        found = roles(param_groups(model, Muon, batch))
        assert found["score.weight"] == "head"
    by_use = roles(param_groups(model, Muon, batch))
    assert by_use == found
    assert {name for name, role in found.items() if role == "embedding"} == {
        "transformer.wte.weight",
        "transformer.wpe.weight",
    }
    assert {role for name, role in found.items() if "c_" in name and name.endswith("weight")} == {"matrix"}

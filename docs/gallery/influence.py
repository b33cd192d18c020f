"""Who taught the language model that?

A small transformer learns the source of some modules of the standard library, token by token, and is asked what
follows `if __name__ == '`. It knows. The influence of every training window on that one prediction, by EKFAC after
Grosse et al. (2023), finds the few windows that taught it, and by token the places in them that did: the quote in front
of `__main__`. Trained again without the most influential 2 % of the windows it hardly has an idea; without as many
others, drawn at random, it still knows.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from importlib import import_module
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor, nn

import curvature

MODULES = "base64 calendar code compileall dis gzip mimetypes platform py_compile pyclbr quopri random shlex symtable"
MODULES += " sysconfig tabnanny textwrap timeit tokenize trace webbrowser zipapp"
LENGTH, WIDTH, VOCABULARY, ENDS = 16, 32, 400, 700
QUERY = ["\n\n", "if", " ", "__name__", " ", "==", " ", "'"]
ANSWER = "__main__"


class Transformer(nn.Module):
    """Causal, of one layer, with learned places."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        h = self.norms[0](x)
        x = x + self.out(F.scaled_dot_product_attention(self.query(h), self.key(h), self.value(h), is_causal=True))
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return self.head(self.norms[2](x))


def tokens() -> list[str]:
    """Words, numbers, runs of spaces and single signs."""
    found = []
    for name in MODULES.split():
        source = re.sub(r'"""[\s\S]*?"""|#.*', "", inspect.getsource(import_module(name)))
        found += re.findall(r"\n+|[ ]+|\w+|[=!<>]=|[^\w\s]", source)[-ENDS:]
    return found


def trained(x: Tensor, y: Tensor, steps: int = 700) -> Transformer:
    torch.manual_seed(0)
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(x), (32,), generator=order)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]).transpose(1, 2), y[batch]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def draw(ax: Axes, words: list[str], strengths: Tensor, row: float) -> float:
    """A line of tokens, each on a colour: red raised the probability of the answer, blue lowered it.

    Returns:
        Its width.
    """
    at = 0.0
    for word, strength in zip(words, strengths.tolist(), strict=True):
        shown = word.replace("\n", "\u21b5")[:14]
        shown = shown if shown.strip() else " " * min(len(shown), 2)
        width = len(shown) + 0.5
        ax.add_patch(Rectangle((at, row - 0.4), width - 0.1, 0.8, color=plt.get_cmap("RdBu_r")(0.5 + 0.33 * strength)))
        ax.text(at + width / 2 - 0.05, row, shown, ha="center", va="center", family="monospace", fontsize=8)
        at += width
    return at


def main(out: Path) -> None:
    words = tokens()
    ids = {word: number for number, (word, _) in enumerate(Counter(words).most_common(VOCABULARY - 1), 1)}
    windows = torch.tensor([ids.get(word, 0) for word in words]).unfold(0, LENGTH + 1, LENGTH)
    x, y = windows[:, :-1], windows[:, 1:]
    query, target = torch.tensor([[ids[word] for word in QUERY]]), torch.full((1, len(QUERY)), -100)
    target[0, -1] = ids[ANSWER]  # the one token that is asked about

    def probability(model: nn.Module) -> float:
        return float(model(query).detach()[0, -1].softmax(-1)[ids[ANSWER]])

    model = trained(x, y)
    data = list(zip(x.split(64), y.split(64), strict=True))
    found = curvature.influence(
        model, nn.CrossEntropyLoss(), data, (query, target), class_dim=-1, by_position=True, progress=False
    )
    few = len(x) // 50
    best = found.scores[0].argsort(descending=True)
    others = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    chances = {"all windows": probability(model)}
    for name, left_out in (("all but 2 % at random", others[:few]), ("all but the top 2 %", best[:few])):
        keep = torch.ones(len(x), dtype=torch.bool)
        keep[left_out] = False
        chances[name] = probability(trained(x[keep], y[keep]))
    there = (windows == ids[ANSWER]).any(1)
    share = float(there[best[:few]].double().mean())
    by_token = found.by_token[0]
    named = [n for n in best[:few].tolist() if bool((x[n] == ids[ANSWER]).any())]
    near = [abs(int(by_token[n].argmax()) + 1 - int((x[n] == ids[ANSWER]).nonzero()[0])) <= 1 for n in named]
    print(f"{len(x)} windows, {int(there.sum())} with the answer; {share:.0%} of the {few} most influential ones")
    print("probability of the answer:", {name: round(value, 4) for name, value in chances.items()})
    print(f"{sum(near)} of {len(near)} have their most influential token next to the answer")

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained", width_ratios=[2.6, 1])
    wide = [draw(left, [*QUERY, ANSWER], torch.tensor([0.0] * len(QUERY) + [1.0]), 0)]
    left.text(0, -0.75, "asked", fontsize=8, color="gray")
    left.text(0, 0.9, "the most influential windows", fontsize=8, color="gray")
    for row, n in enumerate(best[:11].tolist()):
        line = words[n * LENGTH : (n + 1) * LENGTH]
        wide.append(draw(left, line, by_token[n] / by_token[n].abs().max(), row + 1.6))
    left.set(xlim=(0, max(wide)), ylim=(12.2, -1.2))
    left.axis("off")
    bars = right.barh(list(chances), list(chances.values()), color=["0.6", "0.6", "firebrick"], height=0.5)
    right.bar_label(bars, fmt=lambda value: f"{value:.2g}", padding=3)
    right.invert_yaxis()
    right.set(xlabel=f"probability of {ANSWER}", xlim=(0, 1), title="trained on")
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "influence.png", dpi=110)

    assert share > 0.5 > 10 * float(there.double().mean()), "it finds the windows that hold the answer"
    assert sum(near) > 0.6 * len(near), "and the places in them"
    everything, random, top = chances.values()
    # Three starts: 0.05 at most, and 0.39 at least.
    assert top < 0.1 < 0.2 < min(everything, random), "without them the model does not know"


if __name__ == "__main__":
    main(Path(__file__).parent)

"""A tiny GPT-2 from transformers: every parameter has a curvature block, and a few of them hold most of the curvature.

The model learns to spell the Zen of Python, character by character. Its projections are `Conv1D` modules and its head
is tied to the embedding; nothing has to be registered for that. The table says which block each parameter got. The
trace of the Gauss-Newton matrix, by layer, says where the model is stiff.
"""

from __future__ import annotations

import codecs
import contextlib
import io
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import curvature
from curvature import plots
from precond import KFAC

LENGTH, STEPS = 32, 140


def text() -> str:
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return codecs.decode(this.s, "rot13")


def main(out: Path) -> None:
    letters = sorted(set(text()))
    codes = torch.tensor([letters.index(letter) for letter in text()])
    windows = codes.unfold(0, LENGTH + 1, 1)
    loss_fn = nn.CrossEntropyLoss()

    def model() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        config = GPT2Config(
            n_layer=2,
            n_head=2,
            n_embd=32,
            n_positions=LENGTH,
            vocab_size=len(letters),
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
        return GPT2LMHeadModel(config)

    def train(gpt: GPT2LMHeadModel, optimizer: torch.optim.Optimizer) -> list[float]:
        order = torch.Generator().manual_seed(1)
        losses = []
        for _ in range(STEPS):
            batch = windows[torch.randint(len(windows), (32,), generator=order)]
            optimizer.zero_grad()
            logits: Tensor = gpt(batch[:, :-1]).logits
            loss = loss_fn(logits.flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    curves = {}
    for lr in (2e-3, 5e-3, 1e-2):
        gpt = model()
        curves[f"AdamW, lr = {lr:g}"] = train(gpt, torch.optim.AdamW(gpt.parameters(), lr=lr))
    gpt = model()
    optimizer = KFAC(gpt, loss_fn)
    curves["K-FAC"] = train(gpt, optimizer)
    optimizer.detach()
    final = {name: sum(losses[-10:]) / 10 for name, losses in curves.items()}
    for name, loss in final.items():
        print(f"{name:18s} loss over the last ten steps {loss:.2f}")
    assert min(final, key=lambda name: final[name]) == "K-FAC", "K-FAC is ahead of AdamW at every learning rate"

    data = (windows[::20, :-1], windows[::20, 1:])
    table = curvature.coverage(gpt, loss_fn, data)
    print(table)
    assert table.covered == 1.0, "every parameter has a block by a layer rule"
    G = curvature.ggn(gpt, loss_fn, data, structure="diagonal", kind="mc", class_dim=-1)
    diagonal = G.diagonal()
    start, traces = 0, {}
    for name, p in gpt.named_parameters():
        layer = name.removeprefix("transformer.").rpartition(".")[0]
        traces[layer] = traces.get(layer, 0.0) + float(diagonal[start : start + p.numel()].sum())
        start += p.numel()

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, losses in curves.items():
        smooth = torch.tensor(losses).unfold(0, 5, 1).mean(1)
        left.plot(range(5, STEPS + 1), smooth.numpy(), label=name)
    left.set(xlabel="step", ylabel="loss per character", title="learning to spell")
    left.legend(frameon=False)
    left.spines[["top", "right"]].set_visible(False)
    plots.shares(traces, right, label="share of the trace of the Gauss-Newton matrix")
    right.set_title("where the curvature is")
    figure.savefig(out / "gpt2.png", dpi=110)


if __name__ == "__main__":
    main(Path(__file__).parent)

"""What a training loop may do that the curvature has no part of, in words for who wrote it."""

from __future__ import annotations

from collections.abc import Mapping

#: What is told once of each, after the name of the method.
WORDS: Mapping[str, str] = {
    "outside": (
        "a part of the loss was computed by the model without its forward (by another "
        "method of it, by its parts, or by another model that has some), where no use of a parameter is seen, "
        "so its curvature is left out. Let forward compute it (forward(x, part='decode'), say; for two models "
        "that share layers, that of one module that calls both), or leave it to the gradient alone by calling "
        "a function in place of the loss module, with loop=Loop(capture='loss')."
    ),
    "left out": (
        "a part of the loss compares an output with fixed targets by a function, and "
        "rounding hides its weight, as both are so near, or nothing tells it (entries have weights of their "
        "own, several such losses are added, or it is beside the loss on the same output), or it is another "
        "function of a pass of its own (targets that learn, a penalty) or a divergence at a temperature: it "
        "counts in no curvature as long as that is so. "
        "Call the module with these targets, where it is of its kind, or leave it out for good: "
        "loop=Loop(capture='loss')."
    ),
    "by hand": (
        "what stands in p.grad was put together by hand, of gradients that were kept, "
        "zeroed and added up or that torch.autograd.grad returned, and the curvature is that of the backward "
        "passes alone that were not zeroed. Let backward() accumulate: (loss / n).backward() for each part, "
        "with one zero_grad() before all. Or call backward() on the sum of the same losses last "
        "(retain_graph=True before), and then write p.grad: C is that of the sum."
    ),
    "in parts": (
        "the gradients of some parameters were divided by hand after backward(), and "
        "those of others were not, or by another number; their curvature is that of the loss as backward() "
        "saw it, so their steps are as much smaller. Divide all alike, or give these parameters a group with "
        "an lr of its own."
    ),
}

"""One call that compares reports."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from curvature.comparison.comparability import NotComparableWarning, obstacles, remarks
from curvature.comparison.document import Comparison
from curvature.comparison.quantities import quantities
from curvature.reports import Report

Source = Report | str | os.PathLike[str]


def compare(*reports: Source | Sequence[Source], names: Sequence[str] | None = None) -> Comparison:
    r"""What differs between reports on the curvature of one loss: of two models, or along a training run.

    Numbers that are in both, quantity by quantity, with the difference from the first report, its error
    (:math:`\sqrt{e_1^2 + e_2^2}` for standard errors, :math:`e_1 + e_2` for bounds) and their ratio; spectra over each
    other; layers side by side. Of more than two reports there is the course besides.

    Two numbers are said to differ beyond two standard errors, or beyond their bounds. Of many that are equal about one
    in twenty is beyond by chance. Of eigenvalues that have not converged nothing is concluded.

    >>> import torch
    >>> from torch import nn
    >>> from curvature.reports import report
    >>> x, y = torch.linspace(-1, 1, 8).unsqueeze(1), torch.linspace(-1, 1, 8).unsqueeze(1) ** 2
    >>> model = nn.Linear(1, 1)
    >>> before, after = (report(model, nn.MSELoss(), (x, y)) for _ in range(2))
    >>> (trace,) = compare(before, after).of("trace", matrix="ggn", layer="Linear")
    >>> trace.differences[1].differs, trace.differences[1].ratio
    (False, 1.0)

    Args:
        reports: Two or more of them, or one list: each a :class:`curvature.Report`, or a ``.json`` or ``.pt`` file that
            one was saved to. The first is the one that the others are compared with.
        names: One for each; the names of their files by default, and letters for objects.

    Returns:
        The comparison; print it, ``save("comparison.html")``, or read ``quantities``.

    Raises:
        TypeError: If something is no report.
        ValueError: If there are fewer than two, the names do not fit, or no number is in two of them.
        CheckpointError: If a file holds something else, or is damaged.
        OSError: If a file cannot be read.

    Warns:
        NotComparableWarning: If the reports are on other data, modes, losses or models.
    """
    given: list[Source] = []
    for entry in reports:
        given += entry if isinstance(entry, (list, tuple)) else [entry]  # type: ignore[list-item]
    if len(given) < 2:
        raise ValueError(f"a comparison takes two reports or more, got {len(given)}: compare(before, after).")
    chosen = _names(given, names)
    loaded = tuple(_load(source) for source in given)
    found = obstacles(loaded, chosen)
    same_damping = len({report.damping for report in loaded}) == 1
    same_k = len({report.k for report in loaded}) == 1
    comparison = Comparison(chosen, loaded, found, remarks(loaded, chosen), quantities(loaded, same_damping, same_k))
    if found:
        warnings.warn(
            f"these reports differ in more than the parameters: {'; '.join(found)}.", NotComparableWarning, stacklevel=2
        )
    return comparison


def _load(source: Source) -> Report:
    if isinstance(source, Report):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"a report is one of curvature.report, or the .json or .pt file it was saved to, not a "
            f"{type(source).__name__}."
        )
    if Path(source).suffix == ".html":
        raise ValueError(
            f"{Path(source).name} is a page for people, which no number can be read from: save the report as .json or "
            ".pt as well, report.save('report.json')."
        )
    return Report.load(source)


def _names(given: Sequence[Source], names: Sequence[str] | None) -> tuple[str, ...]:
    if names is not None:
        if isinstance(names, str) or len(names) != len(given) or len({*names}) < len(given):
            raise ValueError(f"names are {len(given)} different ones, one for each report, not {names!r}.")
        return tuple(names)
    letters = [_letter(i) for i in range(len(given))]
    stems = [
        Path(source).stem if isinstance(source, (str, os.PathLike)) else letter
        for source, letter in zip(given, letters, strict=True)
    ]
    if len({*stems}) < len(stems):  # reports of one name in several folders
        stems = [str(s) if isinstance(s, (str, os.PathLike)) else x for s, x in zip(given, letters, strict=True)]
    return tuple(stems) if len({*stems}) == len(stems) else tuple(letters)


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else str(index + 1)

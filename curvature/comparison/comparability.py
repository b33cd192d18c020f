"""Whether reports can be compared: what else differs between them than what they were made to show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isclose

from curvature.reports.results import Findings


class NotComparableWarning(UserWarning):
    """Reports belong to other data, modes, losses or models, so that their numbers differ for that reason as well."""


def obstacles(reports: Sequence[Findings], names: Sequence[str]) -> tuple[str, ...]:
    """Why numbers of the reports differ for other reasons than the parameters of the model."""
    found = [
        *_differing(reports, names, "models", lambda r: r.model),
        *_differing(reports, names, "losses", lambda r: r.loss_fn),
        *_differing(reports, names, "numbers of parameters", lambda r: f"{r.parameters:,}"),
        *_differing(reports, names, "dampings", lambda r: f"{r.damping:g}", " (what depends on it is left out)"),
    ]
    first, *others = reports
    for other, name in zip(others, names[1:], strict=True):
        if missing := [layer for layer in {**first.layers, **other.layers} if not _has_both(layer, first, other)]:
            found.append(f"layers of {names[0]} or {name} only: {_some(missing)}")
    settings = [report.setting for report in reports]
    if any(setting is None for setting in settings):
        unknown = [name for name, setting in zip(names, settings, strict=True) if setting is None]
        found.append(f"{_some(unknown)} does not say its mode and data: it was made by an older version")
    else:
        known = [setting for setting in settings if setting is not None]
        found += _differing(reports, names, "modes", lambda r: r.setting.mode if r.setting else "")
        if any(setting.examples != known[0].examples for setting in known):
            found += _differing(reports, names, "numbers of examples", lambda r: str(r.setting and r.setting.examples))
        elif not all(isclose(setting.data, known[0].data, rel_tol=1e-9, abs_tol=1e-9) for setting in known):
            which = [n for n, s in zip(names, known, strict=True) if not isclose(s.data, known[0].data, rel_tol=1e-9)]
            found.append(f"the data of {_some(which)} are not those of {names[0]}")
    return tuple(found)


def remarks(reports: Sequence[Findings], names: Sequence[str]) -> tuple[str, ...]:
    """Differences that leave the numbers comparable within their errors."""
    found = [
        *_differing(reports, names, "numbers of eigenvalues", lambda r: str(r.k)),
        *_differing(reports, names, "tolerances of eigenvalues", lambda r: f"{r.rtol:g}"),
        *_differing(reports, names, "budgets", lambda r: r.budget or "none"),
    ]
    if all(report.setting is not None for report in reports):
        found += _differing(reports, names, "data types", lambda r: r.setting.dtype if r.setting else "")
        found += _differing(reports, names, "devices", lambda r: r.setting.device if r.setting else "")
        found += _differing(
            reports, names, "versions", lambda r: " ".join(r.setting.versions.values()) if r.setting else ""
        )
    if any(not sums.trace.exact for report in reports for sums in report.traces.values()):
        same = len({report.seed for report in reports}) == 1
        found += (
            [
                "equal seeds drew equal random vectors: errors of estimates are taken as independent, so those of "
                "differences come out too large where the matrices are alike"
            ]
            if same
            else _differing(reports, names, "seeds", lambda r: str(r.seed))
        )
    return tuple(found)


def _differing(
    reports: Sequence[Findings], names: Sequence[str], what: str, read: Callable[[Findings], str], then: str = ""
) -> list[str]:
    values = [read(report) for report in reports]
    if len(set(values)) == 1:
        return []
    shown = ", ".join(f"{value} ({name})" for name, value in zip(names, values, strict=True))
    return [f"other {what}: {shown}{then}"]


def _has_both(layer: str, first: Findings, other: Findings) -> bool:
    return layer in first.layers and layer in other.layers


def _some(names: Sequence[str], most: int = 4) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest

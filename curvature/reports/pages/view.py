"""The contents of a report chapter by chapter, for text and HTML alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod

from curvature.reports.pages.chapter import BOUND, EIGENVALUE, ERROR, Chapter, Table, notes
from curvature.reports.pages.formats import DASH, condition, eigenvalue, memory, number, plain, seconds, share
from curvature.reports.results import Eigenvalue, Findings, Matrix, Number

NAMES = {"hessian": "Hessian", "ggn": "GGN"}


def chapters(report: Findings) -> list[Chapter]:
    """The chapters with contents."""
    made = [_glance, _spectrum, _layers, _structures, _rounding, _examples, _coverage, _missing, _cost]
    return [chapter for make in made if (chapter := make(report)) is not None]


def named(report: Findings, layer: str) -> str:
    """A layer by its name, with the class of its module where that is only a number."""
    kind = None if report.setting is None else report.setting.kinds.get(layer)
    return f"{layer} ({kind})" if kind and layer.rpartition(".")[2].isdigit() else layer


def facts(report: Findings) -> list[tuple[str, str]]:
    """The facts at the top: the loss, the sizes of model and data, and what the numbers belong to."""
    rows = [("loss", plain(report.loss.value)), ("gradient norm", plain(report.loss.gradient_norm))]
    rows.append(("parameters", f"{report.parameters:,}"))
    rows.append(("layers", f"{len(report.layers):,}"))
    setting = report.setting
    if report.noise is not None:
        rows.append(("examples", f"{report.noise.examples:,}"))
    elif setting is not None and setting.examples is not None:
        rows.append(("examples", f"{setting.examples:,}"))
    rows.append(("batches", f"{report.loss.batches:,}"))
    if setting is not None:
        rows += [("mode", setting.mode), ("dtype", setting.dtype), ("device", setting.device)]
        rows += [("learning rate", f"{setting.lr:g}")] if setting.lr is not None else []
    rows.append(("seed", f"{report.seed}"))
    if setting is not None:
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in setting.versions.items())))
    return rows


def _matrices(report: Findings) -> list[Matrix]:
    known = {*report.eigenvalues, *report.traces, *report.densities, *report.layer_eigenvalues}
    return [matrix for matrix in NAMES if matrix in known]


def _glance(report: Findings) -> Chapter | None:
    matrices = _matrices(report)
    if not matrices:
        return None

    def row(label: str, *cells: str) -> tuple[str, ...] | None:
        return (label, *cells) if any(cell != DASH for cell in cells) else None

    eigen = [report.eigenvalues.get(m) for m in matrices]
    trace = [report.traces.get(m) for m in matrices]
    density = [report.densities.get(m) for m in matrices]
    lam = f"{report.damping:g}"
    lr = None if report.setting is None else report.setting.lr
    edge = DASH if lr is None else plain(2 / lr)
    ends = [
        row("largest eigenvalue", *(_end(e.largest, e.complete) if e else DASH for e in eigen)),
        row(f"2 / lr at lr = {lr or 0:g}", *(edge if m == "hessian" else DASH for m in matrices)),
        row("smallest eigenvalue", *(_end(e.smallest, e.smallest_complete) if e else DASH for e in eigen)),
    ]
    sums = [
        row("trace", *(number(t.trace) if t else DASH for t in trace)),
        row("Frobenius norm", *(number(t.frobenius) if t else DASH for t in trace)),
        row(f"effective dimension at λ = {lam}", *(number(d.effective_dimension) if d else DASH for d in density)),
        row(f"condition with λ = {lam}", *(condition(d.condition) if d else DASH for d in density)),
    ]
    along = row(f"gradient in the top {report.k} directions", *(_aligned(e.alignment) if e else DASH for e in eigen))
    rows = tuple(r for r in (*ends, *sums, along) if r is not None)
    marks = notes((EIGENVALUE, _cells(ends)), (ERROR, _cells(sums)), (BOUND, _cells([along])))
    table = Table("The matrices in numbers", ("", *(NAMES[m] for m in matrices)), rows, notes=marks)
    return Chapter(
        "At a glance",
        "Curvature says how fast the slope of the loss changes as the parameters move. The Hessian is the exact "
        "curvature; the Gauss-Newton matrix (GGN) is the part of it that second-order optimizers use, which never "
        "bends downwards.",
        tuple(_findings(report)),
        (table,),
        expert=(
            "Without ± all digits shown are right.",
            "Effective dimension: tr C (C + λI)⁻¹. Condition: of C + λI, between bounds where it was estimated. Both "
            "are for the GGN only; the Hessian is indefinite. Share of the gradient: |Vᵀg|² / |g|², its error bounded "
            "by the residuals over the gap to the next eigenvalue.",
        ),
    )


def _cells(rows: Iterable[tuple[str, ...] | None]) -> list[str]:
    """Cells of rows, their names left out."""
    return [cell for row in rows if row is not None for cell in row[1:]]


def _end(pairs: tuple[Eigenvalue, ...], complete: bool) -> str:
    """The outermost eigenvalue, marked where there may be one beyond it."""
    if not pairs:
        return DASH
    return eigenvalue(pairs[0]) + (" *" if pairs[0].converged and not complete else "")


def _aligned(x: Number | None) -> str:
    if x is None:
        return DASH
    return "undetermined" if x.error >= 0.5 else share(x.value, x.error)


def _findings(report: Findings) -> Iterator[str]:
    hessian = report.eigenvalues.get("hessian")
    if hessian is not None:
        top = hessian.largest[0]
        if top.converged and hessian.complete and top.value > 0:
            yield (
                f"Plain gradient descent is stable here up to a learning rate of about {plain(2 / top.value, 3)}: two "
                "over the largest eigenvalue of the Hessian."
            )
        yield from _at_the_edge(report, top, hessian.complete)
        low = hessian.smallest[0] if hessian.smallest else None
        if low is not None and low.value + low.residual < 0 < top.value:
            yield (
                "The loss also bends downwards: the most negative curvature has "
                f"{share(-low.value / top.value)} of the size of the largest. This is no minimum."
            )
    noise = report.noise
    if noise is not None and noise.scale is not None:
        yield (
            f"The gradient noise scale is {number(noise.scale)} examples: much larger batches hardly improve a step, "
            "much smaller ones are mostly noise."
        )
    elif noise is not None:
        yield (
            f"On {noise.examples:,} examples the gradient cannot be told from zero: its noise is as large as itself."
        )
    if report.distances is not None and report.distances.structures:
        name, best = min(report.distances.structures.items(), key=lambda item: item[1].whole.value)
        yield f"Of the structures compared, {name} is nearest to the GGN: {share(best.whole.value)} of it is left out."


def _at_the_edge(report: Findings, top: Eigenvalue, complete: bool) -> Iterator[str]:
    """Where the largest eigenvalue is against 2 / lr."""
    lr = None if report.setting is None else report.setting.lr
    if lr is None:
        return
    known = top.converged and complete
    low, high = lr * (top.value - top.residual) / 2, lr * (top.value + top.residual) / 2
    if low > 1:
        verdict = "as far as the loss is quadratic, gradient descent of this learning rate diverges in that direction"
    elif high < 1 and known:
        verdict = "gradient descent of this learning rate is stable"
    else:
        verdict = "whether gradient descent of this learning rate is stable cannot be told"
    yield (
        f"At lr = {lr:g} the edge of stability, 2 / lr, is {plain(2 / lr, 3)}, and the largest eigenvalue is "
        f"{'' if known else 'at least '}{plain(lr * top.value / 2, 3)} of it: {verdict}."
    )


def _spectrum(report: Findings) -> Chapter | None:
    if not report.eigenvalues and not report.densities:
        return None
    tables = []
    for matrix, found in report.eigenvalues.items():
        marks = [(f"{i}", pair) for i, pair in enumerate(found.largest, start=1)]
        marks += [(f"lowest {i}", pair) for i, pair in enumerate(found.smallest, start=1)]
        rows = tuple((label, eigenvalue(pair), share(pair.gradient_share)) for label, pair in marks)
        all_met = all(pair.converged for pair in (*found.largest, *found.smallest))
        state = "" if all_met else "; not all have converged (*)"
        if all_met and not found.smallest_complete:
            state = "; the search for the lowest was not finished, so lower ones may exist"
        if not found.complete:
            state = "; the search was not finished, so larger ones may exist"
        head = ("", "eigenvalue", "share of gradient")
        explained = notes((EIGENVALUE, [cell for _, cell, _ in rows]))
        tables.append(
            Table(f"{NAMES[matrix]}: eigenvalues at the ends of the spectrum{state}", head, rows, notes=explained)
        )
    samples = {d.samples for d in report.densities.values()}
    how = "from all eigenvalues" if samples == {0} else f"from {max(samples, default=0)} random vectors"
    return Chapter(
        "Spectrum",
        "Each direction in parameter space has a curvature, an eigenvalue. Typically a few directions are steep and "
        "almost all are nearly flat; the steep ones limit the learning rate, the flat ones make training slow.",
        tables=tuple(tables),
        plots=("density", "eigenvalues"),
        expert=(
            f"Density {how}, smoothed by a Gaussian (stochastic Lanczos quadrature; the band is two standard errors). "
            "Eigenvalues by thick-restart Lanczos with full reorthogonalisation and a search for repeated ones; each "
            "is within its residual |Av - λv| of a true one. Both densities integrate to one.",
        ),
    )


def _layers(report: Findings) -> Chapter | None:
    if not report.traces and not report.layer_eigenvalues:
        return None
    matrices = _matrices(report)
    head = ["layer", "parameters"]
    for m in matrices:
        head += [f"{NAMES[m]}: share of trace"] if m in report.traces else []
        head += [f"{NAMES[m]}: largest eigenvalue"] if m in report.layer_eigenvalues else []
    rows, sums, tops = [], list[str](), list[str]()
    for name, size in report.layers.items():
        cells = [named(report, name), f"{size:,}"]
        for m in matrices:
            if m in report.traces:
                cells.append(trace_share(report, m, name))
                sums.append(cells[-1])
            if m in report.layer_eigenvalues:
                cells.append(eigenvalue(report.layer_eigenvalues[m].largest.get(name)))
                tops.append(cells[-1])
        rows.append(tuple(cells))
    marks = notes((ERROR, sums), (EIGENVALUE, tops))
    top = _dominant(report)
    return Chapter(
        "Layers",
        "The same curvature, layer by layer: which parts of the model are sensitive, and which could take larger "
        "steps.",
        () if top is None else (top,),
        (Table("Curvature by layer", tuple(head), tuple(rows), weights=_weights(report), notes=marks),),
        ("shares",),
        (
            "A layer is a module with the parameters it owns itself. Its block is the part of the matrix in which both "
            "rows and columns are its own; shares are its trace over that of the whole matrix. Blocks with negative "
            "eigenvalues can have negative shares.",
        ),
    )


def _weights(report: Findings) -> tuple[float, ...]:
    """Layers with the largest trace matter most, or the largest ones where it is not known."""
    found = report.traces.get("ggn") or report.traces.get("hessian")
    return tuple(report.layers.values() if found is None else (abs(x.value) for x in found.layers.values()))


def trace_share(report: Findings, matrix: Matrix, layer: str) -> str:
    """Share of a layer in the trace; a dash where the trace may be zero."""
    found = report.traces[matrix]
    whole, part = found.trace, found.layers[layer]
    if abs(whole.value) <= 2 * whole.error or whole.value == 0:
        return DASH
    return share(part.value / whole.value, part.error / abs(whole.value))


def _dominant(report: Findings) -> str | None:
    found = report.traces.get("ggn") or report.traces.get("hessian")
    if found is None or not found.trace.value > 2 * found.trace.error or len(found.layers) < 2:
        return None
    name, part = max(found.layers.items(), key=lambda item: item[1].value)
    of = "GGN" if "ggn" in report.traces else "Hessian"
    small = share(report.layers[name] / report.parameters)
    held = share(part.value / found.trace.value)
    return f"{named(report, name)} holds {held} of the trace of the {of}, with {small} of the parameters."


def _structures(report: Findings) -> Chapter | None:
    found = report.distances
    if found is None or not found.structures:
        return None
    names = list(found.structures)
    rows = [("whole matrix", *(_distance(found.structures[s].whole) for s in names))]
    weights = [float("inf")]
    for layer, weight in zip(report.layers, _weights(report), strict=True):
        cells = [_distance(found.structures[s].layers.get(layer)) for s in names]
        if any(cell != DASH for cell in cells):
            rows.append((named(report, layer), *cells))
            weights.append(weight)
    marks = notes((ERROR, _cells(rows)))
    sampled = any(d.kind == "mc" for d in found.structures.values())
    return Chapter(
        "Approximations",
        "Optimizers store the GGN in a simpler form. The distance says what that form leaves out: 0 % is the GGN "
        "itself, 100 % is as far away as no curvature at all.",
        tables=(
            Table("Relative distance to the GGN", ("layer", *names), tuple(rows), weights=tuple(weights), notes=marks),
        ),
        plots=("distances",),
        expert=(
            "|S - G| / |G| in the Frobenius norm, for the whole matrix (blocks off the diagonal included, which all of "
            "these structures leave out) and for each layer's own block."
            + (
                " The structures were estimated from sampled gradients, whose noise adds to the distances."
                if sampled
                else ""
            ),
        ),
    )


def _rounding(report: Findings) -> Chapter | None:
    found = report.sensitivity
    if found is None or not found.layers:
        return None
    head = ("layer", *(f"{bits} bits" for bits in found.bits))
    rows = tuple((name, *(plain(value) for value in values)) for name, values in found.layers.items())
    weights = tuple(values[0] for values in found.layers.values())
    return Chapter(
        "Sensitivity",
        "How much the loss would rise if the weights of one layer were rounded to a few bits, the others left alone: "
        "layers with large numbers need the bits.",
        tables=(Table("Predicted increase of the loss", head, rows, weights=weights),),
        plots=("sensitivity",),
        expert=(
            "Half the quadratic form of the rounding error in K-FAC's factors, from sampled labels; weights are "
            "rounded as curvature.quantize does, one scale per row. Increases of several layers add up, as far as the "
            "loss is quadratic.",
        ),
    )


def _distance(x: Number | None) -> str:
    return DASH if x is None else share(x.value, x.error)


def _examples(report: Findings) -> Chapter | None:
    noise = report.noise
    if noise is None:
        return None
    marks = (
        (0, "shortest"),
        (5, "5 % below"),
        (25, "25 %"),
        (50, "median"),
        (75, "75 %"),
        (95, "95 %"),
        (100, "longest"),
    )
    norms = Table(
        "Norms of the gradients of single examples",
        ("examples", "norm"),
        tuple((label, plain(noise.percentiles[at])) for at, label in marks),
    )
    numbers = Table(
        "Signal and noise",
        ("", "value"),
        (
            ("squared norm of the expected gradient", number(noise.squared_gradient)),
            ("total variance of one example's gradient", number(noise.covariance_trace)),
            ("noise scale, in examples", number(noise.scale) if noise.scale else "undetermined"),
        ),
        notes=notes((ERROR, (number(noise.squared_gradient), number(noise.covariance_trace), number(noise.scale)))),
    )
    longest = Table(
        "Examples with the longest gradients",
        ("example", "norm"),
        tuple((f"{index:,}", plain(norm)) for index, norm in noise.largest),
        words=0,
    )
    return Chapter(
        "Examples",
        "How much single examples disagree about the next step. Examples with by far the longest gradients are often "
        "mislabelled or unusual.",
        tables=(numbers, norms, longest) if noise.largest else (numbers, norms),
        plots=("norms",),
        expert=(
            "Gradients of examples are scaled so that their mean is the gradient of the loss. Noise scale: tr Σ / |G|² "
            "with unbiased estimates of both (McCandlish et al., 2018), undetermined where |G|² is within two standard "
            "errors of zero; errors by the jackknife over examples. "
            + (
                "Examples are numbered from 0 in the order of the data."
                if noise.largest
                else "Single examples are not named: the data come in another order in each pass (shuffle=False)."
            ),
        ),
    )


def _coverage(report: Findings) -> Chapter | None:
    table = report.coverage
    if table is None:
        return None
    sizes = tuple(float(prod(r.shape)) for r in table.rows)
    rows = tuple(
        (r.parameter, "\N{MULTIPLICATION SIGN}".join(map(str, r.shape)) or "scalar", r.structure, r.why)
        for r in table.rows
    )
    return Chapter(
        "Coverage",
        "How each parameter is used, and the structure that K-FAC gives it. "
        + (
            "All of them are used in ways that have a rule of their own."
            if table.covered == 1
            else f"{share(table.covered)} are used in ways that have a rule; the others get a curvature by autograd."
        ),
        tables=(
            Table("Every parameter and its structure", ("parameter", "shape", "structure", "why"), rows, 4, sizes),
        ),
    )


def _missing(report: Findings) -> Chapter | None:
    rows = [(refusal.part, refusal.message) for refusal in report.refused]
    rows += [(part, "left out: the budget did not reach it") for part in report.cut]
    short = [
        f"layers ({m}): {len(found.largest)} of {len(report.layers)} layers"
        for m, found in report.layer_eigenvalues.items()
        if len(found.largest) < len(report.layers)
    ]
    rows += [(text.split(":")[0], f"the budget reached {text.split(': ')[1]}") for text in short]
    rows += [("note", note) for note in report.notes]
    if not rows:
        return None
    return Chapter(
        "What is missing",
        "Parts that could not be computed, with the reason, and parts that the budget did not reach.",
        tables=(Table("Refused and left out", ("part", "why"), tuple(rows), 2),),
    )


def _cost(report: Findings) -> Chapter:
    in_products = report.budget is not None and report.budget.endswith("products")
    head = ("section", "time", "products", "predicted " + ("products" if in_products else "time"))
    rows = tuple(
        (
            c.part,
            seconds(c.seconds),
            f"{c.products:,.0f}",
            f"{c.predicted:,.0f}" if in_products else seconds(c.predicted),
        )
        for c in report.costs
    )
    limit = "without a limit" if report.budget is None else f"with a budget of {report.budget}"
    peak = "" if report.peak_memory is None else f" and {memory(report.peak_memory)} of memory at most"
    formed = "" if not report.formed else f" Formed as a whole, hence exact: {', '.join(report.formed)}."
    return Chapter(
        "Cost",
        f"This report took {seconds(report.seconds)}{peak}, {limit}.{formed}",
        tables=(Table("Time by section", head, rows),),
        expert=(
            f"Eigenvalues to a relative residual of {report.rtol:g}. Memory is that of the "
            "whole process, or of the accelerator.",
        ),
    )

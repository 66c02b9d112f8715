"""Figures of a run by plotly, from stored trials: the search, what it traded, and what the candidates look like inside.

Needs the extra ``report``.
"""

from __future__ import annotations

import html
import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from capnas.documents import or_nan
from capnas.errors import MissingDependencyError
from capnas.objective.evaluation import Evaluation
from capnas.objective.targets import LATENCY
from capnas.scoring import COSTS
from capnas.search.runs import RunResult

Row = tuple[FrozenTrial, Evaluation]

BLUE, GREY, RED, GREEN = "#2f6db5", "#9aa5b1", "#c4532f", "#3a8f5c"
_WIDE_LEFT = {"l": 210, "r": 16, "t": 36, "b": 52}  # room for names
_AXES = {  # of a metric: its name in a figure's title, and beside its axis
    "macs": ("multiply-accumulates", "multiply-accumulates of one image"),
    "saturation_evenness": ("evenness of saturation", "saturation evenness"),
    LATENCY: (LATENCY, "latency, milliseconds of one image"),
}
_SHARE_FROM = 6  # complete trials from which on parameters are ranked by importance


def figures(run: RunResult, correlations: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Plotly figures by title, those that the stored trials allow.

    Args:
        run: the run.
        correlations: rows with ``score``, ``spearman``, ``partial`` and ``chance``, as `capnas.report.summary` gives them.

    Raises:
        MissingDependencyError: plotly is not installed.
    """
    graph = _plotly()
    rows = run.evaluations()
    done = [row for row in rows if row[1].status in ("complete", "duplicate") and row[1].metrics.get("accuracy") is not None]
    best = None if run.best is None else run.best.number
    found: dict[str, Any] = {}
    if done:
        found["Accuracy over the search"] = _history(graph, rows, done)
        others = [n for n in run.config.values if len(run.config.values) > 1 and any(e.metrics.get(n) is not None for _, e in done)]
        for metric in dict.fromkeys(("macs", "saturation_evenness", *(name for name in others if name != "accuracy"))):
            title, axis = _AXES.get(metric, (metric.replace("_", " "),) * 2)
            found[f"Accuracy against {title}"] = (_trade if metric in (*COSTS, LATENCY) else _scatter)(graph, done, metric, axis)
        if any(e.profile is not None for _, e in done):
            found["Saturation through the network"] = _profiles(graph, done, best)
    if any(len(e.curve) > 1 for _, e in rows):
        found["Learning curves"] = _curves(graph, [row for row in rows if row[1].curve], best)
    if correlations:
        found["What went with accuracy"] = _bars(graph, correlations)
    found.update(_optuna(run))
    return found


def _plotly() -> Any:
    try:
        import plotly.graph_objects as graph
    except ModuleNotFoundError as error:
        raise MissingDependencyError("figures need plotly: pip install 'capnas[report]'.") from error
    return graph


def _styled(figure: Any, x: str | None, y: str | None, **layout: Any) -> Any:
    look = {"template": "plotly_white", "height": 380, "autosize": True, "margin": {"l": 64, "r": 16, "t": 36, "b": 52}, "title": None,
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "font": {"family": "system-ui, sans-serif", "size": 12.5, "color": "#1f2933"}, "hoverlabel": {"align": "left"}}  # fmt: skip
    figure.update_layout(**(look | layout))
    if x is not None:
        figure.update_xaxes(title=x)
    if y is not None:
        figure.update_yaxes(title=y)
    return figure


def _label(row: Row) -> str:
    trial, found = row
    params = "<br>".join(f"{html.escape(str(k))}: {html.escape(str(v))}" for k, v in list(trial.params.items())[:16])
    return f"<b>trial {trial.number}</b>, {found.n_params or 0:,} parameters, {found.macs or 0:,} MACs<br>{params}"


def _scaled(values: Iterable[float | None]) -> dict[str, str]:
    """Settings of an axis: a single value has no scale of its own, so its axis begins at 0."""
    return {"rangemode": "tozero"} if len(set(values)) == 1 else {}


def _accuracy(row: Row) -> float:
    return or_nan(row[1].metrics.get("accuracy"))


def _history(graph: Any, rows: Sequence[Row], done: Sequence[Row]) -> Any:
    stopped = [row for row in rows if row[1].status == "stopped" and row[1].metrics.get("accuracy") is not None]
    best = list(itertools.accumulate(map(_accuracy, done), max))
    last = max(t.number for t, _ in rows)
    traces = [
        graph.Scatter(x=[*(t.number for t, _ in done), last], y=[*best, best[-1]], mode="lines", name="best so far",
                      line={"shape": "hv", "color": RED}),
        graph.Scatter(x=[t.number for t, _ in stopped], y=[_accuracy(r) for r in stopped], mode="markers", name="stopped early",
                      marker={"color": GREY, "symbol": "circle-open", "size": 8}, hovertext=[_label(r) for r in stopped]),
        graph.Scatter(x=[t.number for t, _ in done], y=[_accuracy(r) for r in done], mode="markers", name="complete",
                      marker={"color": BLUE, "size": 9}, hovertext=[_label(r) for r in done]),
    ]  # fmt: skip
    side = max(0.5, 0.03 * last)  # lines get no room of their own beside the last trial
    axis = {"tickformat": "d", "dtick": 1 if last < 10 else None, "range": [-side, last + side]}
    return _styled(graph.Figure(traces), "trial", "validation accuracy", xaxis=axis, yaxis=_scaled(map(_accuracy, done)))


def _trade(graph: Any, done: Sequence[Row], metric: str, title: str) -> Any:
    """Accuracy and a cost of complete trials, with the line of those that no other beats in both."""
    kept = [row for row in done if row[1].metrics.get(metric)]
    points = sorted(((e.metrics[metric] or 0.0, _accuracy((t, e))) for t, e in kept), key=lambda point: (point[0], -point[1]))
    front: list[tuple[float, float]] = []
    for cost, accuracy in points:
        if not front or accuracy > front[-1][1]:
            front.append((cost, accuracy))
    figure = _scatter(graph, kept, metric, title)
    line = graph.Scatter(x=[cost for cost, _ in front], y=[accuracy for _, accuracy in front], mode="lines",
                         line={"color": RED, "shape": "hv"}, name="best at this cost", hoverinfo="skip")  # fmt: skip
    figure.add_trace(line)
    figure.update_xaxes(type="log" if points and points[-1][0] > 20 * points[0][0] else "linear", tickformat="~s")
    return figure


def _scatter(graph: Any, done: Sequence[Row], metric: str, title: str) -> Any:
    kept = [row for row in done if row[1].metrics.get(metric) is not None]
    x, y, sizes = [e.metrics[metric] for _, e in kept], [_accuracy(r) for r in kept], [e.n_params for _, e in kept]
    trace = graph.Scatter(
        x=x, y=y, mode="markers", name="trial", showlegend=False, hovertext=[_label(r) for r in kept],
        marker={"color": sizes, "colorscale": "Viridis", "size": 10, "line": {"width": 0.5, "color": "#444"},
                "showscale": len(set(sizes)) > 1,
                "colorbar": {"title": {"text": "parameters", "side": "right"}, "thickness": 12, "tickformat": "~s"}},
    )  # fmt: skip
    return _styled(graph.Figure(trace), title, "validation accuracy", xaxis=_scaled(x), yaxis=_scaled(y))


def _profiles(graph: Any, done: Sequence[Row], best: int | None) -> Any:
    """Saturation of the study's best trial, and of the median and the worst by accuracy, each once; blocks as lines, layers as dots."""
    order = sorted((r for r in done if r[1].profile is not None), key=_accuracy, reverse=True)
    chosen = [("best", row) for row in order if row[0].number == best]
    chosen += [("median", order[len(order) // 2]), ("worst", order[-1])]
    words: dict[int, list[str]] = {}
    for word, (trial, _) in chosen:
        words.setdefault(trial.number, []).append(word)
    figure = graph.Figure()
    for trial, found in {row[0].number: row for _, row in chosen}.values():
        word = words[trial.number][0]
        color = {"best": RED, "median": BLUE, "worst": GREY}[word]
        name = f"{', '.join(words[trial.number])}: trial {trial.number}, {_accuracy((trial, found)):.3f}"
        for reading in ("blocks", "modules"):
            rows = found.profile.reading(reading) if found.profile else ()
            lines = {"mode": "lines+markers", "line": {"color": color}} if reading == "blocks" else {"mode": "markers"}
            marker = {"color": color, "size": 8 if reading == "blocks" else 5, "opacity": 1 if reading == "blocks" else 0.45}
            figure.add_trace(graph.Scatter(
                x=[(i + 0.5) / len(rows) for i in range(len(rows))], y=[r.saturation for r in rows], name=name, legendgroup=word,
                showlegend=reading == "blocks", marker=marker, **lines,
                hovertext=[f"{word}, {reading[:-1]} {r.name} ({r.kind}): {r.k} of {r.width}" for r in rows], hoverinfo="text",
            ))  # fmt: skip
    return _styled(figure, "relative depth (lines: blocks, dots: layers)", "saturation", yaxis_range=[0, 1.05])


def _curves(graph: Any, rows: Sequence[Row], best: int | None) -> Any:
    figure = graph.Figure()
    for row in sorted(rows, key=lambda r: (r[0].number == best, r[1].status != "stopped")):
        trial, found = row
        color = RED if trial.number == best else GREY if found.status == "stopped" else BLUE
        figure.add_trace(graph.Scatter(
            x=[p["epoch"] for p in found.curve], y=[p.get("accuracy") for p in found.curve], mode="lines+markers", line={"color": color},
            opacity=1 if trial.number == best else 0.5, name=f"trial {trial.number}", hovertext=_label(row), showlegend=False,
        ))  # fmt: skip
    return _styled(figure, "epoch (red: best, grey: stopped early)", "validation accuracy", xaxis={"dtick": 1})


def _bars(graph: Any, correlations: Sequence[Mapping[str, Any]]) -> Any:
    """Rank correlations with accuracy, alone and at equal size; between the dotted lines is what chance gives."""
    shown = list(correlations)[:14][::-1]
    names = [str(r["score"]) for r in shown]
    traces = [
        graph.Bar(y=names, x=[r["partial"] for r in shown], orientation="h", marker={"color": GREEN}, name="at equal parameters and MACs"),
        graph.Bar(y=names, x=[r["spearman"] for r in shown], orientation="h", marker={"color": BLUE}, name="alone"),
    ]
    if all(r["partial"] is None for r in shown):
        del traces[0]  # it would keep room beside the other bars
    figure = graph.Figure(traces)
    chance = shown[0]["chance"] if shown else None
    for x in () if chance is None else (-chance, chance):
        figure.add_vline(x=x, line={"dash": "dot", "color": GREY})
    return _styled(
        figure,
        "rank correlation; dotted: chance",
        None,
        xaxis_range=[-1.02, 1.02],
        height=120 + 30 * len(shown),
        margin=_WIDE_LEFT,
        bargroupgap=0.1,
    )


def _optuna(run: RunResult) -> dict[str, Any]:
    """Optuna's own figures of the first value: importance of the parameters, and slices of the most important ones."""
    import optuna

    complete = [t for t in run.study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]
    if len(complete) < _SHARE_FROM:
        return {}
    name = run.config.values[0]
    target = None if len(run.config.values) == 1 else _first_value
    sign = -1 if run.config.directions[0] == "maximize" else 1

    def best_is_least(trial: FrozenTrial) -> float:  # as PED-ANOVA takes any target of several values
        return sign * _first_value(trial)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            shares = optuna.importance.get_param_importances(run.study, target=best_is_least if target else None)
        except (ValueError, RuntimeError):  # parameters that all complete trials share, or none in common
            return {}
        top = list(shares)[:4]
        if not top:
            return {}
        slices = optuna.visualization.plot_slice(run.study, params=top, target=target, target_name=name)
    slices.update_xaxes(tickangle=90)  # long names would lie across the next panel
    graph = _plotly()
    names = list(shares)[:12][::-1]
    bars = graph.Figure(graph.Bar(x=[shares[n] for n in names], y=names, orientation="h", marker={"color": BLUE}))
    height = 120 + 26 * len(names)
    return {
        "Which decisions mattered": _styled(bars, f"share for {name} (PED-ANOVA)", None, height=height, margin=_WIDE_LEFT),
        "Values by decision": _styled(slices, None, None, showlegend=False, width=None),
    }


def _first_value(trial: FrozenTrial) -> float:
    return trial.values[0]

"""The report's charts: matplotlib figures as inline SVG whose colours are the page's, in light and in dark.

Photos and tables are collected in `data.py`.
"""

import re
from io import StringIO
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cluster.app.report.data import Curve, Report
from cluster.app.report.examples import Generated
from cluster.app.report.results import Results, Role

# name -> (light, dark); the page's CSS variables. The light colours are also what matplotlib draws with
PALETTE = {
    "paper": ("#f7f6f3", "#131518"),
    "card": ("#fffefd", "#1b1e22"),
    "ink": ("#1d2125", "#e9e7e2"),
    "muted": ("#646b73", "#9aa2ab"),
    "line": ("#e5e2dc", "#2e3339"),
    "semi": ("#0d7a6f", "#3fc1ae"),
    "baseline": ("#76879a", "#8093a8"),
    "control": ("#c9c3b8", "#555c64"),
    "reference": ("#c98a2e", "#d9a45a"),
    "reranked": ("#7d6ca8", "#a596d0"),
    "right": ("#2c8a4b", "#55c07a"),
    "wrong": ("#b3473d", "#e2796e"),
}
COLOURS = {name: light for name, (light, _) in PALETTE.items()}
ROLE_COLOURS: dict[Role, str] = {
    "baseline": COLOURS["baseline"],
    "labelled": COLOURS["baseline"],
    "semi": COLOURS["semi"],
    "shuffled": COLOURS["control"],
    "control": COLOURS["control"],
    "reference": COLOURS["reference"],
    "reranked": COLOURS["reranked"],
}
CONTROL_COLOURS = ("#a8a194", "#c9c3b8", "#8c8577", "#dad5cb")
LONGEST = 200  # words of a delta; longer ones count as so long
WIDTH = 320  # of a chart, in the units of its text: about the CSS pixels it gets, so that text keeps its size
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "text.color": COLOURS["ink"],
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.7,
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "ytick.major.size": 0,
    "xtick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "legend.handlelength": 1.2,
}


def draw(report: Report) -> dict[str, Markup]:
    """SVG of each chart of the sections that the report has, by name."""
    with matplotlib.rc_context(STYLE):
        return {name: _svg(figure, name, label) for name, (label, figure) in _figures(report).items()}


def _figures(report: Report) -> dict[str, tuple[str, Figure]]:
    """name -> (what it shows, figure)."""
    results, curves = report.results, report.curves
    figures = {"gain": (f"{results.metric} of every variant, seeds as dots", _bars(results))}
    if report.mined is not None:
        figures["similarity"] = ("similarity of gallery, labelled and mined pairs", _similarity(report.mined.similarities))
    if report.generated is not None:
        figures["lengths"] = ("length of generated and human deltas", _lengths(report.generated))
        figures["scores"] = ("scores of the generated deltas", _scores(report.generated))
    for name, curve in (("align", curves.align), ("instruct", curves.instruct)):
        if curve is not None:
            figures[name] = (f"training loss of {name}", _loss(curve))
    figures["retrieval"] = ("training loss of the retrieval models", _losses(curves.retrieval, results, "loss"))
    for name, found in curves.validation.items():
        figures[name] = (f"{name} of the retrieval models", _losses(found, results, name))
    return figures


def _svg(figure: Figure, name: str, label: str) -> Markup:
    """The figure as an element of the page: sized by it, in its fonts and colours, with ids of its own."""
    stream = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.id": f"chart-{name}"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| (width|height)="[\d.]+pt"', "", text).replace("xlink:href", "href")
    text = re.sub(
        r' id="(figure|axes|patch|line2d|text|matplotlib|xtick|ytick|legend|PolyCollection|FillBetween\w*)[\w.]*"', "", text
    )
    text = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", text)
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))


def _axes(height: float) -> tuple[Figure, Axes]:
    """A figure of one chart, `WIDTH` wide."""
    figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
    return figure, figure.subplots()


def _bars(results: Results) -> Figure:
    rows = [row for _, band in results.bands for row in band]
    figure, axes = _axes(40 + 50 * len(rows))
    means = [results.score(row) for row in rows]
    axes.barh(range(len(rows)), means, height=0.6, color=[ROLE_COLOURS[row.role] for row in rows])
    for place, row in enumerate(rows):
        seeds = row.values[results.metric].seeds
        if len(seeds) > 1:
            axes.scatter(seeds, [place] * len(seeds), s=13, color=COLOURS["ink"], edgecolors=COLOURS["card"], lw=0.7, zorder=3)
        axes.annotate(
            f"{means[place]:.1f}",
            (max(seeds), place),
            (7, 0),
            textcoords="offset points",
            va="center",
            weight="bold" if row is results.best else "normal",
            bbox={"facecolor": COLOURS["card"], "edgecolor": "none", "pad": 1.5},
        )
    if results.baseline is not None:
        axes.axvline(results.score(results.baseline), color=COLOURS["baseline"], lw=0.9, ls=(0, (3, 3)), zorder=2)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], color=COLOURS["ink"])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, max(max(row.values[results.metric].seeds) for row in rows) * 1.14)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"{results.metric}, %")
    return figure


def _similarity(densities: dict[str, list[float]]) -> Figure:
    figure, axes = _axes(190)
    edges = np.array(densities["edges"])
    series = [
        ("gallery", "control", "random pairs"),
        ("labelled", "baseline", "labelled pairs"),
        ("mined", "semi", "mined pairs"),
    ]
    shown = [(name, colour, label) for name, colour, label in series if name in densities]
    for name, colour, label in shown:
        filled = name == "gallery"
        alpha, line = (0.35, 0.0) if filled else (1.0, 1.8)
        axes.stairs(densities[name], edges, label=label, fill=filled, color=COLOURS[colour], alpha=alpha, lw=line)
    spread = np.flatnonzero(np.sum([densities[name] for name, _, _ in shown], axis=0) > 0.01)
    axes.set_xlim(edges[max(spread[0] - 1, 0)], edges[min(spread[-1] + 2, len(edges) - 1)])
    axes.set_yticks([])
    axes.set_xlabel("cosine of the centred features")
    axes.legend()
    return figure


def _lengths(generated: Generated) -> Figure:
    figure, axes = _axes(190)
    longest = int(min(max(generated.texts.lengths.max(initial=1), generated.human.lengths.max(initial=1)), LONGEST))
    edges = np.linspace(0.5, longest + 0.5, min(longest, 30) + 1)
    for texts, colour, label in ((generated.human, "baseline", "human"), (generated.texts, "semi", "generated")):
        shares = 100 * np.histogram(np.minimum(texts.lengths, longest), edges)[0] / max(len(texts.lengths), 1)
        axes.stairs(shares, edges, color=COLOURS[colour], alpha=0.18, fill=True)
        axes.stairs(shares, edges, color=COLOURS[colour], lw=1.8, label=label)
    axes.set_xlabel("words a delta")
    axes.set_ylabel("%")
    axes.legend()
    return figure


def _scores(generated: Generated) -> Figure:
    figure, axes = _axes(190)
    shares, edges = np.histogram(generated.scores, 40)
    axes.stairs(100 * shares / max(len(generated.scores), 1), edges, color=COLOURS["semi"], alpha=0.55, fill=True)
    if generated.least_score is not None:
        axes.axvline(generated.least_score, color=COLOURS["ink"], lw=1, ls=(0, (3, 3)))
        axes.annotate(
            "kept ", (generated.least_score, 1), (5, -10), xycoords=("data", "axes fraction"), textcoords="offset points"
        )
    axes.set_xlabel("log-probability of a delta")
    axes.set_ylabel("%")
    return figure


def _loss(curve: Curve) -> Figure:
    """One stage's loss: each report pale, their running mean over it."""
    figure, axes = _axes(190)
    axes.plot(curve.steps, curve.values, color=COLOURS["semi"], alpha=0.3, lw=1)
    axes.plot(curve.steps, _smooth(curve.values), color=COLOURS["semi"], lw=1.8)
    _label(axes, "loss")
    return figure


def _losses(curves: list[Curve], results: Results, metric: str) -> Figure:
    figure, axes = _axes(190)
    roles = {row.name: row.role for row in results.rows}
    controls = iter(CONTROL_COLOURS)
    for curve in curves:
        role = roles[curve.name]
        colour = next(controls, COLOURS["control"]) if role in ("control", "shuffled") else ROLE_COLOURS[role]
        values = _smooth(curve.values) if metric == "loss" else curve.values
        axes.plot(curve.steps, values, color=colour, lw=1.8 if role in ("baseline", "semi") else 1.2, label=curve.name)
    _label(axes, metric)
    axes.legend(ncols=2)
    return figure


def _smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over about a fifteenth of the curve, shorter at its ends."""
    half = len(values) // 30
    return np.array([values[max(i - half, 0) : i + half + 1].mean() for i in range(len(values))])


def _label(axes: Axes, metric: str) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(metric)
    axes.set_ylim(bottom=0)

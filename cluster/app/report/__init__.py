"""The report of a finished run: one self-contained HTML page."""

from pathlib import Path

import jinja2

from cluster.app.graph import Graph
from cluster.app.report import words
from cluster.app.report.data import collect
from cluster.app.report.plots import PALETTE, draw
from cluster.artifacts import Output

TEMPLATE = "report.html.j2"


def environment() -> jinja2.Environment:
    """What fills the pages of this folder; everything is escaped."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {name: getattr(words, name) for name in ("count", "short", "signed", "interval", "duration")}
    return made


def write_report(graph: Graph, folder: Output) -> None:
    """Write `report.html` into a run's folder; every stage of the run is finished."""
    report = collect(graph)
    page = environment().get_template(TEMPLATE).render(report=report, charts=draw(report), palette=PALETTE)
    folder.write_bytes("report.html", page.encode())

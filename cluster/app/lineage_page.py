"""A lineage drawn as one HTML page: a column for each step from the sources, an arrow from each output to what it made."""

from dataclasses import dataclass

import networkx as nx

from cluster.app.report import environment
from cluster.app.report.plots import PALETTE
from cluster.driver.lineage import Lineage, Made

WIDTH, HEIGHT, ACROSS, DOWN = 200, 48, 270, 66  # of a box, and from one box to the next, in pixels
MARGIN = 20


@dataclass(frozen=True)
class Box:
    """An output at its place."""

    made: Made
    x: int
    y: int
    kind: str  # asked, removed or other


def page(lineage: Lineage, shown: dict[str, Made], asked: set[str], root: str) -> str:
    """The page of some outputs of a lineage, those that were asked for in colour."""
    boxes = _boxes(lineage, shown, asked)
    arrows = [
        {"curve": _curve(boxes[parent], boxes[child]), "role": role}
        for child in shown
        for role, parent in lineage.parents.get(child, {}).items()
        if parent in shown
    ]
    return (
        environment()
        .get_template("lineage.html.j2")
        .render(
            title=", ".join(sorted(shown[name].instance for name in asked)),
            root=root,
            width=max(box.x for box in boxes.values()) + ACROSS,
            height=max(box.y for box in boxes.values()) + DOWN,
            box_width=WIDTH,
            box_height=HEIGHT,
            arrows=arrows,
            boxes=list(boxes.values()),
            rows=[(box.made, lineage.above(box.made)) for box in sorted(boxes.values(), key=lambda box: (box.x, box.y))],
            palette=PALETTE,
        )
    )


def _boxes(lineage: Lineage, shown: dict[str, Made], asked: set[str]) -> dict[str, Box]:
    """Each in the column behind the last of its parents', in the order of the names."""
    graph: nx.DiGraph = nx.DiGraph((parent, child) for child in shown for parent in lineage.parents.get(child, {}).values())
    graph.add_nodes_from(shown)
    boxes = {}
    for column, names in enumerate(nx.topological_generations(graph.subgraph(shown))):
        for place, name in enumerate(sorted(names)):
            kind = "asked" if name in asked else "removed" if shown[name].manifest is None else "other"
            boxes[name] = Box(shown[name], MARGIN + column * ACROSS, MARGIN + place * DOWN, kind)
    return boxes


def _curve(start: Box, end: Box) -> str:
    (x0, y0), (x1, y1) = (start.x + WIDTH, start.y + HEIGHT // 2), (end.x, end.y + HEIGHT // 2)
    middle = (x0 + x1) // 2
    return f"M{x0} {y0}C{middle} {y0} {middle} {y1} {x1} {y1}"

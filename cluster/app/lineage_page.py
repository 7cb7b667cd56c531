"""A lineage drawn as one HTML page: a column for each step from the sources, an arrow from each output to what it made."""

from html import escape

from cluster.driver.lineage import Lineage, Made

WIDTH, HEIGHT, ACROSS, DOWN = 190, 44, 260, 64  # of a box, and from one box to the next, in pixels


def page(lineage: Lineage, shown: dict[str, Made], asked: set[str]) -> str:
    """The page of some outputs of a lineage, those that were asked for in colour."""
    places = _places(lineage, shown)
    width = max(x for x, _ in places.values()) + ACROSS
    height = max(y for _, y in places.values()) + DOWN
    arrows = [
        _arrow(places[parent], places[child], role)
        for child in shown
        for role, parent in lineage.parents.get(child, {}).items()
        if parent in shown
    ]
    boxes = [_box(made, places[name], name in asked) for name, made in shown.items()]
    return (
        "<!doctype html><meta charset='utf-8'><title>Lineage</title>"
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' font-family='sans-serif' font-size='12'>"
        "<defs><marker id='tip' viewBox='0 0 8 8' refX='8' refY='4' markerWidth='7' markerHeight='7' orient='auto'>"
        "<path d='M0 0 8 4 0 8z' fill='#888'/></marker></defs>"
        f"{''.join(arrows)}{''.join(boxes)}</svg>\n"
    )


def _places(lineage: Lineage, shown: dict[str, Made]) -> dict[str, tuple[int, int]]:
    depths: dict[str, int] = {}

    def depth(name: str) -> int:
        if name not in depths:
            parents = [parent for parent in lineage.parents.get(name, {}).values() if parent in shown]
            depths[name] = 1 + max(map(depth, parents), default=-1)
        return depths[name]

    rows: dict[int, int] = {}
    places = {}
    for name in sorted(shown):
        column = depth(name)
        places[name] = (20 + column * ACROSS, 20 + rows.get(column, 0) * DOWN)
        rows[column] = rows.get(column, 0) + 1
    return places


def _arrow(start: tuple[int, int], end: tuple[int, int], role: str) -> str:
    (x0, y0), (x1, y1) = (start[0] + WIDTH, start[1] + HEIGHT // 2), (end[0], end[1] + HEIGHT // 2)
    middle = (x0 + x1) // 2
    curve = f"M{x0} {y0}C{middle} {y0} {middle} {y1} {x1} {y1}"
    return f"<path d='{curve}' fill='none' stroke='#888' marker-end='url(#tip)'><title>{escape(role)}</title></path>"


def _box(made: Made, place: tuple[int, int], asked: bool) -> str:
    x, y = place
    fill = "#fde9b8" if asked else "#eee" if made.manifest is None else "#e3eefb"
    rows = "removed" if made.manifest is None else f"{made.manifest['rows']:,} rows" if made.manifest["rows"] else ""
    return (
        f"<rect x='{x}' y='{y}' width='{WIDTH}' height='{HEIGHT}' rx='5' fill='{fill}' stroke='#667'/>"
        f"<text x='{x + 8}' y='{y + 18}'>{escape(made.instance)}</text>"
        f"<text x='{x + 8}' y='{y + 35}' fill='#556'>{made.digest} {rows}</text>"
    )

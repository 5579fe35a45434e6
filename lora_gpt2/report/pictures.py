"""Pictures of a report as SVG that stands inside a page: curves, heat map, Pareto front, spectra."""

import io
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from lora_gpt2.errors import UserError

Line = tuple[Sequence[float], Sequence[float]]
"""x and y of each point."""


def curves(lines: Mapping[str, Line], x: str, y: str) -> str:
    """One line a name; those of one point are dots."""
    figure, place = _figure()
    for name, (xs, ys) in lines.items():
        place.plot(xs, ys, marker="o" if len(xs) < 20 else None, markersize=3, linewidth=1.2, label=name)
    place.set(xlabel=x, ylabel=y)
    if len(lines) > 1:
        place.legend(fontsize="x-small", ncols=2 if len(lines) > 6 else 1)
    place.grid(alpha=0.3)
    return _svg(figure)


def heat_map(cells: Mapping[tuple[Any, Any], float], x: str, y: str, value: str) -> str:
    """A square for each (x, y), its value written in it."""
    columns, rows = (sorted({key[axis] for key in cells}) for axis in (0, 1))
    grid = [[cells.get((column, row), float("nan")) for column in columns] for row in rows]
    figure, place = _figure(height=1.2 + 0.55 * len(rows))
    image = place.imshow(grid, cmap="viridis", aspect="auto", origin="lower")
    place.set(xlabel=x, ylabel=y)
    place.set_xticks(range(len(columns)), [f"{one:g}" for one in columns])
    place.set_yticks(range(len(rows)), [f"{one:g}" for one in rows])
    middle = sum(image.get_clim()) / 2
    for i, row in enumerate(grid):
        for j, one in enumerate(row):
            if one == one:
                place.text(j, i, f"{one:.4f}", ha="center", va="center", fontsize=8,
                           color="black" if one > middle else "white")  # fmt: skip
    figure.colorbar(image, ax=place, label=value)
    return _svg(figure)


def front(points: Mapping[str, tuple[float, float]], x: str, y: str, falling: bool) -> str:
    """A dot each; those that no other beats in both are joined, and named."""
    figure, place = _figure()
    sign = 1 if falling else -1
    best: dict[str, tuple[float, float]] = {}
    for name, one in sorted(points.items(), key=lambda item: (item[1][0], sign * item[1][1])):
        if not best or sign * one[1] < min(sign * value for _, value in best.values()):
            best[name] = one
    place.plot(*zip(*points.values(), strict=True), "o", color="tab:blue", markersize=4)
    place.plot(*zip(*best.values(), strict=True), color="tab:red", linewidth=1, label="Pareto front")
    middle = sum(a for a, _ in points.values()) / len(points)
    for name, (a, b) in best.items():  # on the wider side of its dot
        where = {"xytext": (-3, 3), "ha": "right"} if a > middle else {"xytext": (3, 3), "ha": "left"}
        place.annotate(name, (a, b), fontsize=7, textcoords="offset points", **where)
    place.set(xlabel=x, ylabel=y)
    place.margins(0.1)
    place.legend(fontsize="x-small")
    place.grid(alpha=0.3)
    return _svg(figure)


def _figure(height: float = 3.2) -> tuple[Any, Any]:
    try:
        import matplotlib
    except ImportError:
        do = 'pip install "lora-gpt2[report]"'
        raise UserError("report", "needs matplotlib, which is not installed", do) from None
    matplotlib.use("agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any) -> str:
    """The bare element: no address of a standard in it, and names that no other picture of the page has."""
    import matplotlib

    written = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lora-gpt2"}):
        figure.savefig(written, format="svg", metadata={"Date": None})
    text = written.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    own = f"p{zlib.crc32(text.encode())}-"
    text = re.sub(r'\bid="', f'id="{own}', text)
    text = re.sub(r'href="#', f'href="#{own}', text)
    return re.sub(r"url\(#", f"url(#{own}", text)

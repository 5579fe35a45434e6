"""An adapter's analysis as a table, as JSON and as a picture."""

import math
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lora_gpt2.errors import UserError
from lora_gpt2.files import replacing
from lora_gpt2.weights.analysis import Analysis

Overlaps = dict[tuple[str, str], Tensor]
"""`similarity` of two adapters by layer and part."""


def table(analyses: list[Analysis], rank: int | None, overlaps: Overlaps | None) -> None:
    """Prints a line for each projection.

    `rank`: with the energy that a cut to it would keep; `overlaps`: with the similarity of the whole spaces.
    """
    columns = ["projection", "r", "norm", "/base", "amplif", "eff.r", "s_1", "s_r"]
    columns += [f"at {rank}"] if rank is not None else []
    columns += ["shared"] if overlaps is not None else []
    shown = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for column in columns:
        shown.add_column(column, justify="left" if column == "projection" else "right", no_wrap=True)
    for one in analyses:
        values = [f"{len(one.spectrum)}", f"{one.norm:.3g}", _figure(one.relative_norm)]
        values += [_figure(one.amplification), f"{one.effective_rank:.2f}"]
        values += [f"{float(one.spectrum[0]):.3g}", f"{float(one.spectrum[-1]):.3g}"]
        values += [f"{100 * one.energy(rank):.1f} %"] if rank is not None else []
        if overlaps is not None:
            grid = overlaps.get((one.layer, one.part))
            values.append(_figure(None if grid is None else float(grid[-1, -1])))
        shown.add_row(f"{one.layer} {one.part}", *values)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(shown)
    console.print("norm of the update, over the base's, how much it amplifies the base in its directions,")
    console.print("effective rank, largest and smallest singular value")


def as_json(analyses: list[Analysis], overlaps: Overlaps | None) -> list[dict[str, Any]]:
    """The same figures as plain values."""
    lines = []
    for one in analyses:
        values = {
            "layer": one.layer,
            "part": one.part,
            "singular_values": one.spectrum.tolist(),
            "norm": one.norm,
            "relative_norm": one.relative_norm,
            "amplification": one.amplification,
            "effective_rank": one.effective_rank,
        }
        if overlaps is not None:
            grid = overlaps.get((one.layer, one.part))
            values["similarity"] = None if grid is None else grid.tolist()
        lines.append(values)
    return lines


def picture(path: Path, analyses: list[Analysis], overlaps: Overlaps | None) -> None:
    """Spectra by layer and, for two adapters, their similarity; PNG or SVG by the name's ending.

    Raises UserError where matplotlib is missing or the ending is another.
    """
    if path.suffix not in (".png", ".svg"):
        raise UserError(path, "the picture is a .png or a .svg", "choose such a name")
    try:
        import matplotlib
    except ImportError:
        do = 'pip install "lora-gpt2[report]"'
        raise UserError("--picture", "needs matplotlib, which is not installed", do) from None
    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "lora-gpt2"  # the same adapter, the same bytes
    from matplotlib.figure import Figure

    kinds = sorted({_kind(one) for one in analyses})
    grids = list((overlaps or {}).items())
    across = max(len(kinds), min(4, len(grids)), 1)
    down = 1 + math.ceil(len(grids) / across)
    figure = Figure(figsize=(4 * across, 3.2 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    for place in axes.flat:
        place.set_axis_off()
    for kind, place in zip(kinds, axes[0], strict=False):
        _spectra(place, kind, [one for one in analyses if _kind(one) == kind])
    for ((layer, part), grid), place in zip(grids, axes[1:].flat, strict=False):
        place.set_axis_on()
        reach = 0.5, grid.shape[1] + 0.5, 0.5, grid.shape[0] + 0.5
        image = place.imshow(grid.numpy(), vmin=0, vmax=1, origin="lower", cmap="viridis", extent=reach)
        place.set(title=f"similarity, {layer} {part}", xlabel="j (the other)", ylabel="i")
        place.locator_params(integer=True)
        figure.colorbar(image, ax=place)
    with replacing(path) as temporary:
        figure.savefig(
            temporary, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else {}
        )


def _spectra(place: Any, kind: str, analyses: list[Analysis]) -> None:
    place.set_axis_on()
    for one in analyses:
        ranks = range(1, len(one.spectrum) + 1)
        place.plot(ranks, one.spectrum.tolist(), marker="o", markersize=3, label=one.layer.split(".")[1])
    place.set(title=f"singular values, {kind}", xlabel="i")
    place.set_ylim(bottom=0)
    place.xaxis.get_major_locator().set_params(integer=True)
    place.legend(title="block", fontsize="x-small", ncols=2)


def _kind(one: Analysis) -> str:
    return f"{one.layer.split('.', 2)[2]} {one.part}".strip()


def _figure(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3g}"

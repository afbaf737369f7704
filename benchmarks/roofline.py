"""The roofline of a recording: every timed case of mixft under the ceilings measured in the same run.

Left, work without matrix products: bytes a second, case by case, under the bandwidth of a copy, a read and an addition
in place. Right, matrix products: operations a second over operations a byte, under the bandwidth's slope and each data
type's rate (Williams, Waterman and Patterson, Roofline: an insightful visual performance model, 2009).
"""

from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes

from .case import OURS
from .plot_style import CYCLE, MARKERS, canvas, drawn_alike, legend_below, machine_name, plain_numbers, save

STREAMS = {"copy": "-", "read": "--", "update": ":"}


@drawn_alike
def roofline(recording: dict, path: Path) -> None:
    """Draw the roofline of the module docstring.

    Raises:
        ValueError: no row of mixft has a time.
    """
    timed = [row for row in recording["rows"] if row["provider"] == OURS and row["status"] == "timed"]
    if not timed:
        raise ValueError("no row of mixft in the recording has a time; nothing to draw")
    moved = [row for row in timed if not row["operations"]]
    multiplied = [row for row in timed if row["operations"]]
    panels = [(draw, rows) for draw, rows in ((_bandwidth_panel, moved), (_product_panel, multiplied)) if rows]
    figure = canvas(6.2 * len(panels), 5.4)
    for index, (draw, rows) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        draw(axes, rows, recording["machine"])
        plain_numbers(axes.xaxis)
        plain_numbers(axes.yaxis)
        axes.grid(which="both")
        legend_below(axes)
    figure.suptitle(machine_name(recording))
    save(figure, path, recording)


def _bandwidth_panel(axes: Axes, rows: list[dict], machine: dict) -> None:
    for row, look in _by_family(rows):
        axes.plot(row["bytes"] / 1e6, row["bytes"] / row["seconds"] / 1e9, linestyle="", **look)
    for name, line in STREAMS.items():
        ceiling = machine.get(f"{name}_bytes_per_second", 0.0) / 1e9
        if not ceiling:  # a recording from before it was measured
            continue
        axes.axhline(ceiling, color="black", linestyle=line, linewidth=1, label=f"{name} {ceiling:,.0f} GB/s")
    axes.set_xlabel("MB that the work must move")
    axes.set_ylabel("GB/s, of those bytes")
    axes.set_title("no matrix products: bandwidth")


def _product_panel(axes: Axes, rows: list[dict], machine: dict) -> None:
    bandwidth = max(machine.get(f"{name}_bytes_per_second", 0.0) for name in STREAMS) / 1e12
    rates = {name: rate / 1e12 for name, rate in machine["matmul_operations_per_second"].items() if rate}
    intensities = [row["operations"] / row["bytes"] for row in rows]
    left = min(intensities) / 2
    right = max([*intensities, *(rate / bandwidth for rate in rates.values())]) * 2
    for row, look in _by_family(rows):
        rate = row["operations"] / row["seconds"] / 1e12
        axes.plot(row["operations"] / row["bytes"], rate, linestyle="", **look)
    labelled: list[tuple[float, list[str]]] = []
    for name, rate in sorted(rates.items(), key=lambda item: item[1]):
        axes.plot([left, rate / bandwidth, right], [left * bandwidth, rate, rate], color="black", linewidth=0.9)
        if labelled and rate < 1.2 * labelled[-1][0]:  # the labels would lie on each other
            labelled[-1][1].append(f"{name} {rate:,.3g}")
        else:
            labelled.append((rate, [f"{name} {rate:,.3g}"]))
    for rate, names in labelled:
        # Beside the axes, where no point can lie under it.
        beside = {"xycoords": ("axes fraction", "data"), "va": "center", "annotation_clip": False}
        axes.annotate("\n".join(names), (1.01, rate), **beside)
    axes.set_xlabel("operations a byte")
    axes.set_ylabel("T operations/s")
    axes.set_title("matrix products: roofline")


def _by_family(rows: list[dict]) -> Iterable[tuple[dict, dict]]:
    families = list(dict.fromkeys(row["family"] for row in rows))
    for row in rows:
        index = families.index(row["family"])
        marker = MARKERS[index % len(MARKERS)]
        yield row, {"color": CYCLE[index % len(CYCLE)], "marker": marker, "label": row["family"]}

"""Pictures of a recording: speed-ups as bars, a roofline, memory as stacks, and how time grows.

Each function takes a recording as ``mixft bench --json`` writes it and a path that ends in .png or .svg, and raises
``ValueError`` where the recording has nothing of the kind.
"""

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .case import OURS
from .growth import slopes
from .memory import MEASURED
from .plot_style import CYCLE, GREY, canvas, drawn_alike, durations, machine_name, patch, save, style
from .recording import Row, Sweep
from .roofline import roofline

BAR_INCHES, CASE_INCHES = 0.17, 0.12

# What the pictures call the tensors that a provider holds, whatever its own names for them are.
MEMORY_KINDS = {
    "parameters": ("parameters",),
    "masters": ("master", "remainder", "FP32 copies"),
    "moments": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "state1", "state2", "moments"),
    "scales and tables": ("exp_avg_scale", "exp_avg_sq_scale", "absmax1", "absmax2", "qmap1", "qmap2"),
    "gradients": ("gradients", "copied gradients"),
}
OTHER = "other"


@drawn_alike
def ratio_bars(recording: dict, path: Path) -> None:
    """One group of bars a case: each peer's time over mixft's, with its quartiles, on both sides of the line at 1.

    A peer that gave a wrong output or refused the case is said so in its place; those that are not installed, or that
    refused every case, are named below the picture.
    """
    statuses: dict[str, set[str]] = {}
    for row in recording["rows"]:
        statuses.setdefault(row["provider"], set()).add(row["status"])
    absent = {name: kinds for name, kinds in statuses.items() if name != OURS and kinds <= {"missing", "refused"}}
    cases = {row["case"]: [] for row in recording["rows"] if row["provider"] == OURS}
    for row in recording["rows"]:
        if row["provider"] not in (OURS, *absent) and row["case"] in cases:
            cases[row["case"]].append(row)
    cases = {case: peers for case, peers in cases.items() if peers}
    if not cases:
        raise ValueError("no row of the recording has a peer beside it; mixft bench records some")
    missing = sorted(name for name, kinds in absent.items() if "missing" in kinds)
    refusing = sorted(set(absent) - set(missing))
    height = sum(map(len, cases.values())) * BAR_INCHES + len(cases) * CASE_INCHES
    figure = canvas(8, height + 1.3 + 0.2 * bool(missing) + 0.2 * bool(refusing))
    axes = figure.add_subplot()
    top, ends = 0.0, [0.9, 1.2]
    for case, peers in cases.items():
        middle = top + len(peers) * BAR_INCHES / 2
        axes.text(-0.01, middle, case, transform=axes.get_yaxis_transform(), ha="right", va="center")
        for row in peers:
            ends += _ratio_bar(axes, row, top + BAR_INCHES / 2)
            top += BAR_INCHES
        top += CASE_INCHES
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    room = (max(ends) / min(ends)) ** 0.12
    axes.set_xlim(min(ends) / room**0.5, max(ends) * room)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=10))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}x"))
    axes.set_ylim(top, -CASE_INCHES)
    axes.yaxis.set_major_locator(NullLocator())
    axes.grid(axis="x")
    axes.set_xlabel("time of the peer / time of mixft (right of 1: mixft is faster)")
    axes.set_title(machine_name(recording))
    timed = dict.fromkeys(row["provider"] for peers in cases.values() for row in peers if row["speedup"] is not None)
    if timed:
        handles = [patch(name, *style(name)) for name in timed]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(5, len(handles)))
    notes = [f"not installed where this was recorded: {', '.join(missing)}"] if missing else []
    notes += [f"refused every case: {', '.join(refusing)}"] if refusing else []
    if notes:
        figure.supxlabel("\n".join(notes), fontsize=8, color=GREY)
    save(figure, path, recording)


def _ratio_bar(axes: Axes, row: dict, centre: float) -> list[float]:
    """Draw one peer's bar, or the reason for none; returns how far along the axis it reaches."""
    beside = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 7}
    if row["speedup"] is None:
        text = {"wrong": "wrong output", "refused": "refused"}.get(row["status"], "no time of mixft beside it")
        axes.annotate(f"{row['provider']}: {text}", (1, centre), color=GREY, style="italic", **beside)
        return []
    color, hatch = style(row["provider"])
    ends = [row["speedup"], row["speedup_low"], row["speedup_high"]]
    length = row["speedup"] - 1
    axes.barh(centre, length, 0.88 * BAR_INCHES, left=1, color=color, hatch=hatch, edgecolor="white", linewidth=0)
    axes.plot(ends[1:], [centre, centre], color="black", linewidth=0.8)
    axes.annotate(f"{row['speedup']:.2f}", (max(1, *ends), centre), **beside)
    return ends


@drawn_alike
def memory_stacks(recording: dict, path: Path) -> None:
    """One stack a row that knows where its memory goes: the kinds of it in MiB, and the measured peak as a line."""
    rows = [row for row in recording["rows"] if row["memory"]]
    if not rows:
        raise ValueError("no row of the recording has a memory; mixft bench of an optimizer step records some")
    stacks = [_by_kind(row["memory"]) for row in rows]
    kinds = [kind for kind in (*MEMORY_KINDS, OTHER) if any(kind in stack for stack in stacks)]
    colors = dict(zip(kinds, CYCLE, strict=False))
    figure = canvas(8, 1.5 + 0.2 * len(rows))
    axes = figure.add_subplot()
    for place, (row, stack) in enumerate(zip(rows, stacks, strict=True)):
        left = 0.0
        for name, color in colors.items():
            size = stack.get(name, 0) / 2**20
            axes.barh(place, size, left=left, height=0.7, color=color, edgecolor="white")
            left += size
        peak = row["memory"].get("peak", 0) / 2**20
        if peak:
            axes.plot([peak, peak], [place - 0.42, place + 0.42], color="black", linewidth=2)
        end = max(left, peak)
        axes.annotate(f"{end:,.0f}", (end, place), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [f"{row['case']}: {row['provider']}" for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.grid(axis="x")
    axes.set_xlabel("MiB")
    axes.set_title(machine_name(recording))
    handles = [patch(name, color) for name, color in colors.items()]
    handles += axes.plot([], [], color="black", linewidth=2, label="measured peak")
    figure.legend(handles=handles, loc="outside upper center", ncols=5)
    save(figure, path, recording)


def _by_kind(memory: dict[str, int]) -> dict[str, int]:
    kinds: dict[str, int] = {}
    for name, size in memory.items():
        if name not in MEASURED and size:
            kind = next((kind for kind, names in MEMORY_KINDS.items() if name in names), OTHER)
            kinds[kind] = kinds.get(kind, 0) + size
    return kinds


@drawn_alike
def scaling_curves(recording: dict, path: Path) -> None:
    """One panel a sweep: time over the swept size, both logarithmic, each provider with the slope fitted to it."""
    sweeps: dict[tuple[str, str], list[Row]] = {}
    for row in recording["rows"]:
        if row["sweep"] and row["status"] == "timed":
            swept = Row(**row | {"sweep": Sweep(**row["sweep"])})
            sweeps.setdefault((swept.sweep.name, swept.sweep.variable), []).append(swept)
    if not sweeps:
        raise ValueError("no row of the recording belongs to a sweep; mixft bench without --quick records some")
    columns = min(2, len(sweeps))
    lines = -(-len(sweeps) // columns)
    figure = canvas(5.4 * columns, 0.5 + 3.6 * lines)
    for index, ((name, variable), rows) in enumerate(sweeps.items()):
        axes = figure.add_subplot(lines, columns, index + 1)
        fitted = slopes(rows).get((name, variable), {})
        for provider in dict.fromkeys(row.provider for row in rows):
            points = sorted((row.sweep.value, row.seconds) for row in rows if row.provider == provider)
            label = f"{provider}, slope {fitted[provider]:.2f}" if provider in fitted else provider
            color, hatch = style(provider)
            axes.plot(*zip(*points, strict=True), "o--" if hatch else "o-", color=color, markersize=4, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        durations(axes.yaxis)
        axes.set_xlabel(variable)
        axes.set_title(f"{name} over {variable}")
        axes.grid(which="both")
        axes.legend()
    figure.suptitle(f"{machine_name(recording)}\nslope of log time over log size: 1 is growth in proportion")
    save(figure, path, recording)


PLOTS: dict[str, Callable[[dict, Path], None]] = {
    "roofline": roofline,
    "memory": memory_stacks,
    "scaling": scaling_curves,
}

"""What the pictures have in common: size of type, a colour for each provider, and how a file is written."""

import hashlib
import json
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter

from .case import OURS

# Okabe and Ito's colours, which the colour-blind can tell apart. A provider has the same one in every picture, and is
# hatched where it is a second one of its kind.
BLUE, ORANGE, SKY, GREEN, YELLOW, VERMILION, PURPLE, BLACK, GREY = (
    "#0072B2", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#000000", "#777777"
)  # fmt: skip
CYCLE = (BLUE, ORANGE, SKY, GREEN, YELLOW, VERMILION, PURPLE, BLACK, GREY)
MARKERS = "os^Dv<>Ph*Xp8dH"
STYLES = {
    OURS: (BLUE, ""),
    "torch": (ORANGE, ""),
    "torch fused": (ORANGE, "////"),
    "torch FP32": (ORANGE, "...."),
    "torch foreach": (YELLOW, ""),
    "by hand, fused": (YELLOW, "////"),
    "by hand, foreach": (YELLOW, "...."),
    "torch.compile": (SKY, ""),
    "torch AMP": (SKY, "////"),
    "torch.ao": (VERMILION, ""),
    "torchao": (GREEN, ""),
    "torchao+compile": (GREEN, "////"),
    "bitsandbytes": (PURPLE, ""),
    "gemlite": (BLACK, ""),
    "flashoptim": (GREY, ""),
    "liger-kernel": (VERMILION, "////"),
    "torch GradScaler": (ORANGE, "||||"),
    "no scaler": (BLACK, "...."),
}
SETTINGS = {
    "font.size": 8,
    "axes.titlesize": 8,
    "figure.titlesize": 9,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "hatch.linewidth": 1.2,
    "svg.hashsalt": "mixft",
}

# A decorator of every function that draws: none of the reader's own settings show.
drawn_alike = matplotlib.rc_context(SETTINGS)


def style(provider: str) -> tuple[str, str]:
    """Colour and hatching; a provider without its own, such as another revision of mixft, is told by hatching."""
    return STYLES.get(provider) or (BLUE if provider.startswith(OURS) else GREY, "xxxx")


def patch(label: str, color: str, hatch: str = "") -> Patch:
    return Patch(facecolor=color, hatch=hatch, edgecolor="white", linewidth=0, label=label)


def canvas(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain_numbers(axis: Axis) -> None:
    """1, 10, 100 on a logarithmic axis in the place of powers."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def durations(axis: Axis) -> None:
    """Seconds in the unit that suits them."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: _duration(value)))
    axis.set_minor_formatter(NullFormatter())


def legend_below(axes: Axes) -> None:
    """One entry a label, under the axes."""
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)


def machine_name(recording: dict) -> str:
    """Where and when a recording was made, for a title."""
    environment = recording["environment"]
    name = f"{environment['device_name']}, torch {environment['torch']}, {environment['date'][:10]}"
    return name + (", quick run" if recording["quick"] else "")


def digest(recording: dict) -> str:
    """A name for the rows, the machine and the environment of ``recording``: 16 hexadecimal digits."""
    shown = {key: recording[key] for key in ("environment", "machine", "rows")}
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()[:16]


def save(figure: Figure, path: Path, recording: dict) -> None:
    """Write ``figure`` with the digest of what it shows, and without anything that differs from run to run."""
    metadata: dict = {"Description": f"recording {digest(recording)}"}
    if Path(path).suffix == ".svg":
        metadata |= {"Date": None, "Creator": None}
    figure.savefig(path, dpi=130, metadata=metadata)


def _duration(seconds: float) -> str:
    scale, unit = next(((s, u) for s, u in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")) if seconds >= s), (1e-9, "ns"))
    return f"{seconds / scale:g} {unit}"

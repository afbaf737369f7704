"""What a finished ``mixft finetune`` leaves: ``report.json``, the loss curves and the table on the screen."""

import json
import statistics
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from mixft.cli.output_file import write_whole
from mixft.cli.output_folder import REPORT
from mixft.precision import PrecisionEvent

COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7")  # Okabe and Ito: distinct for the colour-blind
FIGURES = {"eval_accuracy": ("accuracy, %", ", %"), "eval_perplexity": ("perplexity", "")}  # and what a column adds
SMOOTHING = 0.05  # share of the steps that one point of a curve averages


def write_report(folder: Path, environment: dict, task: dict, runs: list[dict]) -> None:
    """Write ``report.json`` whole or not at all."""
    content = {"environment": environment, "task": task, "runs": runs}
    write_whole(folder / REPORT, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def by_precision(runs: list[dict]) -> dict[str, list[dict]]:
    """The runs of each precision, precisions in the order they first ran."""
    grouped: dict[str, list[dict]] = {}
    for run in runs:
        grouped.setdefault(run["precision"], []).append(run)
    return grouped


def comparison(runs: list[dict]) -> Table:
    """One row a precision, means over its seeds; ± is the standard deviation over seeds."""
    grouped = by_precision(runs)
    metric = next(key for key in FIGURES if key in runs[0])
    first, seeds = next(iter(grouped)), len({run["seed"] for run in runs})
    title = f"means over {seeds} seeds" if seeds > 1 else f"seed {runs[0]['seed']}"
    caption = "± standard deviation over seeds" if seeds > 1 else None
    table = Table(
        title=f"Fine-tuning by precision, {title}",
        caption=caption,
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    columns = (
        "ms per\nstep",
        f"speed-up\nover {first}",
        "peak\nMiB",
        "optimizer\nMiB",
        f"held-out\n{FIGURES[metric][0]}",
        f"after\nint8{FIGURES[metric][1]}",
        "overflow\nsteps",
    )
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    baseline = _mean(grouped[first], "seconds_per_step_median")
    for precision, group in grouped.items():
        seconds = _mean(group, "seconds_per_step_median")
        table.add_row(
            precision,
            f"{seconds * 1e3:,.1f}",
            f"{baseline / seconds:.2f}x",
            _mebibytes(group, "peak_memory_bytes"),
            _mebibytes(group, "optimizer_bytes"),
            _over_seeds(group, metric),
            _over_seeds(group, f"{metric}_int8"),
            f"{_mean(group, 'overflow_steps'):g}",
        )
    return table


def draw_curves(runs: list[dict], path: Path) -> None:
    """Draw the training loss of every precision over the steps as a PNG: the mean over seeds, smoothed, in the band
    that the smoothed losses of the seeds span, or with one seed over the losses as they were."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (precision, group) in enumerate(by_precision(runs).items()):
        curves = [[float("nan") if loss is None else loss for loss in run["losses"]] for run in group]
        color = COLORS[index % len(COLORS)]
        smooth = [_smooth(curve) for curve in curves]
        steps = range(1, min(map(len, curves)) + 1)
        if len(curves) > 1:
            lowest, highest = zip(*((min(values), max(values)) for values in zip(*smooth, strict=False)), strict=True)
            axes.fill_between(steps, lowest, highest, color=color, alpha=0.15, linewidth=0)
        else:
            axes.plot(steps, curves[0], color=color, alpha=0.2, linewidth=0.8)
        mean = [statistics.fmean(values) for values in zip(*smooth, strict=False)]
        axes.plot(steps, mean, color=color, linewidth=1.8, label=precision)
        _mark_switches(axes, [event for run in group for event in run["precision_events"]], mean, color, precision)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.set_title("Training loss, running mean" + (" and the band of the seeds" if len(curves) > 1 else ""))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def inference(runs: list[dict]) -> list[str]:
    """A line for every precision: how long the held-out data took the trained model, and its int8 copy."""
    lines = []
    for precision, group in by_precision(runs).items():
        seconds = _mean(group, "eval_seconds")
        line = f"{precision}: the held-out data took {seconds:.2f} s"
        if group[0]["eval_seconds_int8"] is not None:
            quantized = _mean(group, "eval_seconds_int8")
            line += f", after int8 quantization {quantized:.2f} s ({seconds / quantized:.2f}x)"
        lines.append(line)
    return lines


def switches(runs: list[dict]) -> list[str]:
    """A line for every switch of precision in every run."""
    return [
        f"{run['precision']} seed {run['seed']}, {PrecisionEvent(**event)}"
        for run in runs
        for event in run["precision_events"]
    ]


def _mark_switches(axes: Axes, events: list[dict], curve: list[float], color: str, precision: str) -> None:
    """A triangle on ``curve`` at every step that raised a layer, upside down where one was lowered."""
    up = "layer to floats" if precision == "int8" else "layer to FP32"
    for marker, raised, label in (("^", True, up), ("v", False, "layer back to FP16")):
        steps = [event["step"] for event in events if _raised(event) == raised and event["step"] <= len(curve)]
        if steps:
            heights = [curve[step - 1] for step in steps]
            axes.plot(steps, heights, marker, color=color, markersize=8, label=f"{precision}: {label}")


def _raised(event: dict) -> bool:
    return event["after"] == "fp32" or event["before"] == "int8"


def _smooth(values: list[float]) -> list[float]:
    """Mean of the last values at every point, over a window that is a share of them all."""
    window = max(1, round(SMOOTHING * len(values)))
    return [statistics.fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def _mean(group: list[dict], key: str) -> float:
    return statistics.fmean(run[key] for run in group)


def _over_seeds(group: list[dict], key: str) -> str:
    factor = 100 if key.startswith("eval_accuracy") else 1
    values = [factor * run[key] for run in group if run[key] is not None]
    if not values:
        return "none"
    spread = f"±{statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def _mebibytes(group: list[dict], key: str) -> str:
    return f"{_mean(group, key) / 2**20:,.1f}"

"""Markdown tables of ``mixft finetune``'s ``report.json``, and the report as it is kept beside the recordings."""

import json
import statistics
from pathlib import Path

NAMES = {
    "fp32": "fp32: plain torch",
    "bf16": "bf16: torch autocast, mixft AdamW",
    "fp16": "fp16: FP16 parameters, FP32 masters, loss scaling",
    "int8": "int8: int8 forward and backward",
}


def kept(report: dict) -> dict:
    """A report without what the tables do not need: every step's loss, and folders of the machine it ran on."""
    task = dict(report["task"])
    task["model"] = "/".join(Path(task["model"]).parts[-2:])
    task |= {key: Path(task[key]).name for key in ("train", "eval") if task[key]}
    runs = [{key: value for key, value in run.items() if key != "losses"} for run in report["runs"]]
    return {"environment": report["environment"], "task": task, "runs": runs}


def keep(path: Path, results: Path) -> Path:
    """Write ``kept`` of the report in ``path`` into the folder ``results``, under a name of what it compares.

    Raises:
        ValueError: the file is no report with a run in it.
    """
    report = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(report, dict) or not report.get("runs"):
        raise ValueError(f"{path} has no runs; report.json of a finished mixft finetune would do")
    report = kept(report)
    precisions = "-".join(report["task"]["precisions"])
    seeds = len(report["task"]["seeds"])
    target = results / f"finetune-{report['task']['train'].split('.')[0]}-{precisions}-{seeds}-seeds.json"
    target.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return target


def place(report: dict) -> str:
    """Where and when the report was made."""
    environment = report["environment"]
    threads = f", {environment['threads']} threads" if environment["device"] == "cpu" else ""
    capability = f" ({environment['cpu_capability']}{threads})" if environment["device"] == "cpu" else ""
    return f"{environment['device_name']}{capability}, torch {environment['torch']}, {environment['date'][:10]}"


def detailed(report: dict) -> str:
    """A row a precision with time, memory, accuracy and overflow steps; means over seeds."""
    groups = _by_precision(report)
    base = _seconds(next(iter(groups.values())))
    lines = [
        "| | ms per step | speed-up | peak MiB | optimizer MiB | held-out accuracy | after int8 quantization | "
        "overflow steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for precision, runs in groups.items():
        cells = [
            NAMES[precision],
            f"{_seconds(runs) * 1e3:.1f}",
            f"{base / _seconds(runs):.2f}x",
            _mebibytes(runs, "peak_memory_bytes"),
            _mebibytes(runs, "optimizer_bytes"),
            _percent(runs, "eval_accuracy"),
            _percent(runs, "eval_accuracy_int8"),
            f"{statistics.fmean(run['overflow_steps'] for run in runs):g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def brief(report: dict) -> str:
    """A row a precision with time and accuracy; means over seeds, ± the standard deviation over them."""
    groups = _by_precision(report)
    base = _seconds(next(iter(groups.values())))
    lines = ["| | ms per step | speed-up | held-out accuracy |", "|---|---|---|---|"]
    for precision, runs in groups.items():
        seconds = _seconds(runs)
        accuracy = _percent(runs, "eval_accuracy")
        lines.append(f"| {NAMES[precision]} | {seconds * 1e3:.1f} | {base / seconds:.2f}x | {accuracy} |")
    return "\n".join(lines)


def _by_precision(report: dict) -> dict[str, list[dict]]:
    return {
        precision: [run for run in report["runs"] if run["precision"] == precision]
        for precision in dict.fromkeys(run["precision"] for run in report["runs"])
    }


def _seconds(runs: list[dict]) -> float:
    return statistics.fmean(run["seconds_per_step_median"] for run in runs)


def _mebibytes(runs: list[dict], key: str) -> str:
    return f"{statistics.fmean(run[key] for run in runs) / 2**20:,.1f}"


def _percent(runs: list[dict], key: str) -> str:
    values = [100 * run[key] for run in runs if run[key] is not None]
    if not values:
        return "none"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}%"

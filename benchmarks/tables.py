"""Markdown tables of a recording, for the README and docs/benchmarks.md."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .case import OURS
from .memory import MEASURED

NOT_MEASURED = "not measured yet"


@dataclass(frozen=True)
class Aim:
    """A figure to reach, and the rows that show it.

    Attributes:
        work: what is measured.
        device: "cuda" or "cpu".
        aim: the figure, in words that begin with "≥ 1.5x" or "≥ 90%".
        cases: patterns of case names.
        peer: the provider whose time over mixft's is meant; None for the share of the floor.
        host: whether that time is the host's, until the call returns, and not the device's.
    """

    work: str
    device: str
    aim: str
    cases: tuple[str, ...]
    peer: str | None = "torch"
    host: bool = False

    @property
    def least(self) -> float:
        """The figure: a ratio, or a share of the floor."""
        number = self.aim.split()[1]
        return float(number[:-1]) / (100 if number.endswith("%") else 1)


AIMS = (
    Aim("FP16 linear layer", "cuda", "≥ 0.97x torch", ("linear/*-fp16",)),
    Aim("FP16 linear layer with GELU", "cuda", "≥ 1.10x torch", ("linear/*-fp16-gelu",)),
    Aim("int8 linear layer, dynamic", "cuda", "≥ 1.35x torch in 16 bits", ("int8_linear/*",)),
    Aim("int8 linear layer, dynamic", "cuda", "≥ 1.2x torchao", ("int8_linear/*",), "torchao"),
    Aim("int8 linear layer, dynamic", "cuda", "≥ 1.5x bitsandbytes", ("int8_linear/*",), "bitsandbytes"),
    Aim("int8 product with scales", "cuda", "≥ 1.4x `torch._int_mm` and scales", ("int8_matmul/*",)),
    Aim("int8 weights, 1 to 16 rows", "cuda", "≥ 1.8x torch in 16 bits", ("int8_decode/*",)),
    Aim("int8 weights, 1 to 16 rows", "cuda", "≥ 85% of the floor", ("int8_decode/*",), None),
    Aim("gradient norm and overflow check", "cuda", "≥ 4x torch", ("grad_stats/*",)),
    Aim("gradient norm and overflow check", "cuda", "≥ 90% of the floor", ("grad_stats/*",), None),
    Aim("AdamW step, FP32", "cuda", "≥ 1.0x torch fused", ("optimizer_step/adamw-fp32",), "torch fused"),
    Aim(
        "AdamW step, split masters, int8 states",
        "cuda",
        "≥ 2x torch fused on FP32 copies",
        ("optimizer_step/adamw-*split-int8",),
        "by hand, fused",
    ),
    Aim("AdamW step, FP32", "cuda", "≥ 90% of the floor", ("optimizer_step/adamw-fp32",), None),
    Aim(
        "AdamW step, 1,000 tensors: host's time",
        "cuda",
        "≥ 5x torch fused",
        ("tensors/adamw-fp32-1000",),
        "torch fused",
        host=True,
    ),
    Aim(
        "FP16 step: unscale, clip, AdamW, cast",
        "cuda",
        "≥ 1.5x by hand, torch fused",
        ("optimizer_step/adamw-fp16-clip",),
        "by hand, fused",
    ),
    Aim("AdamW step, int8 states", "cuda", "≥ 1.0x bitsandbytes", ("optimizer_step/adamw-fp32-int8",), "bitsandbytes"),
    Aim(
        "AdamW step, split masters, int8 states",
        "cuda",
        "≥ 1.3x FlashOptim",
        ("optimizer_step/adamw-bf16-split-int8",),
        "flashoptim",
    ),
    Aim("quantize", "cuda", "≥ 90% of the floor", ("quantize/*",), None),
    Aim("quantize", "cuda", "≥ 1.0x bitsandbytes", ("quantize/*",), "bitsandbytes"),
    Aim("int8 training of a linear layer", "cuda", "≥ 1.5x torch in 16 bits", ("int8_training/*",)),
    Aim("int8 training step, 12-layer BERT", "cuda", "≥ 1.25x torch.compile", ("*/bert-12*-int8",), "torch.compile"),
    Aim("int8 linear layer, 128 rows and more", "cpu", "≥ 3.5x FP32", ("int8_linear/[125][0-9][0-9]*x*-fp32",)),
    Aim("FP16 linear layer", "cpu", "≥ 4x torch", ("linear/*-fp16",)),
    Aim("FP16 linear layer", "cpu", "≥ 1.5x torch in FP32", ("linear/*-fp16",), "torch FP32"),
    Aim("FP16 training step: cost of the scaler", "cpu", "≥ 0.97x no scaler", ("loss_scaling/*",), "no scaler"),
    Aim("gradients accumulated in FP32", "cpu", "≥ 2x by hand", ("accumulate/*",)),
    Aim("AdamW step, FP32", "cpu", "≥ 1.0x torch fused", ("optimizer_step/adamw-fp32",), "torch fused"),
    Aim(
        "FP16 step: unscale, clip, AdamW, cast",
        "cpu",
        "≥ 2x by hand, torch foreach",
        ("optimizer_step/adamw-fp16-clip",),
        "by hand, foreach",
    ),
)


def machine(recording: dict) -> str:
    """Where, when and with what a recording was made, and the ceilings measured in it, as a sentence or two."""
    environment, ceilings = recording["environment"], recording["machine"]
    on_cpu = environment["device"] == "cpu"
    device = f"{environment['device_name']}" + (f", {environment['threads']} threads" if on_cpu else "")
    rates = ", ".join(
        f"{name} {rate / 1e12:,.3g}" for name, rate in ceilings["matmul_operations_per_second"].items() if rate
    )
    # Recordings from before "update" was measured do not have it.
    streams = {name: ceilings.get(f"{name}_bytes_per_second") for name in ("copy", "read", "update")}
    bandwidths = ", ".join(f"{name} {rate / 1e9:,.0f} GB/s" for name, rate in streams.items() if rate)
    return (
        f"{device}, torch {environment['torch']}, Triton {environment['triton']}, {environment['date'][:10]}, commit "
        f"{str(environment['commit'])[:12]}. Measured in the same run: {bandwidths}, torch's matmul in T operations/s: "
        f"{rates}."
    )


def summary(recording: dict) -> str:
    """A row a family: how many cases, mixft's share of the floor, and each peer's time over mixft's.

    Means are geometric; in brackets the least and the largest of the family's cases.
    """
    families = dict.fromkeys(row["family"] for row in recording["rows"])
    lines = ["| work | cases | of the floor | time of the others / time of mixft |", "|---|---|---|---|"]
    for family in families:
        rows = [row for row in recording["rows"] if row["family"] == family]
        ours = [row for row in rows if row["provider"] == OURS]
        floors = [row["floor_fraction"] for row in ours if row["floor_fraction"]]
        floor = f"{statistics.geometric_mean(floors):.0%}" if floors else "no time"
        peers = [_spread(name, rows) for name in dict.fromkeys(row["provider"] for row in rows) if name != OURS]
        lines.append(f"| {family} | {len(ours)} | {floor} | {', '.join(filter(None, peers)) or 'no peer timed'} |")
    return "\n".join(lines)


def family_table(recording: dict, family: str) -> str:
    """A row a case: mixft's median time, tokens a second, share of the floor, and what each peer does beside it."""
    rows = [row for row in recording["rows"] if row["family"] == family]
    peers = [name for name in dict.fromkeys(row["provider"] for row in rows) if name != OURS]
    has_tokens = any(row["tokens"] for row in rows)
    columns = ["case", "mixft ms", *(["tokens/s"] if has_tokens else []), "of the floor", *peers]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for case in dict.fromkeys(row["case"] for row in rows):
        found = {row["provider"]: row for row in rows if row["case"] == case}
        ours = found[OURS]
        timed = ours["status"] == "timed"
        cells = [case, f"{ours['seconds'] * 1e3:,.3f}" if timed else ours["status"]]
        if has_tokens:
            cells.append(f"{ours['tokens'] / ours['seconds']:,.0f}" if timed and ours["tokens"] else "")
        cells.append(f"{ours['floor_fraction']:.0%}" if timed else "")
        lines.append(f"| {' | '.join([*cells, *(_beside(found.get(peer)) for peer in peers)])} |")
    return "\n".join(lines)


def memory_table(recording: dict, family: str) -> str:
    """A row for each provider of ``family`` whose memory was measured: what it holds, and what was measured, in MiB."""
    rows = [row for row in recording["rows"] if row["memory"] and row["family"] == family]
    found = dict.fromkeys(name for row in rows for name in row["memory"])
    # Recordings from before "resident" was measured do not have it.
    components = [name for name in found if name not in MEASURED] + [name for name in MEASURED if name in found]
    titles = [MEASURED.get(name, name) for name in components]
    lines = [f"| {' | '.join(['case', 'provider', *titles])} |", "|" + "---|" * (2 + len(components))]
    for row in rows:
        cells = [_mebibytes(row["memory"].get(name)) for name in components]
        lines.append(f"| {' | '.join([row['case'], row['provider'], *cells])} |")
    return "\n".join(lines)


def whole_model(recording: dict, names: dict[tuple[str, str], str]) -> str:
    """A row for each (case, provider) of ``names`` timed beside "torch": both times, speed-up, and memory held.

    The torch of a row is that of its own case: other cases were timed minutes before or after.
    """
    rows = {(row["case"], row["provider"]): row for row in recording["rows"] if row["status"] == "timed"}
    beside = {found: (found[0], "torch") for found in names}
    shown = {names[found]: (rows[found], rows[base]) for found, base in beside.items() if {found, base} <= rows.keys()}
    if not shown:
        return NOT_MEASURED
    lines = ["| | ms | plain torch beside it, ms | speed-up | MiB afterwards |", "|---|---|---|---|---|"]
    for name, (row, base) in shown.items():
        memory = _mebibytes((row["memory"] or {}).get("resident"))
        # Medians of the rounds' own ratios, as everywhere: of a provider's time over ours.
        speedup = 1.0 if row is base else base["speedup"] / (row["speedup"] or 1.0)
        times = [f"{timed['seconds'] * 1e3:,.1f}" for timed in (row, base)]
        lines.append(f"| {' | '.join([name, *times, f'{speedup:.2f}x', memory])} |")
    return "\n".join(lines)


def repeatability(first: dict, second: dict) -> str:
    """How far the ratios of two runs of the same commit on the same machine are apart, a row a family, then all."""
    earlier = {(row["case"], row["provider"]): row["speedup"] for row in second["rows"]}
    apart: dict[str, dict[tuple[str, str], float]] = {}
    for row in first["rows"]:
        key = (row["case"], row["provider"])
        if row["provider"] != OURS and row["speedup"] and earlier.get(key):
            low, high = sorted((row["speedup"], earlier[key]))
            apart.setdefault(row["family"], {})[key] = high / low - 1
    apart["all"] = {key: value for found in apart.values() for key, value in found.items()}
    lines = ["| work | ratios | median difference | largest |", "|---|---|---|---|"]
    for family, found in apart.items():
        if found:
            worst = max(found, key=found.get)
            middle = statistics.median(found.values())
            lines.append(f"| {family} | {len(found)} | {middle:.1%} | {found[worst]:.1%} ({', '.join(worst)}) |")
    return "\n".join(lines)


def reasons_if_slower(recording: dict) -> str:
    """A line for each reason why a peer is faster in some cases, as the cases themselves give it."""
    slower = {row["case"] for row in recording["rows"] if row["speedup"] and row["speedup"] < 1}
    reasons: dict[str, list[str]] = {}
    for row in recording["rows"]:
        if row["note"] and row["case"] in slower:
            reasons.setdefault(row["note"], []).append(row["case"])
    return "\n".join(f"- {', '.join(cases)}: {reason}" for reason, cases in reasons.items())


def without_times(recording: dict) -> str:
    """A line for each provider and reason that left a row without a time."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in recording["rows"]:
        if row["status"] != "timed":
            reason = " ".join((row["reason"] or "no reason given").replace("|", "/").split())
            reasons.setdefault((row["provider"], row["status"], reason), []).append(row["case"])
    return "\n".join(
        f"- {provider}, {status}, {len(cases)} case{'s' * (len(cases) > 1)}: {reason}"
        for (provider, status, reason), cases in reasons.items()
    )


def aims(recordings: Iterable[dict]) -> str:
    """Every figure of ``AIMS`` beside what the recordings show; without a row that shows it, it is not measured yet."""
    by_device = {recording["environment"]["device"].split(":")[0]: recording for recording in recordings}
    lines = ["| work | on | aim | measured | met |", "|---|---|---|---|---|"]
    for aim in AIMS:
        found = _measured(aim, by_device[aim.device]["rows"]) if aim.device in by_device else []
        place = {"cuda": "H100", "cpu": "CPU"}[aim.device]
        met = "" if not found else "yes" if statistics.geometric_mean(found) >= aim.least else "no"
        lines.append(f"| {aim.work} | {place} | {aim.aim} | {_figures(aim, found)} | {met} |")
    return "\n".join(lines)


def _measured(aim: Aim, rows: list[dict]) -> list[float]:
    shown = [row for row in rows if any(fnmatchcase(row["case"], name) for name in aim.cases)]
    ours = {row["case"]: row for row in shown if row["provider"] == OURS}
    if aim.peer is None:
        return [row["floor_fraction"] for row in ours.values() if row["floor_fraction"]]
    peers = [row for row in shown if row["provider"] == aim.peer and row["speedup"]]
    return [row["host_seconds"] / ours[row["case"]]["host_seconds"] if aim.host else row["speedup"] for row in peers]


def _figures(aim: Aim, found: list[float]) -> str:
    if not found:
        return NOT_MEASURED
    middle, count = statistics.geometric_mean(found), f"{len(found)} case{'s' * (len(found) > 1)}"
    if aim.peer is None:
        return f"{middle:.0%} ({min(found):.0%} to {max(found):.0%}, {count})"
    return f"{middle:.2f}x ({min(found):.2f} to {max(found):.2f}, {count})"


def _mebibytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.1f}"


def _spread(provider: str, rows: list[dict]) -> str | None:
    ratios = [row["speedup"] for row in rows if row["provider"] == provider and row["speedup"]]
    if not ratios:
        return None
    middle = f"{provider} **{statistics.geometric_mean(ratios):.2f}x**"
    return middle if len(ratios) == 1 else f"{middle} ({min(ratios):.2f} to {max(ratios):.2f})"


def _beside(row: dict | None) -> str:
    if row is None:
        return ""
    if row["status"] != "timed":
        return {"wrong": "wrong output"}.get(row["status"], row["status"])
    if row["speedup"] is None:
        return f"{row['seconds'] * 1e3:,.3f} ms"
    return f"{row['speedup']:.2f}x ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})"

"""What ``mixft bench`` shows: a line a case, then a line a family with what was left out and why."""

import statistics
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from mixft.benchmarks.case import OURS
from mixft.benchmarks.growth import slopes
from mixft.benchmarks.recording import Recording, Row
from mixft.benchmarks.revision import provider_name

# A ratio this close to 1 is called neither faster nor slower.
SAME = 0.03


def heading(width: int) -> Text:
    """The names of what :func:`case_line` shows, for case names of at most ``width`` characters."""
    return Text(f"{'case':<{width}}{'mixft ms':>10}{'of floor':>10}  time of the others / time of mixft", "bold")


def preface(recording: Recording) -> str:
    """Where and how the run was measured, and the ceilings of the machine."""
    machine, environment = recording.machine, recording.environment
    rates = ", ".join(f"{name} {rate / 1e12:.2f}" for name, rate in machine.matmul_operations_per_second.items())
    return (
        f"{environment['device']} ({environment['device_name']}), torch {environment['torch']}, "
        f"{environment['threads']} threads; medians of up to {recording.rounds} interleaved rounds with cold data\n"
        f"copy {machine.copy_bytes_per_second / 1e9:.1f} GB/s, read {machine.read_bytes_per_second / 1e9:.1f} GB/s, "
        f"update {machine.update_bytes_per_second / 1e9:.1f} GB/s, "
        f"torch's matmul in T operations/s: {rates}\n"
        "of floor: the least time at these rates over the time taken; ±: half the distance between the quartiles\n"
    )


def case_line(rows: Sequence[Row], width: int, screen: int) -> Text:
    """One case: mixft's time, its share of the floor, and the ratio to every peer that was timed.

    Args:
        rows: of the case, mixft's first.
        width: of the column of names.
        screen: characters in a line; what does not fit goes on below the ratios.
    """
    ours, *others = rows
    line = Text(f"{ours.case:<{width}}")
    if ours.status == "timed":
        line.append(f"{ours.seconds * 1e3:>10.3f}{ours.floor_fraction:>10.0%}  ")
    else:
        line.append(f"  {_excuse(ours)}  ", "bold red" if ours.status == "wrong" else "red")
    indent = used = width + 22
    for part in filter(None, map(_against, others)):
        if used > indent and used + len(part) > screen:
            line.rstrip()
            line.append("\n" + " " * indent)
            used = indent
        line.append(part).append("  ")
        used += len(part) + 2
    line.rstrip()
    return line


def summary(rows: Sequence[Row]) -> Table:
    """One line a family: how much of the floor, and the geometric mean of the ratio to each peer with its range."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0))
    table.add_column("family", no_wrap=True)
    table.add_column("cases", justify="right", no_wrap=True)
    table.add_column("of floor", justify="right", no_wrap=True)
    table.add_column("time of the others / time of mixft: geometric mean (least to most)")
    for family in dict.fromkeys(row.family for row in rows):
        members = [row for row in rows if row.family == family]
        ours = [row for row in members if row.provider == OURS]
        floors = [row.floor_fraction for row in ours if row.floor_fraction is not None]
        table.add_row(
            family,
            str(len(ours)),
            f"{statistics.geometric_mean(floors):.0%}" if floors else "",
            Text(", ").join(_mean_ratio(provider, ratios) for provider, ratios in _ratios(members).items()),
        )
    return table


def remarks(rows: Sequence[Row], base: str | None) -> list[str]:
    """What the ratios do not say: growth, reasons, who was left out, and with ``base`` what moved."""
    # A case's reason is about its peers, and says nothing of another revision.
    compared = reasons_if_slower(rows) if base is None else moved(rows, provider_name(base))
    return [*growth_lines(rows), *compared, *left_out(rows)]


def growth_lines(rows: Sequence[Row]) -> list[str]:
    """For every series, the power of its variable that each provider's time grows with."""
    lines = []
    for (name, variable), fitted in slopes(rows).items():
        powers = ", ".join(f"{provider} {slope:.2f}" for provider, slope in fitted.items())
        lines.append(f"{name}: time grows as {variable} to the power of: {powers}")
    return lines


def moved(rows: Sequence[Row], base: str) -> list[str]:
    """Where this revision differs from ``base`` in both quartiles of the ratio."""
    timed = [row for row in rows if row.provider == base and row.speedup is not None]
    faster = [row.case for row in timed if row.speedup_low > 1 + SAME]
    slower = [row.case for row in timed if row.speedup_high < 1 - SAME]
    return [
        f"{word} than {base} in {len(cases)} of {len(timed)} cases{': ' if cases else ''}{', '.join(cases)}"
        for word, cases in (("faster", faster), ("slower", slower))
    ]


def left_out(rows: Sequence[Row]) -> list[str]:
    """Who has no time, or no figure of memory, and why, each reason once."""
    concerned: dict[str, list[Row]] = {}
    for row in rows:
        if row.reason is not None:
            concerned.setdefault(_excuse(row), []).append(row)
    lines = []
    for excuse, without in concerned.items():
        providers = dict.fromkeys(row.provider for row in without)
        cases = dict.fromkeys(row.case for row in without)
        what = "no memory" if without[0].status == "timed" else "no time"
        lines.append(f"{what} for {_listed(providers, 'providers')} in {_listed(cases, 'cases')}: {excuse}")
    return lines


def reasons_if_slower(rows: Sequence[Row]) -> list[str]:
    """For the cases where a peer is faster, why; each reason once."""
    slower = {row.case for row in rows if row.speedup is not None and row.speedup < 1 - SAME}
    noted: dict[str, list[str]] = {}
    for row in rows:
        if row.note and row.case in slower:
            noted.setdefault(row.note, []).append(row.case)
    return [f"slower than a peer in {_listed(cases, 'cases')}: {note}" for note, cases in noted.items()]


def _listed(names: Iterable[str], what: str) -> str:
    names = list(names)
    return ", ".join(names) if len(names) < 4 else f"{len(names)} {what}"


def _excuse(row: Row) -> str:
    return f"WRONG: {row.reason}" if row.status == "wrong" else row.reason


def _against(row: Row) -> Text | None:
    if row.status == "wrong":
        return Text(f"{row.provider} {_excuse(row)}", "bold red")
    if row.status != "timed":
        return None
    if row.speedup is None:
        return Text(f"{row.provider} {row.seconds * 1e3:.3f} ms")
    spread = (row.speedup_high - row.speedup_low) / 2 / row.speedup
    return Text.assemble(f"{row.provider} ", (f"{row.speedup:.2f}x", _style(row.speedup)), (f" ±{spread:.0%}", "dim"))


def _style(ratio: float) -> str:
    return "green" if ratio > 1 + SAME else "red" if ratio < 1 - SAME else ""


def _ratios(rows: Iterable[Row]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.provider != OURS and row.speedup is not None:
            found.setdefault(row.provider, []).append(row.speedup)
    return found


def _mean_ratio(provider: str, ratios: list[float]) -> Text:
    mean = statistics.geometric_mean(ratios)
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return Text.assemble(f"{provider} ", (f"{mean:.2f}x", _style(mean)), (spread, "dim"))

"""A benchmark run as data, ``"format": 1``: what ``mixft bench --json`` writes, and plots and tables read.

Times are seconds of one call, sizes bytes, rates a second. The JSON has the attribute names of the classes below.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mixft.cli.output_file import write_whole

from .machine import Machine

FORMAT = 1


@dataclass(frozen=True)
class Sweep:
    """A row's place in a series of rows.

    Attributes:
        name: of the series.
        variable: what grows along it: "parameters", "tensors" or "rows".
        value: how large it is in this row.
    """

    name: str
    variable: str
    value: int


@dataclass(frozen=True)
class Row:
    """One provider of one case. Figures are None where the status is not "timed", and a ratio without mixft's time.

    Attributes:
        case: the case's name, ``family/size``.
        family: the part of the name before the slash.
        provider: "mixft", "torch", "torch.compile", a peer's name ...; "mixft REVISION" for another revision of mixft.
        status: "timed"; "wrong": its output failed the check; "missing": its package is not installed; "refused": it
            does not serve the case here.
        reason: why it is not timed, or why its memory could not be measured; None otherwise.
        seconds: median of the rounds; on a GPU the device's time.
        seconds_low: lower quartile.
        seconds_high: upper quartile.
        host_seconds: median time until the call returned; on a CPU the same as ``seconds``.
        speedup: median over rounds of this provider's time over mixft's: above 1 where mixft is faster.
        speedup_low: lower quartile of that ratio.
        speedup_high: upper quartile.
        floor_seconds: the least time at the machine's ceilings of this run.
        floor_fraction: ``floor_seconds / seconds``.
        bytes: least memory traffic of the work.
        operations: multiplications and additions of its matrix products.
        rate: the matmul ceiling that these are held against: "fp32", "fp16", "bf16", "int8"; None without products.
        tokens: tokens that a call processes; None where that means nothing.
        memory: bytes by component, and "resident" and "peak", measured in a process of its own; None where not
            measured.
        sweep: its place in a series; None outside of one.
        note: why mixft is slower here than a peer, where a case says so; None otherwise.
    """

    case: str
    family: str
    provider: str
    status: str
    reason: str | None = None
    seconds: float | None = None
    seconds_low: float | None = None
    seconds_high: float | None = None
    host_seconds: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    floor_seconds: float | None = None
    floor_fraction: float | None = None
    bytes: int = 0
    operations: int = 0
    rate: str | None = None
    tokens: int | None = None
    memory: dict[str, int] | None = None
    sweep: Sweep | None = None
    note: str | None = None


@dataclass(frozen=True)
class Recording:
    """One run.

    Attributes:
        environment: versions, device, commit of mixft, date.
        machine: the ceilings measured in the run.
        load_average: of the machine over the minute before the run.
        rounds: turns that each provider of a case took at most.
        quick: whether the run was ``--quick``.
        rows: in the order measured.
    """

    environment: dict
    machine: Machine
    load_average: float
    rounds: int
    quick: bool
    rows: list[Row] = field(default_factory=list)

    def to_dict(self) -> dict:
        """The JSON object."""
        return {"format": FORMAT, **asdict(self)}

    def write(self, path: Path) -> None:
        """Write the JSON whole or not at all."""
        write_whole(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")


def read(path: Path) -> Recording:
    """The recording in a file.

    Raises:
        ValueError: the file is not JSON, or of another format.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    found = content.pop("format", None) if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} has format {found!r}; mixft bench --json writes format {FORMAT}")
    rows = [Row(**row | {"sweep": Sweep(**row["sweep"]) if row["sweep"] else None}) for row in content.pop("rows")]
    return Recording(machine=Machine(**content.pop("machine")), rows=rows, **content)

"""The record of ``mixft tune``, and the shipped files that its choices go into."""

import json
from pathlib import Path

from mixft.cli.output_file import write_whole

FORMAT = 1


def record(environment: dict, sweeps: list[dict]) -> dict:
    """The JSON object that ``mixft tune --json`` writes."""
    return {"format": FORMAT, "environment": environment, "sweeps": sweeps}


def read(path: Path) -> dict:
    """The record in a file of ``mixft tune --json`` or of ``make gpu``.

    Raises:
        ValueError: the file is not JSON or has no such record.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    found = content.get("tuning", content) if isinstance(content, dict) else None
    if not isinstance(found, dict) or found.get("format") != FORMAT or "sweeps" not in found:
        raise ValueError(f"{path} has no record of mixft tune in format {FORMAT}")
    return found


def write(content: dict, path: Path) -> None:
    """Write whole or not at all."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


def ship(found: dict, folder: Path) -> list[str]:
    """Put the choices that are faster than what ships into the files of ``folder``; returns a line for each.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: a file no longer ships what was measured; nothing is written then.
    """
    documents: dict[Path, dict] = {}
    lines = []
    for sweep in found["sweeps"]:
        if sweep["chosen"] == sweep["shipped"]:
            continue
        path = folder / f"{sweep['op']}.json"
        document = documents.setdefault(path, json.loads(path.read_text(encoding="utf-8")))
        _exchange(document, sweep, found["environment"])
        lines.append(f"{path.name}, {sweep['architecture']}, {sweep['bucket']}: {sweep['speedup']:.2f}x")
    for path, document in documents.items():
        write_whole(path, _layout(document))
    return lines


def _exchange(document: dict, sweep: dict, environment: dict) -> None:
    """Take the architecture out of the entry that serves it, and add one of its own."""
    arch, bucket = sweep["architecture"], sweep["bucket"]
    for entry in document["entries"]:
        if arch in entry["architectures"] and entry["bucket"] == bucket:
            break
    else:
        raise ValueError(f"{sweep['op']}.json has no entry for {arch} and {bucket!r}")
    if entry["config"] != sweep["shipped"]:
        raise ValueError(
            f"{sweep['op']}.json ships {entry['config']} for {arch} and {bucket!r}; measured against {sweep['shipped']}"
        )
    entry["architectures"].remove(arch)
    if not entry["architectures"]:
        document["entries"].remove(entry)
    measured = {
        "triton": environment["triton"],
        "device": environment["device_name"],
        "date": environment["date"][:10],
        "speedup": round(sweep["speedup"], 3),
    }
    chosen = {"architectures": [arch], "bucket": bucket, "config": sweep["chosen"], "measured": measured}
    document["entries"].append(chosen)


def _layout(document: dict) -> str:
    """One entry a line."""
    provenance = json.dumps(document["provenance"], indent=2).replace("\n", "\n  ")
    entries = ",\n    ".join(json.dumps(entry) for entry in document["entries"])
    return f'{{\n  "provenance": {provenance},\n  "entries": [\n    {entries}\n  ]\n}}\n'

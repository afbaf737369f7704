"""Put what ``benchmarks/results/*.json`` holds into README.md and docs/benchmarks.md, and draw its plots.

    python -m mixft.benchmarks.publish                     write tables and plots (make tables)
    python -m mixft.benchmarks.publish --check             exit 1 where they are not what the results say
    python -m mixft.benchmarks.publish --keep report.json  first keep a report of mixft finetune among the results

The generated parts of a document stand between ``<!-- generated: NAME -->`` and ``<!-- end -->``, NAME being one of
``SECTIONS``.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from . import finetune_tables, recording, tables
from .plot_style import digest
from .plots import PLOTS, memory_stacks, ratio_bars

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "docs/benchmarks.md")
PLOT_FOLDER = "docs/plots"
SECTION = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
REPEATED = "The suite ran twice on this machine; how far the two runs' ratios are apart."
RECORD = "Not measured yet: `{command}` records it, and `make tables` puts it here."


@dataclass
class Results:
    """What has been recorded.

    Attributes:
        recordings: the newest benchmark run by kind of device, "cpu" or "cuda".
        repeats: the run before it by kind of device, where that is of the same commit, device and peers.
        reports: the newest fine-tuning report by number of seeds, "one" or "several".
    """

    recordings: dict[str, dict] = field(default_factory=dict)
    repeats: dict[str, dict] = field(default_factory=dict)
    reports: dict[str, dict] = field(default_factory=dict)


def load(folder: Path) -> Results:
    """Read every JSON file of ``folder``: recordings of format 1, records of ``make gpu``, reports of finetune.

    Raises:
        ValueError: a file is none of these.
    """
    results = Results()
    runs: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if "runs" in content:
            kind = "one" if len(content["task"]["seeds"]) == 1 else "several"
            _keep_newest(results.reports, kind, content)
            continue
        if "stages" in content:
            content = content["recording"]
            if content is None:
                continue
        if content.get("format") != recording.FORMAT:
            raise ValueError(
                f"{path.name} has format {content.get('format')!r}; mixft bench --json writes {recording.FORMAT}, "
                "make gpu and --keep report.json what else can stand here"
            )
        runs.setdefault(content["environment"]["device"].split(":")[0], []).append(content)
    for kind, found in runs.items():
        newest, *older = sorted(found, key=lambda content: content["environment"]["date"], reverse=True)
        results.recordings[kind] = newest
        if older and _same_place(newest["environment"], older[0]["environment"]):
            results.repeats[kind] = older[0]
    return results


def demo(results: Results) -> str:
    """README: the table of ``make demo``."""
    report = results.reports.get("one")
    if report is None:
        return RECORD.format(command="make demo")
    return f"On {finetune_tables.place(report)}:\n\n{finetune_tables.detailed(report)}"


def precisions(results: Results) -> str:
    """README: every precision over several seeds."""
    report = results.reports.get("several")
    if report is None:
        return RECORD.format(command="mixft finetune --precision fp32,bf16,fp16,int8 --seeds 1,2,3")
    return f"On {finetune_tables.place(report)}:\n\n{finetune_tables.brief(report)}"


def speed(results: Results) -> str:
    """README: one table a device, a row a family."""
    parts = []
    for kind, name in (("cuda", "On a GPU"), ("cpu", "On a CPU")):
        found = results.recordings.get(kind)
        parts.append(
            f"{name}: {tables.machine(found)}\n\n{tables.summary(found)}"
            if found
            else f"{name}: {tables.NOT_MEASURED}, so nothing is claimed."
        )
    return "\n\n".join(parts)


def layers(results: Results) -> str:
    """README: a whole model with its linear layers replaced, for inference and in training."""
    parts = []
    for kind, place, size, floats in (("cuda", "On a GPU", 12, "FP16"), ("cpu", "On a CPU", 2, "FP32")):
        found = results.recordings.get(kind)
        if found is None:
            parts.append(f"{place}: {tables.NOT_MEASURED}.")
            continue
        model = f"bert-{size}-layers"
        forward, training, in_bf16 = (
            f"{step}/{model}-{recipe}"
            for step, recipe in (("inference_step", "dynamic"), ("training_step", "int8"), ("training_step", "bf16"))
        )
        plain, autocast = f"`nn.Linear`, {floats}", "the same under torch's autocast"
        parts += [
            f"{place}, BERT-base with {size} layers and the batch of `mixft bench inference_step`, a forward pass:",
            tables.whole_model(
                found,
                {
                    (forward, "torch"): plain,
                    (forward, "torch AMP"): autocast,
                    (forward, "torch.ao"): "`torch.ao.quantization.quantize_dynamic`",
                    (forward, "mixft"): '`mixft.quantize_(model, mode="dynamic")`',
                },
            ),
            "A training step, with clipping and optimizer:",
            tables.whole_model(
                found,
                {
                    (training, "torch"): plain,
                    (training, "torch AMP"): autocast,
                    (in_bf16, "mixft"): '`model.bfloat16()`, `mixft.optim.AdamW(..., master_weights="split")`',
                    (training, "mixft"): '`mixft.quantize_(model, mode="train")`',
                },
            ),
        ]
    return "\n\n".join(parts)


def aims(results: Results) -> str:
    """docs: the figures to reach, each with what was measured."""
    return tables.aims(results.recordings.values())


def device_section(results: Results, kind: str, command: str) -> str:
    """docs: everything that one recording shows."""
    found = results.recordings.get(kind)
    if found is None:
        return RECORD.format(command=command)
    names = plots(results)
    parts = [tables.machine(found), tables.summary(found)]
    for name in PLOTS:
        parts += [f"![{name}](plots/{kind}-{name}.png)"] if f"{kind}-{name}.png" in names else []
    for family in dict.fromkeys(row["family"] for row in found["rows"]):
        parts.append(f"### {family}\n\n{tables.family_table(found, family)}")
        if f"{kind}-{family}.png" in names:
            parts.append(f"![{family}](plots/{kind}-{family}.png)")
        if f"{kind}-memory-{family}.png" in names:
            parts.append(f"![memory of {family}](plots/{kind}-memory-{family}.png)")
            parts.append(tables.memory_table(found, family))
    again = results.repeats.get(kind)
    parts += [f"### From run to run\n\n{REPEATED}\n\n{tables.repeatability(found, again)}"] if again else []
    reasons, left_out = tables.reasons_if_slower(found), tables.without_times(found)
    parts += [f"### Why a peer is faster\n\n{reasons}"] if reasons else []
    parts += [f"### Without a time\n\n{left_out}"] if left_out else []
    return "\n\n".join(parts)


SECTIONS = {
    "demo": demo,
    "precisions": precisions,
    "layers": layers,
    "speed": speed,
    "aims": aims,
    "gpu": lambda results: device_section(results, "cuda", "make gpu"),
    "cpu": lambda results: device_section(results, "cpu", "mixft bench --json benchmarks/results/NAME.json"),
}


def render(text: str, results: Results) -> str:
    """``text`` with every generated part made anew.

    Raises:
        ValueError: a part has a name that is not one of ``SECTIONS``.
    """

    def section(found: re.Match) -> str:
        if found[2] not in SECTIONS:
            raise ValueError(f"there is no generated part {found[2]!r}; there are {', '.join(SECTIONS)}")
        return f"{found[1]}{SECTIONS[found[2]](results)}\n{found[3]}"

    return SECTION.sub(section, text)


def plots(results: Results) -> dict[str, tuple]:
    """The pictures of the recordings by file name: the function that draws it, and what it draws."""
    found = {}
    for kind, whole in results.recordings.items():
        has = {
            "roofline": any(row["provider"] == "mixft" and row["seconds"] for row in whole["rows"]),
            "scaling": any(row["sweep"] and row["seconds"] for row in whole["rows"]),
        }
        found |= {f"{kind}-{name}.png": (PLOTS[name], whole) for name in has if has[name]}
        for family in dict.fromkeys(row["family"] for row in whole["rows"]):
            rows = [row for row in whole["rows"] if row["family"] == family]
            if any(row["provider"] != "mixft" and row["speedup"] for row in rows):
                found[f"{kind}-{family}.png"] = (ratio_bars, {**whole, "rows": rows})
            if any(row["memory"] for row in rows):
                found[f"{kind}-memory-{family}.png"] = (memory_stacks, {**whole, "rows": rows})
    return found


def drift(root: Path, results: Results) -> list[str]:
    """What under ``root`` is not what the results say, a line each."""
    complaints = []
    for name in DOCUMENTS:
        text = (root / name).read_text(encoding="utf-8")
        if render(text, results) != text:
            complaints.append(f"{name} is not what the results say")
    expected = plots(results)
    present = {path.name: path for path in (root / PLOT_FOLDER).glob("*.png")}
    complaints += [f"{PLOT_FOLDER}/{name} is of no recording" for name in sorted(set(present) - set(expected))]
    for name, (_, shown) in expected.items():
        if name not in present or digest(shown).encode() not in present[name].read_bytes():
            complaints.append(f"{PLOT_FOLDER}/{name} does not show the recording")
    return complaints


def write(root: Path, results: Results) -> None:
    """Bring the documents and the plots under ``root`` up to date."""
    for name in DOCUMENTS:
        path = root / name
        path.write_text(render(path.read_text(encoding="utf-8"), results), encoding="utf-8")
    folder = root / PLOT_FOLDER
    expected = plots(results)
    for path in folder.glob("*.png"):
        if path.name not in expected:
            path.unlink()
    if expected:
        folder.mkdir(exist_ok=True)
    for name, (draw, shown) in expected.items():
        draw(shown, folder / name)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mixft.benchmarks.publish", description="Tables and plots.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where something has drifted")
    parser.add_argument("--keep", metavar="REPORT", type=Path, action="append", default=[], help="a report.json")
    given = parser.parse_args(arguments)
    if not (ROOT / DOCUMENTS[0]).is_file():
        parser.error(f"{ROOT} is no checkout of mixft; install it with pip install -e")
    folder = ROOT / "benchmarks" / "results"
    try:
        for path in given.keep:
            print(f"kept {finetune_tables.keep(path, folder).name}")
        results = load(folder)
    except (OSError, ValueError, KeyError) as error:
        parser.error(str(error))
    if not given.check:
        write(ROOT, results)
    complaints = drift(ROOT, results)
    for complaint in complaints:
        print(f"{complaint}; make tables brings it up to date", file=sys.stderr)
    return 1 if complaints else 0


def _same_place(first: dict, second: dict) -> bool:
    return {**first, "date": None} == {**second, "date": None}


def _keep_newest(found: dict[str, dict], kind: str, content: dict) -> None:
    if kind not in found or found[kind]["environment"]["date"] < content["environment"]["date"]:
        found[kind] = content


if __name__ == "__main__":
    sys.exit(main())

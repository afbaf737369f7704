"""The documents' tables and plots are what the recordings say; where nothing is recorded, that is said."""

import json
from pathlib import Path

import pytest
from recordings import example, pair, recording, row, without_time

from mixft.benchmarks import finetune_tables, publish, tables
from mixft.benchmarks.publish import Results, drift, load, render, write

ROOT = Path(__file__).parent.parent
RUN = {
    "steps": 2,
    "peak_memory_bytes": 3 * 2**20,
    "optimizer_bytes": 2**20,
    "eval_accuracy_int8": None,
    "overflow_steps": 1,
    "losses": [0.7, 0.6],
}


def report(seeds: list[int]) -> dict:
    runs = [
        RUN
        | {"precision": precision, "seed": seed, "seconds_per_step_median": seconds, "eval_accuracy": 0.8 + seed / 100}
        for seed in seeds
        for precision, seconds in (("fp32", 0.4), ("int8", 0.16))
    ]
    task = {"model": "/home/me/models/bert", "train": "/home/me/reviews.csv", "eval": None, "seeds": seeds}
    return {
        "environment": example()["environment"],
        "task": task | {"precisions": ["fp32", "int8"]},
        "runs": runs,
    }


@pytest.fixture
def checkout(tmp_path):
    """A checkout with documents and no results."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "results").mkdir()
    for name in publish.DOCUMENTS:
        (tmp_path / name).write_text((ROOT / name).read_text())
    return tmp_path


def test_the_documents_and_the_plots_are_what_the_results_say():
    assert not drift(ROOT, load(ROOT / "benchmarks" / "results")), "make tables brings them up to date"


def test_a_changed_figure_is_drift_until_written_again(checkout):
    results = Results({"cpu": example()}, {})
    write(checkout, results)
    assert not drift(checkout, results)
    results.recordings["cpu"]["rows"][1]["speedup"] = 9.87
    found = drift(checkout, results)
    assert "docs/benchmarks.md is not what the results say" in found
    assert "docs/plots/cpu-quant_linear.png does not show the recording" in found
    write(checkout, results)
    assert not drift(checkout, results)
    assert "9.87x" in (checkout / "docs/benchmarks.md").read_text()


def test_an_edit_by_hand_and_a_stray_plot_are_drift(checkout):
    results = Results({"cpu": example()}, {})
    write(checkout, results)
    readme = checkout / "README.md"
    readme.write_text(readme.read_text().replace("| adamw | 3 |", "| adamw | 4 |"))
    (checkout / "docs/plots/cuda-roofline.png").write_bytes(b"")
    assert drift(checkout, results) == [
        "README.md is not what the results say",
        "docs/plots/cuda-roofline.png is of no recording",
    ]
    write(checkout, results)
    assert not drift(checkout, results)


def test_what_is_not_recorded_is_said(checkout):
    write(checkout, Results())
    assert not drift(checkout, Results())
    assert "On a GPU: not measured yet, so nothing is claimed." in (checkout / "README.md").read_text()
    page = (checkout / "docs/benchmarks.md").read_text()
    assert page.count("| not measured yet |") == len(tables.AIMS)
    assert "`make gpu` records it" in page
    assert not (checkout / "docs/plots").exists()


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="no generated part 'sped'; there are demo,"):
        render("<!-- generated: sped -->\n<!-- end -->", Results())


def test_results_of_every_kind_are_read_and_the_newest_counts(tmp_path):
    on_gpu = recording([row("a/1")], device="cuda:0")
    later = recording([row("b/1")], date="2027-01-01T00:00:00+00:00")
    files = {
        "a": example(),
        "b": later,
        "c": {"stages": [], "recording": on_gpu},
        "d": {"stages": [], "recording": None},
        "e": report([1]),
        "f": report([1, 2]),
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    results = load(tmp_path)
    assert results.recordings == {"cpu": later, "cuda": on_gpu}
    assert results.reports == {"one": report([1]), "several": report([1, 2])}


@pytest.mark.parametrize("content", [{"format": 2}, {"results": []}])
def test_another_format_is_refused_by_name(tmp_path, content):
    (tmp_path / "old.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"old\.json has format"):
        load(tmp_path)


def test_a_family_table_says_ratio_or_reason():
    rows = [*pair("a/1", {"torch": 2.0}), *pair("a/2", {"torch": 4.0}), without_time("a/2", "torchao", "wrong", "e")]
    assert tables.family_table(recording(rows), "a").splitlines()[2:] == [
        "| a/1 | 1.000 | 20% | 2.00x (1.92 to 2.10) |  |",
        "| a/2 | 1.000 | 20% | 4.00x (3.84 to 4.20) | wrong output |",
    ]


def test_a_summary_has_geometric_means():
    rows = [*pair("a/1", {"torch": 2.0}), *pair("a/2", {"torch": 8.0}), without_time("b/1", "mixft", "wrong", "e")]
    assert tables.summary(recording(rows)).splitlines()[2:] == [
        "| a | 2 | 20% | torch **4.00x** (2.00 to 8.00) |",
        "| b | 1 | no time | no peer timed |",
    ]


def test_tokens_memory_and_reasons_have_their_place():
    memory = {"weights": 2**20, "peak": 3 * 2**21, "resident": 2**21}
    rows = pair("a/1", {"torch": 0.5}, tokens=100, memory=memory)
    rows[0]["note"] = "torch does less"
    rows += [{**pair("a/2", {"torch": 2.0})[0], "note": "not shown"}]
    found = recording(rows)
    assert "| a/1 | 1.000 | 100,000 | 20% | 0.50x (0.48 to 0.53) |" in tables.family_table(found, "a")
    assert "| case | provider | weights | measured afterwards | measured peak |" in tables.memory_table(found, "a")
    assert "| a/1 | torch | 1.0 | 2.0 | 6.0 |" in tables.memory_table(found, "a")
    assert tables.reasons_if_slower(found) == "- a/1: torch does less"
    page = publish.device_section(Results({"cpu": found}), "cpu", "mixft bench")
    assert "### Why a peer is faster" in page
    assert tables.memory_table(found, "a") in page
    assert "![memory of a](plots/cpu-memory-a.png)" in page


def test_a_whole_model_is_shown_beside_what_it_was():
    memory = {"parameters": 2**20, "peak": 2**23, "resident": 2**22}
    rows = pair("inference_step/bert-2-layers-dynamic", {"torch": 4.0}, memory=memory)
    rows += [without_time("inference_step/bert-2-layers-dynamic", "torch.ao", "refused", "old")]
    rows += pair("training_step/bert-2-layers-bf16", {"torch": 3.0}, memory=memory)
    rows += [row for row in pair("training_step/bert-2-layers-int8", {"torch": 5.0}) if row["provider"] != "torch"]
    shown = publish.layers(Results({"cpu": recording(rows)}))
    assert "| `nn.Linear`, FP32 | 4.0 | 4.0 | 1.00x | 4.0 |" in shown
    assert '| `mixft.quantize_(model, mode="dynamic")` | 1.0 | 4.0 | 4.00x | 4.0 |' in shown
    assert "quantize_dynamic" not in shown
    assert shown.startswith("On a GPU: not measured yet.")
    # Each beside the torch of its own case, and not without one.
    assert shown.endswith(
        '|---|---|---|---|---|\n| `model.bfloat16()`, `mixft.optim.AdamW(..., master_weights="split")` '
        "| 1.0 | 3.0 | 3.00x | 4.0 |"
    )
    assert publish.layers(Results({"cpu": recording(rows[:3])})).endswith("and optimizer:\n\nnot measured yet")


def test_two_runs_of_one_commit_show_how_far_ratios_repeat(tmp_path):
    first = recording(pair("a/1", {"torch": 2.0, "torchao": 1.0}) + pair("b/1", {"torch": 4.0}))
    again = recording(pair("a/1", {"torch": 2.2, "torchao": 1.0}) + pair("b/1", {"torch": 3.0}))
    again["environment"] = {**again["environment"], "date": "2026-11-22T00:49:44+00:00"}
    table = tables.repeatability(first, again)
    assert table.splitlines()[2:] == [
        "| a | 2 | 5.0% | 10.0% (a/1, torch) |",
        "| b | 1 | 33.3% | 33.3% (b/1, torch) |",
        "| all | 3 | 10.0% | 33.3% (b/1, torch) |",
    ]
    for name, content in (("x", first), ("y", again)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    results = publish.load(tmp_path)
    assert results.recordings["cpu"] == first
    assert table in publish.device_section(results, "cpu", "mixft bench")
    again["environment"]["commit"] = "f" * 40
    (tmp_path / "y.json").write_text(json.dumps(again))
    assert not publish.load(tmp_path).repeats


def test_reasons_are_counted_once_each():
    rows = [without_time(f"a/{index}", "torchao", "refused", "odd | shape\nhere") for index in range(2)]
    assert tables.without_times(recording(rows)) == "- torchao, refused, 2 cases: odd / shape here"


def test_an_aim_shows_its_own_rows():
    rows = pair("linear/512x768-fp16", {"torch": 2.0}) + pair("linear/512x768-bf16", {"torch": 9.0})
    table = tables.aims([recording(rows, device="cuda")])
    assert "| FP16 linear layer | H100 | ≥ 0.97x torch | 2.00x (2.00 to 2.00, 1 case) | yes |" in table
    assert table.count("not measured yet") == len(tables.AIMS) - 1


@pytest.mark.parametrize(("ratio", "met"), [(0.97, "yes"), (0.96, "no")])
def test_an_aim_is_met_from_its_figure_on(ratio, met):
    rows = pair("linear/512x768-fp16", {"torch": ratio})
    assert f"1 case) | {met} |" in tables.aims([recording(rows, device="cuda")])


def test_a_share_of_the_floor_is_met_in_hundredths():
    rows = pair("quantize/512x768-fp16", {})
    for fraction, met in ((0.9, "yes"), (0.89, "no")):
        rows[0]["floor_fraction"] = fraction
        table = tables.aims([recording(rows, device="cuda")])
        assert f"| ≥ 90% of the floor | {fraction:.0%} ({fraction:.0%} to {fraction:.0%}, 1 case) | {met} |" in table


def test_an_aim_for_the_host_compares_the_host_s_times():
    rows = pair("tensors/adamw-fp32-1000", {"torch fused": 2.0})
    rows[0]["host_seconds"], rows[1]["host_seconds"] = 1e-5, 7e-5
    assert "| ≥ 5x torch fused | 7.00x (7.00 to 7.00, 1 case) | yes |" in tables.aims([recording(rows, device="cuda")])


def test_tables_of_a_fine_tuning_report():
    assert finetune_tables.detailed(report([1])).splitlines()[2:] == [
        "| fp32: plain torch | 400.0 | 1.00x | 3.0 | 1.0 | 81.0% | none | 1 |",
        "| int8: int8 forward and backward | 160.0 | 2.50x | 3.0 | 1.0 | 81.0% | none | 1 |",
    ]
    assert "| 160.0 | 2.50x | 81.5 ± 0.7% |" in finetune_tables.brief(report([1, 2]))


def test_a_kept_report_names_no_folder_of_the_machine(tmp_path):
    source = tmp_path / "report.json"
    source.write_text(json.dumps(report([1, 2])))
    kept = finetune_tables.keep(source, tmp_path)
    assert kept.name == "finetune-reviews-fp32-int8-2-seeds.json"
    text = kept.read_text()
    assert "/home" not in text
    assert "losses" not in text
    assert finetune_tables.brief(json.loads(text)) == finetune_tables.brief(report([1, 2]))


def test_a_report_without_runs_is_refused(tmp_path):
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ValueError, match="no runs"):
        finetune_tables.keep(tmp_path / "report.json", tmp_path)

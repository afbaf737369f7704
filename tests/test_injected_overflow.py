"""An overflow in the middle of a fine-tuning run is skipped, named in the report and survived."""

from dataclasses import replace

import pytest
from tiny_bert import rows, save_tiny_bert, write_csv

from mixft.benchmarks import demo_runs, injected_overflow

STEPS = 8


@pytest.fixture
def recipe(tmp_path):
    model = save_tiny_bert(tmp_path / "model")
    train = write_csv(tmp_path / "train.csv", rows(96))
    return replace(demo_runs.DEMO, model=str(model), train=str(train), max_steps=STEPS, batch_size=4, max_length=16)


def test_an_injected_infinity_is_skipped_and_named(recipe, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(injected_overflow, "STEP", 5)
    undisturbed, entry = (demo_runs.train(recipe, set_up, 1) for set_up in injected_overflow.SETUPS.values())
    found = {step["iteration"]: step["parameters"] for step in entry["overflows"]}
    usual = {step["iteration"]: step["parameters"] for step in undisturbed["overflows"]}
    # The pass counted 5 from 0 is iteration 6; the steps before it are the same in both runs.
    assert found[6] == [(f"bert.{injected_overflow.LAYER}.weight", 1)]
    assert 6 not in usual
    assert entry["losses"][:6] == undisturbed["losses"][:6]
    assert entry["steps"] == STEPS
    assert demo_runs.NAME not in demo_runs.precision.PRECISIONS

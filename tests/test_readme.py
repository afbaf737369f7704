"""The README's examples: each runs as it stands, given what it names, and one that shows what it prints prints that."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_models import VOCABULARY, llama, logits
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

import mixft

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```(python|diff)\n(.*?)```(?:\n\n```\n(.*?)```)?", README, re.DOTALL)
SHOWN = [(code, output) for _, code, output in EXAMPLES if output]


def as_it_becomes(kind: str, code: str) -> str:
    """The code of an example; of a change, what it leads to."""
    lines = code.splitlines()
    return code if kind == "python" else "\n".join(line[1:] for line in lines if not line.startswith("-"))


@pytest.fixture
def given(tmp_path) -> dict:
    """What a reader of an example has already."""
    path = tmp_path / "model"
    llama().save_pretrained(path)
    model = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.LayerNorm(256))
    model.add_module("classifier", torch.nn.Linear(256, 128))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randn(4, 128)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    tokens = torch.randint(0, VOCABULARY, (4, 9))
    return {
        "mixft": mixft,
        "torch": torch,
        "model": model,
        "optimizer": optimizer,
        "scaler": mixft.amp.LossScaler(init_scale=8.0, device="cpu"),
        "loss_of": lambda part: model(part).float().square().mean(),
        "batch": torch.randn(4, 128),
        "batches": [torch.randn(2, 4, 128) for _ in range(3)],
        "other_model": torch.nn.Sequential(torch.nn.Linear(128, 128)),
        "x": torch.randn(3, 768).half(),
        "path": path,
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "AutoModelForSequenceClassification": AutoModelForSequenceClassification,
        "LoraConfig": LoraConfig,
        "get_peft_model": get_peft_model,
        "Trainer": Trainer,
        "arguments": TrainingArguments(
            str(tmp_path / "run"), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1
        ),
        "texts": [{"input_ids": row, "labels": row} for row in tokens],
    }


def took_over(names: dict) -> bool:
    return isinstance(names["optimizer"], mixft.optim.AdamW)


def swapped_with_its_state(names: dict) -> bool:
    state = next(iter(names["optimizer"].state_dict()["state"].values()))
    return took_over(names) and state["step"] == 1


def stepped_with_sums(names: dict) -> bool:
    steps = {state["step"].item() for state in names["optimizer"].state_dict()["state"].values()}
    return steps == {3} and all(buffer.dtype == torch.float32 for buffer in names["accumulator"].buffers)


def trains_in_int8(names: dict) -> bool:
    return {layer.mode for layer in mixft.model_report(names["model"]).layers} >= {"train"}


def serves_in_int8(names: dict) -> bool:
    static, outliers = names["model"][0], names["other_model"][0]
    return (static.mode, outliers.mode, outliers.outlier_threshold) == ("static", "dynamic", 6.0)


def merged_in_int8(names: dict) -> bool:
    merged = AutoModelForCausalLM.from_pretrained("merged")
    history = names["trainer"].state.log_history
    assert all(any(name in entry for entry in history) for name in ("loss", "int8_fallbacks"))
    return torch.equal(logits(merged), logits(names["model"].merge_and_unload()))


def computes_and_sums(names: dict) -> bool:
    return names["y"].shape == (3, 768) and names["layer"].weight.main_grad.shape == (768, 768)


def follows_the_run(names: dict) -> bool:
    dtypes = [module.weight.dtype for module in names["model"]]
    return dtypes == [torch.float16, torch.float32, torch.float32] and not names["controller"].events


# What is so after the example that has these words.
OUTCOMES: dict[str, Callable[[dict], bool]] = {
    "torch.amp.GradScaler": took_over,
    "optim.swap": swapped_with_its_state,
    "GradAccumulator(": stepped_with_sums,
    "AutoModelForSequenceClassification": trains_in_int8,
    "mixft.calibrate": serves_in_int8,
    "get_peft_model": merged_in_int8,
    "nn.MLP": computes_and_sums,
    "PrecisionPolicy": follows_the_run,
}


@pytest.mark.parametrize("words", OUTCOMES)
def test_an_example_runs(native_device, given, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (code,) = (as_it_becomes(kind, code) for kind, code, _ in EXAMPLES if words in code)
    exec(code, given)
    assert OUTCOMES[words](given)


def test_every_example_is_one_of_these():
    assert len(EXAMPLES) == len(OUTCOMES) + len(SHOWN)


@pytest.mark.parametrize(("code", "output"), SHOWN)
def test_an_example_prints_what_is_shown(native_device, capsys, code, output):
    exec(code, {})
    assert capsys.readouterr().out == output

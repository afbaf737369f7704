"""A BERT and a causal language model from folder to folder: quantized, loaded in a fresh process, trained with LoRA."""

import json
import subprocess
import sys

import torch
from huggingface_models import llama, logits
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import mixft
from mixft.cli.model_folder import find_model

AUTO = {"minilm": AutoModelForSequenceClassification, "llama": AutoModelForCausalLM}

FRESH = """
import json, sys
import torch
import mixft.huggingface
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

def train(model, targets, task):
    model = get_peft_model(model, LoraConfig(r=8, target_modules=targets, task_type=task)).train()
    optimizer = mixft.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(tokens, labels=tokens if task == "CAUSAL_LM" else tokens[:, 0] % 2).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses

torch.manual_seed(0)
folder = sys.argv[1]
tokens = torch.randint(0, 150, (3, 17), generator=torch.Generator().manual_seed(7))
found = {}
for name, load, targets, task in (
    ("minilm", AutoModelForSequenceClassification, ["query", "value"], "SEQ_CLS"),
    ("llama", AutoModelForCausalLM, "all-linear", "CAUSAL_LM"),
):
    model = load.from_pretrained(f"{folder}/{name}-int8")
    with torch.no_grad():
        torch.save(model(tokens).logits, f"{folder}/{name}.pt")
    found[name] = train(model, targets, task)
print(json.dumps(found))
"""


def test_quantized_saved_loaded_in_a_fresh_process_and_fine_tuned(without_interpreter, tmp_path):
    llama().save_pretrained(tmp_path / "llama")
    expected = {}
    for name, folder in (("minilm", find_model("minilm")), ("llama", tmp_path / "llama")):
        model = AUTO[name].from_pretrained(folder, quantization_config=mixft.Int8Config("weight_only"))
        model.save_pretrained(tmp_path / f"{name}-int8", max_shard_size="5MB")
        expected[name] = logits(model)
    run = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for name, losses in json.loads(run.stdout.splitlines()[-1]).items():
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), expected[name])
        assert losses[-1] < losses[0] - 0.1, (name, losses)

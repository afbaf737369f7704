"""What an overflow costs: the FP16 run of ``mixft finetune`` with an infinity put into one gradient, and undisturbed.

    python -m mixft.benchmarks.injected_overflow [SEED...]

For every seed it prints the held-out accuracy of both runs and what the report says of the steps that were skipped.
"""

import argparse
import itertools
import sys
import tempfile
from dataclasses import replace

import torch

from mixft.cli import dataset, model_folder, precision, training
from mixft.cli.job import Job, Recipe

STEP = 20
LAYER = "encoder.layer.0.attention.output.dense"

DEMO = Recipe(
    task="classification",
    model=model_folder.MINILM,
    train=dataset.MOVIE_REVIEWS,
    eval=None,
    text_column="text",
    label_column="label",
    epochs=1,
    max_steps=None,
    batch_size=32,
    grad_accumulation=1,
    max_length=64,
    learning_rate=1e-4,
    master_weights="auto",
    state_dtype="fp32",
    lora=None,
    lora_alpha=None,
    device="cpu",
)


def fp16_with_an_infinity(model: torch.nn.Module, learning_rate: float, storage: precision.Storage) -> precision.Setup:
    """``fp16`` with a hook that makes one element of a weight's gradient infinite in backward pass ``STEP``."""
    setup = precision.PRECISIONS["fp16"](model, learning_rate, storage)
    weight = next(value for name, value in model.named_parameters() if name.endswith(f"{LAYER}.weight"))
    passes = itertools.count()

    def disturb(grad: torch.Tensor) -> torch.Tensor:
        if next(passes) != STEP:
            return grad
        disturbed = grad.clone()
        disturbed.view(-1)[0] = torch.inf
        return disturbed

    weight.register_hook(disturb)
    return setup


def train(recipe: Recipe, kind: str, seed: int) -> dict:
    """The entry of one run in ``report.json``; its model is not kept."""
    precision.PRECISIONS["injected"] = fp16_with_an_infinity
    try:
        with tempfile.TemporaryDirectory() as output:
            return training.run(Job(recipe, kind, seed, output), lambda *_, **__: None)
    finally:
        del precision.PRECISIONS["injected"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mixft.benchmarks.injected_overflow")
    parser.add_argument("seeds", nargs="*", type=int, default=[1, 2, 3], metavar="SEED")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = replace(DEMO, model=str(model_folder.find_model(model_folder.MINILM)), device=device)
    for seed in parser.parse_args(arguments).seeds:
        for kind in ("fp16", "injected"):
            entry = train(recipe, kind, seed)
            skipped = "; ".join(f"iteration {step['iteration']}: {step['parameters']}" for step in entry["overflows"])
            print(f"seed {seed}, {kind}: held-out accuracy {entry['eval_accuracy']:.1%}, skipped {skipped}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs of the demo task of ``mixft finetune`` in a setup of one's own, in this process and with nothing kept."""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace

import torch

from mixft.cli import dataset, model_folder, precision, training
from mixft.cli.job import Job, Recipe

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
NAME = "demo"

SetUp = Callable[[torch.nn.Module, float, precision.OptimizerStorage], precision.Setup]


def demo_recipe() -> Recipe:
    """The demo task with the model found, on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return replace(DEMO, model=str(model_folder.find_model(model_folder.MINILM)), device=device)


def train(recipe: Recipe, set_up: SetUp, seed: int) -> dict:
    """The entry in ``report.json`` of a run in the precision that ``set_up`` makes; its model is not kept."""
    precision.PRECISIONS[NAME] = set_up
    try:
        with tempfile.TemporaryDirectory() as output:
            return training.run(Job(recipe, NAME, seed, output), lambda *_, **__: None)
    finally:
        del precision.PRECISIONS[NAME]


def seeds(program: str, arguments: list[str] | None) -> list[int]:
    """The seeds that the command line names, or the first three."""
    parser = argparse.ArgumentParser(prog=f"python -m mixft.benchmarks.{program}")
    parser.add_argument("seeds", nargs="*", type=int, default=[1, 2, 3], metavar="SEED")
    return parser.parse_args(arguments).seeds

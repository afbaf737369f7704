"""What the optimizer's storage costs in accuracy: int8 moments and split masters against ``torch.optim.AdamW`` in FP32.

    python -m mixft.benchmarks.optimizer_states [SEED...]

The demo task of ``mixft finetune`` twice for every seed: FP32 parameters under torch's AdamW, and ``--precision fp16
--master-weights split --state-dtype int8``. Both see the same batches and, unlike two runs of the command, drop the
same elements: ``mixft.nn.Dropout`` draws its masks alike in every dtype, and here the FP32 run has it too. What is left
is the difference of the numbers, not that of two draws of the masks, which moves the loss by a few percent either way.
"""

import statistics
import sys
from collections.abc import Callable
from operator import itemgetter

import torch

import mixft
from mixft.cli import precision

from .demo_runs import demo_recipe, seeds, train


def fp32(model: torch.nn.Module, learning_rate: float, storage: precision.OptimizerStorage) -> precision.Setup:
    """torch's layers, AdamW and clipping; dropout as in ``fp16`` runs."""
    precision.replace_layers(model, torch.nn.Dropout, mixft.nn.Dropout.from_dropout)
    return precision.PRECISIONS["fp32"](model, learning_rate, storage)


def int8_states(model: torch.nn.Module, learning_rate: float, storage: precision.OptimizerStorage) -> precision.Setup:
    """``fp16`` with 4.06 bytes a parameter for what remains of the master and both moments."""
    return precision.PRECISIONS["fp16"](model, learning_rate, precision.OptimizerStorage("split", "int8"))


SETUPS = {"FP32 AdamW": fp32, "split masters, int8 moments": int8_states}


def main(arguments: list[str] | None = None) -> int:
    found: dict[str, list[dict]] = {name: [] for name in SETUPS}
    for seed in seeds("optimizer_states", arguments):
        for name, set_up in SETUPS.items():
            entry = train(demo_recipe(), set_up, seed)
            found[name].append(entry)
            print(f"seed {seed}, {summary(name, [entry])}", flush=True)
    for name, entries in found.items():
        print(f"mean, {summary(name, entries)}")
    return 0


def summary(name: str, entries: list[dict]) -> str:
    """Means over runs of one setup."""

    def mean(figure: Callable[[dict], float]) -> float:
        return statistics.fmean(map(figure, entries))

    return (
        f"{name}: held-out accuracy {mean(itemgetter('eval_accuracy')):.2%}, training loss at the end "
        f"{mean(itemgetter('final_train_loss')):.4f}, over all steps "
        f"{mean(lambda entry: statistics.fmean(entry['losses'])):.4f}, optimizer state "
        f"{mean(lambda entry: entry['optimizer_bytes'] / entry['trained_parameters']):.2f} bytes a parameter"
    )


if __name__ == "__main__":
    sys.exit(main())

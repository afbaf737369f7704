"""What an overflow costs: the FP16 run of ``mixft finetune`` with an infinity put into one gradient, and undisturbed.

    python -m mixft.benchmarks.injected_overflow [SEED...]

For every seed it prints the held-out accuracy of both runs and what the report says of the steps that were skipped.
"""

import itertools
import sys

import torch

from mixft.cli import precision

from .demo_runs import demo_recipe, seeds, train

STEP = 20
LAYER = "encoder.layer.0.attention.output.dense"


def with_an_infinity(
    model: torch.nn.Module, learning_rate: float, storage: precision.OptimizerStorage
) -> precision.Setup:
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


SETUPS = {"fp16": precision.PRECISIONS["fp16"], "injected": with_an_infinity}


def main(arguments: list[str] | None = None) -> int:
    for seed in seeds("injected_overflow", arguments):
        for name, set_up in SETUPS.items():
            entry = train(demo_recipe(), set_up, seed)
            skipped = "; ".join(f"iteration {step['iteration']}: {step['parameters']}" for step in entry["overflows"])
            print(f"seed {seed}, {name}: held-out accuracy {entry['eval_accuracy']:.1%}, skipped {skipped}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

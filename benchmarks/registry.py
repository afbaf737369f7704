"""Every benchmark case. A new case is one entry of ``CASES`` in the module of its family."""

import torch

from .case import Case
from .cases import gradients, inference_step, int8, linear, lora_step, optimizer_step, quantizers, training_step

MODULES = (linear, int8, quantizers, gradients, optimizer_step, training_step, lora_step, inference_step)
CASES: tuple[Case, ...] = tuple(case for module in MODULES for case in module.CASES)


def cases_for(device: torch.device) -> list[Case]:
    """The cases for devices of this kind, in order."""
    return [case for case in CASES if device.type in case.devices]


def find(name: str) -> Case:
    """The case of that name.

    Raises:
        KeyError: there is none.
    """
    return {case.name: case for case in CASES}[name]

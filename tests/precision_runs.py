"""Small models in FP16 under a precision controller, and one step of training, for the tests of the controller."""

import pytest
import torch
from torch import nn

from mixft.optim import AdamW

F16, F32 = torch.float16, torch.float32
QUIET = {"spike_deviations": None, "snr_drop": None, "memory_reserve": None, "calm_steps": None}


def switches(controller):
    return [(event.step, event.layer, event.cause, event.before, event.after) for event in controller.events]


def parameter_dtypes(model):
    return {name.removesuffix(".weight"): p.dtype for name, p in model.named_parameters() if name.endswith("weight")}


def iterate(model, optimizer, scaler, controller, inputs, loss_of=lambda output: output.float().square().mean()):
    optimizer.zero_grad()
    loss = loss_of(model(inputs))
    (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    return controller.step(loss)


def three_layers(first=1.0, second=1.0, outer=1.0):
    """Three layers in FP16 without biases, all weights of a layer alike, and an optimizer that hardly moves them."""
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3))).half()
    with torch.no_grad():
        for layer, value in zip(model, (first, second, outer), strict=True):
            layer.weight.fill_(value)
    return model, AdamW(model.parameters(), lr=1e-7, weight_decay=0.0)


@pytest.fixture(autouse=True)
def cpu_routines(request, monkeypatch):
    """The CPU routines, except where a test says what serves it: the interpreter takes seconds for some steps."""
    if "device" not in request.fixturenames:
        monkeypatch.setenv("TRITON_INTERPRET", "0")

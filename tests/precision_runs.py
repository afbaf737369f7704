"""Small models and their training, shared by the tests of precision policies and controllers."""

import pytest
import torch
from torch import nn

from mixft.optim import AdamW

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
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


class Net(nn.Module):
    """A norm called by its place and one by its class, a residual sum, an additive mask, buffers, a head."""

    def __init__(self, width=6):
        super().__init__()
        self.embed = nn.Embedding(10, width)
        self.block = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width)})
        self.norm1 = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, 3)
        self.register_buffer("positions", torch.arange(width))
        self.register_buffer("frequencies", torch.rand(width))
        self.seen = {}
        for name, module in self.named_modules():
            module.register_forward_hook(self._note(name))

    def _note(self, name):
        return Note(self.seen, name)

    def forward(self, tokens, *, mask=None):
        hidden = self.embed(tokens)
        hidden = self.block["LayerNorm"](self.block["dense"](hidden) + hidden)
        hidden = self.norm1(hidden)
        if mask is not None:
            hidden = hidden * mask.softmax(-1).unsqueeze(-1)
        return self.classifier(hidden)


class Note:
    def __init__(self, seen, name):
        self.seen, self.name = seen, name

    def __call__(self, module, args, output):
        self.seen[self.name] = (args[0].dtype, output.dtype)


TOKENS = torch.tensor([[1, 2, 3], [4, 5, 9]])


def dtypes(model):
    return {name: param.dtype for name, param in model.named_parameters()}


def train(model, optimizer, steps=3):
    for _ in range(steps):
        model(TOKENS).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(autouse=True)
def cpu_routines(request, monkeypatch):
    """The CPU routines, except where a test says what serves it: the interpreter takes seconds for some steps."""
    if "device" not in request.fixturenames:
        monkeypatch.setenv("TRITON_INTERPRET", "0")

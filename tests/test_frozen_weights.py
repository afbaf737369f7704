"""Frozen int8 weights under adapters: what training on top of them keeps in memory, and the ways of training."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mixft
from mixft.nn import QuantLinear

MODES = ("weight_only", "dynamic")

PEAK = """
import torch
from torch import nn
from mixft.nn import QuantLinear

LAYERS, SIZE = 16, 1024

def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        linear = nn.Linear(SIZE, SIZE, bias=False)
        self.base = QuantLinear.from_linear(linear, "{mode}")
        self.down, self.up = nn.Linear(SIZE, 4, bias=False), nn.Linear(4, SIZE, bias=False)

    def forward(self, x):
        return torch.tanh(self.base(x) + self.up(self.down(x)))

def train(model):
    x = torch.randn(8, SIZE, requires_grad=True)
    model(x).square().sum().backward()
    assert x.grad.abs().sum() > 0

train(nn.Sequential(Adapted()))  # what torch loads at its first call is not of the model
model = nn.Sequential(*[Adapted() for _ in range(LAYERS)])
before = peak()
for _ in range(2):
    train(model)
print((peak() - before) / (LAYERS * SIZE * SIZE))
"""


@pytest.mark.parametrize("compiled", ["0", "1"])
@pytest.mark.parametrize("mode", MODES)
def test_training_needs_no_floating_point_copy_of_the_weights(mode, compiled):
    """The peak of the process grows by the packed int8 weights, a byte each, and a little: 16 bits would be two."""
    source = PEAK.replace("{mode}", mode)
    # Every large block goes back to the system when it is freed, else the peak is of what glibc kept for later too.
    freed = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    environment = {**os.environ, **freed, "TRITON_INTERPRET": "0", "MIXFT_NATIVE": compiled}
    run = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 1.8


@pytest.mark.parametrize("mode", MODES)
def test_the_graph_keeps_int8_weights_alone(native_device, mode):
    layer = QuantLinear.from_linear(torch.nn.Linear(96, 64, device=native_device), mode)
    x = torch.randn(5, 96, device=native_device, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x).sum()
    assert all(tensor.dtype == torch.int8 for tensor in kept if tensor.numel() >= layer.weight.numel())
    assert sum(tensor.nbytes for tensor in kept if tensor.data_ptr() != layer.weight.data_ptr()) <= 4 * 64


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_autocast_give_the_gradients_of_plain_training(native_device, mode, reentrant):
    model = torch.nn.Sequential(
        torch.nn.Linear(96, 128), mixft.nn.Linear(128, 128, activation="gelu"), torch.nn.Linear(128, 128)
    ).to(native_device)
    mixft.quantize_(model, mode)
    x = torch.randn(5, 96, device=native_device, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    found = checkpoint(model, x, use_reentrant=reentrant)
    found.square().sum().backward()
    torch.testing.assert_close(x.grad, expected)
    with torch.autocast(native_device.type, torch.bfloat16):
        out = checkpoint(model, x, use_reentrant=False)
    assert out.dtype == torch.bfloat16
    (rounded,) = torch.autograd.grad(out.float().square().sum(), x)
    assert (rounded - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("backward", ["int8", "16bit", "exact"])
@pytest.mark.parametrize("mode", MODES)
def test_a_second_derivative_is_refused(mode, backward):
    frozen = QuantLinear.from_linear(torch.nn.Linear(64, 64), mode, backward=backward)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), frozen)
    x = torch.randn(4, 64, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()

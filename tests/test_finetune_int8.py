"""What ``mixft finetune --precision int8`` adds to a run: the fallbacks of noisy layers, as events."""

import json

import pytest
import torch

import mixft
from mixft.cli import report
from mixft.cli.precision import Setup


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.Tanh(), torch.nn.Linear(128, 128))
        mixft.quantize_(self, "train", shape_gating=False)


def steps(setup, x, count):
    for _ in range(count):
        loss = setup.model.layers(x).square().mean()
        setup.backward(loss)
        setup.step(loss.detach())


def test_a_noisy_layer_is_an_event_of_the_run():
    model = Model()
    setup = Setup(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    x = torch.randn(40, 128)
    x[:, 5] = 3000.0
    with pytest.warns(UserWarning, match="layers.0"):
        steps(setup, x, 4)
    (event,) = setup.precision_events()
    assert (event["step"], event["layer"]) == (2, "layers.0")
    assert (event["cause"], event["before"], event["after"]) == ("signal-to-noise", "int8", "fp32")
    assert event["figures"]["input"] < 10
    json.dumps(event)
    (line,) = report.switches([{"precision": "int8", "seed": 3, "precision_events": [event]}])
    assert line.startswith("int8 seed 3, step 2: layers.0 int8 -> fp32, signal-to-noise (input")


def test_a_quiet_run_has_no_events():
    model = Model()
    setup = Setup(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    steps(setup, torch.randn(40, 128), 3)
    assert setup.precision_events() == []

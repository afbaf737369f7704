"""The path of the loss scale over scripted overflows, written out where GradScaler has no such option."""

import pytest
import torch

from mixft.amp import LossScaler

F, O = False, True


def path(scaler, script):
    """The scale after every iteration of ``script``."""
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([param], lr=0.5)
    scales = []
    for overflows in script:
        param.grad = scaler.scale(torch.ones(2)) * (float("inf") if overflows else 1.0)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


@pytest.mark.parametrize(
    ("options", "script", "expected"),
    [
        # Three overflows go by in total; from the third on each backs off.
        ({"hysteresis": 3}, [O, F, O, F, O, O, F], [64, 64, 64, 64, 32, 16, 16]),
        # Growth restores the allowance.
        ({"hysteresis": 2, "growth_interval": 2}, [O, O, F, F, O, O], [64, 32, 32, 64, 64, 32]),
        # Growth that the ceiling holds back is still growth.
        ({"hysteresis": 2, "growth_interval": 1, "max_scale": 64.0}, [O, F, O, O], [64, 64, 64, 32]),
        # Only overflows in a row count.
        (
            {"hysteresis": 2, "consecutive_hysteresis": True},
            [O, F, O, F, O, O, O, F, O],
            [64, 64, 64, 64, 64, 32, 16, 16, 16],
        ),
        # An overflow without a backoff restarts the finite steps all the same.
        ({"hysteresis": 2, "growth_interval": 3}, [F, F, O, F, F, F], [64, 64, 64, 64, 64, 128]),
        ({"hysteresis": 2, "min_scale": 20.0}, [O, O, O, O, F], [64, 32, 20, 20, 20]),
        ({"dynamic": False, "hysteresis": 2, "growth_interval": 1}, [O, O, O, F, F], [64] * 5),
        ({"growth_interval": 2, "growth_factor": 4.0, "backoff_factor": 0.25}, [F, F, O, F, F], [64, 256, 64, 64, 256]),
    ],
)
def test_path(options, script, expected):
    assert path(LossScaler(64.0, **options, device="cpu"), script) == expected


def test_hysteresis_of_one_is_grad_scaler_s_rule():
    generator = torch.Generator().manual_seed(3)
    script = (torch.rand(200, generator=generator) < 0.2).tolist()
    options = {"init_scale": 2.0**16, "growth_interval": 4}
    stock = path(torch.amp.GradScaler("cpu", **options), script)
    assert path(LossScaler(**options, max_scale=2.0**60, min_scale=2.0**-60, device="cpu"), script) == stock


@pytest.mark.parametrize("at", range(8))
def test_a_checkpoint_at_any_point_changes_nothing(at):
    script = [O, F, O, O, F, F, F, O]
    options = {"hysteresis": 3, "growth_interval": 3, "patience": 2}
    whole = LossScaler(64.0, **options, device="cpu")
    expected = path(whole, script)
    first = LossScaler(64.0, **options, device="cpu")
    resumed = LossScaler(device="cpu")
    start = path(first, script[:at])
    resumed.load_state_dict(first.state_dict())
    assert start + path(resumed, script[at:]) == expected
    # Names tell the two optimizers apart only by group and position, so the histories are alike as well.
    assert resumed.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda scaler: scaler.set_growth_factor(1.0), "growth_factor must be above 1; it is 1.0"),
        (lambda scaler: scaler.set_backoff_factor(1.5), "backoff_factor must be between 0 and 1; it is 1.5"),
        (lambda scaler: scaler.set_growth_interval(0), "growth_interval must be at least 1; it is 0"),
        (lambda _: LossScaler(hysteresis=0), "hysteresis must be at least 1; it is 0"),
        (lambda _: LossScaler(patience=0), "patience must be at least 1; it is 0"),
        (lambda scaler: scaler.load_state_dict({"scale": 2.0}), "state_dict lacks growth_factor"),
    ],
)
def test_bad_values_are_refused_and_change_nothing(call, message):
    scaler = LossScaler(device="cpu")
    before = scaler.state_dict()
    with pytest.raises(ValueError, match=message):
        call(scaler)
    assert scaler.state_dict() == before


def test_setters_act():
    scaler = LossScaler(64.0, device="cpu")
    scaler.set_growth_factor(3.0)
    scaler.set_backoff_factor(0.25)
    scaler.set_growth_interval(1)
    assert path(scaler, [F, O]) == [192.0, 48.0]


def test_a_positional_closure_is_refused():
    param = torch.nn.Parameter(torch.ones(2))
    scaler = LossScaler(device="cpu")
    scaler.scale(param.sum()).backward()
    with pytest.raises(RuntimeError, match="closure"):
        scaler.step(torch.optim.SGD([param]), lambda: None)

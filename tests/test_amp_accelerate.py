"""LossScaler in the place of the GradScaler of Accelerate, which is also what transformers' Trainer steps with."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import mixft.optim
from mixft.amp import LossScaler


@pytest.fixture
def accelerator():
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = LossScaler(64.0, device="cpu")
    accelerator.native_amp = True
    yield accelerator
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(("make", "sees_skip"), [(torch.optim.AdamW, True), (mixft.optim.AdamW, False)])
def test_train_checkpoint_and_resume(accelerator, tmp_path, make, sees_skip):
    model = torch.nn.Linear(4, 3)
    model, optimizer = accelerator.prepare(model, make(model.named_parameters(), lr=0.1))
    skipped, changed = [], []
    for iteration in range(3):
        before = model.weight.detach().clone()
        accelerator.backward(model(torch.ones(2, 4)).sum() * (float("inf") if iteration == 1 else 1.0))
        if iteration == 2:
            accelerator.unscale_gradients(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        skipped.append(optimizer.step_was_skipped)
        changed.append(not torch.equal(model.weight, before))
    assert changed == [True, False, True]
    # Accelerate takes a step that was called for one that was taken, with torch's fused optimizers too.
    assert skipped == [False, sees_skip, False]
    report = [("weight", 12), ("bias", 3)]
    assert (accelerator.scaler.get_scale(), accelerator.scaler.overflow_report()) == (32.0, report)
    saved = accelerator.scaler.state_dict()
    accelerator.save_state(str(tmp_path))
    accelerator.scaler = LossScaler(device="cpu")
    accelerator.load_state(str(tmp_path))
    assert accelerator.scaler.state_dict() == saved


def test_counters_are_made_where_a_loaded_scaler_is_started_by_device_type():
    # As Accelerate does under FSDP, without a loss to scale.
    saved = LossScaler(16.0, hysteresis=3, device="cpu").state_dict() | {"hysteresis_left": 2, "overflow_steps": 5}
    scaler = LossScaler(device="cpu")
    scaler.load_state_dict(saved)
    scaler._lazy_init_scale_growth_tracker(scaler._device)
    assert scaler.state_dict() == saved

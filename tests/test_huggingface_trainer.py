"""transformers' Trainer with int8 models, mixft's optimizer and scaler, and the callback that logs their numbers."""

import pytest
import torch
from huggingface_models import VOCABULARY, bert, llama, logits
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import mixft
from mixft.amp import LossScaler
from mixft.huggingface import NumericsCallback
from mixft.optim import AdamW

# The Trainer calls what transformers deprecates.
pytestmark = [
    pytest.mark.usefixtures("without_interpreter"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]

TOKENS = torch.randint(0, VOCABULARY, (16, 9), generator=torch.Generator().manual_seed(5))
TEXTS = [{"input_ids": row, "labels": row} for row in TOKENS]
REVIEWS = [{"input_ids": row, "labels": row[0] % 2} for row in TOKENS]
STEPS = 8


def arguments(folder, **options):
    options = {"max_steps": STEPS, "learning_rate": 2e-3, "logging_steps": 1} | options
    return TrainingArguments(
        str(folder), per_device_train_batch_size=8, report_to=[], use_cpu=True, disable_tqdm=True, seed=1, **options
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_an_int8_training_model_with_our_optimizer_in_unchanged_code(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    load = type(llama()).from_pretrained
    model = load(tmp_path / "base", quantization_config=mixft.Int8Config("train"))
    trainer = Trainer(
        model,
        arguments(tmp_path / "run"),
        train_dataset=TEXTS,
        optimizer_cls_and_kwargs=(AdamW, {"lr": 2e-3, "weight_decay": 0.1}),
    )
    trainer.train()
    assert type(trainer.optimizer.optimizer) is AdamW
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.5
    trainer.save_model(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model.eval()))


def test_frozen_int8_weights_train_through_adapters_alone(tmp_path):
    bert().save_pretrained(tmp_path / "base")
    model = type(bert()).from_pretrained(tmp_path / "base", quantization_config=mixft.Int8Config("weight_only"))
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(model, arguments(tmp_path / "run"), train_dataset=REVIEWS)
    adapters = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    model = get_peft_model(model, adapters)
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items() if "base_layer" in name}
    assert sum(tensor.dtype == torch.int8 for tensor in frozen.values()) == 13
    trainer = Trainer(
        model,
        arguments(tmp_path / "run", max_steps=2 * STEPS, gradient_checkpointing=True),
        train_dataset=REVIEWS,
        optimizer_cls_and_kwargs=(AdamW, {"lr": 1e-2}),
    )
    trainer.train()
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in frozen.items())


class Recorder(TrainerCallback):
    """Stands for TensorBoard and the like: it gets what the Trainer logs, in order."""

    def __init__(self):
        self.entries = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.entries.append((state.global_step, dict(logs)))

    def series(self, name):
        return [(step, logs[name]) for step, logs in self.entries if name in logs]


class Regression(nn.Module):
    """FP16 parameters; the loss is infinite at the third batch."""

    def __init__(self, dtype=torch.float16):
        super().__init__()
        self.linear = nn.Linear(5, 1).to(dtype)
        self.batches = 0

    def forward(self, inputs, labels):
        self.batches += 1
        loss = (self.linear(inputs.to(self.linear.weight.dtype)).float().squeeze(-1) - labels).square().mean()
        return {"loss": loss * float("inf") if self.batches == 3 else loss}


ROWS = [{"inputs": row, "labels": row.sum()} for row in torch.randn(16, 5, generator=torch.Generator().manual_seed(3))]


@pytest.mark.parametrize(
    ("scaler", "optimizer", "dtype"),
    [
        (LossScaler, AdamW, torch.float16),
        (torch.amp.GradScaler, AdamW, torch.float16),
        (torch.amp.GradScaler, torch.optim.AdamW, torch.float32),
    ],
)
def test_scale_and_overflows_reach_what_the_trainer_logs_to(tmp_path, scaler, optimizer, dtype):
    recorder = Recorder()
    trainer = Trainer(
        Regression(dtype),
        arguments(tmp_path, max_steps=5, max_grad_norm=0.0),
        train_dataset=ROWS,
        optimizer_cls_and_kwargs=(optimizer, {"lr": 1e-3}),
        callbacks=[recorder],
    )
    trainer.accelerator.scaler, trainer.accelerator.native_amp = scaler(init_scale=8.0, device="cpu"), True
    trainer.add_callback(NumericsCallback(trainer))
    trainer.train()
    assert recorder.series("loss_scale") == [(1, 8.0), (2, 8.0), (3, 4.0), (4, 4.0), (5, 4.0)]
    assert recorder.series("overflow_steps") == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1)]
    assert not recorder.series("int8_fallbacks")
    logged = [entry for entry in trainer.state.log_history if "loss_scale" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 3, 4, 5]
    assert [step for step, _ in recorder.series("loss")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("strategy", "steps"), [("epoch", [2, 4]), ("steps", [1, 2, 3, 4])])
def test_numbers_come_beside_every_loss(tmp_path, strategy, steps):
    recorder = Recorder()
    trainer = Trainer(
        Regression(),
        arguments(tmp_path, max_steps=4, logging_strategy=strategy),
        train_dataset=ROWS,
        optimizer_cls_and_kwargs=(AdamW, {"lr": 1e-3}),
        callbacks=[recorder],
    )
    trainer.add_callback(NumericsCallback(trainer))
    trainer.train()
    assert [step for step, _ in recorder.series("loss")] == steps
    assert recorder.series("overflow_steps") == [(step, int(step >= 3)) for step in steps]


class Outlier(nn.Module):
    """One feature of the input, 10,000 times the others, takes the scale of every row."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(256, 256)

    def forward(self, inputs, labels):
        inputs = torch.cat([1e4 * inputs[..., :1], inputs[..., 1:]], dim=-1)
        return {"loss": (self.dense(inputs).mean((1, 2)) - labels).square().mean()}


class Behind(Outlier):
    """The same outlier in what comes back to a frozen layer: one of its outputs weighs 10,000 times the others."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(256, 256)

    def forward(self, inputs, labels):
        hidden = self.dense(self.first(inputs))
        hidden = torch.cat([1e4 * hidden[..., :1], hidden[..., 1:]], dim=-1)
        return {"loss": (hidden.mean((1, 2)) - labels).square().mean()}


@pytest.mark.parametrize(("model", "mode"), [(Outlier, "train"), (Behind, "dynamic")])
def test_layers_that_fell_back_are_counted_in_the_log(tmp_path, model, mode):
    recorder = Recorder()
    model = model()
    mixft.quantize_(model, mode, include="dense")
    rows = [{"inputs": row, "labels": row[0, 0]} for row in torch.randn(16, 16, 256)]
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=4, logging_steps=2), train_dataset=rows, callbacks=[recorder]
    )
    trainer.add_callback(NumericsCallback(trainer))
    with pytest.warns(UserWarning, match="'dense': signal to quantization noise below"):
        trainer.train()
    assert recorder.series("int8_fallbacks") == [(2, 1), (4, 1)]


def test_only_what_there_is_is_logged(tmp_path):
    recorder = Recorder()
    trainer = Trainer(
        Regression(torch.float32),
        arguments(tmp_path, max_steps=2),
        train_dataset=ROWS,
        optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 1e-3}),
        callbacks=[recorder],
    )
    trainer.add_callback(NumericsCallback(trainer))
    trainer.train()
    assert recorder.series("loss")
    assert not recorder.series("overflow_steps")
    with pytest.raises(TypeError, match=r"trainer must be a transformers\.Trainer; it is a Regression"):
        NumericsCallback(trainer.model)

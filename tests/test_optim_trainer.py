"""``mixft.optim`` in the Trainer of transformers: the values of torch's optimizer, and checkpoints it resumes from."""

import pytest
import torch
from optimizer_cases import snapshot
from transformers import Trainer, TrainingArguments

from mixft.optim import AdamW

ROWS = [{"inputs": row, "labels": row.sum()} for row in torch.randn(12, 5, generator=torch.Generator().manual_seed(3))]


class Regression(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.linear = torch.nn.Linear(5, 1).to(dtype)

    def forward(self, inputs, labels):
        found = self.linear(inputs.to(self.linear.weight.dtype)).squeeze(-1)
        return {"loss": torch.nn.functional.mse_loss(found.float(), labels)}


def train(folder, make, dtype=torch.float32, resume=None):
    torch.manual_seed(0)
    model = Regression(dtype)
    optimizer = make(model.named_parameters(), lr=0.05)
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        seed=1,
    )
    Trainer(model, arguments, train_dataset=ROWS, optimizers=(optimizer, None)).train(resume_from_checkpoint=resume)
    return optimizer


def test_the_trainer_s_steps_are_torch_s(tmp_path):
    ours, theirs = (train(tmp_path / name, make) for name, make in (("a", AdamW), ("b", torch.optim.AdamW)))
    for listed in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(*listed, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("master_weights", ["fp32", "split"])
def test_training_resumes_bit_for_bit(tmp_path, master_weights):
    def make(params, lr):
        return AdamW(params, lr, master_weights=master_weights, max_grad_norm=1.0)

    whole = train(tmp_path, make, torch.bfloat16)
    resumed = train(tmp_path, make, torch.bfloat16, resume=str(tmp_path / "checkpoint-2"))
    assert snapshot(resumed) == snapshot(whole)

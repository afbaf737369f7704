"""What happened to the numbers of a run, in the logs of transformers' Trainer."""

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mixft.nn import QuantLinear
from mixft.nn.model_report import model_report


class NumericsCallback(TrainerCallback):
    """Logs the loss scale, skipped steps and int8 layers that fell back, to whatever the Trainer logs to::

        trainer.add_callback(NumericsCallback(trainer))

    At every step at which the Trainer logs its loss, one more entry of the same step has

    - ``loss_scale``: of the gradient scaler, ``torch.amp.GradScaler`` or ``mixft.amp.LossScaler``;
    - ``overflow_steps``: optimizer steps skipped since training began, for gradients with NaN or Inf;
    - ``int8_fallbacks``: ``QuantLinear`` layers that compute in floating point for their noise, in part or whole;
      ``mixft.model_report(model)`` names them.

    Each is left out where there is nothing to say: without a scaler the first, and the second too unless an optimizer
    of ``mixft.optim`` looks for NaN and Inf itself; the last where there is no such layer. Reading them waits for the
    device; the steps between wait for nothing.

    Args:
        trainer: the Trainer that it is added to.

    Raises:
        TypeError: ``trainer`` is no Trainer.
    """

    def __init__(self, trainer: Trainer):
        if not isinstance(trainer, Trainer):
            raise TypeError(f"trainer must be a transformers.Trainer; it is a {type(trainer).__name__}")
        self.trainer = trainer
        self._skipped: torch.Tensor | int | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Counts from here."""
        self._skipped = None

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer=None, **kwargs
    ) -> None:
        """Notes on the device whether the step was skipped."""
        # Accelerate's own flag takes a fused step that changed nothing for one that was taken.
        skipped = getattr(getattr(optimizer, "optimizer", optimizer), "last_found_inf", None)
        if skipped is None and self.trainer.accelerator.scaler is not None:
            skipped = int(optimizer.step_was_skipped)
        if skipped is not None:
            self._skipped = skipped if self._skipped is None else self._skipped + skipped

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Logs, where the Trainer is about to."""
        if control.should_log and (figures := self._figures(kwargs["model"])):
            self.trainer.log(figures)
            control.should_log = True  # an entry takes it back, and the Trainer's own is still to come

    # The Trainer logs there with ``logging_strategy="epoch"``.
    on_epoch_end = on_step_end

    def _figures(self, model: torch.nn.Module) -> dict[str, float]:
        figures = {}
        scaler = self.trainer.accelerator.scaler
        if scaler is not None:
            figures["loss_scale"] = scaler.get_scale()
        if self._skipped is not None:
            figures["overflow_steps"] = int(self._skipped)
        if any(isinstance(module, QuantLinear) for module in model.modules()):
            figures["int8_fallbacks"] = len(model_report(model).fallbacks)
        return figures

"""A model that was saved, in floating point or in int8, ready to label texts or to go on with them."""

from dataclasses import dataclass
from pathlib import Path

import torch

from mixft.cli import model_folder, stored_weights
from mixft.cli.errors import InputError


@dataclass(frozen=True)
class SavedModel:
    """A model with its tokenizer.

    Attributes:
        task: "classification" or "causal-lm".
        longest: tokens that the model takes.
    """

    task: str
    model: torch.nn.Module
    tokenizer: object
    config: object
    longest: int

    @torch.no_grad()
    def probabilities(self, texts: list[str]) -> torch.Tensor:
        """Of each label, FP32 [texts, labels], on the CPU."""
        return self.model(**self._tokens(texts)).logits.float().softmax(-1).cpu()

    @torch.no_grad()
    def continuation(self, text: str, new_tokens: int) -> str:
        """The likeliest next tokens, one after another, up to the end of the document.

        Raises:
            InputError: ``text`` leaves no room for so many.
        """
        tokens = self._tokens([text], special=False)
        count = tokens["input_ids"].shape[1]
        if count + new_tokens > self.longest:
            raise InputError(
                f"the text has {count} tokens and the model takes {self.longest}; --max-new-tokens "
                f"{max(1, self.longest - count)} or a shorter text would do"
            )
        made = self.model.generate(
            **tokens, max_new_tokens=new_tokens, do_sample=False, pad_token_id=self.tokenizer.pad_token_id
        )
        return self.tokenizer.decode(made[0, count:], skip_special_tokens=True)

    def _tokens(self, texts: list[str], special: bool = True):
        encoded = self.tokenizer(
            texts,
            truncation=True,
            max_length=self.longest,
            padding=True,
            add_special_tokens=special,
            return_token_type_ids=None if special else False,
            return_tensors="pt",
        )
        return encoded.to(self.model.device)


def load(folder: Path, device: str) -> SavedModel:
    """The model that ``mixft finetune`` or ``mixft quantize`` saved in ``folder``.

    Raises:
        InputError: it is no classifier and no causal language model, or a file does not load.
    """
    tokenizer = model_folder.load_tokenizer(folder)
    task = _task_of(folder)
    config = model_folder.load_config(folder, task)
    if model_folder.has_quantized_file(folder):
        model = model_folder.load_quantized_model(folder, config, task)
    elif model_folder.has_adapters(folder):
        from mixft.cli.lora import load_adapted

        model = load_adapted(folder, config, task)
    else:
        if stored_weights.is_int8_folder(folder):
            stored_weights.prepare_int8(folder)
        load_model = model_folder.load_causal_lm if task == "causal-lm" else model_folder.load_classifier
        model = load_model(folder)
    longest = model_folder.longest_input(tokenizer, config)
    return SavedModel(task, model.to(device).eval(), tokenizer, config, longest)


def _task_of(folder: Path) -> str:
    architectures = model_folder.load_any_config(folder).architectures or ()
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        return "classification"
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        return "causal-lm"
    raise InputError(f"the model in {folder} has no classifier yet; mixft finetune --model {folder} trains one")

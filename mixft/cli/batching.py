"""Batches of texts of like length, in an order that the seed alone fixes."""

import random

import torch

from mixft.cli.dataset import Examples

BUCKET = 50  # batches sorted by length together: enough to pad little, few enough to keep the order random


class Batches:
    """Tokenized examples and the batches made of them.

    Args:
        tokenizer: a Hugging Face tokenizer with a padding token.
        examples: texts and the names of their labels.
        label_names: the names in class order.
        max_length: tokens after which a text is cut.
        batch_size: texts to a batch.
    """

    def __init__(self, tokenizer, examples: Examples, label_names: list[str], max_length: int, batch_size: int):
        encoded = tokenizer(examples.texts, truncation=True, max_length=max_length)
        self.examples = [{name: encoded[name][i] for name in encoded} for i in range(len(examples))]
        self.lengths = [len(example["input_ids"]) for example in self.examples]
        index = {name: i for i, name in enumerate(label_names)}
        self.labels = [index[name] for name in examples.labels]
        self.batch_size = batch_size
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def shuffled(self, seed: int, epoch: int) -> list[list[int]]:
        """The example indices of each batch of one epoch: the same for every precision at one seed."""
        generator = random.Random(f"{seed} {epoch}")
        order = list(range(len(self.examples)))
        generator.shuffle(order)
        bucket = BUCKET * self.batch_size
        by_length = []
        for start in range(0, len(order), bucket):
            by_length += sorted(order[start : start + bucket], key=self.lengths.__getitem__)
        batches = self._cut(by_length)
        generator.shuffle(batches)
        return batches

    def in_order(self) -> list[list[int]]:
        """The example indices of each batch, shortest texts first."""
        return self._cut(sorted(range(len(self.examples)), key=self.lengths.__getitem__))

    def collate(self, indices: list[int], device: torch.device) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Pad the texts of one batch to its longest.

        Returns:
            The model's inputs, int64 [batch, length] each, and the labels, int64 [batch].
        """
        columns = {name: [self.examples[i][name] for i in indices] for name in self.examples[indices[0]]}
        inputs = self.tokenizer.pad(columns, return_tensors="pt", verbose=False)
        labels = torch.tensor([self.labels[i] for i in indices])
        return {name: value.to(device) for name, value in inputs.items()}, labels.to(device)

    def _cut(self, order: list[int]) -> list[list[int]]:
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

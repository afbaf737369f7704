"""Batches of texts of like length, in an order that the seed alone fixes."""

import random

import torch

from mixft.cli.dataset import Examples

BUCKET = 50  # batches sorted by length together: enough to pad little, few enough to keep the order random
IGNORED = -100  # the label of a position that is not predicted, as torch's cross_entropy has it


class ByLength:
    """Which examples make a batch, by their lengths.

    Args:
        lengths: tokens of each example.
        batch_size: examples to a batch.
    """

    def __init__(self, lengths: list[int], batch_size: int):
        self.lengths = lengths
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def shuffled(self, seed: int, epoch: int) -> list[list[int]]:
        """The example indices of each batch of one epoch: the same for every precision at one seed."""
        generator = random.Random(f"{seed} {epoch}")
        order = list(range(len(self.lengths)))
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
        return self._cut(sorted(range(len(self.lengths)), key=self.lengths.__getitem__))

    def _cut(self, order: list[int]) -> list[list[int]]:
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]


class Batches(ByLength):
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
        super().__init__([len(example["input_ids"]) for example in self.examples], batch_size)
        index = {name: i for i, name in enumerate(label_names)}
        self.labels = [index[name] for name in examples.labels]
        self.tokenizer = tokenizer

    def predictions(self, indices: list[int]) -> int:
        """How many predictions the examples ask for: a label each."""
        return len(indices)

    def predicted(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [predictions, classes] and the labels [predictions] that they are held to."""
        return logits, labels

    def collate(self, indices: list[int], device: torch.device) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Pad the texts of one batch to its longest.

        Returns:
            The model's inputs, int64 [batch, length] each, and the labels, int64 [batch].
        """
        columns = {name: [self.examples[i][name] for i in indices] for name in self.examples[indices[0]]}
        inputs = self.tokenizer.pad(columns, return_tensors="pt", verbose=False)
        labels = torch.tensor([self.labels[i] for i in indices])
        return {name: value.to(device) for name, value in inputs.items()}, labels.to(device)


class Blocks(ByLength):
    """Documents as one stream of tokens, cut into blocks; no token is lost and none is read twice.

    An end token stands after every document. The last block may be shorter; a single token, which predicts nothing, is
    left out.

    Args:
        tokenizer: a Hugging Face tokenizer with a padding token and an end token.
        documents: texts.
        max_length: tokens to a block.
        batch_size: blocks to a batch.
    """

    def __init__(self, tokenizer, documents: list[str], max_length: int, batch_size: int):
        encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
        stream = [token for document in encoded for token in (*document, tokenizer.eos_token_id)]
        cut = [stream[start : start + max_length] for start in range(0, len(stream), max_length)]
        self.blocks = [block for block in cut if len(block) > 1]
        super().__init__([len(block) for block in self.blocks], batch_size)
        self.padding = tokenizer.pad_token_id

    def predictions(self, indices: list[int]) -> int:
        """How many predictions the blocks ask for: every token but the first of a block."""
        return sum(self.lengths[index] - 1 for index in indices)

    def predicted(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [predictions, vocabulary] and the tokens [predictions] that they are held to."""
        return logits[:, :-1].flatten(0, 1), labels.flatten()

    def collate(self, indices: list[int], device: torch.device) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Pad the blocks of one batch to its longest.

        Returns:
            The model's inputs, int64 [batch, length] each, and the token after each one, int64 [batch, length - 1]:
            `IGNORED` where there is none.
        """
        blocks = [torch.tensor(self.blocks[index]) for index in indices]
        pad = torch.nn.utils.rnn.pad_sequence
        tokens = pad(blocks, batch_first=True, padding_value=self.padding)
        mask = pad([torch.ones_like(block) for block in blocks], batch_first=True)
        labels = pad([block[1:] for block in blocks], batch_first=True, padding_value=IGNORED)
        return {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}, labels.to(device)

"""What ``mixft finetune`` can train: text classifiers and causal language models.

A task knows its data, its kind of model, and the figure that held-out data gives.
"""

import math
from pathlib import Path

from mixft.cli import model_folder
from mixft.cli.dataset import Dataset, load_dataset
from mixft.cli.documents import Documents, load_documents
from mixft.cli.job import Recipe

EVAL_BATCH = 64  # texts
EVAL_TOKENS = 4096  # of a causal language model, whose logits are the vocabulary wide


class Classification:
    """Labels of texts.

    Args:
        recipe: the options of the command.
        data: labelled texts.
    """

    metric = "eval_accuracy"
    special_tokens = True

    def __init__(self, recipe: Recipe, data: Dataset):
        self.recipe = recipe
        self.data = data

    def description(self, seed: int) -> dict:
        """What the report says of the data."""
        fitted, held = self.data.split(seed)
        return {"labels": self.data.labels, "train_examples": len(fitted), "eval_examples": len(held)}

    def texts(self) -> dict[str, list[str]]:
        """All texts, by the file that they are from."""
        held = self.data.evaluation
        return {self.recipe.train: self.data.examples.texts} | ({self.recipe.eval: held.texts} if held else {})

    def load_model(self, folder: Path):
        """The model to train."""
        return model_folder.load_classifier(folder, self.data.labels)

    def batches(self, tokenizer, seed: int):
        """Batches to train on and batches to evaluate on."""
        from mixft.cli.batching import Batches

        fitted, held = self.data.split(seed)
        length, size = self.recipe.max_length, self.recipe.batch_size
        return (
            Batches(tokenizer, fitted, self.data.labels, length, size),
            Batches(tokenizer, held, self.data.labels, length, EVAL_BATCH),
        )

    def figure(self, loss: float, accuracy: float) -> float:
        """The held-out accuracy."""
        return accuracy


class CausalLM:
    """The next token of texts.

    Args:
        recipe: the options of the command.
        data: documents.
    """

    metric = "eval_perplexity"
    special_tokens = False

    def __init__(self, recipe: Recipe, data: Documents):
        self.recipe = recipe
        self.data = data

    def description(self, seed: int) -> dict:
        """What the report says of the data."""
        fitted, held = self.data.split(seed)
        return {"train_documents": len(fitted), "eval_documents": len(held)}

    def texts(self) -> dict[str, list[str]]:
        """All texts, by the file that they are from."""
        held = self.data.evaluation
        return {self.recipe.train: self.data.texts} | ({self.recipe.eval: held} if held else {})

    def load_model(self, folder: Path):
        """The model to train."""
        return model_folder.load_causal_lm(folder)

    def batches(self, tokenizer, seed: int):
        """Batches to train on and batches to evaluate on; a document of one token has its end token to predict."""
        from mixft.cli.batching import Blocks

        fitted, held = self.data.split(seed)
        length = self.recipe.max_length
        return (
            Blocks(tokenizer, fitted, length, self.recipe.batch_size),
            Blocks(tokenizer, held, length, max(1, EVAL_TOKENS // length)),
        )

    def figure(self, loss: float, accuracy: float) -> float | None:
        """The held-out perplexity, exp of the mean loss over all tokens but the first of each block; None where it is
        beyond what a float holds."""
        return math.exp(loss) if loss < 700 else None


Task = Classification | CausalLM
TASKS = {"classification": Classification, "causal-lm": CausalLM}


def read_data(
    task: str, train: str, evaluation: str | None, text_column: str | None, label_column: str | None
) -> Dataset | Documents:
    """The data that the task of that name trains on.

    Raises:
        InputError: as `load_dataset` and `load_documents`.
    """
    if task == "causal-lm":
        return load_documents(train, evaluation)
    return load_dataset(train, evaluation, text_column, label_column)


def task_of(recipe: Recipe) -> Task:
    """The recipe's task, with its data."""
    data = read_data(recipe.task, recipe.train, recipe.eval, recipe.text_column, recipe.label_column)
    return TASKS[recipe.task](recipe, data)

"""What one training run is told, and how the command and the run's process talk.

The command starts ``mixft.cli.training.main`` in a new Python, writes one `Job` as JSON to its standard input and reads
events from its standard output, one JSON object a line: ``start`` (steps), ``step`` (progress), ``phase`` (name)
and at the end ``result`` (the run's entry in ``report.json``) or ``refused`` (reason: something given does not load).
"""

import json
from dataclasses import asdict, dataclass

LOG = "train.log"  # in a run's folder


@dataclass(frozen=True)
class Recipe:
    """What all runs of one command share: the options of ``mixft finetune``, checked."""

    task: str
    model: str
    train: str
    eval: str | None
    text_column: str | None
    label_column: str | None
    epochs: int
    max_steps: int | None
    batch_size: int
    grad_accumulation: int
    max_length: int
    learning_rate: float
    master_weights: str
    state_dtype: str
    lora: int | None
    lora_alpha: float | None
    device: str


@dataclass(frozen=True)
class Job:
    """One run: the recipe in one precision with one seed, and the folder that it fills."""

    recipe: Recipe
    precision: str
    seed: int
    output: str

    @property
    def name(self) -> str:
        return f"{self.precision} seed {self.seed}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Job":
        fields = json.loads(text)
        return Job(**{**fields, "recipe": Recipe(**fields["recipe"])})

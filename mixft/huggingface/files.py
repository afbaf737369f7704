"""The files of a saved int8 model, held to their format before transformers reads them, which converts silently."""

from collections.abc import Iterable

from safetensors import safe_open

SCALE = "_scale"


def check_files(paths: Iterable[str]) -> None:
    """Hold every int8 weight to its scale by the headers of the safetensors files in ``paths``; others are passed over.

    Raises:
        ValueError: ``X.weight`` is int8 without an FP32 ``X.weight_scale`` [out_features, 1], or the other way round.
    """
    found: dict[str, tuple[str, list[int]]] = {}
    for path in paths:
        if str(path).endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name.endswith((".weight", f".weight{SCALE}")):
                        tensor = file.get_slice(name)
                        found[name] = tensor.get_dtype(), tensor.get_shape()
    for name, (dtype, shape) in found.items():
        if name.endswith(SCALE) and name.removesuffix(SCALE) not in found:
            raise ValueError(f"the checkpoint has no tensor {name.removesuffix(SCALE)!r} to its scale")
        scale = found.get(f"{name}{SCALE}")
        if not name.endswith(SCALE) and (dtype == "I8" or scale is not None):
            expected = ("F32", [shape[0], 1])
            if dtype != "I8" or len(shape) != 2 or scale != expected:
                raise ValueError(
                    f"tensor {name!r} of the checkpoint is {dtype} {shape} and its scale {scale or 'missing'}; it "
                    "must be I8 [out_features, in_features], its scale F32 [out_features, 1]"
                )

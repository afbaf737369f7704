"""Compile a share of the kernel variants in a process without the interpreter: one JSON line a variant.

Usage: ``python compile_worker.py SHARE SHARES MODULE...``, where a module has ``variants(arch)``.
"""

import importlib
import json
import sys
from dataclasses import asdict

import triton

from mixft.kernels.architecture import ARCHITECTURES
from mixft.kernels.compilation import compile_variant


def main(share: int, shares: int, modules: list[str]) -> None:
    jobs = [
        (module, arch, variant)
        for module in modules
        for arch in ARCHITECTURES.values()
        for variant in importlib.import_module(module).variants(arch)
    ]
    for module, arch, variant in jobs[share::shares]:
        # A crash inside LLVM leaves this line as the last one.
        print(f"{module} {variant.name} {arch.name}", file=sys.stderr, flush=True)
        record = {"module": module, "name": variant.name, "architecture": arch.name, "failure": None}
        try:
            record |= asdict(compile_variant(variant, arch))
        except (triton.TritonError, RuntimeError, ValueError) as error:
            record["failure"] = f"{type(error).__name__}: {error}"
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])

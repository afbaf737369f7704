"""Installs kernels/ as mixft.kernels and benchmarks/ as mixft.benchmarks, and compiles native/ where gcc is at hand.

All else is in pyproject.toml.
"""

import copy
import hashlib
import platform
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# Called through ctypes, so they need neither Python's nor torch's headers. OpenMP's functions stay undefined: they
# are those of the library that torch has loaded, whose threads are shared.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512"]
INSTRUCTION_SETS = {"avx2": AVX2, "avx_vnni": [*AVX2, "-mavxvnni"], "avx512_vnni": [*AVX2, *AVX512]}
COMPILE = ["-std=gnu11", "-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall"]

# Compiled into the libraries, so that mixft/cpu/native.py can tell one that is older than the sources of its checkout.
CHECKSUM = hashlib.sha256(b"".join(Path(file).read_bytes() for file in sorted(glob("native/*.[ch]")))).hexdigest()


def native_libraries() -> list[Extension]:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return []
    return [
        Extension(
            f"mixft.cpu._native_{name}",
            sources=sorted(glob("native/*.c")),
            depends=sorted(glob("native/*.h")),
            define_macros=[("MIXFT_SOURCES", f'"{CHECKSUM}"')],
            extra_compile_args=[*COMPILE, *flags],
            libraries=["m"],
            optional=True,
        )
        for name, flags in INSTRUCTION_SETS.items()
    ]


class SideBySide(build_ext):
    """Compiles the libraries at once; their sources are the same, so each has a folder for its object files."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.parallel is None:
            self.parallel = True

    def build_extension(self, extension: Extension) -> None:
        alone = copy.copy(self)
        alone.build_temp = str(Path(self.build_temp, extension.name))
        super(SideBySide, alone).build_extension(extension)


setup(
    cmdclass={"build_ext": SideBySide},
    packages=[
        *find_packages(include=["mixft", "mixft.*"]),
        "mixft.kernels",
        "mixft.benchmarks",
        "mixft.benchmarks.cases",
    ],
    package_dir={"mixft": "mixft", "mixft.kernels": "kernels", "mixft.benchmarks": "benchmarks"},
    package_data={"mixft.kernels": ["configs/*.json"]},
    ext_modules=native_libraries(),
)

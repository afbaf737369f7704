"""Launches kernels on a GPU that is not there, and notes each: ``python launch_recorder.py ARCH RECORD CASES ...``.

Everything between a launcher and the driver is Triton's own: the binder, the specialization of arguments, the compiler
and the launcher in C. Only the driver is ``fake_libcuda.c`` or ``fake_libamdhip64.c``. Binding takes 0.1 ms and
compiling 0.2 s, so a kernel is compiled at its first launch and bound at the others.

``CASES`` are modules whose ``LAUNCHES`` are functions by name. ``RECORD`` is written: of each module the launches, and
by case what was raised.
"""

import ctypes
import importlib
import json
import pkgutil
import sys
from concurrent.futures import ThreadPoolExecutor

import triton
from triton.backends.amd.driver import HIPDriver
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime.jit import JITFunction

import mixft.kernels
from mixft.kernels.architecture import ARCHITECTURES, Architecture
from mixft.ops import registration

LIBRARIES = {"cuda": "libcuda.so.1", "hip": "libamdhip64.so"}


def driver(arch: Architecture):
    """Triton's driver without what it asks torch for."""
    found = (CudaDriver if arch.backend == "cuda" else HIPDriver)()
    found.get_device_capability = lambda device: divmod(arch.capability, 10)
    found.get_current_device = lambda: 0
    found.get_current_stream = lambda device: 0
    return found


class Bound:
    """Stands in for a compiled kernel."""

    function = packed_metadata = None

    def __init__(self, src):
        self.src = src

    def launch_metadata(self, *args):
        return None

    def run(self, *args):
        self.grid = args[:3]


class Recorder:
    """Takes the place of ``triton.compile`` and of ``JITFunction.run``.

    Attributes:
        launches: a dict each, as ``json`` writes it.
        case: what the next launches are noted under.
    """

    def __init__(self, library: ctypes.CDLL):
        self.launches, self.case = [], None
        self._compile, self._run = triton.compiler.compile, JITFunction.run
        self._compiled = {}
        self._last = (ctypes.c_uint64 * 6).in_dll(library, "launched")

    def compile(self, src, target, options):
        compiled = Bound(src) if src.fn in self._compiled else self._compile(src, target=target, options=options)
        self._compiled[src.fn] = True
        compiled.noted_options = {name: options[name] for name in ("num_warps", "num_stages")}
        return compiled

    def run(self, function, *args, **kwargs):
        before = self._last[0]
        compiled = self._run(function, *args, **kwargs)
        src, names = compiled.src, function.arg_names
        constants = {key if isinstance(key, str) else names[key[0]]: value for key, value in src.constants.items()}
        annotated = {parameter.name for parameter in function.params if parameter.is_constexpr}
        # Triton 3.2 has an object for them.
        attributes = src.attrs.values() if isinstance(src.attrs, dict) else ()
        launch = {
            "case": self.case,
            "kernel": function.fn.__name__,
            "types": {
                name: str(constants.get(name, src.signature.get(name))) for name in names if name not in annotated
            },
            "constexprs": {name: str(constants[name]) for name in names if name in annotated},
            "attributes": sorted({name for given in attributes for name, _ in given}),
            **compiled.noted_options,
        }
        if isinstance(compiled, Bound):
            launch["grid"] = compiled.grid
        else:
            count, *grid = self._last[:4]
            launch |= {"grid": grid if count > before else [0], "threads": self._last[4], "shared": self._last[5]}
        self.launches.append(launch)
        return compiled


def main(architecture: str, record: str, *modules: str) -> None:
    arch = ARCHITECTURES[architecture]
    recorder = Recorder(ctypes.CDLL(LIBRARIES[arch.backend], ctypes.RTLD_GLOBAL))
    triton.runtime.driver.set_active(driver(arch))
    triton.compiler.compile = recorder.compile
    JITFunction.run = lambda *args, **kwargs: recorder.run(*args, **kwargs)
    # CPU tensors go to the launchers, which take the CPU for that GPU.
    registration.interpreting = lambda: True
    for entry in pkgutil.iter_modules(mixft.kernels.__path__):
        kernels = importlib.import_module(f"mixft.kernels.{entry.name}")
        if hasattr(kernels, "architecture_of"):
            kernels.architecture_of = lambda device: arch
    found = {}
    for module in modules:
        recorder.launches, failures = [], {}
        for recorder.case, launch in importlib.import_module(module).LAUNCHES.items():
            with ThreadPoolExecutor(1) as thread:
                failure = thread.submit(launch).exception()
            if failure is not None:
                failures[recorder.case] = f"{type(failure).__name__}: {failure}"
        found[module] = {"launches": recorder.launches, "failures": failures}
    with open(record, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])

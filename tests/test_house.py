"""The rules of the house: who imports whom, what an import costs, and that every op is complete."""

import ast
import importlib
import inspect
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PUBLIC = ("mixft.ops", "mixft.nn", "mixft.optim", "mixft.amp", "mixft.precision", "mixft.onnx", "mixft.huggingface")
ATTRIBUTES = (
    "quantize_",
    "dequantize_",
    "model_report",
    "calibrate",
    "save_quantized",
    "load_quantized",
    "PrecisionPolicy",
    "PrecisionController",
)

# The packages of this repository that each part may import, and the modules from elsewhere beside Python's own.
PARTS = {
    "mixft.kernels": ({"mixft.kernels"}, {"torch", "triton"}),
    "mixft.cpu": ({"mixft.cpu"}, {"torch"}),
    "mixft.ops": ({"mixft.ops", "mixft.cpu"}, {"torch"}),
    "mixft.nn": ({"mixft.nn", "mixft.ops"}, {"torch", "safetensors"}),
    "mixft.optim": ({"mixft.optim", "mixft.ops"}, {"torch"}),
    "mixft.amp": ({"mixft.amp", "mixft.ops"}, {"torch"}),
    "mixft.precision": ({"mixft.precision", "mixft.nn", "mixft.optim", "mixft.amp", "mixft.ops"}, {"torch"}),
    "mixft.onnx": ({"mixft.ops"}, {"torch", "onnxscript"}),
    "mixft.huggingface": (
        {"mixft.huggingface", "mixft.nn", "mixft.optim", "mixft.amp", "mixft.ops"},
        {"torch", "transformers", "peft", "safetensors"},
    ),
    "mixft.benchmarks": ({"mixft"}, {"torch", "triton", "pytest", "transformers", "matplotlib"}),
    "mixft.cli": ({"mixft"}, {"torch", "triton", "typer", "rich", "matplotlib", "transformers", "safetensors", "peft"}),
    "mixft": (set(), set()),
}


def module_name(path: Path) -> str:
    """The installed name of a source file: kernels/ and benchmarks/ are packages of mixft."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] != "mixft":
        parts = ("mixft", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path
    for folder in ("mixft", "kernels", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imports(source: str, module: str, is_package: bool) -> set[str]:
    """Every module that ``source`` imports, at its top or inside a function, by absolute name."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, node.module] if node.module else base)
            # "from package import module" imports the module.
            found |= {f"{origin}.{alias.name}" for alias in node.names}
    return found


def forbidden(module: str, imported: set[str]) -> set[str]:
    part = max((name for name in PARTS if within(module, name)), key=len)
    ours, others = PARTS[part]
    return {
        name
        for name in imported
        if name.split(".")[0] not in sys.stdlib_module_names
        and not any(within(name, allowed) for allowed in (*ours, *others))
    }


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_downward(module):
    path = SOURCES[module]
    imported = imports(path.read_text(), module, is_package=path.stem == "__init__")
    assert not forbidden(module, imported)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mixft.kernels.matmul", "from mixft.ops import matmul"),
        ("mixft.kernels.matmul", "from ..ops import matmul"),
        ("mixft.kernels.matmul", "def launch():\n    import numpy"),
        ("mixft.cpu.matmul", "from ..kernels.matmul import matmul"),
        ("mixft.ops.matmul", "from mixft.kernels import matmul"),
        ("mixft.ops.matmul", "import mixft.nn"),
        ("mixft.optim.adamw", "from .. import nn"),
        ("mixft.nn.linear", "import transformers"),
        ("mixft.optim.adamw", "import mixft.precision"),
        ("mixft.precision.policy", "from mixft.cli import errors"),
        ("mixft.nn.linear", "import mixft.huggingface"),
        ("mixft.huggingface.lora", "from mixft.cli import errors"),
        ("mixft", "import torch"),
    ],
)
def test_an_upward_import_is_found(module, source):
    assert forbidden(module, imports(source, module, is_package=module == "mixft"))


NEWLY_IMPORTED = """
import sys
import torch
if {block_triton}:
    sys.modules["triton"] = None
before = set(sys.modules)
import {module}
assert not torch.cuda.is_initialized()
print(*set(sys.modules) - before)
"""
HEAVY = {"triton", "transformers", "matplotlib", "typer", "rich", "safetensors", "numpy", "pandas"}


def newly_imported(module: str, *, block_triton: bool = False) -> set[str]:
    """What an import of ``module`` imports beyond torch's own."""
    source = NEWLY_IMPORTED.format(module=module, block_triton=block_triton)
    run = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_import_of_mixft_imports_nothing_else():
    assert newly_imported("mixft") == {"mixft"}


@pytest.mark.parametrize("module", [module for module in PUBLIC if module != "mixft.huggingface"])
def test_the_api_imports_without_triton(module):
    found = newly_imported(module, block_triton=True)
    assert module in found
    assert not {name.split(".")[0] for name in found} & HEAVY


def registered_ops() -> list[tuple[str, str, str, str]]:
    """Every op: (the file of mixft.ops, the name there, the module that implements it, the implementation's name)."""
    found = []
    for module, path in SOURCES.items():
        if not within(module, "mixft.ops"):
            continue
        tree = ast.parse(path.read_text())
        imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "mixft.cpu"]
        for node in ast.walk(tree):
            for call in getattr(node, "decorator_list", []):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "define_op":
                    names = [word.value.value for word in call.keywords if word.arg == "name"]
                    found.append((module, node.name, call.args[0].value, names[0] if names else node.name))
            if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("define_in_place_op("):
                routine = node.value.args[0]
                spelling = f"{path.name}: from mixft.cpu import scale_add as routines; ...(routines.scale_add_, ...)"
                assert imported, spelling
                assert isinstance(routine, ast.Attribute), spelling
                found.append((module, node.targets[0].id, imported[0].names[0].name, routine.attr))
    return found


def test_every_public_op_stands_on_registered_ones():
    ops = importlib.import_module("mixft.ops")
    files = {module for module, *_ in registered_ops()}
    for name in ops.__all__:
        module = getattr(ops, name).__module__
        imported = imports(SOURCES[module].read_text(), module, is_package=False)
        assert module in files or any(within(name, file) for name in imported for file in files), name


@pytest.mark.parametrize(("file", "op", "module", "name"), registered_ops())
def test_launcher_cpu_routine_and_schema_have_one_signature(file, op, module, name):
    launcher = getattr(importlib.import_module(f"mixft.kernels.{module}"), name)
    routine = getattr(importlib.import_module(f"mixft.cpu.{module}"), name)
    assert parameters(launcher) == parameters(routine)
    schema = getattr(importlib.import_module(file), op)._opoverload._schema
    assert [argument.name for argument in schema.arguments] == [name for name, *_ in parameters(launcher)]
    defaults = [argument.default_value for argument in schema.arguments if argument.has_default_value()]
    assert defaults == [default for *_, default in parameters(launcher) if default is not inspect.Parameter.empty]


def parameters(function) -> list[tuple[str, object]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def raised(function: ast.FunctionDef) -> set[str]:
    """The exceptions that the function's own statements raise by name."""
    found = set()
    pending = list(function.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            found.add(ast.unparse(error).split(".")[-1])
        pending += ast.iter_child_nodes(node)
    return {name for name in found if name[0].isupper()}


def unnamed_errors(source: str) -> set[str]:
    """What a function, or a class in its public methods, raises without naming it in a docstring."""
    (item,) = ast.parse(textwrap.dedent(source)).body
    documentation = ast.get_docstring(item) or ""
    methods = [item]
    if isinstance(item, ast.ClassDef):
        methods = [
            node
            for node in item.body
            if isinstance(node, ast.FunctionDef) and (node.name == "__init__" or not node.name.startswith("_"))
        ]
    return {
        f"{method.name}: {error}"
        for method in methods
        for error in raised(method)
        if error not in documentation + (ast.get_docstring(method) or "")
    }


def public_items() -> dict[str, object]:
    items = {name: getattr(importlib.import_module("mixft"), name) for name in ATTRIBUTES}
    for package in PUBLIC:
        module = importlib.import_module(package)
        items |= {f"{package}.{name}": getattr(module, name) for name in module.__all__}
    return items


def test_docstrings_name_the_errors_raised():
    unnamed = {
        name: errors
        for name, item in public_items().items()
        if (errors := unnamed_errors(inspect.getsource(getattr(item, "_init_fn", item))))
    }
    assert not unnamed


def test_an_unnamed_error_is_found():
    assert unnamed_errors("def f():\n    'Doubles.'\n    if 1:\n        raise ValueError('x')") == {"f: ValueError"}
    assert unnamed_errors("class C:\n    'Holds.'\n    def set(self):\n        raise KeyError") == {"set: KeyError"}
    assert not unnamed_errors("def f():\n    'Raises ValueError.'\n    raise ValueError('x')")


def test_everything_public_has_a_docstring():
    bare = []
    for name, item in public_items().items():
        bare += [] if inspect.getdoc(item) else [name]
        methods = inspect.getmembers(item, inspect.isfunction) if inspect.isclass(item) else []
        bare += [
            f"{name}.{method}"
            for method, function in methods
            if not method.startswith("_")
            and function.__module__.startswith("mixft.")
            and not inspect.getdoc(getattr(item, method))
        ]
    assert not bare


@pytest.mark.parametrize("module", SOURCES)
def test_every_module_says_what_it_holds(module):
    assert ast.get_docstring(ast.parse(SOURCES[module].read_text()))

"""Which layers' weights the code around them reads, past the layers' own forward, as the source of its classes says."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator

from torch import nn

# What an int8 weight answers as the floating-point one did.
HARMLESS = (["device"], ["shape"], ["size"], ["requires_grad"])
# What a method names that asks whether a weight's dtype is one to cast an input to.
ASKS_FOR_INTEGERS = ("int8", "is_floating_point")


def reader_of(name: str, model: nn.Module) -> str:
    """The class of the innermost module around the layer ``name`` of ``model`` whose forward reads the layer's weight,
    such as ``self.dense.weight``, itself; empty where none does, or where that cannot be told from a class's source."""
    parts = name.split(".")
    for start in reversed(range(len(parts))):
        outer = type(model.get_submodule(".".join(parts[:start])))
        if ".".join(parts[start:]) in layers_read_by(outer):
            return outer.__name__
    return ""


@functools.cache
def layers_read_by(module: type[nn.Module]) -> frozenset[str]:
    """The paths, from a module of this class, whose ``weight`` its forward and the methods that this calls read."""
    found, seen, pending = set(), set(), ["forward"]
    while pending:
        method = pending.pop()
        if method in seen:
            continue
        seen.add(method)
        for tree in _sources(module, method):
            harmless = (*HARMLESS, ["dtype"]) if _asks_for_integers(tree) else HARMLESS
            for first, *rest in _paths(tree):
                if not rest:
                    pending.append(first)
                for place, name in enumerate(rest):
                    if name == "weight" and rest[place + 1 : place + 2] not in harmless:
                        found.add(".".join([first, *rest[:place]]))
    return frozenset(found)


def _asks_for_integers(tree: ast.AST) -> bool:
    return any(isinstance(node, ast.Attribute) and node.attr in ASKS_FOR_INTEGERS for node in ast.walk(tree))


def _sources(module: type[nn.Module], method: str) -> Iterator[ast.AST]:
    """The method's source, and as long as one names ``super`` that of the next class which has it; not torch's."""
    for owner in module.__mro__:
        if owner.__module__.partition(".")[0] == "torch":
            return
        if method in vars(owner):
            tree = _source(vars(owner)[method])
            yield tree
            if not any(isinstance(node, ast.Name) and node.id == "super" for node in ast.walk(tree)):
                return


def _source(function: object) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])


def _paths(node: ast.AST) -> Iterator[tuple[str, ...]]:
    """What is read of ``self`` under ``node``: ("a", "b") for ``self.a.b``."""
    names = []
    inner = node
    while isinstance(inner, ast.Attribute):
        names.append(inner.attr)
        inner = inner.value
    if names and isinstance(inner, ast.Name) and inner.id == "self":
        if isinstance(node.ctx, ast.Load):
            yield tuple(reversed(names))
    elif not (isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"):
        for child in ast.iter_child_nodes(node):
            yield from _paths(child)

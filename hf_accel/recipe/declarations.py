"""What classes and tables of this package declare, read from their source.

A recipe is checked, and --help answered, before anything imports torch, which takes seconds. The classes that a recipe
configures import it; their source says the names, types and defaults of their settings all the same.
"""

import ast
import inspect
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

PACKAGE = Path(__file__).parents[1]
TYPES = {kind.__name__: kind for kind in (bool, dict, float, int, list, str, tuple)} | {"Any": Any, "Literal": Literal}


class Setting(NamedTuple):
    """Type and default of one keyword argument."""

    annotation: Any
    default: Any


@dataclass(frozen=True)
class Declaration:
    """A class as its source declares it."""

    settings: dict[str, Setting]
    attributes: dict[str, Any]
    description: str


@cache
def read_class(file: str, name: str) -> Declaration:
    """The class `name` of the file at this path below the package.

    Settings are the keyword arguments of `__init__`, or the public fields of a dataclass; attributes are what the class
    body assigns, where it is a literal.
    """
    node = next(part for part in _body(file) if isinstance(part, ast.ClassDef) and part.name == name)
    settings, attributes = {}, {}
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and part.value:
            if ast.unparse(part.annotation).startswith("ClassVar"):
                attributes[part.target.id] = _value(part.value)
            elif not part.target.id.startswith("_"):
                settings[part.target.id] = Setting(_type(part.annotation), _value(part.value))
        elif isinstance(part, ast.Assign) and isinstance(part.targets[0], ast.Name):
            attributes[part.targets[0].id] = _value(part.value)
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            arguments, defaults = part.args.args, part.args.defaults
            settings = {
                argument.arg: Setting(_type(argument.annotation), _value(default))
                for argument, default in zip(arguments[len(arguments) - len(defaults) :], defaults, strict=True)
            }
    return Declaration(settings, attributes, inspect.cleandoc(ast.get_docstring(node) or ""))


def inspect_class(kind: type) -> Declaration:
    """The same of a class that is imported already. Its source may be anywhere."""
    parameters = inspect.signature(kind.__init__, eval_str=True).parameters.values()
    settings = {
        parameter.name: Setting(
            Any if parameter.annotation is parameter.empty else parameter.annotation, parameter.default
        )
        for parameter in parameters
        if parameter.default is not parameter.empty
    }
    attributes = {name: value for part in reversed(kind.__mro__) for name, value in vars(part).items()}
    return Declaration(settings, attributes, inspect.getdoc(kind) or "")


@cache
def read_table(file: str, name: str) -> tuple[str, ...]:
    """The names in the tuple, or the keys of the dictionary, that the module assigns to `name`."""
    return tuple(_value(key) for key in _entries(file, name))


@cache
def read_classes(file: str, name: str) -> dict[str, tuple[str, str]]:
    """Of a dictionary of imported classes in a package's `__init__.py`: file and name of each class, by key."""
    found = {}
    for part in _body(file):
        if isinstance(part, ast.ImportFrom):
            module = str(Path(file).with_name(f"{part.module}.py"))
            found |= {alias.name: (module, alias.name) for alias in part.names}
    return {_value(key): found[value.id] for key, value in _entries(file, name).items() if isinstance(value, ast.Name)}


@cache
def _body(file: str) -> list[ast.stmt]:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8")).body


def _entries(file: str, name: str) -> dict[ast.expr, ast.expr]:
    """The entries of a module's table, each with its value, or with itself where the table has keys alone."""
    for part in _body(file):
        if not isinstance(part, ast.Assign | ast.AnnAssign):
            continue
        target, table = part.targets[0] if isinstance(part, ast.Assign) else part.target, part.value
        if isinstance(target, ast.Name) and target.id == name:
            if isinstance(table, ast.Dict):
                return {key: value for key, value in zip(table.keys, table.values, strict=True) if key}
            if isinstance(table, ast.Tuple):
                return {entry: entry for entry in table.elts}
    raise LookupError(f"{file} assigns no tuple and no dictionary to {name}")


def _type(annotation: ast.expr | None) -> Any:
    return eval(ast.unparse(annotation), {"__builtins__": {}}, TYPES) if annotation else Any


def _value(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)

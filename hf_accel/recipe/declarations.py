"""What classes and tables of this package declare, read from their source.

A recipe is checked, and --help answered, before anything imports torch, which takes seconds. The classes that a recipe
configures import it; their source says the names, types and defaults of their settings all the same.
"""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional, Union

from ..utils.errors import SettingError

PACKAGE = Path(__file__).parents[1]
TYPES = {kind.__name__: kind for kind in (bool, dict, float, int, list, str, tuple)}
TYPES |= {
    "Any": Any,
    "Literal": Literal,
    "Optional": Optional,
    "Union": Union,
    "List": list,
    "Dict": dict,
    "Tuple": tuple,
}
"""What annotations may be made of. `typing.` may stand before a name."""


class Setting(NamedTuple):
    """Type and default of one keyword argument."""

    annotation: Any
    default: Any


class Unread(NamedTuple):
    """An expression whose value its source does not say."""

    source: str


@dataclass(frozen=True)
class Declaration:
    """A class as its source declares it."""

    settings: dict[str, Setting]
    attributes: dict[str, Any]
    description: str
    place: str
    """File and class, for messages."""
    has_init: bool = True
    """Whether `settings` are the arguments of an `__init__`, and not the fields of a class."""

    def attribute(self, name: str, kind: Any, default: Any) -> Any:
        """Return the class attribute `name`, a `kind`, or `default` if the class has none.

        Raises:
            SettingError: the source does not say its value, or it is of another type.
        """
        value = self.attributes.get(name, default)
        if isinstance(value, Unread):
            raise SettingError(f"{self.place}: {name} = {value.source} is not understood; {PLAIN}")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise SettingError(f"{self.place}: {name} = {value!r} is no number; write one")
        return value


PLAIN = "write a number, text, list or the like in its place, as the source is read without running it"


@cache
def read_class(file: str, name: str) -> Declaration:
    """Read the class `name` of the file at this path below the package, which may also import it from another one.

    Settings are the keyword arguments of `__init__`, its own or that of a base class in this package, or else the
    public fields of a dataclass. Attributes are what the class bodies assign.

    Raises:
        SettingError: there is no such class, or its `__init__` holds what cannot be read.
    """
    found = _find_class(file, name)
    if found is None:
        raise SettingError(f"{PACKAGE.name}/{file}: there is no class {name} here, and no import of one; add it")
    file, node = found
    place = f"{PACKAGE.name}/{file}, {name}"
    inherited = [read_class(*base) for base in _bases(file, node)]
    attributes = {key: value for base in reversed(inherited) for key, value in base.attributes.items()}
    attributes |= {target: _value(value) for target, value, _ in _assignments(node)}
    own = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
    parent = next((base for base in inherited if base.has_init), None)
    settings = _arguments(own[-1], place) if own else parent.settings if parent else _fields(node, place)
    text = inspect.cleandoc(ast.get_docstring(node) or "") or (parent.description if parent else "")
    return Declaration(settings, attributes, text, place, bool(own or parent))


def _fields(node: ast.ClassDef, place: str) -> dict[str, Setting]:
    """Read the public fields of a dataclass."""
    return {
        name: Setting(_type(annotation, f"{place}.{name}"), _value(value))
        for name, value, annotation in _assignments(node)
        if annotation and not name.startswith("_") and not ast.unparse(annotation).startswith("ClassVar")
    }


def _arguments(function: ast.FunctionDef, place: str) -> dict[str, Setting]:
    """Read the keyword arguments of an `__init__`, all of which must have defaults."""
    signature = function.args
    for rest in (signature.vararg, signature.kwarg):
        if rest:
            stars = "*" if rest is signature.vararg else "**"
            raise SettingError(f"{place}.__init__: {stars}{rest.arg} hides what settings there are; name each argument")
    positional = [*signature.posonlyargs, *signature.args]
    given = dict(zip(positional[len(positional) - len(signature.defaults) :], signature.defaults, strict=True))
    given |= {argument: default for argument, default in zip(signature.kwonlyargs, signature.kw_defaults, strict=True)}
    settings = {}
    for argument in [*positional[2:], *signature.kwonlyargs]:  # the first two are self and config
        where, default = f"{place}.__init__, {argument.arg}", given.get(argument)
        if default is None:
            raise SettingError(f"{where}: give it a default, which holds where a recipe does not name it")
        value = _value(default)
        if isinstance(value, Unread):
            raise SettingError(f"{where}: the default {value.source} is not understood; {PLAIN}")
        settings[argument.arg] = Setting(_type(argument.annotation, where), value)
    return settings


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
    return Declaration(settings, attributes, inspect.getdoc(kind) or "", f"{kind.__module__}.{kind.__name__}")


@cache
def read_table(file: str, name: str) -> tuple[str, ...]:
    """The names in the tuple, or the keys of the dictionary, that the module assigns to `name`."""
    return tuple(_value(key) for key in _entries(file, name))


@cache
def read_classes(file: str, name: str) -> dict[str, tuple[str, str]]:
    """Of a dictionary of classes in a module: file and name of each class for `read_class`, by key."""
    return {_value(key): (file, ast.unparse(value)) for key, value in _entries(file, name).items()}


@cache
def _body(file: str) -> list[ast.stmt]:
    try:
        return ast.parse((PACKAGE / file).read_text(encoding="utf-8")).body
    except SyntaxError as error:
        raise SettingError(f"{PACKAGE.name}/{file}, line {error.lineno}: {error.msg}") from None


def _find_class(file: str, name: str) -> tuple[str, ast.ClassDef] | None:
    """The class that a module calls `name`, with the file of the package that defines it; None: it is none of these."""
    if not (PACKAGE / file).is_file():
        return None
    for part in _body(file):
        if isinstance(part, ast.ClassDef) and part.name == name:
            return file, part
    for part in _body(file):
        if not isinstance(part, ast.ImportFrom):
            continue
        for alias in part.names:
            if (alias.asname or alias.name) == name:
                module = _module(file, part)
                return _find_class(module, alias.name) if module else None
    return None


def _module(file: str, part: ast.ImportFrom) -> str | None:
    """The file of the package from which a statement imports; None: it is of another package."""
    names = part.module.split(".") if part.module else []
    if part.level:
        folder = Path(file).parents[part.level - 1]
    elif names[0] == PACKAGE.name:
        folder, names = Path(), names[1:]
    else:
        return None
    path = folder.joinpath(*names)
    return (path / "__init__.py" if (PACKAGE / path).is_dir() else path.with_suffix(".py")).as_posix()


def _bases(file: str, node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """File and name of each base class that this package defines."""
    for base in node.bases:
        found = _find_class(file, base.id) if isinstance(base, ast.Name) else None
        if found:
            yield found[0], found[1].name


def _assignments(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr, ast.expr | None]]:
    """Name, value and annotation of what a class body assigns."""
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and part.value:
            yield part.target.id, part.value, part.annotation
        elif isinstance(part, ast.Assign):
            for target in part.targets:
                pairs = [(target, part.value)]
                if isinstance(target, ast.Tuple) and isinstance(part.value, ast.Tuple):
                    pairs = list(zip(target.elts, part.value.elts, strict=False))
                yield from ((name.id, value, None) for name, value in pairs if isinstance(name, ast.Name))


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


def _type(annotation: ast.expr | None, where: str) -> Any:
    if annotation is None:
        return Any
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    text = ast.unparse(annotation)
    try:
        return eval(text.replace("typing.", ""), {"__builtins__": {}}, TYPES)
    except (NameError, TypeError, AttributeError, SyntaxError):
        known = f"understood are {', '.join(TYPES)}, None and their unions"
        raise SettingError(f"{where}: the annotation {text} is not understood; {known}") from None


def _value(node: ast.expr) -> Any:
    """The value of literals and of sums, products and the like of numbers."""
    try:
        return eval(compile(ast.Expression(node), "<source>", "eval"), {"__builtins__": {}}, {})
    except Exception:  # a name, a call, or whatever else the source alone does not say
        return Unread(ast.unparse(node))

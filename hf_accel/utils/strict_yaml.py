"""YAML as recipes and schedules are written in: no key twice, and `1e-3` is a number."""

import re
from typing import Any

import yaml

EXPONENT_FORM = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class StrictLoader(yaml.SafeLoader):
    """`yaml.SafeLoader`, which takes the last value of a key that is given twice, refuses such a key here."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                earlier = first.setdefault(key.value, key)
                if earlier is not key:
                    line = earlier.start_mark.line + 1
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is given twice, first in line {line}", key.start_mark
                    )
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """The value that YAML `text` stands for.

    Raises:
        yaml.YAMLError: the text is no YAML, or a mapping in it gives a key twice.
    """
    return yaml.load(text, StrictLoader)


def as_number(value: Any) -> Any:
    """The number that a string in exponent form stands for; any other value as it is.

    YAML 1.1 reads `1e-3` and `1.0e15` as strings, because it wants a point in the mantissa and a sign in the exponent.
    """
    return float(value) if isinstance(value, str) and EXPONENT_FORM.fullmatch(value) else value

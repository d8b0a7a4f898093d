"""What is read from the source of a class is what the class itself says."""

import dataclasses
import inspect
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from hf_accel.data import AUGMENTATIONS
from hf_accel.evaluation import FineTuneConfig, LinearConfig
from hf_accel.models import PRESETS, AccelViTConfig
from hf_accel.models.configuration_accel_vit import AccelViTConfig as Config
from hf_accel.objectives import OBJECTIVES
from hf_accel.recipe import checks as recipe_checks
from hf_accel.recipe import declarations
from hf_accel.recipe.declarations import Declaration, Setting, read_class, read_table
from hf_accel.recipe.values import check_settings, join_names
from hf_accel.schedule_search.choose import SYMMETRIES
from hf_accel.utils.errors import SettingError


def settings_of(kind: type) -> dict[str, tuple[Any, Any]]:
    parameters = inspect.signature(kind.__init__, eval_str=True).parameters
    return {
        name: (parameter.annotation, parameter.default)
        for name, parameter in parameters.items()
        if name not in ("self", "config")
    }


@pytest.mark.parametrize("name", OBJECTIVES)
def test_settings_and_text_of_an_objective(name):
    kind, declared = OBJECTIVES[name], read_class(*recipe_checks.OBJECTIVES[name])
    assert recipe_checks.OBJECTIVES.keys() == OBJECTIVES.keys()
    assert declared.settings == settings_of(kind) and declared.description == inspect.getdoc(kind)
    assert recipe_checks.least_batch(name) == kind.least_batch


@pytest.mark.parametrize("kind", [LinearConfig, FineTuneConfig])
def test_settings_and_text_of_an_evaluation(kind):
    files = dict((name, file) for file, name in recipe_checks.EVALUATION_CONFIGS.values())
    declared = read_class(files[kind.__name__], kind.__name__)
    assert declared.settings == settings_of(kind) and declared.description == inspect.getdoc(kind)


def test_fields_of_the_encoders_configuration():
    declared = read_class("models/configuration_accel_vit.py", "AccelViTConfig").settings
    fields = {field.name: field for field in dataclasses.fields(Config)}  # pyright: ignore[reportArgumentType]
    own = [name for name in Config.__annotations__ if not name.startswith("_")]
    assert list(declared) == own and {"hidden_size", "pooling"} <= declared.keys()
    assert all(declared[name].default == fields[name].default for name in own)
    assert all(declared[name].annotation == AccelViTConfig.__annotations__[name] for name in own)


def test_names_of_tables():
    assert tuple(PRESETS) == recipe_checks.PRESETS and tuple(AUGMENTATIONS) == recipe_checks.AUGMENTATIONS
    assert recipe_checks.SYMMETRIES == SYMMETRIES
    with pytest.raises(LookupError, match=r"augment\.py assigns no tuple.* NOTHING"):
        read_table("data/augment.py", "NOTHING")
    assert declarations.PACKAGE.name == "hf_accel"


# Files that a user adds

CACHED = (declarations.read_class, declarations.read_table, declarations.read_classes, declarations._body)


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Reads a class from its source, which is added to a copy of the objectives as byol.py."""
    package = tmp_path / "hf_accel"
    shutil.copytree(declarations.PACKAGE / "objectives", package / "objectives")
    monkeypatch.setattr(declarations, "PACKAGE", package)
    monkeypatch.setitem(recipe_checks.OBJECTIVES, "byol", ("objectives/byol.py", "BYOL"))

    def from_source(*lines: str, base: str = "ObjectiveForPreTraining", name: str = "byol") -> Declaration:
        for cached in CACHED:
            cached.cache_clear()
        imports = "from .base import ObjectiveForPreTraining\nfrom .moco import MoCoForPreTraining as MoCo\n"
        source = f"{imports}class BYOL({base}):\n" + "".join(f"    {line}\n" for line in lines)
        (package / "objectives/byol.py").write_text(source)
        return recipe_checks.read_objective(name)

    yield from_source
    for cached in CACHED:
        cached.cache_clear()


def test_keyword_only_arguments_are_settings(read: Callable[..., Declaration]):
    found = read("def __init__(self, config, width: int = 8, *, momentum: float = 0.99, name: str = 'a'): ...").settings
    assert found == {"width": Setting(int, 8), "momentum": Setting(float, 0.99), "name": Setting(str, "a")}


def test_a_subclass_has_the_settings_of_its_base(read: Callable[..., Declaration]):
    declared = read("least_batch = 4", base="MoCo")
    moco = recipe_checks.read_objective("moco")
    assert declared.settings == moco.settings and "symmetric" in declared.settings
    assert declared.description == moco.description
    assert declared.attributes["base_learning_rate"] == 1.5e-4 and recipe_checks.least_batch("byol") == 4
    assert read("def __init__(self, config, width: int = 8): ...", base="MoCo").settings == {"width": Setting(int, 8)}
    with pytest.raises(
        SettingError, match=r"objectives/byol\.py, BYOL: neither the class nor .* `__init__`.*write one"
    ):
        read("least_batch = 4")


@pytest.mark.parametrize(
    "annotation, meaning",
    [
        *[
            ("Optional[float]", float | None),
            ("typing.Union[int, str]", int | str),
            ("'float | None'", float | None),
        ],
        *[("List[int]", list[int]), ("Tuple[float, float]", tuple[float, float]), ("typing.Any", Any)],
    ],
)
def test_annotations_of_typing_are_understood(read: Callable[..., Declaration], annotation, meaning):
    found = read(f"def __init__(self, config, momentum: {annotation} = None): ...").settings["momentum"]
    assert found == Setting(meaning, None)
    if annotation.startswith("Optional"):
        check_settings("objective_config", values := {"momentum": 1}, {"momentum": found}, "byol")
        assert values == {"momentum": 1.0}


def test_arithmetic_of_numbers_is_understood(read: Callable[..., Declaration]):
    read("least_batch, x = 1 + 1, 2", "base_learning_rate: float = 0.2 / 16", "def __init__(self, config): ...")
    assert (recipe_checks.least_batch("byol"), recipe_checks.base_learning_rate("byol")) == (2, 0.2 / 16)
    declared = read("def __init__(self, config, width: int = 2**11, rate: float = -1e-3): ...")
    assert [setting.default for setting in declared.settings.values()] == [2048, -1e-3]


@pytest.mark.parametrize(
    "lines, problem",
    [
        (["least_batch = SMALL"], r"objectives/byol\.py, BYOL: least_batch = SMALL is not understood; write a number"),
        (["least_batch = '2'"], r"BYOL: least_batch = '2' is no number; write one"),
        (["least_batch = True"], r"BYOL: least_batch = True is no number"),
    ],
)
def test_an_unread_attribute_is_named(read: Callable[..., Declaration], lines, problem):
    read(*lines, "def __init__(self, config): ...")
    with pytest.raises(SettingError, match=problem):
        recipe_checks.least_batch("byol")
    assert recipe_checks.least_batch("moco") == 2
    assert recipe_checks.objectives_of_batches() == "moco and simclr"  # a part of every recipe's help


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (
            "momentum: Tensor = 0.9",
            r"byol\.py, BYOL\.__init__, momentum: the annotation Tensor .*understood are bool, .*",
        ),
        ("momentum: float = BASE", r"__init__, momentum: the default BASE is not understood; write a number"),
        ("momentum: float", r"__init__, momentum: give it a default"),
        ("*, momentum: float", r"__init__, momentum: give it a default"),
        ("width: int = 8, **kwargs", r"__init__: \*\*kwargs hides what settings there are; name each argument"),
        ("*args", r"__init__: \*args hides"),
    ],
)
def test_an_unread_argument_is_named(read: Callable[..., Declaration], arguments, problem):
    with pytest.raises(SettingError, match=problem) as raised:
        read(f"def __init__(self, config, {arguments}): ...")
    assert "\n" not in str(raised.value)


def test_a_class_that_is_not_there_is_named(read: Callable[..., Declaration], monkeypatch):
    with pytest.raises(SettingError, match=r"hf_accel/objectives/byol\.py, line 4: "):
        read("def __init__(self, config", "x y")
    read("def __init__(self, config): ...")
    monkeypatch.setitem(recipe_checks.OBJECTIVES, "byol", ("objectives/byol.py", "BYOLForPretraining"))
    with pytest.raises(
        SettingError, match=r"byol\.py: there is no class BYOLForPretraining here, and no import of one"
    ):
        recipe_checks.read_objective("byol")
    registry = declarations.PACKAGE / "objectives/__init__.py"
    registry.write_text(registry.read_text().replace('    "dino":', '    "byol": BYOL,\n    "dino":'))
    declarations._body.cache_clear()
    declarations.read_classes.cache_clear()
    table = declarations.read_classes("objectives/__init__.py", "OBJECTIVES")
    assert [*table] == ["moco", "simclr", "byol", "dino"] and read_class(*table["moco"]).place.endswith(
        "moco.py, MoCoForPreTraining"
    )
    with pytest.raises(SettingError, match=r"objectives/__init__\.py: there is no class BYOL here"):
        read_class(*table["byol"])


def test_an_objective_without_settings_says_so():
    with pytest.raises(SettingError, match=r"momentum=1: byol has no such setting; it has none; leave it out"):
        check_settings("objective_config", {"momentum": 1}, {}, "byol")


def test_names_are_joined_with_commas():
    assert [join_names(["a", "b", "c"][:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]

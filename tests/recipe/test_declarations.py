"""What is read from the source of a class is what the class itself says."""

import dataclasses
import inspect
from typing import Any

import pytest

from hf_accel.data import AUGMENTATIONS
from hf_accel.evaluation import FineTuneConfig, LinearConfig
from hf_accel.models import PRESETS, AccelViTConfig
from hf_accel.models.configuration_accel_vit import AccelViTConfig as Config
from hf_accel.objectives import OBJECTIVES
from hf_accel.recipe import checks as recipe_checks
from hf_accel.recipe import declarations
from hf_accel.recipe.declarations import read_class, read_table
from hf_accel.schedule_search.choose import SYMMETRIES


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

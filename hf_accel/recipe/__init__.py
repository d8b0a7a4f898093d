"""Recipes: every setting of a task, flat, from a YAML file and `key=value` overrides."""

from ..utils.errors import SettingError as RecipeError
from .keys import (
    RECIPES,
    CardRecipe,
    CostRecipe,
    EmbedRecipe,
    EvaluateRecipe,
    ExploreRecipe,
    ExportRecipe,
    PackRecipe,
    PretrainRecipe,
    Recipe,
    SearchRecipe,
    ViewsRecipe,
    tasks_that_read,
)
from .loading import describe_keys, load_recipe, overrides_for, split_words

"""Recipes: every setting of a task, flat, from a YAML file and `key=value` overrides."""

from .keys import Recipe, describe_keys, load_recipe, recipe_types
from .task_keys import TASKS, overrides_for, task_reads, tasks_that_read
from .values import RecipeError

__all__ = [
    "TASKS",
    "Recipe",
    "RecipeError",
    "describe_keys",
    "load_recipe",
    "overrides_for",
    "recipe_types",
    "task_reads",
    "tasks_that_read",
]

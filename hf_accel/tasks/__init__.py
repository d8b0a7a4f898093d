"""The tasks of a recipe, each one file."""

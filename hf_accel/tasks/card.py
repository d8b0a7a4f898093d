"""`task=card`: write the card of a complete run again, and push it with `push_to_hub`."""

from pathlib import Path

from ..distributed import say
from ..hub import CARD_NAME, Publication
from ..recipe import CardRecipe, Recipe
from ..run_folder import RunFolder
from ..utils.errors import SettingError, fail

OF_A_BASELINE = ("units", "steps", "images_seen", "seconds", "knn_top1")


def publication_of(recipe: Recipe) -> Publication:
    """Return the run of a recipe with the repository that the recipe names."""
    names = (recipe.output_dir, recipe.hub_model_id, recipe.hub_private)
    return Publication(*names, license=recipe.license, optimizer=recipe.hub_optimizer)


def card(recipe: CardRecipe) -> None:
    """Write the card of the run that `checkpoint` names.

    Raises:
        SettingError: `checkpoint` or `baseline` is no complete run, or somebody has taken over the card.
    """
    run = find_run_folder("checkpoint", str(recipe.checkpoint))
    results = run.read_results()
    if recipe.baseline:
        other = find_run_folder("baseline", recipe.baseline)
        measured = other.read_results()
        baseline = {"name": other.path.resolve().name, **{key: measured.get(key) for key in OF_A_BASELINE}}
        with run.update_results() as results:
            results["baseline"] = baseline
    ran, chosen = run.read_recipe(), {key: getattr(recipe, key) for key in ("license", "hub_model_id")}
    for key, value in chosen.items():
        if value == getattr(CardRecipe, key):  # What the run was started with is better than a default.
            chosen[key] = ran.get(key, value)
    names = (run.path, chosen["hub_model_id"], recipe.hub_private)
    publication = Publication(*names, license=chosen["license"], optimizer=recipe.hub_optimizer)
    path = run.final / CARD_NAME
    try:
        written = publication.complete_final(results)
    except ValueError as error:
        raise SettingError(f"checkpoint={recipe.checkpoint!r}: {error}") from error
    if not written:
        raise SettingError(f"{path} is somebody's own by now (its mark is gone): move it away to have one written")
    say(f"Card written: {path}")
    if recipe.push_to_hub:
        publication.publish()


def find_run_folder(key: str, value: str) -> RunFolder:
    """Return the folder of a complete run, which `value` names by itself or by its final/."""
    for run in (RunFolder(value), RunFolder(Path(value).parent)):
        if run.is_complete() and (run.final / "config.json").is_file():
            return run
    fail(key, value, "no complete run there; give the output_dir of one, which holds results.json")

"""A run made public: its card, uploads at checkpoints and at the end, and `task=card`."""

import json
import logging
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, constants, get_token
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data import ImageSource
from ..data.labels import UNLABELLED
from ..distributed import broadcast_object, is_main, say
from ..hub import (
    CARD_NAME,
    FIGURES,
    FINAL,
    STATE_FOLDER,
    Files,
    HubRepository,
    PushFailed,
    PushRefused,
    Run,
    card_text,
    patiently,
    push_failure,
    read_run,
    schedule_of,
    stage,
    without_local_paths,
    write_card,
)
from ..models import AccelViTConfig
from ..recipe import PretrainRecipe, Recipe, RecipeError
from ..report import StrategyCosts, environment, plot_schedule, run_is_complete
from ..run_folder import last_complete_checkpoint, write_json
from ..training.trainer import PretrainTrainer

logger = logging.getLogger(__name__)

HUB_FOLDER = ".hub"
"""In `output_dir`: what waits to be uploaded, and the note of what was."""

MOST_NAMED = 100
"""Images of a split that results.json names where they could not be read."""

OF_A_BASELINE = ("units", "steps", "images_seen", "seconds", "knn_top1")


def hub_of(recipe: Recipe) -> HubRepository:
    output = Path(recipe.output_dir)
    return HubRepository(recipe.hub_model_id or output.resolve().name, recipe.hub_private, output / HUB_FOLDER)


def start_hub(recipe: Recipe) -> HubRepository | None:
    """The repository of a run that begins, on the main process; None without `push_to_hub`, and on the others.

    What no later attempt would cure is found out now. A network that is down is not: training goes on without.

    Raises:
        RecipeError: offline mode, no token or one that may not write, an impossible name or licence.
    """
    if not recipe.push_to_hub:
        return None
    refusal, hub = None, None
    if is_main():
        hub = hub_of(recipe)
        for left_over in hub.folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            shutil.rmtree(left_over)
        try:
            check_hub(recipe, hub)
        except PushRefused as error:
            refusal = str(error)
        except PushFailed as error:
            logger.warning("The Hub cannot be reached now (%s). Training goes on; each checkpoint tries again", error)
    refusal = broadcast_object(refusal)
    if refusal:
        raise RecipeError(refusal)
    return hub


def check_hub(recipe: Recipe, hub: HubRepository) -> None:
    """Raises PushRefused, naming key and fix, or PushFailed."""
    key = f"push_to_hub=true, hub_model_id={hub.name!r}"
    if constants.HF_HUB_OFFLINE:
        raise PushRefused(f"{key}: HF_HUB_OFFLINE is set; unset it, or set push_to_hub=false and push another day")
    if get_token() is None:
        raise PushRefused(f"{key}: there is no token; run `hf auth login`, or set HF_TOKEN")
    try:
        hub.open()
    except PushRefused as error:
        fix = "is the token valid, may it write, and is the name user/name of your own?"
        raise PushRefused(f"{key}: the Hub refuses: {error} ({fix})") from error
    try:
        ModelCard(f"---\nlicense: {json.dumps(recipe.license)}\n---\n").validate()
    except ValueError as error:
        raise PushRefused(f"license={recipe.license!r}: the Hub refuses: {' '.join(str(error).split())}") from error
    except Exception as error:
        raise push_failure(error) from error


class PushCallback(TrainerCallback):
    """Uploads each checkpoint in the background. The last one is left to `publish`.

    Args:
        hub: see `start_hub`.
    """

    def __init__(self, trainer: PretrainTrainer, hub: HubRepository):
        self.trainer, self.hub = trainer, hub
        self.environment = environment()

    def on_save(self, args, state, control, **kwargs):
        recipe, step = self.trainer.recipe, state.global_step
        if step >= self.trainer.plan.num_steps:
            return
        checkpoint = Path(recipe.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        folder = self.hub.folder / checkpoint.name
        try:
            staged = stage(checkpoint, folder, recipe.hub_optimizer)
        except OSError as error:  # a disk that is full: the checkpoint itself is there
            logger.warning("%s is not pushed: %s", checkpoint, error)
            return
        data = describe_data(recipe, self.trainer.source, self.trainer.validation)
        results = {**self.trainer.results(), "data": data, "environment": self.environment}
        make = partial(self.files, staged, results)
        self.hub.push_later(make, f"Step {step}, {results['units'] / results['budget']:.0%} of the budget", folder)

    def files(self, staged: Files, results: dict[str, Any], repo_id: str) -> Files:
        recipe = yaml.safe_load(self.trainer.recipe.to_yaml())
        name, config = repo_id.split("/")[-1], self.trainer.objective.config
        card = card_text(Run(name, recipe, results, config, is_complete=False), repo_id)
        return {**staged, CARD_NAME: card.encode(), "recipe.yaml": public_yaml(recipe)}


def describe_data(recipe: Recipe, source: ImageSource, validation: ImageSource | None) -> dict[str, Any]:
    """What results.json tells of the images, with no path of this machine."""
    data, local = recipe.data, Path(recipe.data).expanduser()
    parts = [source] if validation is None else [source, validation]
    is_on_hub = data != "bundled" and not local.exists()
    return {
        "name": "bundled digits" if data == "bundled" else data if is_on_hub else local.resolve().name,
        "is_on_hub": is_on_hub,
        "images": len(source),
        "train_split": source.name.rpartition("/")[2],
        "validation_images": None if validation is None else len(validation),
        "validation_split": None if validation is None else validation.name.rpartition("/")[2],
        "classes": source.num_classes,
        "labels": source.labels_from,
        "labelled_images": 0 if source.labels is None else int((source.labels != UNLABELLED).sum()),
        "unreadable_images": len(source.bad),
        "unreadable_validation_images": None if validation is None else len(validation.bad),
        "unreadable": [
            {"image": _name_inside(local, name), "reason": without_local_paths(reason)}
            for part in parts
            for name, reason in list(part.bad.values())[:MOST_NAMED]
        ],
    }


def _name_inside(folder: Path, name: str) -> str:
    """The name of an image without the path of the data set's folder, or any other path of this machine."""
    for start in (folder.resolve(), folder):
        if Path(name).is_relative_to(start):
            return Path(name).relative_to(start).as_posix()
    return without_local_paths(name)


def complete_final(recipe: Recipe, results: dict[str, Any], model_id: str | None = None) -> bool:
    """Lay figures and card beside the encoder in final/. False if the card there was taken over by somebody.

    Args:
        recipe: its `output_dir` is the run's; `license` is stated.
        model_id: the repository that the card names; default: the one it was or will be pushed to, if that is known,
            else the folder, by its whole path, so that the card's code runs from anywhere.
    """
    output = Path(recipe.output_dir)
    config = AccelViTConfig.from_pretrained(output / FINAL)
    schedule = schedule_of(results, config)
    if "units_per_image" in results:  # of runs of earlier versions it is not known
        relative = [units / results["units_per_image_uncompressed"] for units in results["units_per_image"]]
        costs = dict(zip((stage.strategy for stage in schedule.stages), relative, strict=True))
        plot_schedule(StrategyCosts(config.image_size, costs), schedule, output / "schedule")
    for name in FIGURES:
        if (output / name).exists():
            shutil.copy(output / name, output / FINAL)
    run = read_run(output, results, config)
    run = replace(run, recipe={**run.recipe, "license": recipe.license})
    repo_id = model_id or hub_of(recipe).repo_id
    if repo_id:
        run = replace(run, name=repo_id.split("/")[-1])
    return write_card(run, output / FINAL / CARD_NAME, repo_id or (output / FINAL).resolve().as_posix())


def publish(recipe: Recipe, hub: HubRepository | None = None) -> None:
    """Push a complete run, unless the Hub has it already. Only the main process of a launch does so.

    Raises:
        PushFailed: with what to do; nothing is lost.
    """
    if int(os.environ.get("RANK", 0)):  # after the end of training there is no process group to ask
        return
    hub, output = hub or hub_of(recipe), Path(recipe.output_dir)
    try:
        hub.drop_waiting()
        if hub.repo_id is None:
            patiently(partial(check_hub, recipe, hub))
        results = json.loads((output / "results.json").read_text())
        complete_final(recipe, results, hub.repo_id)
        files = {**final_files(output, recipe.hub_optimizer), **published_card(output, str(hub.repo_id))}
        if hub.holds(files):
            say(f"{hub.marker()['url']} holds all of it (remove {hub.folder} to push it again)")
            return
        patiently(partial(check_hub, recipe, hub))
        url = patiently(partial(hub.push, files, f"{results['steps']} steps, {results['units']:,.0f} units"))
    except PushFailed as error:
        raise type(error)(
            f"{error}. The run itself is complete, and all of it is in {output}: launch the same command again to push"
        ) from error
    say(f"Pushed to {url}")


def published_card(output: Path, repo_id: str) -> Files:
    """The card of final/ with the repository in the place of this folder, which one that somebody wrote may name."""
    path = output / FINAL / CARD_NAME
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    here = path.parent.resolve().as_posix()
    return {CARD_NAME: text.replace(here, repo_id).encode()} if here in text else {}


def final_files(output: Path, optimizer: bool) -> Files:
    """final/, the recipe and the results, and, if asked for, the last checkpoint with its optimizer."""
    folders = [(output / FINAL, "")]
    checkpoint = last_complete_checkpoint(output) if optimizer else None
    if checkpoint:
        folders.append((checkpoint, f"{STATE_FOLDER}/"))
    files: dict[str, Path | bytes] = {
        prefix + path.relative_to(folder).as_posix(): path
        for folder, prefix in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    for name in ("results.json", "log_history.json"):
        values = without_local_paths(json.loads((output / name).read_text()))
        files[name] = (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
    files["recipe.yaml"] = public_yaml(yaml.safe_load((output / "recipe.yaml").read_text()))
    return files


def public_yaml(recipe: dict[str, Any]) -> bytes:
    return yaml.safe_dump(without_local_paths(recipe), sort_keys=False, allow_unicode=True).encode()


def card(recipe: Recipe) -> None:
    """`task=card`: write the card of a complete run anew, and push it with `push_to_hub`.

    Raises:
        RecipeError: `checkpoint` or `baseline` is no complete run.
    """
    output = run_folder("checkpoint", str(recipe.checkpoint))
    results = json.loads((output / "results.json").read_text())
    if recipe.baseline:
        other = run_folder("baseline", recipe.baseline)
        measured = json.loads((other / "results.json").read_text())
        results["baseline"] = {"name": other.resolve().name, **{key: measured.get(key) for key in OF_A_BASELINE}}
        write_json(output / "results.json", results)
    ran, default = yaml.safe_load((output / "recipe.yaml").read_text()), PretrainRecipe(budget=1.0)
    keys = {key: getattr(recipe, key) for key in ("license", "hub_model_id")}
    kept = {key: ran[key] for key, given in keys.items() if given == getattr(default, key) and key in ran}
    recipe = replace(recipe, **{**keys, **kept})
    recipe.output_dir = str(output)  # pyright: ignore[reportAttributeAccessIssue]
    path = output / FINAL / CARD_NAME
    try:
        written = complete_final(recipe, results)
    except ValueError as error:
        raise RecipeError(f"checkpoint={recipe.checkpoint!r}: {error}") from error
    if not written:
        raise RecipeError(f"{path} is somebody's own by now (its mark is gone): move it away to have one written")
    say(f"Card written: {path}")
    if recipe.push_to_hub:
        publish(recipe)


def run_folder(key: str, value: str) -> Path:
    """The output_dir of a complete run, given by itself or by its final/."""
    for folder in (Path(value), Path(value).parent):
        if run_is_complete(folder) and (folder / FINAL / "config.json").is_file():
            return folder
    raise RecipeError(f"{key}={value!r}: no complete run there; give the output_dir of one, which holds results.json")

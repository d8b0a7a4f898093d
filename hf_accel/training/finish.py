"""The end of a run: the encoder with its card in `final/`, figures, and `results.json`, which marks it as complete."""

import shlex
from typing import Any, cast

from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from ..checkpoints import load_processor
from ..distributed import is_main, say
from ..evaluation import raw_pixel_features, weights_digest
from ..hub import Publication
from ..models import AccelViTModel
from ..report import environment, plot_curves
from ..run_folder import RunFolder, find_damage
from ..utils.errors import fail
from ..utils.writing import AGAIN, write_json, writing
from .accuracy import measure_knn

STARTS = ("knn_top1_init_from", "knn_top1_continued_from")


def finish_run(trainer: Any) -> None:
    """Write everything that a complete run leaves. All processes must call it."""
    folder, args, source, validation = trainer.folder, trainer.args, trainer.source, trainer.validation
    so_far, raw = trainer.results(), None
    encoder = trainer.whole_objective().encoder
    if trainer.has_labels():
        raw = measure_knn(encoder, source, validation, args, features=raw_pixel_features)
    for images in filter(None, (source, validation)):
        images.gather_bad()
    if not is_main():
        return
    results: dict[str, Any] = {
        **so_far,
        "knn_top1_raw_pixels": raw and raw["top1"],
        "weights": weights_digest(encoder),
        "data": trainer.describe_data(),
        "environment": environment(),
    }
    with writing(folder.path, AGAIN):
        encoder.save_pretrained(folder.final)
        trainer.processing_class.save_pretrained(folder.final)
        write_results(trainer, results)
    say(describe_result(trainer, results))
    for line in describe_pictures(folder, by_recipe=trainer.given_record is not None):
        say(line)


def restore_final(folder: RunFolder, publication: Publication) -> None:
    """Write `final/` of a complete run again, from its last checkpoint, where it is missing. One process must call it.

    Raises:
        SettingError: that checkpoint is missing, too.
    """
    if (folder.final / CONFIG_NAME).is_file() and (folder.final / SAFE_WEIGHTS_NAME).is_file():
        return
    results = folder.read_results()
    checkpoint = folder.checkpoint(results["steps"])
    if wrong := find_damage(checkpoint):
        lost = f"its run is complete, but its encoder {folder.final} is missing, and so is what it was written from"
        fail("output_dir", str(folder), f"{lost}: {checkpoint}: {wrong}; restore one of them, or choose another folder")
    with writing(folder.path, AGAIN):
        cast(Any, AccelViTModel.from_pretrained(checkpoint)).save_pretrained(folder.final)
        cast(Any, load_processor(str(checkpoint))).save_pretrained(folder.final)
        publication.complete_final(results)
    say(f"{folder.final} was missing, and is written again from {checkpoint}")


def describe_result(trainer: Any, results: dict[str, Any]) -> str:
    """Say what accuracy the run has reached and where its results are."""
    folder, best, kept = trainer.folder, results["best"], ""
    in_words = "RankMe {:.1f}" if best and best["measure"] == "rank_me" else "{:.2%}"
    if best and best["step"] < results["steps"]:
        value = in_words.format(best[best["measure"]])
        kept = f"; best/ holds the best, {value} at {best['progress']:.0%} of the budget"
    if results["knn_top1"] is None:
        lack = "no labels, or no held-out images"
        why = "eval_points asks for none at the end" if trainer.has_labels() else lack
        rank = "" if results["rank_me"] is None else f"; RankMe {results['rank_me']:.1f}"
        start = f" (at the start {best['start']:.1f})" if rank and best and best["start"] is not None else ""
        return f"Results in {folder}; no accuracy: {why}{rank}{start}{kept}"
    said = {"random initialisation": results["knn_top1_random_init"], "at the start": accuracy_at_start(results)}
    start = "".join(f" ({name} {value:.2%})" for name, value in said.items() if value is not None)
    return f"kNN accuracy {results['knn_top1']:.2%}{start}{kept}; results in {folder}"


def accuracy_at_start(results: dict[str, Any]) -> float | None:
    """The kNN accuracy of the trained weights that a run has started from."""
    return next((results[name] for name in STARTS if results.get(name) is not None), None)


def describe_pictures(folder: RunFolder, by_recipe: bool) -> list[str]:
    """Say where the pictures of a finished run are, or which command draws them.

    Args:
        by_recipe: whether `recipe.yaml` of the run names its images, as it does not after a run in Python.
    """
    recipe = [str(folder.recipe)] if by_recipe else []
    given = [f"checkpoint={folder.final}", *([] if by_recipe else ["data=FOLDER", f"output_dir={folder}"])]
    page = folder.explore.with_suffix(".html")
    views = folder.views if folder.views.exists() else shlex.join(["hf-accel", "views", *recipe])
    learnt = page if page.exists() else shlex.join(["hf-accel", "explore", *recipe, *given])
    lines = [f"See what it has learnt: {learnt}"]
    return [f"See its views: {views}", *lines] if by_recipe or folder.views.exists() else lines


def write_results(trainer: Any, results: dict[str, Any]) -> None:
    """Beside the encoder in `final/`, which is written: figures, card, log and, last, `results.json`."""
    folder, plan, history = trainer.folder, trainer.plan, trainer.state.log_history
    named = {"raw pixels": results["knn_top1_raw_pixels"], "random init": results["knn_top1_random_init"]}
    named["start"] = accuracy_at_start(results)
    baselines = {name: value for name, value in named.items() if value is not None}
    title = f"{results['objective']} on {results['data']['name']}"
    size, best = trainer.objective.config.image_size, results.get("best") or {}
    rank = best["start"] if best.get("measure") == "rank_me" else None
    drawn: dict[str, Any] = {"baselines": baselines, "rank_me_start": rank}
    drawn["has_target_branch"] = trainer.objective.has_target_branch
    plot_curves(history, folder.curves, title=title, plan=plan, image_size=size, **drawn)
    write_json(folder.log_history, {"log_history": history})
    with folder.update_results() as written:  # It may hold evaluations of a checkpoint.
        written |= results
        trainer.publication().complete_final(written)

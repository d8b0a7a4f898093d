"""The end of a run: the encoder with its card in `final/`, figures, and `results.json`, which marks it as complete."""

from typing import Any

from ..distributed import is_main, say
from ..evaluation import raw_pixel_features, weights_digest
from ..report import environment, plot_curves
from ..utils.writing import AGAIN, write_json, writing
from .accuracy import measure_knn


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
    if results["knn_top1"] is None:
        lack = "for lack of labels or of images kept for it"
        rank = "" if results["rank_me"] is None else f"; RankMe {results['rank_me']:.1f}"
        why = "as eval_points asks for none" if trainer.has_labels() else lack
        say(f"Results in {folder}; no accuracy, {why}{rank}")
        return
    said = {"random initialisation": results["knn_top1_random_init"], "at the start": results.get("knn_top1_init_from")}
    start = "".join(f" ({name} {value:.2%})" for name, value in said.items() if value is not None)
    best, kept = results.get("best"), ""
    if best and best["step"] < results["steps"]:
        kept = f"; best/ holds the best, {best['knn_top1']:.2%} at {best['progress']:.0%} of the budget"
    say(f"kNN accuracy {results['knn_top1']:.2%}{start}{kept}; results in {folder}")


def write_results(trainer: Any, results: dict[str, Any]) -> None:
    """Beside the encoder in `final/`, which is written: figures, card, log and, last, `results.json`."""
    folder, plan, history = trainer.folder, trainer.plan, trainer.state.log_history
    named = {"raw pixels": results["knn_top1_raw_pixels"], "random init": results["knn_top1_random_init"]}
    named["start"] = results.get("knn_top1_init_from")
    baselines = {name: value for name, value in named.items() if value is not None}
    title = f"{results['objective']} on {results['data']['name']}"
    size = trainer.objective.config.image_size
    plot_curves(history, folder.curves, title=title, baselines=baselines, plan=plan, image_size=size)
    write_json(folder.log_history, {"log_history": history})
    with folder.update_results() as written:  # It may hold evaluations of a checkpoint.
        written |= results
        trainer.publication().complete_final(written)

"""`task=views`: the contact sheet shows what the branches of the run get, and the run's folder stays as it was."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import yaml

from hf_accel import cli
from hf_accel.recipe import load_recipe
from hf_accel.report import contact_sheet
from hf_accel.report.contact_sheet import SeenView, StageViews, describe_seen, fade_dropped, plot_contact_sheet
from hf_accel.tasks import views as task
from hf_accel.tasks.plan import preview_run
from hf_accel.tasks.pretrain import pretrain
from hf_accel.training import stage_views
from hf_accel.training.stage_views import collect_stage_views, recording_encoders
from hf_accel.training.trainer import PretrainTrainer
from tests.tiny_runs import RECIPE

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")

STAGES = [{"until": 0.5, "patch_size": 8, "token_dropout": 0.5}, {"until": 1.0, "token_dropout": 0.25}]
HEADS = RECIPE["objective_config"]
LOCAL = {"num_local_crops": 3, "local_crop_size": 8, "num_prototypes": 8, "head_hidden_size": 8}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "moco": {"objective": "moco", "objective_config": HEADS | {"symmetric": True}},
    "simclr": {"objective": "simclr", "objective_config": HEADS, "view_resolution": "full"},
    "dino": {"objective": "dino", "objective_config": LOCAL},
}
ROWS = {"moco": 4, "simclr": 2, "dino": 6}
"""Both views in both branches, both in one branch, and both in both with two of three local crops."""
AUTO = ["schedule=auto", "budget=20000", "auto_share=0.5", "auto_draws=3"]


def recipe_of(folder: Path, output: Path, **values: Any) -> Any:
    path = output.with_name(output.name + ".yaml")
    about = {"data": str(folder), "output_dir": str(output), "task": "views"}
    path.write_text(yaml.safe_dump({**RECIPE, "schedule": STAGES, **about, **values}))
    return load_recipe(path)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_sheet_shows_what_training_encodes(objective, folder, tmp_path, monkeypatch):
    recipe = recipe_of(folder, tmp_path / "run", **OBJECTIVES[objective]).run()
    with preview_run(recipe) as trainer:
        stages = collect_stage_views(trainer)
        (_, first), (_, second) = trainer.plan.stage_steps()
        source = trainer.source
    trained: dict[int, Any] = {}
    compute = PretrainTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        step, batch = inputs["step"], inputs["index"].tolist()
        with recording_encoders(model) as calls:
            loss = compute(self, model, inputs, *args, **kwargs)
        trained[step] = (batch, [*calls])
        return loss

    monkeypatch.setattr(PretrainTrainer, "compute_loss", compute_loss)
    pretrain(recipe)
    assert ("target branch" in stages[0].title) == (objective != "simclr")
    assert first > 0 < second and len(stages) == 2 and len(trained) == first + second
    for stage, step in zip(stages, (0, first), strict=True):
        batch, calls = trained[step]
        assert len(stage.originals) == stage_views.SHOWN
        for shown, index in zip(stage.originals, batch, strict=False):
            assert np.array_equal(shown * 255, np.asarray(source.read(index)))
        expected = [row for call in calls for row in rows_of(call, len(batch), source)]
        assert len(stage.seen) == ROWS[objective]
        for seen in stage.seen:
            assert any(same(seen, row) for row in expected), (seen.view, seen.branch)


def rows_of(call: Any, images: int, source: Any) -> list[tuple[np.ndarray, np.ndarray, bool]]:
    """Pixels in [0, 1], kept patches and whether the branch learns, of the first images of each view of a call."""
    mean, std = (torch.tensor(value)[:, None, None] for value in (source.mean, source.std))
    grid = call.pixels.shape[-1] // call.patch_size
    found = []
    for view in range(len(call.pixels) // images):
        rows = slice(view, None, len(call.pixels) // images)
        pixels = (call.pixels[rows] * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        kept = np.ones((images, grid, grid), dtype=bool)
        if call.kept_tokens is not None:
            for image, tokens in enumerate(call.kept_tokens[rows].tolist()):
                kept[image] = np.isin(np.arange(grid**2), tokens).reshape(grid, grid)
        found.append((pixels[: stage_views.SHOWN], kept[: stage_views.SHOWN], call.learns))
    return found


def same(seen: SeenView, row: tuple[np.ndarray, np.ndarray, bool]) -> bool:
    pixels, kept, learns = row
    alike = seen.images.shape == pixels.shape and np.array_equal(seen.images, pixels)
    return alike and np.array_equal(seen.kept, kept) and (seen.branch == "online branch") == learns


def test_a_view_that_both_branches_see_alike_is_shown_once(folder, tmp_path):
    recipe = recipe_of(folder, tmp_path / "run", **OBJECTIVES["moco"], schedule=[{"until": 1.0}]).run()
    with preview_run(recipe) as trainer:
        (stage,) = collect_stage_views(trainer)
    assert [(row.view, row.branch) for row in stage.seen] == [(0, "both branches"), (1, "both branches")]


def test_dropped_patches_lose_their_colour_and_kept_ones_stay():
    image = np.random.default_rng(0).random((12, 12, 3))
    kept = np.array([[True, False], [False, True]])
    shown = fade_dropped(image, kept)
    assert np.array_equal(shown[:6, :6], image[:6, :6]) and np.array_equal(shown[6:, 6:], image[6:, 6:])
    for faded in (shown[:6, 6:], shown[6:, :6]):
        assert np.ptp(faded, axis=2).max() < 1e-9 and faded.min() > 0.7


def test_a_row_names_view_branch_and_patches():
    kept = np.zeros((2, 4, 4), dtype=bool)
    kept[:, 0] = True
    row = SeenView(0, "online branch", np.zeros((2, 8, 8, 3)), 4, kept, "made at 8 px")
    assert describe_seen(row) == "view 1\nonline branch\n4 of 16 patches\nmade at 8 px"
    assert "all 16 patches" in describe_seen(SeenView(1, "target branch", row.images, 4, ~np.zeros_like(kept)))


def test_the_sheet_has_a_row_for_each_original_view_and_branch(tmp_path):
    kept = np.ones((2, 2, 2), dtype=bool)
    seen = [SeenView(view, "online branch", np.full((2, 8, 8, 3), 0.5), 2, kept) for view in range(2)]
    originals = [np.zeros((6, 9, 3)), np.zeros((9, 6, 3))]
    heights = []
    for count in (1, 2):
        stages = [StageViews("Stage", originals, [np.array([[0, 0, 3, 3]] * 2)], seen)] * count
        plot_contact_sheet(stages, tmp_path / "a.png", "Views", ["A note."])
        with PIL.Image.open(tmp_path / "a.png") as image:
            heights.append(image.height)
    inches = contact_sheet.STAGE + 3 * (contact_sheet.INCHES + contact_sheet.GAP)
    assert heights[1] - heights[0] == pytest.approx(160 * inches, abs=2)


def test_views_writes_one_picture_and_nothing_else(folder, tmp_path, monkeypatch, capsys):
    output, drawn = tmp_path / "run", []

    def plot(stages, path, title, notes):
        drawn.append((stages, title, notes))
        path.touch()

    monkeypatch.setattr(task, "plot_contact_sheet", plot)
    recipe_of(folder, output)
    cli.main(["views", str(output.with_suffix(".yaml")), "report_to=[tensorboard]", "torch_compile=true", "seed=3"])
    assert [path.name for path in output.iterdir()] == ["views.png"]
    ((stages, title, notes),) = drawn
    assert title == f"Views of MoCo-v3 on {folder.name}, 16 px, seed 3" and len(notes) == 1
    assert [stage.title.partition(":")[0] for stage in stages] == ["Stage 1 of 2", "Stage 2 of 2"]
    assert "0% to 52% of the budget, 19 steps" in stages[0].title and "50% of the patches dropped" in stages[0].title
    assert f"Views of 2 stages: {output / 'views.png'}" in capsys.readouterr().out
    for words, note in ((AUTO, "schedule=auto: the stages"), (["cost=measured", "seed=4"], "The steps were timed now")):
        cli.main(["views", str(output.with_suffix(".yaml")), *words])
        assert len(drawn[-1][2]) == 2 and drawn[-1][2][1].startswith(note)
    assert not np.array_equal(drawn[0][0][0].seen[0].images, drawn[2][0][0].seen[0].images)

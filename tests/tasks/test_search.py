"""`task=search` as a whole, on a pilot of eight steps: what it writes, that a killed one continues, how it refuses."""

import shutil
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow.parquet
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from hf_accel.compression import Compression, Schedule, Strategy, forward_cost
from hf_accel.objectives import OBJECTIVES
from hf_accel.recipe import RecipeError, load_recipe
from hf_accel.schedule_search.choose import choose_strategies
from hf_accel.schedule_search.error_table import ErrorTable
from hf_accel.schedule_search.gradient_error import GradientError, estimate_errors
from hf_accel.schedule_search.gradient_probe import GradientProbe
from hf_accel.tasks import search
from hf_accel.tasks.setup import build_objective, images_of, pretrain_config
from tests.tiny_runs import STEPS, WEIGHTS, launch, read

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")

DRAWS = 3
SEARCH = ["task=search", f"search_draws={DRAWS}", "search_token_dropout=[0.0, 0.5]"]
GRID = [Strategy(Compression(p, r)) for p, r in product([4, 8], [0.0, 0.5])]
POINTS = [0.0, 0.5, 1.0]


@pytest.fixture(scope="module")
def pilot(folder, tmp_path_factory) -> Path:
    return launch(folder, tmp_path_factory.mktemp("pilot") / "run", f"keep_points={POINTS}", "eval_points=[]")


@pytest.fixture(scope="module")
def found(pilot, folder, tmp_path_factory) -> Path:
    """A search left alone."""
    return launch(folder, tmp_path_factory.mktemp("search") / "run", *SEARCH, f"pilot={pilot}")


def rows_of(output: Path) -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(output / "gradient_error.parquet").to_pylist()


def test_a_pilot_keeps_its_checkpoints(pilot):
    kept = {path.name: path for path in (pilot / "kept").iterdir()}
    assert set(kept) == {"checkpoint-0", f"checkpoint-{STEPS // 2}", f"checkpoint-{STEPS}"}
    assert {path.name for path in pilot.glob("checkpoint-*")} == {f"checkpoint-{STEPS - 2}", f"checkpoint-{STEPS}"}
    assert [read(kept[name] / "run_state.json")["progress"] for name in sorted(kept)] == POINTS
    weights = [load_file(kept[name] / WEIGHTS) for name in sorted(kept)]
    torch.manual_seed(0)
    recipe = load_recipe(pilot / "recipe.yaml")
    for name, value in build_objective(recipe).state_dict().items():
        assert torch.equal(weights[0][name], value), name  # as it was initialised
    assert not torch.equal(weights[1]["encoder.layernorm.weight"], weights[2]["encoder.layernorm.weight"])


def test_the_table_has_a_row_for_each_strategy_and_stage(found, pilot):
    rows = rows_of(found)
    recipe = load_recipe(pilot / "recipe.yaml")
    config = recipe.encoder_config()
    assert len(rows) == len(GRID) * len(POINTS)
    for progress in POINTS:
        stage = [row for row in rows if row["progress"] == progress]
        assert {Strategy.from_dict(row) for row in stage} == set(GRID)
        assert sum(row["chosen"] for row in stage) == 1
    for row in rows:
        strategy = Strategy.from_dict(row)
        units = 3 * forward_cost(config, strategy.online) + forward_cost(config, strategy.target_branch)
        assert row["relative_cost"] == pytest.approx(units / 4) and row["draws"] == DRAWS
        assert row["tokens"] == strategy.online.kept_tokens(16)
        if strategy == GRID[0]:
            assert row["bias2"] == row["bias2_low"] == row["bias2_high"] == 0
    costs = [next(row["relative_cost"] for row in rows if row["progress"] == p and row["chosen"]) for p in POINTS]
    assert costs == sorted(costs)


def test_the_errors_are_those_at_the_checkpoint(found, pilot, folder):
    recipe = load_recipe(found / "recipe.yaml")
    objective = build_objective(recipe)
    objective.load_state_dict(load_file(pilot / "kept" / f"checkpoint-{STEPS // 2}" / WEIGHTS))
    source, _ = images_of(recipe)
    stage = {Strategy.from_dict(row): row for row in rows_of(found) if row["progress"] == 0.5}
    cost = {strategy: row["relative_cost"] for strategy, row in stage.items()}
    probe = GradientProbe(objective, pretrain_config(recipe), source, 0.5)
    errors = estimate_errors(probe, cost, range(DRAWS))
    for strategy, error in errors.items():
        for name in ("bias2", "variance", "ca_variance", "ca_mse", "reference_norm2"):
            assert stage[strategy][name] == pytest.approx(getattr(error, name)), (strategy, name)


@pytest.mark.slow
def test_the_schedule_file_is_taken_by_a_recipe_in_one_line(found, folder, tmp_path):
    path = found / "schedule.yaml"
    written = yaml.safe_load(path.read_text())
    assert {"data", "model", "objective", "command", "date", "pilot", "patch_size", "stages"} <= set(written)
    schedule = Schedule.parse(str(path), 4)
    chosen = [Strategy.from_dict(row) for row in rows_of(found) if row["chosen"]]
    assert schedule.strategies == list(dict.fromkeys(chosen))
    output = launch(folder, tmp_path / "run", f"schedule={path}", "eval_points=[]")
    assert Schedule.parse(read(output / "results.json")["schedule"], 4).strategies == schedule.strategies


def test_the_report_holds_every_figure(found):
    page = (found / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "moco on" in page and (found / "report.md").exists()
    for name in ("gradient_error", "ca_mse_heatmap", "schedule"):
        assert (found / f"{name}.svg").stat().st_size > 1000
        with PIL.Image.open(found / f"{name}.png") as image:
            assert min(image.size) > 200


@pytest.mark.slow
def test_a_killed_search_continues_and_finds_the_same(found, pilot, folder, tmp_path, monkeypatch, capsys):
    true_errors, seen = search.measure_errors, []

    def measure_errors(parts, folder, progress, *rest):
        seen.append(progress)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return true_errors(parts, folder, progress, *rest)

    monkeypatch.setattr(search, "measure_errors", measure_errors)
    monkeypatch.setattr(search, "write_search_report", lambda *_: None)
    with pytest.raises(SystemExit, match="Interrupted"):
        launch(folder, tmp_path / "run", *SEARCH, f"pilot={pilot}")
    said = capsys.readouterr()
    assert f"progress 0%: measuring {len(GRID)} strategies with {DRAWS} draws" in said.out and not said.err
    assert len(rows_of(tmp_path / "run")) == len(GRID) and not (tmp_path / "run" / "schedule.yaml").exists()
    output = launch(folder, tmp_path / "run", *SEARCH, f"pilot={pilot}", "search_memory=1.0")  # as after running out
    assert seen == [0.0, 0.5, 0.5, 1.0] and rows_of(output) == rows_of(found)
    one, other = (yaml.safe_load((path / "schedule.yaml").read_text()) for path in (found, output))
    assert one["stages"] == other["stages"]
    launch(folder, output, *SEARCH, f"pilot={pilot}")  # a finished one has nothing left to compute
    assert len(seen) == 4 and rows_of(output) == rows_of(found)
    capsys.readouterr()
    launch(folder, output, *SEARCH, f"pilot={pilot}", "search_criterion=gain")  # chosen anew from the same table
    told = [line for line in capsys.readouterr().out.splitlines() if "of uncompressed)" in line]
    bases = [row for row in rows_of(found) if Strategy.from_dict(row) == GRID[0]]
    assert ["noise" in line for line in told] == [DRAWS * r["reference_norm2"] < r["variance"] for r in bases]
    table = [ErrorTable(rows_of(found)).errors(progress) for progress in POINTS]
    cost = {Strategy.from_dict(row): row["relative_cost"] for row in rows_of(found)}
    chosen = [Strategy.from_dict(row) for row in rows_of(output) if row["chosen"]]
    assert len(seen) == 4 and chosen == choose_strategies(table, cost, "gain")
    assert yaml.safe_load((output / "schedule.yaml").read_text())["criterion"] == "gain"
    with pytest.raises(SystemExit, match=r"search_draws=5: .* holds a run with search_draws=3"):
        launch(folder, output, *SEARCH, f"pilot={pilot}", "search_draws=5")


class NoisyProbe:
    """Gradients of length 1 with noise of a given variance."""

    base = GRID[0]

    def __init__(self, variance: float):
        self.deviation = (variance / 20_000) ** 0.5

    def __call__(self, name: Strategy | None, draw: int) -> torch.Tensor:
        noise = torch.randn(20_000, generator=torch.Generator().manual_seed(draw))
        return torch.full((20_000,), 20_000**-0.5) + self.deviation * noise


@pytest.mark.parametrize(
    ("variance", "most", "expected", "short"),
    [
        (2.0, 1000, 16, ""),
        (25.0, 1000, 100, ""),
        (25.0, 50, 50, "noisy, and more draws would cost over 5% of the pilot's units"),
        (1e9, 50, 50, "noisy"),
        (25.0, 16, 16, "too small to pay for more"),
    ],
)
def test_auto_takes_draws_by_the_noise(variance, most, expected, short):
    """`most` draws at 3 gradients each are affordable beside the 16 that measure the noise."""
    draws, why = search.choose_draws(NoisyProbe(variance), 16 + 3.0 * most + 1, 3.0)  # pyright: ignore
    assert draws == pytest.approx(expected, rel=0.1) and short in why and bool(short) == bool(why)


@pytest.mark.slow
def test_auto_draws_are_paid_by_the_pilot(pilot, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search, "write_search_report", lambda *_: None)
    monkeypatch.setattr(search, "LEAST_DRAWS", DRAWS)
    grid = ("task=search", "search_token_dropout=[0.0, 0.5]", f"pilot={pilot}")
    poor = rows_of(launch(folder, tmp_path / "poor", *grid))
    assert {row["draws"] for row in poor} == {DRAWS} and "too small to pay for more" in capsys.readouterr().out
    price = 1 + sum(row["relative_cost"] for row in poor[: len(GRID)])  # in uncompressed gradients: a step takes one
    monkeypatch.setattr(search, "SHARE", (DRAWS + 7.5 * price) * len(POINTS) / STEPS)
    monkeypatch.setattr(search, "SIGNAL", 1e9)
    assert {row["draws"] for row in rows_of(launch(folder, tmp_path / "rich", *grid))} == {7}


@pytest.mark.slow
def test_only_rows_of_the_pilots_present_weights_are_taken_over(found, pilot, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search, "write_search_report", lambda *_: None)
    changed, run = tmp_path / "pilot", tmp_path / "run"
    shutil.copytree(pilot, changed)
    launch(folder, run, *SEARCH, f"pilot={changed}")
    assert rows_of(run) == rows_of(found)
    shutil.rmtree(changed / "kept" / f"checkpoint-{STEPS}")  # as after training it anew
    path = changed / "kept" / f"checkpoint-{STEPS // 2}" / WEIGHTS
    save_file({name: 1.1 * value for name, value in load_file(path).items()}, path)
    capsys.readouterr()
    launch(folder, run, *SEARCH, f"pilot={changed}")
    said = capsys.readouterr().out
    assert "progress 0%: found in" in said and "progress 50%: found in" not in said
    before, after = ({row["progress"]: row for row in rows_of(path)} for path in (found, run))
    assert set(after) == {0.0, 0.5} and after[0.0]["variance"] == before[0.0]["variance"]
    assert after[0.5]["variance"] != pytest.approx(before[0.5]["variance"])


@pytest.mark.parametrize(("draws", "doubtful"), [(3, True), (4, False), (64, False)])
def test_a_stage_of_more_noise_than_gradient_is_named(draws, doubtful):
    """The mean of n draws has the variance of one over n, here 2 / n beside a squared gradient of 0.5."""
    error = GradientError(0.0, 2.0, 2.0, 2.0, 0.5, (0.0, 0.0), (2.0, 2.0), 1.0, (1.0, 1.0))
    assert (f"{draws} draws is more noise" in search.describe_doubt(error, draws)) == doubtful


def test_a_stage_at_which_errors_tell_nothing_apart_is_named():
    few, many = Strategy(Compression(8)), Strategy(Compression(4))
    error = partial(GradientError, 0.0, 1.0, 1.0, reference_norm2=1.0, bias2_interval=(0.0, 0.0))
    sure = {
        few: error(ca_mse=1.0, ca_mse_interval=(0.9, 1.1), gain=2.0, gain_interval=(1.0, 3.0)),
        many: error(ca_mse=2.0, ca_mse_interval=(1.0, 3.0), gain=1.0, gain_interval=(-1.0, 3.0)),
    }
    assert search.describe_tie(sure, "ca_mse") == search.describe_tie(sure, "gain") == ""
    unsure = {
        few: error(ca_mse=1.0, ca_mse_interval=(0.0, 2.0), gain=2.0, gain_interval=(-1.0, 5.0)),
        many: sure[many],
    }
    assert "2 of 2 cannot be told apart here, and the cheapest" in search.describe_tie(unsure, "ca_mse")
    assert "no gain is certain here, and so the most expensive" in search.describe_tie(unsure, "gain")


def test_a_best_strategy_that_the_order_forbids_is_named():
    assert search.describe_order("patch 16", 0.25, 0.25) == ""
    words = "the best here alone is patch {}, but compression may never increase with progress, and "
    assert words.format(8) + "a later stage costs less" in search.describe_order("patch 8", 1.0, 0.25)
    assert words.format(16) + "an earlier stage costs more" in search.describe_order("patch 16", 0.25, 1.0)


@pytest.mark.slow
def test_a_search_says_where_the_order_forbids_the_best(pilot, folder, tmp_path, monkeypatch, capsys):
    """At the start the uncompressed strategy is by far the best, and later all are equal."""

    def measure(parts, checkpoint, progress, cost):
        error = partial(GradientError, 0.0, 1.0, 1.0, reference_norm2=1.0, bias2_interval=(0.0, 0.0), gain=1.0)
        values = {strategy: 100.0 if progress == 0 and strategy != GRID[0] else 1.0 for strategy in cost}
        of = {s: error(ca_mse=v, ca_mse_interval=(v, v), gain_interval=(1.0, 1.0)) for s, v in values.items()}
        return of, DRAWS

    monkeypatch.setattr(search, "measure_errors", measure)
    launch(folder, tmp_path / "run", *SEARCH, f"pilot={pilot}")
    lines = [line for line in capsys.readouterr().out.splitlines() if "of uncompressed)" in line]
    starts = [f"progress {point:.0%}: patch 4, dropout 0 |" for point in POINTS]
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
    assert "best" not in lines[0]
    for line in lines[1:]:
        assert "; 4 of 4 cannot be told apart here, and the cheapest of them counts as best; the best here" in line
        assert "alone is patch 8, dropout 0.5 | target patch 8, dropout 0 (cost 0.2" in line
        assert line.endswith("compression may never increase with progress, and an earlier stage costs more")


def test_the_price_of_a_checkpoint_is_said_before_it(pilot, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search, "estimate_errors", lambda *_: (_ for _ in ()).throw(RecipeError("enough")))
    refused(folder, tmp_path / "run", f"pilot={pilot}")
    config = load_recipe(pilot / "recipe.yaml").encoder_config()
    images = DRAWS * 16
    units = 4 * images + sum(  # one uncompressed gradient beside those of the grid
        images * (3 * forward_cost(config, strategy.online) + forward_cost(config, strategy.target_branch))
        for strategy in GRID
    )
    assert f"measuring {len(GRID)} strategies with {DRAWS} draws for {units:,.0f} units" in capsys.readouterr().out


def test_a_table_that_cannot_be_read_is_named(found, pilot, folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    table = (found / "gradient_error.parquet").read_bytes()
    (run / "gradient_error.parquet").write_bytes(table[: len(table) // 2])
    message = refused(folder, run, f"pilot={pilot}")
    assert "gradient_error.parquet cannot be read. Remove it to measure again" in message


def test_settings_that_differ_from_the_pilots_are_named(found, pilot, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search, "measure_errors", lambda *_: (_ for _ in ()).throw(RecipeError("enough")))
    other = ("objective_config.temperature=0.5", "augmentation=digits", "batch_size=8")
    refused(folder, tmp_path / "run", f"pilot={pilot}", *other)
    said = capsys.readouterr().out
    assert "trained with batch_size=16, and is searched with 8" in said
    assert "trained with augmentation='moco', and is searched with 'digits'" in said
    assert "trained with objective_config={" in said and "'temperature': 0.5" in said
    assert "trained with data" not in said and "seed" not in said and "has not finished" not in said


def test_a_pilot_that_has_not_finished_is_named(pilot, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search, "measure_errors", lambda *_: (_ for _ in ()).throw(RecipeError("enough")))
    interrupted = tmp_path / "pilot"
    shutil.copytree(pilot, interrupted)
    (interrupted / "results.json").unlink()
    shutil.rmtree(interrupted / "kept" / f"checkpoint-{STEPS}")
    refused(folder, tmp_path / "run", f"pilot={interrupted}")
    assert "the pilot has not finished, and this search sees its checkpoints up to 50%" in capsys.readouterr().out


@pytest.mark.slow
def test_all_three_symmetries(pilot, folder, tmp_path):
    symmetries = "search_symmetry=[paper, symmetric, asymmetric]"
    output = launch(folder, tmp_path / "run", *SEARCH, f"pilot={pilot}", symmetries)
    expected = {
        Strategy(Compression(p, r), Compression(*target))
        for p, r in product([4, 8], [0.0, 0.5])
        for target in ((p, 0.0), (p, r), (4, 0.0))
    }
    for progress in POINTS:
        stage = [row for row in rows_of(output) if row["progress"] == progress]
        assert {Strategy.from_dict(row) for row in stage} == expected and len(stage) == len(expected) == 8
        assert sum(row["chosen"] for row in stage) == 1
    schedule = Schedule.parse(str(output / "schedule.yaml"), 4)
    assert set(schedule.strategies) <= expected and (output / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "moco"])
def test_every_objective_can_be_searched(objective, folder, tmp_path, capsys):
    heads = {"simclr": "{projector_hidden_size: 32, projection_size: 16}"}
    own = "{num_prototypes: 64, num_local_crops: 2, local_crop_size: 8}"
    settings = [f"objective={objective}", f"objective_config={heads.get(objective, own)}"]
    pilot = launch(folder, tmp_path / "pilot", *settings, f"keep_points={POINTS}", "eval_points=[]", "budget=1200")
    capsys.readouterr()
    output = launch(folder, tmp_path / "run", *settings, *SEARCH, f"pilot={pilot}")
    page = (output / "report.md").read_text().partition("## Schedule")[2]
    assert ("target" in page) == ("target" in capsys.readouterr().out) == OBJECTIVES[objective].has_target_branch
    rows = rows_of(output)
    points = sorted({row["progress"] for row in rows})
    assert len(points) == 3 and len(rows) == len(GRID) * 3 and sum(row["chosen"] for row in rows) == 3
    assert all(row["variance"] > 0 for row in rows)
    assert Schedule.parse(str(output / "schedule.yaml"), 4).stages[-1].until == 1


def refused(folder: Path, output: Path, *overrides: str) -> str:
    """The message, of one line, with which the search ends."""
    with pytest.raises(SystemExit) as stopped:
        launch(folder, output, *SEARCH, *overrides)
    message = str(stopped.value)
    assert message.startswith(f"{RecipeError.__name__}: ") and "\n" not in message
    return message


def test_a_search_that_cannot_be_done_says_why_in_a_line(pilot, folder, tmp_path):
    assert "task=search needs the output_dir of a pilot run" in refused(folder, tmp_path / "none")
    missing = refused(folder, tmp_path / "missing", f"pilot={tmp_path / 'nothing'}")
    assert f"pilot='{tmp_path / 'nothing'}': no checkpoints" in missing and "keep_points=" in missing
    assert not (tmp_path / "missing").exists()
    (tmp_path / "plain").mkdir()
    assert "train the pilot with keep_points=" in refused(folder, tmp_path / "run", f"pilot={tmp_path / 'plain'}")
    at = f"pilot={pilot}"
    wider = refused(folder, tmp_path / "wider", at, "model_config.intermediate_size=128")
    assert "fc1.weight is (64, 32) there and (128, 32) here" in wider and "checkpoint-0" in wider
    deeper = refused(folder, tmp_path / "deeper", at, "model_config.num_hidden_layers=3")
    assert "encoder.layers.2." in deeper and "missing there" in deeper
    assert "missing here" in refused(folder, tmp_path / "other", at, "model_config.num_hidden_layers=1")
    assert "patch_size 5" in refused(folder, tmp_path / "grid", at, "search_patch_size=[5]")
    simclr = ["objective=simclr", "objective_config={projector_hidden_size: 32, projection_size: 16}"]
    symmetric = refused(folder, tmp_path / "symmetric", at, *simclr, "search_symmetry=[symmetric]")
    assert "search_symmetry=['symmetric']: SimCLR has no target branch; leave it out" in symmetric
    assert not list(tmp_path.glob("*/recipe.yaml"))  # which would refuse the corrected command
    used = (pilot / "recipe.yaml").read_text()
    assert f"output_dir='{pilot}': it holds the recipe.yaml of task=pretrain" in refused(folder, pilot, at)
    assert (pilot / "recipe.yaml").read_text() == used
    assert "the limit is" in refused(folder, tmp_path / "memory", at, "search_memory=1.0e-6")

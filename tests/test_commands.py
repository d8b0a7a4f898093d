"""Every command in README, docs and recipes is parsed (options, files, keys, types, tasks), and README's are run.

A command without a check in COVERS fails, and so does one with an unknown key or option.
"""

import argparse
import importlib
import re
import shutil
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from packaging.requirements import Requirement

import hf_accel.run as entry
from hf_accel import AccelViTConfig, cli
from hf_accel.checkpoints import Start
from hf_accel.recipe import RECIPES, Recipe, load_recipe, overrides_for
from hf_accel.tasks import COMMANDS as COMMANDS_WITHOUT_RECIPE
from hf_accel.tasks import PREVIEWS
from tests.commands import ROOT, Command, all_commands, code_blocks, commands_of_comments, commands_of_markdown
from tests.tiny_runs import image_folder, read

PLACEHOLDERS = {
    "RECIPE": "recipes/moco.yaml",
    "NAME": "cpu",
    "FOLDER": "runs/folder",
    "RUN": "runs/moco",
    "RUN2": "runs/searched",
    "A": "runs/moco/final",
    "X": "runs/moco/final",
    "F": "vit",
    "S": "0.1",
    "B1": "50e9",
    "B2": "25e9",
}
"""What a reader puts in the place of words in capitals."""

NEEDED = {
    "search": ["pilot=runs/moco", "output_dir=runs/search"],
    "evaluate": ["checkpoint=runs/moco/final", "output_dir=runs/evaluated"],
    "export": ["checkpoint=runs/moco/final", "output_dir=runs/exported"],
    "card": ["checkpoint=runs/moco/final"],
}
"""Overrides that a shorthand such as `task=search search_draws=64` leaves to the reader."""

COMMANDS = all_commands()


@pytest.fixture(autouse=True)
def released(monkeypatch, tmp_path_factory):
    """What `init_from` names is on the Hub, as a DINOv2. What `continue_from` names is finished."""
    checkpoint = tmp_path_factory.mktemp("run") / "checkpoint-1"
    AccelViTConfig().save_pretrained(checkpoint)
    monkeypatch.setattr("hf_accel.run_folder.find_end", lambda run: checkpoint)
    config = AccelViTConfig(patch_size=14, init_from={"name": "released", "is_on_hub": True, "license": None})
    monkeypatch.setattr("hf_accel.checkpoints.read_start", lambda *_, **__: Start(config, {}, ""))


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A copy of the project's folder, as far as commands name it, in which runs write nothing into the project."""
    for name in ("recipes", "accelerate_configs", "benchmarks", "docs", "hf_accel"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "recipe.yaml").symlink_to(ROOT / "recipes" / "moco.yaml")  # what `hf-accel init` writes
    monkeypatch.chdir(tmp_path)
    return tmp_path


def filled(word: str) -> str:
    """A word of a command without the brackets of what is optional, with its placeholders filled."""
    word = re.sub(r"^\[(\w+=.*)\]$", r"\1", word)
    return re.sub(r"(?<![\w.-])[A-Z][A-Z0-9]*(?![\w-])", lambda found: PLACEHOLDERS.get(found[0], found[0]), word)


def given(command: Command) -> list[str]:
    """The words of a command, filled in; a shorthand `task=...` becomes the whole command."""
    words = [filled(word) for word in command.words]
    if not words[0].startswith("task="):
        return words
    task = words[0].removeprefix("task=")
    keys = {word.partition("=")[0] for word in words}
    needed = [override for override in NEEDED.get(task, []) if override.partition("=")[0] not in keys]
    return ["python", "hf_accel/run.py", "recipes/moco.yaml", *words, *needed]


def shipped(name: str) -> str:
    """The path of a recipe that the `hf-accel` command names."""
    return name if name.endswith(".yaml") else f"recipes/{name}.yaml"


def recipe_of(words: list[str]) -> tuple[str, list[str]]:
    """Recipe and overrides of a launch; the options of the launcher are parsed, and its files exist."""
    if words[0] == "hf-accel":
        options = argparse.ArgumentParser(add_help=False, exit_on_error=False)
        options.add_argument("--config_file", type=Path)
        options.add_argument("--num_processes", type=int)
        options.add_argument("--help", action="store_true")
        parsed, rest = options.parse_known_args(words[2:])
        assert parsed.config_file is None or parsed.config_file.is_file(), f"no file {parsed.config_file}"
        if parsed.help:
            return "--help", []
        named = bool(rest) and "=" not in rest[0]
        task = "pretrain" if words[1] in PREVIEWS else words[1]
        return (shipped(rest[0]) if named else "recipes/moco.yaml"), [f"task={task}", *rest[named:]]
    if words[0] == "accelerate":
        assert words[1] == "launch", f"accelerate {words[1]}"
        launched = launch_command_parser().parse_args(words[2:])
        config = launched.config_file
        assert config is None or Path(config).is_file(), f"no file {config}"
        words = ["python", launched.training_script, *launched.training_script_args]
    assert words[1] == "hf_accel/run.py", words[1]
    return words[2], words[3:]


# What checks a command: it raises, or exits, where something is wrong


def check_launch(words: list[str]) -> Recipe | None:
    recipe, overrides = recipe_of(words)
    if recipe == "--help":
        with pytest.raises(SystemExit) as ended:
            entry.main(["--help"])
        assert ended.value.code == 0
        return None
    schedule = next((word.partition("=")[2] for word in overrides if word.startswith("schedule=runs/")), None)
    if schedule:  # what an earlier command writes
        Path(schedule).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "recipes/schedules/moco_digits_gain.yaml", schedule)
    return load_recipe(recipe, overrides)


class Parsed(Exception):
    """A benchmark has parsed its command line."""


def check_python(words: list[str]) -> None:
    if words[1].startswith("docs/"):
        assert Path(words[1]).is_file(), f"no file {words[1]}"
        return
    if words[1] != "-m":
        check_launch(words)
        return
    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            parse = getattr(argparse.ArgumentParser, name)

            def parse_only(*args, parse=parse, **keywords):
                parse(*args, **keywords)
                raise Parsed

            patch.setattr(argparse.ArgumentParser, name, parse_only)
        assert words[2].startswith("benchmarks."), f"no check for {words[2]}"
        with pytest.raises(Parsed):
            importlib.import_module(words[2]).main(words[3:])
    for word in words[3:]:
        assert not word.startswith(("benchmarks/", "recipes/")) or Path(word).is_file(), f"no file {word}"


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(words[1:]) <= set(targets), f"no target {words[1:]} in the Makefile"


def check_pip(words: list[str]) -> None:
    assert words[1] == "install", words[1]
    extras = set(metadata("hf-accel").get_all("Provides-Extra") or [])
    for word in words[2:]:
        if word in ("-e", ".", "--index-url") or word.startswith("https://download.pytorch.org/"):
            continue
        if word.startswith("hf-accel"):
            raise AssertionError(f"{word}: it is installed from a clone, as .[EXTRA]")
        requirement = Requirement(word.replace(".[", "hf-accel[", 1))
        assert requirement.extras <= extras or requirement.name != "hf-accel", f"no extra {word}"


def check_hf_accel(words: list[str]) -> None:
    assert words[1] in (*RECIPES, *PREVIEWS, *COMMANDS_WITHOUT_RECIPE), f"no task {words[1]}"
    if len(words) > 2 and words[1] not in COMMANDS_WITHOUT_RECIPE:
        check_launch(words)


def check_sbatch(words: list[str]) -> None:
    script = next(place for place, word in enumerate(words) if word.endswith(".sh"))
    assert Path(words[script]).is_file(), f"no file {words[script]}"
    load_recipe(words[script + 1], words[script + 2 :])


def check_hf(words: list[str]) -> None:
    program = Path(sys.executable).with_name("hf")
    subprocess.run([program, *words[1:], "--help"], check=True, capture_output=True)


COVERS = {
    "hf": check_hf,
    "accelerate": check_launch,
    "hf-accel": check_hf_accel,
    "sbatch": check_sbatch,
    "python": check_python,
    "make": check_make,
    "pip": check_pip,
}
"""By program."""


def check(command: Command) -> None:
    if command.words[0].startswith("task=") and len(command.words) == 1:  # the name of a task, and no command
        assert command.words[0].removeprefix("task=") in RECIPES, command.text
        return
    words = given(command)
    assert words[0] in COVERS, f"{command.where}: no check for `{command.text}`: add one to COVERS in {__file__}"
    COVERS[words[0]](words)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.where}-{command.text}"[:70])
def test_a_command_can_be_given(command, workplace):
    check(command)


@pytest.mark.parametrize(
    "text",
    [
        "accelerate launch hf_accel/run.py recipes/moco.yaml no_such_key=1",
        "accelerate launch hf_accel/run.py recipes/moco.yaml seed=much",
        "accelerate launch hf_accel/run.py recipes/no_such.yaml",
        "accelerate launch --no_such_option 1 hf_accel/run.py recipes/moco.yaml",
        "accelerate launch --config_file accelerate_configs/no_such.yaml hf_accel/run.py recipes/moco.yaml",
        "accelerate launch hf_accel/walk.py recipes/moco.yaml",
        "python hf_accel/run.py recipes/moco.yaml evaluations=[knn]",
        "task=evaluate checkpoint=A evaluations=[knm]",
        "task=export checkpoint=X export_format=G",
        "task=evaluation",
        "python -m benchmarks.cost --no-such-option 1",
        "python -m benchmarks.schedules benchmarks/no_such.yaml",
        "python -m benchmarks.no_such",
        "make coffee",
        "pip install -e '.[no_such]'",
        "pip install 'hf-accel[onnx]'",
        "hf-accel pretrain no_such",
        "hf-accel pretrain moco --config_file accelerate_configs/no_such.yaml",
        "hf-accel train moco",
        "sbatch accelerate_configs/no_such.sh recipes/moco.yaml",
        "docker run hf_accel",
    ],
)
def test_a_wrong_command_is_found(text, workplace, capsys):
    found = list(commands_of_markdown("README.md", f"Launch `{text}`, or\n\n```\n{text}\n```\n"))
    assert [command.text for command in found] == [text, text]
    with pytest.raises((AssertionError, ValueError, SystemExit, ImportError, pytest.fail.Exception)):
        check(found[0])


def test_commands_are_found_wherever_they_stand():
    text = (
        "Do `make test` and\n`OMP_NUM_THREADS=1 python hf_accel/run.py\nRECIPE`, "
        "not `make`, `accelerate launch` or `seed=1`.\n\n"
        "```\nmake lint  # both\n\n# a comment\nunknown \\\n  command\n```\n\n"
        "```bash\n$ pip install x\n```\n\n```python\npip = 1\n```\n\n"
        "    python -m a\n    x = y\n\nText\n    hf auth\n"
    )
    assert [command.text for command in commands_of_markdown("x", text)] == [
        "make lint  # both",
        "unknown command",
        "pip install x",
        "python -m a",
        "make test",
        "OMP_NUM_THREADS=1 python hf_accel/run.py RECIPE",
    ]
    assert Command("x", "A=1 B_C=2 make lint # both").words == ["make", "lint"]
    header = "# A recipe, as\n#   accelerate launch a \\\n#     b=1\n# says\n\n# make lint\nkey: 1\n"
    assert [command.text for command in commands_of_comments("x", header)] == ["accelerate launch a b=1"]


def test_no_launch_in_the_documents_is_overlooked():
    for path in [ROOT / "README.md", ROOT / "benchmarks/README.md", *(ROOT / "docs").glob("*.md")]:
        found = [command for command in COMMANDS if command.where == path.relative_to(ROOT).as_posix()]
        text = path.read_text(encoding="utf-8")
        for words in ("hf_accel/run.py", "python -m benchmarks."):
            assert text.count(words) == sum(command.text.count(words) for command in found), (path, words)


def test_every_recipe_says_how_it_is_launched():
    launched = {command.where for command in COMMANDS}
    recipes = [path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "schedules"]
    assert recipes and {path.relative_to(ROOT).as_posix() for path in recipes} <= launched
    for command in COMMANDS:
        if command.where.startswith("recipes/"):
            assert command.where in command.words, f"{command.where} tells how to launch another one"


@pytest.mark.parametrize("page", ["README.md", "docs/recipes.md", "docs/schedules.md"])
def test_yaml_blocks_are_recipes(page, tmp_path):
    blocks = code_blocks((ROOT / page).read_text(encoding="utf-8"), "yaml")
    assert blocks
    for block in blocks:
        (tmp_path / "recipe.yaml").write_text(block)
        budget = [] if "budget:" in block else ["budget=1000"]
        assert load_recipe(tmp_path / "recipe.yaml", ["image_size=28", "patch_size=4", *budget]).schedule


TOY = [
    *("model_config.hidden_size=16", "model_config.num_hidden_layers=1", "model_config.num_attention_heads=2"),
    *("model_config.intermediate_size=32", "batch_size=32", "budget=1500", "warmup=0.2", "logging_steps=1"),
    *("eval_points=[0.0,1.0]", "keep_points=[0.0,1.0]", "report_to=[]", "knn_k=3", "mixed_precision=no"),
    *("search_draws=4", "search_token_dropout=[0.0,0.5]", "search_patch_size=[4,7]"),
    *("linear_config.epochs=2", "finetune_config.epochs=1", "finetune_config.batch_size=40"),
]


def launches_of_readme() -> list[list[str]]:
    """[task, recipe, *overrides] of the recipes that README launches, in its order, after the quickstart."""
    commands = [given(command) for command in COMMANDS if command.where == "README.md" and len(command.words) > 2]
    launches = [words for words in commands if words[0] in ("hf-accel", "accelerate")]
    runs = [recipe_of(words) for words in launches if words[1] not in COMMANDS_WITHOUT_RECIPE]
    started = [[overrides[0].removeprefix("task="), recipe, *overrides[1:]] for recipe, overrides in runs]
    return [["pretrain", "recipes/simclr.yaml"], *started]


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")
def test_what_readme_launches_runs_at_toy_size(workplace, capsys):
    """Its code for finished encoders runs afterwards, in the same folder."""
    images = image_folder(workplace / "images", side=lambda _: 28)
    launches = launches_of_readme()
    assert len(launches) >= 7
    for task, recipe, *overrides in launches:
        toy = [] if task == "export" else overrides_for(task, [*TOY, f"data={images}"])
        cli.main([task, recipe, *overrides, *toy])
    for path in ("simclr/final", "photos/final", "search/schedule.yaml", "searched/final", "exported/vit/README.md"):
        assert (workplace / "runs" / path).exists(), path
    evaluations = read(workplace / "runs/evaluated/results.json")["evaluations"]
    assert {entry["evaluation"] for entry in evaluations} == {"knn", "linear", "logistic", "finetune"}
    assert "finetune" in capsys.readouterr().out
    code = code_blocks((ROOT / "README.md").read_text(encoding="utf-8"), "python")[-1]
    found: dict = {}
    exec(code, found)
    assert found["features"].shape == (1, 16)


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")
def test_own_images_page_leads_from_a_folder_to_a_classifier(tmp_path, monkeypatch, capsys):
    """Its commands and its Python up to released weights, in their order, on few images with a broken one."""
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "photos", labels=False, count=40, side=lambda _: 32)
    image_folder(tmp_path / "labelled", count=30, side=lambda _: 32)
    shutil.copy("photos/train000.png", "photos/holiday.jpg")
    Path("photos/broken.jpg").write_bytes(b"")
    rows = [f"train{number:03}.png,{'abc'[number % 3]}" for number in range(12)]
    Path("labels.csv").write_text("\n".join(["path,label", *rows]))
    page = (ROOT / "docs/own_images.md").read_text(encoding="utf-8").partition("## Continue from released weights")[0]
    toy = {"pretrain": ["budget=2 epochs"], "evaluate": ["finetune_config.epochs=1", "finetune_config.batch_size=30"]}
    programs = [command.words[1:] for command in commands_of_markdown("page", page) if command.words[0] == "hf-accel"]
    for task, *words in programs:
        cli.main([task, *words, *toy.get(task, [])])
    assert [task for task, *_ in programs] == ["init", "views", "pretrain", "explore", "embed", "evaluate"]
    for name in ("views.png", "explore.html", "final/config.json"):
        assert (tmp_path / "runs/photos" / name).exists(), name
    (tuned,) = Path("runs/classified").glob("finetuned-*")
    assert f"the classifier is in {tuned}" in capsys.readouterr().out
    found: dict = {}
    for block in code_blocks(page, "python"):
        exec(block.replace("runs/classified/finetuned-...", str(tuned)), found)
    predicted = Path("predicted.csv").read_text().splitlines()
    assert len(predicted) == 1 + 40 + 30 + 1 and predicted[0] == "path,label"  # with the header, and without broken.jpg

"""The documentation: its links, paths, tables, code and figures agree with the rest of the repository."""

import ast
import dataclasses
import doctest
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import hf_accel
from hf_accel.recipe import RECIPES
from hf_accel.recipe.checks import configured_classes
from hf_accel.training.config import INSTEAD
from tests.commands import ROOT, code_blocks
from tests.tiny_runs import image_folder
from tests.training.test_front_door import SIZES, Tensors

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", *ROOT.glob("docs/**/*.md")]
NOTEBOOKS = {path.stem: path for path in (ROOT / "notebooks").glob("*.ipynb")}

PATHS = re.compile(r"`((?:recipes|accelerate_configs|benchmarks|docs|hf_accel|notebooks|tests)/[\w./-]+)`")
NOT_THERE = {
    "docs/results/PLAN/",
    "recipes/NAME.yaml",
    "hf_accel/objectives/byol.py",
    "recipes/byol.yaml",
    "tests/objectives/test_byol.py",
}
"""Paths that a page asks its reader to make."""


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def load_script(path: Path):
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "github.com/../" not in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert 'href="../CONTRIBUTING' not in (tmp_path / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_and_paths_of_a_page_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = page if not path else page.parent / path
        assert file.exists(), f"{page_name(page)}: no file {target}"
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), f"{page_name(page)}: no {target}"
    for path in PATHS.findall(text):
        assert path in NOT_THERE or (ROOT / path).exists(), f"{page_name(page)}: no file {path}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_imports_in_python_examples_exist(page):
    for block in code_blocks(page.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("hf_accel"):
                module = importlib.import_module(str(node.module))
                for name in node.names:
                    assert hasattr(module, name.name), f"{page_name(page)}: {node.module} has no {name.name}"


def test_readme_is_short_and_shows_a_picture_and_the_install_line_first():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 150
    first_screen = "\n".join(lines[:20])
    assert re.search(r"!\[[^\]]{20,}\]\(.*\.png\)", first_screen) and "pip install" in first_screen


def test_key_tables_agree_with_the_code():
    """After a change of a key run `python docs/key_tables.py`."""
    for path, text in load_script(ROOT / "docs/key_tables.py").render_pages().items():
        assert path.read_text(encoding="utf-8") == text, test_key_tables_agree_with_the_code.__doc__


def test_every_recipe_key_and_setting_is_in_the_tables():
    page = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    described = set(re.findall(r"`(\w+)`", "\n".join(line for line in page.splitlines() if line.startswith("| `"))))
    settings = {setting for read in configured_classes().values() for setting in read().settings}
    assert {key for kind in RECIPES.values() for key in kind.types()} | settings <= described


def test_figures_of_schedules_show_the_rows_of_the_tables():
    figures = json.loads((ROOT / "docs/results/schedules.json").read_text(encoding="utf-8"))["figures"]
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    for name, figure in figures.items():
        before, _, _ = page.partition(f"(results/{name}.png)")
        table = before[before.rindex("| schedule |") :]
        for row, values in figure["rows"].items():
            seeds = f"| {' '.join(map(str, values['seeds']))} |" + f" **{values['mean']}** |" * (
                len(values["seeds"]) > 1
            )
            assert row == "random encoder" or any(
                line.endswith(seeds) or seeds in line for line in table.splitlines()
            ), row
        assert "uncompressed" in figure["rows"] and (ROOT / f"docs/results/{name}.png").exists()


def notebook_code(name: str) -> str:
    cells = json.loads(NOTEBOOKS[name].read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


PUBLIC = [name for name in hf_accel.__all__ if name not in ("PRESETS", "AccelViTPreTrainedModel")]
TRAINING = ("PretrainTrainer", "estimate_gradient_errors")
"""What has an example that takes images and time."""


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example_that_is_true(name):
    text = str(getattr(hf_accel, name).__doc__)
    assert "\n    Example:\n        >>> " in text
    names = {name: getattr(hf_accel, name) for name in hf_accel.__all__}
    names |= {"torch": torch, "set_seed": transformers.set_seed}
    test = doctest.DocTestParser().get_doctest(text, names, name, None, None)
    if name not in TRAINING:
        assert doctest.DocTestRunner(verbose=False).run(test).failed == 0


MAKES_OBJECTIVE = re.compile(r"(?<!class )\b\w+ForPreTraining(?:\.from_encoder)?\(")  # not where one is defined


def scripts_of_objectives() -> dict[str, str]:
    """Every printed piece of Python that makes an objective."""
    pieces = {name: notebook_code(name) for name in NOTEBOOKS}
    for page in PAGES:
        blocks = code_blocks(page.read_text(encoding="utf-8"), "python")
        pieces |= {f"{page_name(page)} {number}": block for number, block in enumerate(blocks)}
    for name in PUBLIC:
        examples = doctest.DocTestParser().get_examples(str(getattr(hf_accel, name).__doc__))
        pieces[name] = "".join(example.source for example in examples)
    return {where: text for where, text in pieces.items() if MAKES_OBJECTIVE.search(text)}


def test_printed_scripts_seed_the_first_weights():
    scripts = scripts_of_objectives()
    assert {*NOTEBOOKS, "PretrainTrainer", "MoCoForPreTraining"} <= scripts.keys() and len(scripts) >= 8
    for where, text in scripts.items():
        assert "set_seed(0)" in MAKES_OBJECTIVE.split(text)[0], where


def test_python_page_names_every_default_that_differs():
    ours = {field.name: field for field in dataclasses.fields(hf_accel.PretrainConfig)}
    others = [field for field in dataclasses.fields(transformers.TrainingArguments) if field.name in ours]
    text = (ROOT / "docs/python.md").read_text(encoding="utf-8").partition("have other defaults here")[2]
    differ = [field.name for field in others if ours[field.name].default != field.default and field.name not in INSTEAD]
    assert "report_to" in differ and not [name for name in differ if f"`{name}" not in text.partition("\n\n")[0]]


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache_and_threads")
def test_the_search_of_the_python_page_runs_at_toy_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos = Tensors()
    run: dict[str, Any] = {"batch_size": 16, "report_to": "none", "eval_points": [], "keep_points": [0.0, 1.0]}
    transformers.set_seed(0)
    model = hf_accel.MoCoForPreTraining(hf_accel.vit_tiny(**SIZES), projector_hidden_size=16)
    config = hf_accel.PretrainConfig("runs/pilot", budget="1 epoch", **run)
    hf_accel.PretrainTrainer(model, config, train_dataset=photos).train()
    blocks = code_blocks((ROOT / "docs/python.md").read_text(encoding="utf-8"), "python")
    (code,) = (block for block in blocks if "choose_strategies" in block)
    found: dict[str, Any] = {"photos": photos}
    for text, replacement in {"draws=16": "draws=3", "batch_size=256": "batch_size=16"}.items():
        assert code.count(text) == 1, text
        code = code.replace(text, replacement)
    exec(code, found)
    assert found["points"] == [0.0, pytest.approx(1, abs=0.05)]  # 16 steps of unequal cost leave a rest
    for name in ("schedule", "by_own_criterion"):
        assert isinstance(found[name], hf_accel.Schedule) and found[name].stages[-1].until == 1


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_committed_without_outputs(name):
    cells = json.loads(NOTEBOOKS[name].read_text(encoding="utf-8"))["cells"]
    assert cells and all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)


def run_notebook(name: str, toy: dict[str, str]) -> dict:
    """Run the code of a notebook with other sizes. Returns the names that it has defined."""
    code, found = notebook_code(name), {}
    for text, replacement in toy.items():
        assert code.count(text) == 1, text
        code = code.replace(text, replacement)
    exec(code, found)
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache_and_threads")
def test_the_quickstart_notebook_runs_at_toy_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run_notebook("quickstart", {'= 2000, "4 epochs", 128': '= 200, "2 epochs", 32'})
    assert found["features"].shape == (1, 128) and found["trainer"].state.global_step > 0
    assert (tmp_path / "runs/notebook/results.json").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.pin_memory:UserWarning")  # by transformers' Trainer on a CPU
@pytest.mark.usefixtures("own_cache_and_threads")
def test_the_notebook_of_own_images_runs_at_toy_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "photos", labels=False, count=60)
    image_folder(tmp_path / "labelled", count=30)
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.set_seed(0)
    config = hf_accel.vit_tiny(image_size=16, patch_size=4, pooling="mean", **tiny)
    hf_accel.AccelViTModel(config).save_pretrained("released")
    toy = {
        '"facebook/dinov2-small"': '"released"',
        '= 224, "20 epochs", 128, 30': '= 16, "2 epochs", 16, 1',
        '{"temperature": 0.2}': '{"projector_hidden_size": 32, "projection_size": 16}',
    }
    found = run_notebook("own_images", toy)
    assert found["features"].shape == (60, 32) and found["accuracy"] > 0.5
    assert {"label", "score"} <= found["classify"](found["photos"][0]["image"])[0].keys()
    assert (tmp_path / "runs/photos/best").exists() and (tmp_path / "runs/classifier/config.json").exists()

"""`task=explore`: what the page shows of an encoder, with labels and without, and what it refuses."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from hf_accel import cli
from hf_accel.data import load_sources
from hf_accel.data.loader import image_processor
from hf_accel.evaluation import load_processor, processed_loader
from hf_accel.models import AccelViTConfig, AccelViTModel
from hf_accel.recipe import ExploreRecipe, RecipeError, load_recipe
from hf_accel.report import exploration, fonts
from hf_accel.report.exploration import Explored, cut_name, draw_map, list_pairs, measure_agreement
from hf_accel.run_folder import RunFolder
from hf_accel.tasks import explore as task
from hf_accel.training.finish import describe_pictures
from tests.tiny_runs import image_folder, launch

pytestmark = pytest.mark.usefixtures("own_cache_and_threads")

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(scope="module")
def checkpoints(folder, tmp_path_factory) -> dict[str, Path]:
    """An encoder with a CLS token and a choice of patch sizes, and a ViT."""
    torch.manual_seed(0)
    encoder = AccelViTModel(AccelViTConfig(**SIZES, image_size=16, patch_size=4))
    vit = transformers.ViTModel(transformers.ViTConfig(**SIZES, image_size=16, patch_size=8))
    source = load_sources(str(folder))[0]
    paths = {"accel_vit": tmp_path_factory.mktemp("encoder"), "vit": tmp_path_factory.mktemp("vit")}
    for model, path in zip((encoder, vit), paths.values(), strict=True):
        model.save_pretrained(path)
        image_processor(source, 16).save_pretrained(path)
    return paths


def recipe_of(checkpoint: Path, data: Path | str, output: Path, *words: str) -> Any:
    words = (f"checkpoint={checkpoint}", f"data={data}", f"output_dir={output}", "num_workers=0", *words)
    return load_recipe(None, ["task=explore", *words])


@pytest.fixture
def quick_map(monkeypatch):
    """The map of the tests that are not about it: t-SNE takes longer than the rest of a page."""
    fit = "sklearn.manifold.TSNE.fit_transform"
    monkeypatch.setattr(fit, lambda self, features: features[:, :2])


def headings(output: Path) -> list[str]:
    text = (output / "explore.md").read_text()
    figures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(figures) == len(set(figures)) and all((output / figure).stat().st_size for figure in figures)
    assert (output / "explore.html").read_text().count('src="data:image/png;base64,') == len(figures)
    return re.findall(r"^## (.*)$", text, re.MULTILINE)


SECTIONS = ["Nearest neighbours", "Patch features", "Attention of the CLS token", "Map", "Near-duplicates", "Outliers"]


@pytest.mark.slow
def test_the_page_shows_everything_of_an_encoder(folder, checkpoints, tmp_path, capsys):
    output = tmp_path / "out"
    words = [f"checkpoint={checkpoints['accel_vit']}", f"data={folder}", f"output_dir={output}", "num_workers=0"]
    cli.main(["explore", *words])
    assert headings(output) == SECTIONS
    text = (output / "explore.md").read_text()
    assert "Images: 120 of" in text and "same class as the image nearest" in text and "| train/" in text
    assert f"has learnt: {output / 'explore.html'}" in capsys.readouterr().out


@pytest.mark.slow
def test_images_without_labels_get_clusters_and_no_classes(checkpoints, tmp_path, quick_map):
    data = image_folder(tmp_path / "photos", labels=False, count=30)
    task.explore(recipe_of(checkpoints["vit"], data, tmp_path / "out"))
    assert headings(tmp_path / "out") == SECTIONS
    text = (tmp_path / "out/explore.md").read_text()
    assert "clusters that k-means finds" in text and "same class" not in text and "patches of 8 px" not in text


def test_patch_sizes_of_the_recipe_are_looked_at(folder, checkpoints, tmp_path, quick_map, monkeypatch):
    found: list[Any] = []
    monkeypatch.setattr(task, "draw_patches", lambda pictures, colors, output: found.append(colors) or None)
    monkeypatch.setattr(task, "draw_attention", lambda *_: None)
    monkeypatch.setattr(task, "write_page", lambda *_: None)
    for name in ("neighbours", "map", "duplicates", "outliers"):
        monkeypatch.setattr(task, f"draw_{name}", lambda *_: None)
    monkeypatch.setattr(task, "describe", lambda *_: "")
    task.explore(recipe_of(checkpoints["accel_vit"], folder, tmp_path / "out"))
    task.explore(recipe_of(checkpoints["accel_vit"], folder, tmp_path / "out", "eval_patch_sizes=[8,2]"))
    shapes = [{label: image.shape[1:3] for label, image in colors.items()} for colors in found]
    assert shapes[0] == {"patches of 4 px": (4, 4), "patches of 8 px": (2, 2)}
    assert shapes[1] == {"patches of 8 px": (2, 2), "patches of 2 px": (8, 8)}
    with pytest.raises(RecipeError, match=r"eval_patch_sizes=\[8\]: the encoder has one patch size"):
        task.explore(recipe_of(checkpoints["vit"], folder, tmp_path / "out", "eval_patch_sizes=[8]"))


@pytest.fixture
def latin_fonts(monkeypatch):
    """No font of the machine has more than those of matplotlib."""
    monkeypatch.setattr(fonts, "list_fonts", dict)
    monkeypatch.setattr(fonts, "_families", {})


def test_classes_that_no_font_can_write_are_numbered(
    checkpoints, tmp_path, quick_map, latin_fonts, monkeypatch, capsys
):
    data = image_folder(tmp_path / "photos", count=30) / "train"
    for old, new in (("a", "猫"), ("b", "собака"), ("c", "_犬_")):
        (data / old).rename(data / new)
    monkeypatch.setattr(task, "look_closely", lambda *_: [])
    drawn: list[str] = []
    monkeypatch.setattr(exploration, "plot_tiles", lambda rows, *_, **__: drawn.extend(t.text for r in rows for t in r))
    monkeypatch.setattr(exploration, "plot_feature_map", lambda points, groups, names, *_: drawn.extend(names))
    monkeypatch.setattr(task, "write_page", lambda text, path, title: path.write_text(text))
    task.explore(recipe_of(checkpoints["vit"], data, tmp_path / "out"))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("No font")]
    assert len(said) == 1 and "the page names them. Install fonts" in said[0]
    text = (tmp_path / "out" / "explore.md").read_text()
    assert r"so the figures number these classes: class 0 is \_犬\_, class 2 is 猫." in text and r"| \_犬\_ " in text
    shown = {line for text in drawn for line in text.splitlines() if line[:1].isalpha() and "pair" not in line}
    assert shown == {"class 0", "собака", "class 2"}


def test_classes_that_a_font_can_write_keep_their_names(monkeypatch):
    monkeypatch.setattr(fonts, "_families", {})
    monkeypatch.setattr(fonts, "list_fonts", lambda: {"Chinese": ""})
    monkeypatch.setattr(fonts, "_select", lambda characters, path: characters)
    images = explored(torch.randn(12, 4), [1] + [-1] * 11)
    images.class_names = ["a", "猫"]
    assert images.figure_names == ["a", "猫"] and images.describe_numbers() == ""
    assert images.caption(0) == "猫" and images.caption(1) == ""
    monkeypatch.setattr(fonts, "_families", {})
    monkeypatch.setattr(fonts, "list_fonts", dict)
    absent = explored(torch.randn(12, 4), [0] * 12)
    absent.class_names = images.class_names
    assert absent.figure_names == ["a", "class 1"] and absent.describe_numbers() == ""  # No image is of that class.


def test_a_name_is_cut_to_the_room_beneath_an_image():
    assert cut_name("tench, Tinca tinca") == "tench" and cut_name("a" * 17) == "a" * 17
    assert cut_name("a" * 18) == "a" * 16 + "…" and cut_name("") == ""
    assert cut_name("猫" * 8) == "猫" * 8 and cut_name("猫" * 9) == "猫" * 8 + "…"


def test_unreadable_images_are_left_out(folder, checkpoints, tmp_path):
    data = tmp_path / "photos"
    shutil.copytree(folder / "train", data)
    broken = data / "a/train003.png"
    broken.write_bytes(broken.read_bytes()[:60])
    recipe = recipe_of(checkpoints["vit"], data, tmp_path / "out")
    source = task.choose_images(recipe)
    for _ in processed_loader(source, load_processor(str(checkpoints["vit"])), 50):
        pass
    features = torch.arange(len(source))[:, None].float()
    images = task.keep_readable(recipe, source, features, torch.zeros(len(source)).long() - 1)
    (gone,) = source.bad
    kept = [number for number in range(120) if number != gone]
    assert len(source) == 120 and images.features[:, 0].tolist() == kept
    assert broken.name not in {Path(images.name(row)).name for row in range(119)}


def test_of_a_large_set_so_many_are_drawn_by_seed(folder, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(task, "MOST", 20)
    recipes = [recipe_of(checkpoints["vit"], folder, tmp_path / "out", f"seed={seed}") for seed in (0, 0, 1)]
    rows = [source.rows.tolist() for source in map(task.choose_images, recipes) if source.rows is not None]
    assert rows[0] == rows[1] != rows[2] and all(len(set(drawn)) == 20 for drawn in rows)
    source = task.choose_images(recipes[0])
    assert source.labels is not None and "abc"[int(source.labels[3])] == Path(source.open(3).info["name"]).parent.name


def test_what_cannot_be_explored_is_refused(checkpoints, tmp_path, monkeypatch):
    data = image_folder(tmp_path / "photos", labels=False, count=4)
    with pytest.raises(RecipeError, match="it has 4 readable images, and a page needs 10"):
        task.explore(recipe_of(checkpoints["vit"], data, tmp_path / "out"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="task=explore runs in one process"):
        task.explore(recipe_of(checkpoints["vit"], data, tmp_path / "out"))


def test_every_key_of_exploring_is_tested():
    images = {"data", "data_config", "train_split", "image_column", "label_column", "streaming"}  # of `load_images`
    assert ExploreRecipe.types().keys() == {
        *images,
        *("checkpoint", "eval_patch_sizes", "image_size", "num_workers", "output_dir", "seed"),
    }


@pytest.mark.slow
@pytest.mark.usefixtures("blank_figures")
def test_a_finished_run_names_both_pictures(folder, tmp_path, capsys, quick_map):
    output = launch(folder, tmp_path / "a run", "model_config.pooling=mean")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("See ")]
    assert [line.partition(":")[0] for line in said] == ["See its views", "See what it has learnt"]
    for line in said:
        name, *words = shlex.split(line.partition(": ")[2])
        assert name == "hf-accel"
        cli.main(words)
    assert headings(output) == [name for name in SECTIONS if "CLS" not in name]
    assert "[views.png](views.png)" in (output / "explore.md").read_text()
    paths = [line.partition(": ")[2] for line in describe_pictures(RunFolder(output), by_recipe=True)]
    assert paths == [str(output / "views.png"), str(output / "explore.html")]


def test_after_a_run_in_python_the_images_are_to_be_named(tmp_path):
    lines = describe_pictures(RunFolder(tmp_path), by_recipe=False)
    command = f"hf-accel explore checkpoint={tmp_path}/final data=FOLDER output_dir={tmp_path}"
    assert lines == [f"See what it has learnt: {command}"]


# What the sections say


def explored(features: torch.Tensor, labels: list[int] | None = None) -> Explored:
    known = None if labels is None else torch.tensor(labels)
    names = [f"class {number}" for number in range(20)]
    return Explored(features, known, names, lambda row: None, lambda row: f"{row}.png", 0)  # pyright: ignore


def test_a_planted_duplicate_and_an_outlier_come_first():
    torch.manual_seed(0)
    features = torch.randn(60, 1) + 0.1 * torch.randn(60, 8) + torch.eye(8)[0] * 5
    features[41] = features[7]
    features[20] = -20 * torch.eye(8)[3]
    images = explored(features)
    assert list_pairs(*images.nearest)[0] == (pytest.approx(1.0, abs=1e-5), 7, 41)
    pairs = [pair[1:] for pair in list_pairs(*images.nearest)]
    assert len(set(pairs)) == len(pairs) and all(one < other for one, other in pairs)
    assert images.nearest[0][:, : exploration.COMPARED].mean(1).argmin() == 20


def test_agreement_counts_labelled_images_only():
    features = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [-1, -1.0], [-1, -1.1]])
    assert measure_agreement(explored(features, [0, 0, 1, 1, 0, 1]))[0] == pytest.approx(4 / 6)
    share, chance = measure_agreement(explored(features, [0, 0, 1, 1, -1, -1]))
    assert (share, chance) == (1.0, 0.5)


def test_a_single_label_leaves_out_the_agreement(tmp_path, monkeypatch):
    monkeypatch.setattr(exploration, "plot_tiles", lambda *words, **options: None)
    monkeypatch.setattr(Explored, "image", lambda self, row: np.zeros((4, 4, 3)))
    text = exploration.draw_neighbours(explored(torch.randn(12, 4), [1] + [-1] * 11), tmp_path).text
    assert "Green frames" in text and "at random it would be" not in text


def test_outliers_count_the_neighbours_that_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(exploration, "plot_tiles", lambda *words, **options: None)
    monkeypatch.setattr(Explored, "image", lambda self, row: np.zeros((4, 4, 3)))
    assert "to the 9 images nearest" in exploration.draw_outliers(explored(torch.randn(10, 4)), tmp_path).text
    assert "to the 10 images nearest" in exploration.draw_outliers(explored(torch.randn(30, 4)), tmp_path).text


@pytest.mark.parametrize(
    "features, problem",
    [
        (torch.full((20, 4), torch.nan), "hold NaN or infinity"),
        (torch.ones(20, 4) + 1e-8 * torch.randn(20, 4), "all the same"),
    ],
)
def test_features_that_show_nothing_are_refused(folder, features, problem):
    source = load_sources(str(folder), in_memory=False)[0].take(torch.arange(20))
    recipe = recipe_of(Path("gone"), folder, Path("out"))
    with pytest.raises(RecipeError, match=f"checkpoint='gone': .*{problem}"):
        task.keep_readable(recipe, source, features, torch.full((20,), -1))


def test_an_image_without_a_file_is_named_by_its_place():
    source = load_sources("bundled", in_memory=False)[0].take(torch.arange(100, 120))
    recipe = recipe_of(Path("gone"), "bundled", Path("out"))
    images = task.keep_readable(recipe, source, torch.randn(20, 4), torch.full((20,), -1))
    place = int(source.rows[3]) if source.rows is not None else None
    assert images.name(3) == f"image {place}" and place is not None and place >= 100


def test_samples_are_drawn_from_as_many_classes_as_possible():
    labels = [0] * 50 + [1] * 3 + [2] * 2
    images = explored(torch.randn(55, 2), labels)
    drawn = [labels[row] for row in images.draw_samples(6)]
    assert sorted(drawn[:3]) == [0, 1, 2] and sorted(drawn[3:]) == [0, 1, 2]


def test_the_map_names_the_largest_classes(tmp_path, monkeypatch, quick_map):
    seen: list[Any] = []
    monkeypatch.setattr(exploration, "plot_feature_map", lambda *words: seen.append(words))
    labels = [number for number in range(12) for _ in range(number + 2)] + [-1] * 3
    text = draw_map(explored(torch.randn(len(labels), 4), labels), tmp_path).text
    points, groups, names, *_ = seen[0]
    assert names == [f"class {number}" for number in range(2, 12)] and "the 10 largest classes" in text
    order = torch.randperm(len(labels), generator=exploration.generator(0, "map")).sort().values
    expected = [labels[row] - 2 if labels[row] >= 2 else 10 for row in order]
    assert groups.tolist() == expected and points.shape == (len(labels), 2)


def test_the_figures_of_a_page_are_drawn(tmp_path):
    image = np.full((4, 4, 3), 0.5)
    tile = exploration.Tile(image, "0.98\nchurch", "#009E73")
    exploration.plot_tiles([[tile, tile], [tile]], tmp_path / "tiles.png", ["a", "b"], apart=[1])
    points = np.random.default_rng(0).random((12, 2))
    groups = np.arange(12) % 3
    exploration.plot_feature_map(points, groups, ["a", "b"], lambda row: image, tmp_path / "map.png")
    assert (tmp_path / "tiles.png").stat().st_size and (tmp_path / "map.png").stat().st_size

"""`task=embed` through the entry point: what the file holds, how it is resumed, what is refused, and the docs' use."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import ClassLabel, load_dataset
from PIL import Image, ImageOps
from transformers import Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel

import hf_accel.evaluation.embeddings as embeddings
from hf_accel import AccelViTConfig, AccelViTModel, read_image
from hf_accel.data import image_processor, load_sources
from hf_accel.evaluation import extract_features, load_processor, open_encoder, processed_loader
from hf_accel.recipe import EmbedRecipe, load_recipe
from hf_accel.tasks.setup import load_images
from tests.commands import code_blocks
from tests.tiny_runs import RECIPE, SIZE, image_folder, launch

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")

ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "vit"
    torch.manual_seed(0)
    AccelViTModel(AccelViTConfig(**SIZES, intermediate_size=64, image_size=SIZE)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def whole(encoder, folder, tmp_path_factory) -> Path:
    return embed(encoder, folder, tmp_path_factory.mktemp("whole") / "out")


def embed(encoder: Path, data: Path | str, output: Path, *overrides: str) -> Path:
    """The file of one launch."""
    return launch(data, output, "task=embed", f"checkpoint={encoder}", *overrides) / "embeddings.parquet"


def expected_of(encoder: Path, data: Path | str, patch_size: int | None = 4, *overrides: str) -> torch.Tensor:
    """The features as an evaluation takes them, of all images."""
    recipe: Any = load_recipe(None, ["task=embed", f"data={data}", f"checkpoint={encoder}", *overrides])
    source, _ = load_images(recipe)
    model, processor = open_encoder(str(encoder), source, SIZE)
    source.labels = torch.zeros(len(source), dtype=torch.long)
    return extract_features(model, processed_loader(source, processor, 7), "cpu", patch_size)[0]


def stacked(path: Path) -> np.ndarray:
    return np.stack(list(pd.read_parquet(path)["embedding"]))


def test_rows_are_paths_labels_and_features_in_order(whole, encoder, folder):
    table = pd.read_parquet(whole)
    files = sorted((folder / "train").rglob("*.png"))
    assert list(table.columns) == ["path", "label", "embedding"]
    assert table["path"].tolist() == [str(file.relative_to(folder)) for file in files]
    assert ["abc"[label] for label in table["label"]] == [file.parent.name for file in files]
    assert stacked(whole).dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(stacked(whole)), expected_of(encoder, folder), rtol=1e-5, atol=1e-5)
    loaded: Any = load_dataset("parquet", data_files=str(whole))["train"]
    assert loaded.features["label"] == ClassLabel(names=["a", "b", "c"])
    assert (
        not (whole.parent / ".embeddings").exists()
        and b'"num_images": 120' in pq.read_schema(whole).metadata[b"hf_accel"]
    )


def test_the_patch_size_and_precision_of_the_numbers_act(whole, encoder, folder, tmp_path):
    other = embed(encoder, folder, tmp_path / "out", "eval_patch_sizes=[8]", "embedding_dtype=fp16")
    expected = expected_of(encoder, folder, 8)
    assert stacked(other).dtype == np.float16
    assert torch.equal(torch.from_numpy(stacked(other)), expected.half())
    assert np.abs(stacked(other) - stacked(whole)).max() > 0.01


def test_images_without_paths_and_labels_have_an_index(encoder, tmp_path):
    table = pd.read_parquet(embed(encoder, "bundled", tmp_path / "out", "label_column=none"))
    assert list(table.columns) == ["index", "embedding"] and table["index"].tolist() == list(range(5000))


def test_no_image_of_a_folder_is_held_out_or_labelled_by_force(encoder, tmp_path):
    flat = image_folder(tmp_path / "flat", labels=False, count=20)
    table = pd.read_parquet(embed(encoder, flat, tmp_path / "out"))
    assert list(table.columns) == ["path", "embedding"] and len(table) == 20
    classes = tmp_path / "classes"
    image_folder(tmp_path / "split", count=20)
    (tmp_path / "split/train").rename(classes)
    table = pd.read_parquet(embed(encoder, classes, tmp_path / "other"))
    assert len(table) == 20 and set(table["label"]) == {0, 1, 2}


def test_keys_of_the_data_choose_the_images(encoder, folder, tmp_path):
    table = pd.read_parquet(embed(encoder, folder, tmp_path / "a", "train_split=validation[:10]", "label_column=none"))
    assert list(table.columns) == ["path", "embedding"] and len(table) == 10
    assert set(table["path"].str.split("/").str[0]) == {"validation"}


def test_an_unreadable_image_is_left_out_and_no_row_moves(encoder, tmp_path, monkeypatch, caplog):
    data = image_folder(tmp_path / "images", count=30)
    broken = sorted((data / "train").rglob("*.png"))[4]
    names = [str(file.relative_to(data)) for file in sorted((data / "train").rglob("*.png")) if file != broken]
    expected = stacked(embed(encoder, data, tmp_path / "before"))
    broken.write_bytes(b"no image")
    monkeypatch.setattr(embeddings, "PART", 4)  # The first image of the second part is the broken one.
    path = embed(encoder, data, tmp_path / "after")
    assert pd.read_parquet(path)["path"].tolist() == names and broken.name in caplog.text
    np.testing.assert_allclose(stacked(path), np.delete(expected, 4, 0), atol=1e-6)


def test_too_many_unreadable_images_end_it_also_over_launches(encoder, tmp_path, monkeypatch):
    data = image_folder(tmp_path / "images", count=30)
    files = sorted((data / "train").rglob("*.png"))
    monkeypatch.setattr(embeddings, "PART", 4)
    files[1].write_bytes(b"no image")
    interrupt_after(1, monkeypatch)
    with pytest.raises(SystemExit, match="Interrupted"):
        embed(encoder, data, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(embeddings, "PART", 4)
    files[20].write_bytes(b"no image")
    with pytest.raises(SystemExit, match="at least 2 of 30 images cannot be read"):
        embed(encoder, data, tmp_path / "out")
    assert not (tmp_path / "out/embeddings.parquet").exists()


def interrupt_after(parts: int, monkeypatch) -> list[int]:
    """Ctrl-C once so many parts are written; the numbers of the parts."""
    written, write = list[int](), embeddings.EmbeddingTable._write_part

    def writing(self, number, *rest):
        if len(written) == parts:
            raise KeyboardInterrupt
        write(self, number, *rest)
        written.append(number)

    monkeypatch.setattr(embeddings.EmbeddingTable, "_write_part", writing)
    return written


def test_an_interrupted_run_goes_on_and_leaves_no_half_file(whole, encoder, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embeddings, "PART", 50)
    output = tmp_path / "out"
    interrupt_after(2, monkeypatch)
    with pytest.raises(SystemExit, match="Interrupted"):
        embed(encoder, folder, output)
    assert not (output / "embeddings.parquet").exists()
    monkeypatch.undo()
    monkeypatch.setattr(embeddings, "PART", 50)
    written = interrupt_after(9, monkeypatch)
    calls, write = list[int](), pq.ParquetWriter.write_table

    def writing(self, table, **options):
        calls.append(len(table))
        if len(calls) == 3:
            raise KeyboardInterrupt
        write(self, table, **options)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", writing)
    with pytest.raises(SystemExit, match="Interrupted"):  # after the last part, and the first one of the whole file
        embed(encoder, folder, output)
    assert (written, calls) == ([2], [20, 50, 50]) and not (output / "embeddings.parquet").exists()
    assert "Going on after 100 embedded images" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(embeddings, "PART", 50)
    path = embed(encoder, folder, output)
    np.testing.assert_allclose(stacked(path), stacked(whole), atol=1e-6)
    assert pd.read_parquet(path)["path"].tolist() == pd.read_parquet(whole)["path"].tolist()


def test_finished_embeddings_are_kept_and_others_refused(whole, encoder, folder, tmp_path, capsys):
    before = whole.read_bytes()
    embed(encoder, folder, whole.parent)
    assert "These images are embedded in" in capsys.readouterr().out
    for override, problem in (
        ("eval_patch_sizes=[8]", "holds embeddings with patch_size=4, and not 8; choose another output_dir"),
        ("embedding_dtype=fp16", "holds embeddings with embedding_dtype='fp32', and not 'fp16'"),
        ("train_split=validation", "holds embeddings with images='.*train', and not '.*validation'"),
    ):
        with pytest.raises(SystemExit, match=problem):
            embed(encoder, folder, whole.parent, override)
    assert whole.read_bytes() == before


def test_an_unfinished_table_of_other_settings_is_refused(encoder, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "PART", 50)
    interrupt_after(1, monkeypatch)
    with pytest.raises(SystemExit, match="Interrupted"):
        embed(encoder, folder, tmp_path / "out")
    with pytest.raises(SystemExit, match="holds embeddings with patch_size=4, and not 8"):
        embed(encoder, folder, tmp_path / "out", "eval_patch_sizes=[8]")


def test_encoders_of_other_libraries_have_their_own_patch_size_only(encoder, folder, tmp_path):
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**SIZES, image_size=SIZE)).save_pretrained(tmp_path / "dinov2")
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])).save_pretrained(tmp_path / "resnet")
    path = embed(tmp_path / "dinov2", folder, tmp_path / "a", "eval_patch_sizes=[4]")
    torch.testing.assert_close(torch.from_numpy(stacked(path)), expected_of(tmp_path / "dinov2", folder, None))
    for name, problem in (("dinov2", "one patch size, 4"), ("resnet", "no patch size to choose")):
        with pytest.raises(SystemExit, match=rf"eval_patch_sizes=\[8\]: the encoder has {problem}; leave the key out"):
            embed(tmp_path / name, folder, tmp_path / "b", "eval_patch_sizes=[8]")
    with pytest.raises(SystemExit, match=r"embeds at one patch size; name a single one"):
        embed(encoder, folder, tmp_path / "b", "eval_patch_sizes=[4, 8]")
    small, large = (embed(tmp_path / "resnet", folder, tmp_path / str(n), f"image_size={n}") for n in (16, 40))
    assert load_processor(str(tmp_path / "resnet")) is None and np.abs(stacked(small) - stacked(large)).max() > 1e-3


def test_numbers_that_cannot_be_stored_are_refused(folder, tmp_path):
    torch.manual_seed(0)
    model = AccelViTModel(AccelViTConfig(**SIZES, intermediate_size=64, image_size=SIZE))
    for value, dtype, problem in ((1e6, "fp16", "take embedding_dtype=fp32"), (torch.nan, "fp32", "diverged")):
        with torch.no_grad():
            model.layernorm.bias.fill_(value)
        model.save_pretrained(tmp_path / dtype)
        with pytest.raises(SystemExit, match=problem):
            embed(tmp_path / dtype, folder, tmp_path / "out", f"embedding_dtype={dtype}")
    assert not (tmp_path / "out/embeddings.parquet").exists()


def printed_ways_to_open(path: Path) -> dict[str, str]:
    """The expressions of the documentation and the templates of cards, by file."""
    pages = ["docs/getting_started.md", "hf_accel/hub/card.md.jinja", "hf_accel/hub/export_card.md.jinja"]
    found = {}
    for page in pages:
        text = (ROOT / page).read_text(encoding="utf-8")
        (found[page],) = re.findall(r"^image = .*# or (.*Image\.open.*)$", text, re.MULTILINE)
    return {page: way.replace("...", repr(str(path))) for page, way in found.items()}


def test_printed_ways_to_open_images_give_embedded_features(tmp_path):
    torch.manual_seed(0)
    model = AccelViTModel(AccelViTConfig(**SIZES, intermediate_size=64, image_size=SIZE))
    model.save_pretrained(tmp_path / "vit")
    data, pixels = tmp_path / "images", np.random.default_rng(0).integers(0, 256, (20, 16, 4), np.uint8)
    data.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels[..., :3]).save(data / "a turned.jpg", exif=exif)
    Image.fromarray(pixels).save(data / "b clear.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(data / "c deep.png")
    processor = image_processor(load_sources(str(data))[0], SIZE)
    processor.save_pretrained(tmp_path / "vit")
    embedded = stacked(embed(tmp_path / "vit", data, tmp_path / "out"))
    for path, expected in zip(sorted(data.iterdir()), torch.from_numpy(embedded), strict=True):
        ways = printed_ways_to_open(path) if "deep" not in path.name else {}
        images = {page: eval(way, {"Image": Image, "ImageOps": ImageOps}) for page, way in ways.items()}
        for page, image in {**images, "read_image": read_image(path)}.items():
            features = model(**processor(image, return_tensors="pt")).pooler_output[0]
            torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4, msg=f"{page}: {path.name}")


@pytest.mark.slow
def test_two_processes_write_what_one_writes(whole, encoder, folder, tmp_path):
    recipe = tmp_path / "two.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "data": str(folder), "output_dir": str(tmp_path / "two")}))
    script = "import hf_accel.evaluation.embeddings as e, hf_accel.run as r, sys; e.PART = 50; r.main(sys.argv[1:])"
    (tmp_path / "launch.py").write_text(script)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu_2proc.yaml"]
    command += [str(tmp_path / "launch.py"), str(recipe), "task=embed", f"checkpoint={encoder}", "num_workers=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    path = tmp_path / "two/embeddings.parquet"
    assert path.exists() and "processes: 2;" in done.stdout, done.stdout + done.stderr
    assert pd.read_parquet(path)["path"].tolist() == pd.read_parquet(whole)["path"].tolist()
    np.testing.assert_allclose(stacked(path), stacked(whole), atol=1e-6)


def test_the_printed_use_from_scikit_learn_runs(whole, tmp_path, monkeypatch, capsys):
    (code,) = (
        block
        for block in code_blocks((ROOT / "docs/evaluation.md").read_text(encoding="utf-8"), "python")
        if "embeddings.parquet" in block
    )
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/embedded").symlink_to(whole.parent)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert 0.5 < float(capsys.readouterr().out.split()[-1]) <= 1
    assert len([line for line in code.splitlines() if line and not line.startswith(("import", "from"))]) <= 5


def test_every_key_of_embedding_is_tested():
    shared = {"data", "data_config", "streaming", "image_column", "label_column", "num_workers"}
    own = {"output_dir", "checkpoint", "train_split", "eval_patch_sizes", "embedding_dtype", "image_size"}
    assert EmbedRecipe.types().keys() == shared | own

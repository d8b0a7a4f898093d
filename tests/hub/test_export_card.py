"""The README of an export: origin, licence and pooling, and code that runs in a fresh process from anywhere."""

import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoImageProcessor

from hf_accel import AccelViTConfig, AccelViTForImageClassification, AccelViTModel
from hf_accel.evaluation import weights_digest
from hf_accel.hub import Export, export_card, stated_licence
from tests.real_timm import real_timm
from tests.tasks.test_export import MLP, SIZES, export, saved

HIDDEN = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_accel":
            raise ModuleNotFoundError("hf_accel is hidden from this process")
sys.meta_path.insert(0, Refuse())
"""


def encoder(folder: Path, *, classifies: bool = False, processor: bool = True, **fields: Any) -> Path:
    torch.manual_seed(0)
    kind: Any = AccelViTForImageClassification if classifies else AccelViTModel
    return saved(kind(AccelViTConfig(**SIZES, **MLP, **fields)), folder, processor)


def code_of(readme: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    return code


def about(export_format: str = "vit", licence: Any = None, processor: bool = True, **fields: Any) -> Export:
    """An export of the model a/b of the Hub."""
    origin = (export_format, "a/b", "0", "2026-01-01", "vit", licence or {})
    return Export(*origin, AccelViTConfig(**fields), 16, False, processor, 0.0)


def shapes(folders: list[Path], folder: Path) -> list[list[int]]:
    """Run the code of each folder there, in one process without hf_accel, and return the shapes of the features."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    runs = "import json, os, sys\nfor folder, code in json.loads(sys.argv[1]):\n    os.chdir(folder)\n"
    runs += "    found = {}\n    exec(code, found)\n"
    runs += "    print(json.dumps(list(found['features'].shape)))\n"
    codes = [(str(path), code_of(path / "README.md")) for path in folders]
    command = [sys.executable, "-c", HIDDEN + runs, json.dumps(codes)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[") and line.endswith("]")]


@pytest.mark.slow
def test_the_code_runs_without_hf_accel_after_a_move(tmp_path):
    folders, expected = list[Path](), []
    for processor, pooling in product((True, False), ("cls", "mean")):
        source = encoder(tmp_path / f"encoder-{processor}-{pooling}", processor=processor, pooling=pooling)
        for export_format in ("vit", "dinov2", "accel_vit"):
            folder = export(source, tmp_path / f"out-{source.name}", export_format)
            folders.append(folder.relative_to(tmp_path))
            expected.append([1, SIZES["hidden_size"]])
    source = encoder(tmp_path / "classifier", classifies=True, id2label={0: "a", 1: "b", 2: "c"})
    folders.append(export(source, tmp_path / "out-classifier", "vit").relative_to(tmp_path))
    expected.append([1, 3])
    (tmp_path / "elsewhere").mkdir()
    for output in tmp_path.glob("out-*"):
        output.rename(tmp_path / "elsewhere" / output.name)
    assert shapes([tmp_path / "elsewhere" / path for path in folders], tmp_path) == expected


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize(
    ("export_format", "processor"),
    [("vit", False), ("dinov2", False), ("timm", True), pytest.param("onnx", True, marks=pytest.mark.slow)],
)
def test_the_code_gives_the_trained_feature(tmp_path, monkeypatch, export_format, processor, pooling):
    if export_format == "timm":
        real_timm()
    if export_format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    source = encoder(tmp_path / "encoder", processor=processor, pooling=pooling)
    folder, found = export(source, tmp_path / "out", export_format), {}
    monkeypatch.chdir(folder)
    exec(code_of(folder / "README.md").replace("torch.zeros(", "torch.ones("), found)
    pixels = torch.ones(1, 3, 32, 32)
    if processor:
        prepare = AutoImageProcessor.from_pretrained(source, backend="pil")
        pixels = prepare(Image.new("RGB", (32, 32)), return_tensors="pt")["pixel_values"]
    ours = AccelViTModel.from_pretrained(source).eval()(pixels).pooler_output
    torch.testing.assert_close(torch.as_tensor(found["features"]), ours.detach(), rtol=1e-4, atol=1e-4)
    if export_format in ("vit", "dinov2"):
        says = "last_hidden_state[:, 1:].mean(1)" if pooling == "mean" else "`pooler_output` is the CLS token"
        assert says in (folder / "README.md").read_text()


@pytest.mark.parametrize("export_format", ["accel_vit", "vit", "dinov2", "timm", "onnx"])
@pytest.mark.parametrize("processor", [True, False])
def test_the_code_uses_the_image_processor_where_there_is_one(export_format, processor):
    text = export_card(about(export_format, processor=processor))
    assert ("AutoImageProcessor.from_pretrained(" in text) == processor and ("zeros(" in text) != processor
    assert "its features equal the original's.\n" in text
    assert ' = "."  # run this in the folder of this file' in text  # A name could be a stranger's repository.
    compile(text.split("```python")[1].strip("`\n"), "README.md", "exec")


def test_no_rgb_image_is_printed_for_other_channels():
    text = export_card(about(num_channels=5))
    assert "zeros(1, 5, 224, 224)" in text and "Image" not in text.split("## How to use")[1]


def test_origin_and_licence_are_those_of_the_source(tmp_path):
    source = encoder(tmp_path / "encoder")
    header = "license: other\nlicense_name: own\nlicense_link: https://example.org/licence"
    (source / "README.md").write_text(f"---\n{header}\n---\n# Mine\n")
    folder = export(source, tmp_path / "out", "dinov2", "eval_patch_sizes=[16]")
    text = (folder / "README.md").read_text()
    data = ModelCard(text).data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "own") and data["library_name"] == "transformers"
    assert "That of the original: own, https://example.org/licence." in text
    name = f"{tmp_path.name}/encoder"  # "encoder" alone may be the name of many
    assert f"# {name} as transformers' DINOv2" in text and f" from `{name}`" in text and "patches of 16" in text
    digest, date = weights_digest(AccelViTModel.from_pretrained(source)), datetime.now(timezone.utc).date()
    assert f"digest `{digest}`" in text and f" on {date} from" in text
    again = export(folder, tmp_path / "again", "accel_vit")  # the licence goes along
    assert ModelCard((again / "README.md").read_text()).data.to_dict()["license_name"] == "own"
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("licence", "says"),
    [
        ({}, "The original states none"),
        ({"license": ["mit", "cc-by-nc-4.0"]}, "That of the original: mit, cc-by-nc-4.0."),
        (
            {"license": "other", "license_name": "own", "license_link": "LICENSE"},
            "That of the original: own, its text is in the file LICENSE of the original.",
        ),
    ],
    ids=["none", "several", "a file of the original"],
)
def test_the_licence_of_the_original_is_stated(licence, says):
    text = export_card(about(licence=licence))
    values = ModelCard(text).data.to_dict()
    assert says in text and {key: values[key] for key in values if key.startswith("license")} == {
        key: value
        for key, value in licence.items()
        if value != "LICENSE"  # There is no such file beside this card.
    }


@pytest.mark.parametrize(
    ("data", "warns"),
    [
        (b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n", False),
        (b"---\nlicense: mit\n---\nh\xe9llo", True),
        (b"---\nauthor: Ren\xe9\nlicense: mit\n---\n", True),
        (b"\n--- \nlicense: mit\n---\n", False),
        (b"---\ntitle: a: b\nlicense: 'mit'\n---\n", True),
    ],
    ids=["byte-order mark", "Latin-1 text", "Latin-1 metadata", "space", "invalid YAML"],
)
def test_a_licence_is_read_from_a_damaged_card(tmp_path, caplog, monkeypatch, data, warns):
    (tmp_path / "README.md").write_bytes(data)
    monkeypatch.setattr(logging.getLogger("hf_accel"), "propagate", True)
    assert stated_licence(str(tmp_path), {}) == {"license": "mit"}
    assert (str(tmp_path / "README.md") in caplog.text) == warns


def test_the_licence_of_a_weight_file_is_that_of_its_folder(tmp_path):
    source = encoder(tmp_path / "encoder")
    weights = export(source, tmp_path / "out", "timm") / "model.safetensors"
    (weights.parent / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    again = export(weights, tmp_path / "again", "vit", "model_config.num_attention_heads=3")
    assert ModelCard((again / "README.md").read_text()).data.to_dict()["license"] == "cc-by-nc-4.0"


def test_a_card_that_cannot_be_read_is_not_one_without_a_licence(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert stated_licence("ann/vit", {}) is None
    text = export_card(dataclasses.replace(about(), licence=None))
    assert "could not be read when this was made" in text and "license" not in ModelCard(text).data.to_dict()
    assert stated_licence("ann/vit", {"license": "mit"}) == {"license": "mit"}
    cache = tmp_path / "models--ann--vit"
    for path, text in {"refs/main": "1" * 40, f".no_exist/{'1' * 40}/README.md": ""}.items():
        (cache / path).parent.mkdir(parents=True)
        (cache / path).write_text(text)
    assert stated_licence("ann/vit", {}) == {}


@pytest.mark.parametrize(
    ("card", "config", "expected"),
    [
        (None, {}, {}),
        ("no metadata", {}, {}),
        ("---\nlicense: mit\n---\n", {}, {"license": "mit"}),
        ("---\nlicense: [mit, 0bsd]\nlicense_link: A\n---", {}, {"license": ["mit", "0bsd"], "license_link": "A"}),
        ("---\nlicense: [mit\n---\n", {}, {}),
        ("---\ntags: [a]\n---\n", {"pretrained_cfg": {"license": "apache-2.0"}}, {"license": "apache-2.0"}),
    ],
    ids=["no card", "no metadata", "card", "several", "broken metadata", "timm"],
)
def test_stated_licence(tmp_path, card, config, expected):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stated_licence(str(tmp_path), config) == expected

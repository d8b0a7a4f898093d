"""The README of an export: origin, licence and pooling, and code that runs in a fresh process from anywhere."""

import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from datetime import datetime, timezone
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


def shapes(codes: list[str], folder: Path) -> list[list[int]]:
    """Of the features that each code gives, in one process that has no hf_accel, started in `folder`."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    runs = "import json, sys\nfor code in json.loads(sys.argv[1]):\n    found = {}\n    exec(code, found)\n"
    runs += "    print(json.dumps(list(found['features'].shape)))\n"
    command = [sys.executable, "-c", HIDDEN + runs, json.dumps(codes)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[") and line.endswith("]")]


@pytest.mark.slow
def test_the_code_runs_where_it_is_pasted(tmp_path, monkeypatch):
    """Output folders are relative, and the code is run in another one."""
    monkeypatch.chdir(tmp_path)
    codes, expected = [], []
    poolings: list[dict[str, Any]] = [{}, {"pooling": "mean"}]
    for processor in (True, False):
        for fields in poolings:
            source = encoder(Path(f"encoder-{processor}-{len(fields)}"), processor=processor, **fields)
            for export_format in ("vit", "dinov2", "accel_vit"):
                folder = export(source, Path(f"out-{source.name}"), export_format)
                codes.append(code_of(folder / "README.md"))
                expected.append([1, SIZES["hidden_size"]])
    source = encoder(Path("classifier"), classifies=True, id2label={0: "a", 1: "b", 2: "c"})
    codes.append(code_of(export(source, Path("out-classifier"), "vit") / "README.md"))
    expected.append([1, 3])
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnxscript"):
        codes.append(code_of(export(Path("encoder-True-0"), Path("out-onnx"), "onnx") / "README.md"))
        expected.append([1, SIZES["hidden_size"]])
    (tmp_path / "elsewhere").mkdir()
    assert shapes(codes, tmp_path / "elsewhere") == expected


@pytest.mark.parametrize("fields", [{}, {"pooling": "mean"}], ids=["cls", "mean"])
def test_the_code_for_timm_runs_and_gives_the_feature(tmp_path, fields):
    real_timm()
    source = encoder(tmp_path / "encoder", **fields)
    folder, found = export(source, tmp_path / "out", "timm"), {}
    exec(code_of(folder / "README.md"), found)
    ours = AccelViTModel.from_pretrained(source).eval()(processed_blank(source)).pooler_output
    torch.testing.assert_close(found["features"], ours.detach(), rtol=1e-4, atol=1e-4)


def processed_blank(source: Path) -> torch.Tensor:
    processor = AutoImageProcessor.from_pretrained(source, backend="pil")
    return processor(Image.new("RGB", (32, 32)), return_tensors="pt")["pixel_values"]


@pytest.mark.slow
def test_the_code_for_onnx_runs_and_gives_the_feature(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    source = encoder(tmp_path / "encoder")
    folder, found = export(source, tmp_path / "out", "onnx"), {}
    exec(code_of(folder / "README.md"), found)
    ours = AccelViTModel.from_pretrained(source).eval()(processed_blank(source)).pooler_output
    torch.testing.assert_close(torch.from_numpy(found["features"]), ours.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("export_format", ["accel_vit", "vit", "dinov2", "timm", "onnx"])
@pytest.mark.parametrize("processor", [True, False])
def test_the_code_uses_the_image_processor_where_there_is_one(tmp_path, export_format, processor):
    about = Export(
        export_format, "a/b", "0", "2026-01-01", "vit", {}, AccelViTConfig(), 16, False, processor, 0.0, tmp_path
    )
    text = export_card(about)
    assert ("AutoImageProcessor.from_pretrained(" in text) == processor and ("zeros(" in text) != processor
    assert "its features equal the original's.\n" in text


@pytest.mark.parametrize("export_format", ["vit", "dinov2"])
@pytest.mark.parametrize("fields", [{}, {"pooling": "mean"}], ids=["cls", "mean"])
def test_the_feature_of_the_code_is_the_trained_one(tmp_path, export_format, fields):
    source = encoder(tmp_path / "encoder", processor=False, **fields)
    folder, found = export(source, tmp_path / "out", export_format), {}
    exec(code_of(folder / "README.md").replace("torch.zeros(", "torch.ones("), found)
    ours = AccelViTModel.from_pretrained(source).eval()(torch.ones(1, 3, 32, 32)).pooler_output
    torch.testing.assert_close(found["features"], ours.detach(), rtol=1e-4, atol=1e-4)
    says = "last_hidden_state[:, 1:].mean(1)" if fields else "`pooler_output` is the CLS token"
    assert says in (folder / "README.md").read_text()


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
    outside_code = text.split("```python")[0]
    assert str(tmp_path) not in outside_code


def test_a_licence_that_is_not_stated_is_not_made_up(tmp_path):
    folder = export(encoder(tmp_path / "encoder"), tmp_path / "out", "vit")
    text = (folder / "README.md").read_text()
    assert "license" not in ModelCard(text).data.to_dict() and "The original states none" in text


def test_a_licence_file_of_the_source_is_named_as_such(tmp_path):
    source = encoder(tmp_path / "encoder")
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n")
    text = (export(source, tmp_path / "out", "vit") / "README.md").read_text()
    assert "That of the original: own, its text is in the file LICENSE of the original." in text
    data = ModelCard(text).data.to_dict()
    assert data["license_name"] == "own" and "license_link" not in data  # there is no such file beside this card


def test_several_licences_go_along(tmp_path):
    source = encoder(tmp_path / "encoder")
    (source / "README.md").write_text("---\nlicense:\n- mit\n- cc-by-nc-4.0\n---\n")
    text = (export(source, tmp_path / "out", "vit") / "README.md").read_text()
    assert "That of the original: mit, cc-by-nc-4.0." in text
    assert ModelCard(text).data.to_dict()["license"] == ["mit", "cc-by-nc-4.0"]


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


@pytest.mark.parametrize(
    ("card", "config", "expected"),
    [
        (None, {}, {}),
        ("no metadata", {}, {}),
        ("---\nlicense: mit\n---\n", {}, {"license": "mit"}),
        ("---\nlicense: [mit\n---\n", {}, {}),
        ("---\ntags: [a]\n---\n", {"pretrained_cfg": {"license": "apache-2.0"}}, {"license": "apache-2.0"}),
    ],
    ids=["no card", "no metadata", "card", "broken metadata", "timm"],
)
def test_stated_licence(tmp_path, card, config, expected):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stated_licence(str(tmp_path), config) == expected

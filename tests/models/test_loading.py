"""Test every way to open a checkpoint in fresh processes, with hf_accel and without it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from hf_accel import AccelViTForImageClassification
from hf_accel.objectives import OBJECTIVES
from tests.models.tiny import tiny_config
from tests.tiny_runs import STEPS, image_folder, launch

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, sys
folder, remote = sys.argv[1], sys.argv[2] == "remote"
if remote:
    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "hf_accel":
                raise ModuleNotFoundError("hf_accel is hidden from this process")
    sys.meta_path.insert(0, Refuse())
else:
    import hf_accel
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from PIL import Image
import torch

trust = {"trust_remote_code": True} if remote else {}
image = Image.open(f"{folder}/image.png")
config = AutoConfig.from_pretrained(f"{folder}/encoder", **trust)
processor = AutoImageProcessor.from_pretrained(f"{folder}/encoder", **trust)
pixels = processor(image, return_tensors="pt")
results = {"hidden_size": config.hidden_size, "module": type(config).__module__}
with torch.no_grad():
    for name in ("encoder", "checkpoint-3"):
        model = AutoModel.from_pretrained(f"{folder}/{name}", **trust)
        results[name] = model(**pixels).pooler_output[0].tolist()
        results[f"{name}, patch 16"] = model(**pixels, patch_size=16).pooler_output[0].tolist()
        features = pipeline("image-feature-extraction", f"{folder}/{name}", **trust)
        results[f"{name}, pipeline"] = features(image, pool=True)[0]
    model = AutoModel.from_pretrained(f"{folder}/encoder", patch_size=16, **trust)
    results["encoder, loaded at patch 16"] = model(**pixels).pooler_output[0].tolist()
    classifier = AutoModelForImageClassification.from_pretrained(f"{folder}/classifier", **trust)
    results["classifier"] = classifier(**pixels).logits[0].tolist()
    classifier.save_pretrained(f"{folder}/again_{sys.argv[2]}")
    again = AutoModelForImageClassification.from_pretrained(f"{folder}/again_{sys.argv[2]}", **trust)
    results["classifier, saved again"] = again(**pixels).logits[0].tolist()
    classify = pipeline("image-classification", f"{folder}/classifier", **trust)
    scores = {entry["label"]: entry["score"] for entry in classify(image)}
    results["classifier, pipeline"] = [scores["cat"], scores["dog"]]
    # AutoBackbone takes a local folder for a timm model: the class itself, there
    if remote:
        backbone = get_class_from_dynamic_module("modeling_accel_vit.AccelViTBackbone", f"{folder}/encoder")
    else:
        backbone = hf_accel.AccelViTBackbone
    results["backbone"] = backbone.from_pretrained(f"{folder}/encoder")(**pixels).feature_maps[0][0].flatten().tolist()
assert remote == ("hf_accel" not in sys.modules)
with open(f"{folder}/{sys.argv[2]}.json", "w") as file:
    json.dump(results, file)
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Write an encoder, a classifier, a training checkpoint and an image, and return the expected outputs."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    config = tiny_config(id2label={0: "cat", 1: "dog"})
    classifier: Any = AccelViTForImageClassification(config).eval()
    moco: Any = OBJECTIVES["moco"]
    training = moco(config, projector_hidden_size=16, projection_size=8)
    training.encoder.load_state_dict(classifier.encoder.state_dict())
    processor = BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for name, model in (("encoder", classifier.encoder), ("classifier", classifier), ("checkpoint-3", training)):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))
    image.save(folder / "image.png")
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        base, larger = classifier.encoder(pixels), classifier.encoder(pixels, patch_size=16)
        logits = classifier(pixels).logits[0]
        maps = base.last_hidden_state[0, 1:].T.flatten()
    expected = {"encoder": base.pooler_output[0], "checkpoint-3": base.pooler_output[0], "classifier": logits}
    expected |= {f"{name}, pipeline": base.pooler_output[0] for name in ("encoder", "checkpoint-3")}
    expected |= {f"{name}, patch 16": larger.pooler_output[0] for name in ("encoder", "checkpoint-3")}
    expected |= {"encoder, loaded at patch 16": larger.pooler_output[0], "backbone": maps}
    expected["classifier, saved again"] = logits
    return folder, {**expected, "classifier, pipeline": logits.softmax(0)}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["installed", "remote"])
def test_every_way_to_open_a_checkpoint(checkpoints: tuple[Path, dict[str, Any]], tmp_path: Path, mode: str) -> None:
    """No call asks for trust (there is no standard input), and none warns."""
    folder, expected = checkpoints
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT) if mode == "installed" else ""
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(folder), mode]
    options: dict[str, Any] = {"cwd": tmp_path, "env": environment, "stdin": subprocess.DEVNULL}
    result = subprocess.run(command, **options, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    said = [
        line
        for line in result.stderr.splitlines()
        if line.strip() and not re.search("(Loading weights|model shards):", line)
    ]
    assert said == []
    results = json.loads((folder / f"{mode}.json").read_text())
    assert results.pop("hidden_size") == 16
    assert results.pop("module").split(".")[0] == {"installed": "hf_accel", "remote": "transformers_modules"}[mode]
    assert results.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(torch.tensor(results[name]), values, atol=1e-5, rtol=1e-5, msg=name)


OTHER_CODE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_accel":
            raise ModuleNotFoundError("hf_accel is hidden from this process")
sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModel, AutoModelForImageClassification

pixels = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
def show(auto, folder):
    with torch.no_grad():
        print("value", auto.from_pretrained(folder, trust_remote_code=True)(pixels)[-1][0, 0].item())
for name in sys.argv[1:]:
    show(AutoModel, f"{name}/encoder")
    AutoModel.from_pretrained(f"{name}/encoder", trust_remote_code=True).save_pretrained(f"{name}/again")
    show(AutoModelForImageClassification, f"{name}/classifier")
for name in sys.argv[1:]:
    show(AutoModel, f"{name}/again")
sys.meta_path.pop(0)
import hf_accel
assert type(AutoModel.from_pretrained(f"{name}/again", trust_remote_code=True)) is hf_accel.AccelViTModel
"""


@pytest.mark.slow
def test_each_checkpoint_of_a_process_runs_its_own_code(checkpoints: tuple[Path, dict], tmp_path: Path) -> None:
    """Two versions of one model file are opened in either order; features and logits are those of each version."""
    for version in ("a", "b"):
        for name in ("encoder", "classifier"):
            shutil.copytree(checkpoints[0] / name, tmp_path / version / name)
            code = tmp_path / version / name / "shortening_accel_vit.py"
            assert "10000.0 **" in code.read_text()
            if version == "b":
                code.write_text(code.read_text().replace("10000.0 **", "100.0 **"))
    results = {}
    for order in ("ab", "ba"):
        cache = str(tmp_path / f"cache {order}")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": cache, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", OTHER_CODE, *order]
        options: dict[str, Any] = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
        result = subprocess.run(command, **options, check=False)
        assert result.returncode == 0, result.stderr
        values = [float(value) for value in re.findall("value (.*)", result.stdout)]
        results[order] = {name: [*values[2 * i : 2 * i + 2], values[4 + i]] for i, name in enumerate(order)}
    assert results["ab"] == results["ba"]
    for a, b in zip(results["ab"]["a"], results["ab"]["b"], strict=True):
        assert abs(a - b) > 1e-3


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache_and_threads")
def test_the_checkpoints_of_a_run_open_as_pipelines(tmp_path: Path) -> None:
    from transformers import pipeline

    output = launch(image_folder(tmp_path / "images"), tmp_path / "run", "keep_points=[0.0]")
    image = Image.open(next((tmp_path / "images").rglob("*.png")))
    features = {}
    for name in ("final", f"checkpoint-{STEPS}", "kept/checkpoint-0"):
        features[name] = pipeline("image-feature-extraction", str(output / name))(image, pool=True)
    assert features["final"] == features[f"checkpoint-{STEPS}"] != features["kept/checkpoint-0"]

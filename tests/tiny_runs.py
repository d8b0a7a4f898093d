"""Whole tasks in the process of the tests, on a model and images so small that a run takes a second or two."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from safetensors.torch import load_file

import hf_accel.run as entry

SIZE, IMAGES = 16, 120
RECIPE: dict[str, Any] = {
    "model": "vit_tiny",
    "model_config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "objective_config": {"projector_hidden_size": 32, "projection_size": 16},
    "image_size": SIZE,
    "patch_size": 4,
    "batch_size": 16,
    "budget": 16 * 4 * 8,  # eight uncompressed steps
    "schedule": None,
    "eval_points": [1.0],
    "logging_steps": 1,
    "save_steps": 2,
    "report_to": [],
}
STEPS, WEIGHTS = 8, "model.safetensors"


def image_folder(root: Path, labels: bool = True, count: int = IMAGES, side: Callable[[int], int] = lambda _: SIZE):
    """train/ with `count` images of noise about a colour for each of three classes, validation/ with 30."""
    rng = np.random.default_rng(0)
    for split, number in (("train", count), ("validation", 30)):
        for index in range(number):
            folder = root / split / "abc"[index % 3] if labels else root
            folder.mkdir(parents=True, exist_ok=True)
            noise = rng.normal(60 * np.eye(3)[index % 3] + 100, 40, (side(index), side(index), 3))
            PIL.Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(folder / f"{split}{index:03}.png")
    return root


def launch(data: Path | str, output: Path, *overrides: str) -> Path:
    """One launch of the command; its output_dir."""
    recipe = output.with_name(output.name + ".yaml")
    recipe.write_text(yaml.safe_dump({**RECIPE, "data": str(data), "output_dir": str(output)}))
    entry.main([str(recipe), *overrides])
    return output


def launch_until_stopped(data: Path | str, output: Path, *overrides: str) -> Path:
    """As `launch`, for a run that gets a SIGTERM on its way: it exits with 143, as a shell says of such an end."""
    with pytest.raises(SystemExit) as ended:
        launch(data, output, *overrides)
    assert ended.value.code == 143
    return output


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def losses(output: Path) -> list[float]:
    return [entry["loss"] for entry in read(output / "log_history.json")["log_history"] if "loss" in entry]


def assert_same_weights(one: Path, other: Path, name: str = f"final/{WEIGHTS}") -> None:
    expected, got = load_file(one / name), load_file(other / name)
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        assert torch.equal(value, got[key]), key

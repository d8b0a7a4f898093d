"""A training step on an accelerator waits for nothing on the host and mixes no devices: shown on a CPU.

As a script this is the process that trains on a pretended device (tests/pretended_device.py) and prints what it found.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from hf_accel.data import ImageSource, load_sources
from hf_accel.recipe import PretrainRecipe, Recipe
from hf_accel.tasks.setup import build_objective, pretrain_config
from hf_accel.training.trainer import PretrainTrainer
from tests import pretended_device
from tests.tiny_runs import RECIPE, image_folder

ROOT = Path(__file__).parents[2]
DINO: dict[str, Any] = {"num_prototypes": 24, "head_hidden_size": 32, "bottleneck_size": 8, "clip_grad": 0.05}
DINO |= {"num_local_crops": 2, "local_crop_size": 8, "norm_last_layer": False, "freeze_last_layer": 0.3}
SYMMETRIC = {**RECIPE["objective_config"], "symmetric": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "dino": {"objective": "dino", "objective_config": DINO, "model_config": {"drop_path_rate": 0.1}},
}
MORE: dict[str, dict[str, Any]] = {
    "moco": {"max_grad_norm": 1.0, "model_config": {"drop_path_rate": 0.1}},
    "simclr, bf16": {"objective": "simclr", "mixed_precision": "bf16", "augmentation": "digits"},
    "moco, bf16": {
        "mixed_precision": "bf16",
        "objective_config": {**SYMMETRIC, "temperature": 1.0},  # a low one enlarges the rounding
        "gradient_accumulation_steps": 2,
        "budget": 8 * 3 * 8,
        "learning_rate": 1e-5,  # as do long steps
    },
    "moco, learned positions": {"model_config": {"position_embedding_type": "learned"}, "gradient_checkpointing": True},
    "moco, digits": {"augmentation": "digits", "view_resolution": "matched"},
    "simclr": {"objective": "simclr"},
    "dino, bf16": {"objective": "dino", "objective_config": DINO, "mixed_precision": "bf16"},
    "dino, crops of a loader": {"objective": "dino", "objective_config": DINO},
}
STAGES = [{"until": 0.3, "patch_size": 8, "token_dropout": 0.25}, {"until": 1.0, "patch_size": 4}]
COPIES = 8
"""Of a micro-batch at most: images or crops, their indices, draws of the views, kept tokens of each branch."""


class WatchedTrainer(PretrainTrainer):
    """Watches every step under a strategy that an earlier one has had, but not what logs and saves."""

    watch: Any = None
    seen: frozenset = frozenset()

    def training_step(self, model, inputs, num_items_in_batch=None):
        strategy = self.plan[inputs["step"]].strategy
        self.watch.on = strategy in self.seen
        if inputs["micro_step"] == 0:
            self.seen |= {strategy}
        self.watch.steps += self.watch.on
        return super().training_step(model, inputs, num_items_in_batch)

    def _save_checkpoint(self, model, trial) -> None:
        """A pretended tensor has no storage to be saved (nor has the encoder: see `train`)."""

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        watched, self.watch.on = self.watch.on, False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        # the loader and callbacks, until the next step begins
        self.watch.on = watched and self.state.global_step < self.state.max_steps


class SyncDebug:
    """A GPU's own watch: while it is `on`, an operation that waits raises."""

    def __init__(self):
        self.steps, self.copies, self.waits = 0, 1, []

    @property
    def on(self) -> bool:
        return torch.cuda.get_sync_debug_mode() > 0

    @on.setter
    def on(self, value: bool) -> None:
        torch.cuda.set_sync_debug_mode("error" if value else "default")


def train(name: str, device: torch.device | None, folder: str) -> dict[str, Any]:
    """Train on the pretended device, a GPU or, for None, the CPU; the losses, and what the steps waited for."""
    settings = {**SETTINGS, **MORE}[name]
    model_config = {**RECIPE["model_config"], "num_hidden_layers": 1, **settings.get("model_config", {})}
    budget = 8 * 3 * {"dino": 11, "simclr": 6}.get(settings.get("objective", "moco"), 4)
    shared = {**RECIPE, "batch_size": 8, "schedule": STAGES, "budget": budget, "eval_points": [], "logging_steps": 1}
    # By default a GPU takes bf16. A pretended device has no memory to pin, which workers need.
    shared |= {"mixed_precision": "no", "num_workers": 0}
    recipe = PretrainRecipe(**{**shared, **settings, "model_config": model_config, "output_dir": folder})
    AcceleratorState._reset_state(reset_partial_state=True)
    pretended, on_gpu = device is not None and device.type == "pretend", device is not None and device.type == "cuda"
    # There is no launcher for the pretended device: the arguments are told.
    os.environ["ACCELERATE_USE_CPU"] = str(not on_gpu).lower()
    arguments = pretrain_config(recipe)
    assert (arguments.device.type == "cuda") == on_gpu
    if pretended:
        os.environ["ACCELERATE_USE_CPU"] = "false"
        PartialState._shared_state |= {"device": device, "_cpu": False}
        arguments.__dict__["_setup_devices"] = device
        arguments.dataloader_pin_memory = True  # the Trainer turns it off on a CPU
    arguments.disable_tqdm = True
    torch.manual_seed(0)
    model = build_objective(recipe)
    unwatched = SyncDebug() if on_gpu else pretended_device.Watch()
    with (
        pretended_device.watching() if pretended else nullcontext(unwatched) as watch,
        patch("hf_accel.training.trainer.finish_run"),
    ):
        trainer = WatchedTrainer(model, arguments, source_of(recipe, "loader" in name, Path(folder)))
        trainer.watch = watch
        trainer.train()
        watch.on = False
    optimizer: Any = trainer.optimizer
    assert all(group["fused"] for group in optimizer.param_groups)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "waits": watch.waits, "watched": watch.steps, "copies": watch.copies}


def source_of(recipe: Recipe, decoded: bool, folder: Path) -> ImageSource:
    """Images of noise, in memory (gray ones for the digits' augmentation), or in files of two sizes."""
    if decoded:
        return load_sources(str(image_folder(folder / "images", False, 24, lambda index: 20 + index % 2)), seed=0)[0]
    pixels = torch.randint(256, (24, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    gray = recipe.augmentation == "digits"
    return ImageSource("noise", pixels=pixels[:, :1].expand(-1, 3, -1, -1) if gray else pixels)


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    device = pretended_device.register()
    with tempfile.TemporaryDirectory() as folder:
        found = {
            name: {who: train(name, where, f"{folder}/{name}-{who}") for who, where in (("cpu", None), ("it", device))}
            for name in names
        }
    print(json.dumps(found))


def check(names: Iterable[str]) -> None:
    """Each of these runs, in one process: no waits, few copies, the CPU's losses."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *names]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, found in json.loads(done.stdout.splitlines()[-1]).items():
        compare(name, found["cpu"], found["it"], 1e-4)


def compare(name: str, on_cpu: dict[str, Any], found: dict[str, Any], tolerance: float) -> None:
    got = found["losses"]
    assert got == pytest.approx(on_cpu["losses"], rel=0.05 if "bf16" in name else tolerance) and len(got) > 3, name
    assert found["watched"] >= 2, name
    assert 0 < found["copies"] <= COPIES * found["watched"], name
    assert found["waits"] == [], name


@pytest.mark.slow
def test_a_step_waits_for_nothing_and_mixes_no_devices():
    check(SETTINGS)


@pytest.mark.slow
def test_steps_of_other_settings_wait_for_nothing():
    check(MORE)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*SETTINGS, *MORE])
def test_a_step_on_a_gpu_waits_for_nothing(name, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    on_cpu = train(name, None, str(tmp_path / "cpu"))
    try:
        compare(name, on_cpu, train(name, torch.device("cuda"), str(tmp_path / "gpu")), 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        AcceleratorState._reset_state(reset_partial_state=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Loss scaling, which accelerate keeps for fp16 on GPUs, on a CPU: what touches gradients finds them true to scale."""

import pytest
import torch

from hf_accel.training.trainer import PretrainTrainer
from tests.engine_runs import HEADS, OBJECTIVES
from tests.tiny_runs import image_folder, launch, losses

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [[], ["max_grad_norm=0.5"], ["objective=dino"]], ids=["plain", "norm", "dino"])
def test_scaled_losses_train_as_plain_ones(settings, tmp_path, monkeypatch):
    # DINO clips each parameter's gradient, far below what they are
    config = OBJECTIVES["dino"]["objective_config"] if "objective=dino" in settings else HEADS
    settings = [*settings, f"objective_config={config}", "model_config.num_hidden_layers=1"]
    images = image_folder(tmp_path / "images", count=64)
    plain = launch(images, tmp_path / "plain", *settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    create = PretrainTrainer.create_accelerator_and_postprocess

    def with_scaler(self) -> None:
        create(self)
        self.accelerator.native_amp, self.accelerator.state._mixed_precision = True, "fp16"
        self.accelerator.scaler = scaler

    monkeypatch.setattr(PretrainTrainer, "create_accelerator_and_postprocess", with_scaler)
    in_fp32 = torch.autocast("cpu", enabled=False)  # what is left is the scale, a power of two
    monkeypatch.setattr("accelerate.accelerator.get_mixed_precision_context_manager", lambda *_: in_fp32)
    scaled = launch(images, tmp_path / "scaled", *settings)
    assert losses(scaled) == pytest.approx(losses(plain), rel=1e-6)
    assert scaler.state_dict()["_growth_tracker"] == len(losses(plain))

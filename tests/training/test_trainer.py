from types import SimpleNamespace
from typing import Any

from hf_accel.compression import Compression, Plan, Schedule, Strategy
from hf_accel.models import vit_tiny
from hf_accel.objectives import SimCLRForPreTraining
from hf_accel.training.callbacks import ProgressCallback
from hf_accel.utils.progress import learning_rate_factor


def test_warmup_of_nothing_starts_at_the_full_rate():
    assert learning_rate_factor(0.0, "cosine", 0.0) == learning_rate_factor(0.0, "poly", 0.0) == 1
    assert learning_rate_factor(1.0, "cosine", 1.0) == 1 and learning_rate_factor(1.0, "cosine", 0.5) == 0


def test_matched_views_have_base_patches():
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "image_size": 28, "patch_size": 4}
    model = SimCLRForPreTraining(vit_tiny(**sizes), projector_hidden_size=8, projection_size=8)
    symmetric, asymmetric = Strategy(Compression(7)), Strategy(Compression(7), Compression(4))
    assert model.matched_view_size(symmetric) == 16
    assert model.matched_view_size(asymmetric) == 28


def test_evaluation_point_just_above_its_step_is_met_once():
    plan = Plan(8 * 4.0, Schedule.constant(Strategy(Compression(4))), 1, lambda strategy: 4.0)
    args = SimpleNamespace(eval_points=[0.25 + 5e-13], keep_points=[])
    flags: dict[str, Any] = {"keep_now": False, "is_deepspeed_enabled": False, "earlier": None}
    trainer: Any = SimpleNamespace(plan=plan, args=args, source=range(10), **flags)

    def evaluated(first_step: int) -> list[int]:
        callback: Any = ProgressCallback(trainer)
        state = SimpleNamespace(global_step=first_step, max_steps=8)
        callback.on_train_begin(None, state, None)
        steps = []
        while state.global_step < 8:
            state.global_step += 1
            names = ("should_evaluate", "should_save", "should_log", "should_training_stop")
            control = SimpleNamespace(**dict.fromkeys(names, False))
            callback.on_step_end(None, state, control)
            steps += [state.global_step] if control.should_evaluate else []
        return steps

    assert evaluated(0) == [2] and evaluated(1) == [2] and evaluated(2) == []

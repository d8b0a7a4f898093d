"""benchmarks/peer_training.py: the peer's loop computes what our trainer does, and leaves what our runs leave."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from benchmarks import peer_training, peers
from tests.tiny_runs import RECIPE, WEIGHTS, image_folder, launch, losses, read

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")

SETTINGS = {
    **RECIPE,
    "model_config": {**RECIPE["model_config"], "pooling": "mean", "freeze_patch_projection": False},
    "objective_config": {**RECIPE["objective_config"], "temperature": 0.3, "momentum": 0.9},
    "learning_rate": 1e-3,
    "warmup": 0.3,
    "eval_points": [0.0, 0.5, 1.0],
    "mixed_precision": "no",
}
OVERRIDES = [f"{key}={json.dumps(value)}" for key, value in SETTINGS.items()]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("images"))


def write_recipe(folder, data, **changes):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**SETTINGS, "data": str(data), "output_dir": str(folder / "peer"), **changes}))
    return str(path)


@pytest.mark.slow
def test_peer_and_ours_take_the_same_steps_from_equal_weights(tmp_path, data, monkeypatch):
    made = peer_training.make_peer

    def with_our_heads(ours, _):
        peer = made(ours, peers.PlainComponents())
        for name in ("projector", "predictor", "momentum_projector"):
            getattr(peer, name).load_state_dict(getattr(ours, name).state_dict())
        return peer

    monkeypatch.setattr(peer_training, "make_peer", with_our_heads)
    recipe = write_recipe(tmp_path, data)
    assert peer_training.main([recipe]) == 0
    ours = launch(data, tmp_path / "ours", *OVERRIDES)
    assert losses(tmp_path / "peer") == pytest.approx(losses(ours), rel=1e-4) and len(losses(ours)) == 8
    theirs, end = (load_file(folder / "final" / WEIGHTS) for folder in (tmp_path / "peer", ours))
    assert theirs.keys() == end.keys()
    for name, tensor in end.items():
        # The loss does not depend on these: softmax and BatchNorm undo a shift. AdamW enlarges the rounding errors.
        if name != "layernorm.bias" and not name.endswith("k_proj.bias"):
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_a_finished_peer_says_what_it_was_and_is_not_trained_again(tmp_path, data, capsys):
    recipe, folder = write_recipe(tmp_path, data), tmp_path / "peer"
    assert peer_training.main([recipe, "seed=1"]) == 0
    results, history = read(folder / "results.json"), read(folder / "log_history.json")["log_history"]
    assert results["peer"] == peers.peer_components()[0]
    assert results["steps"] == 8 and results["units"] == SETTINGS["budget"]
    assert [entry["units"] for entry in history if "eval_knn_top1" in entry] == [0, 256, 512]
    assert results["cpu_seconds"] > 0 and 0 < results["seconds"]["evaluation"] < results["seconds"]["total"]
    ours = launch(data, tmp_path / "ours", *OVERRIDES, "seed=1")
    same = ("knn_top1_random_init", "knn_top1_raw_pixels", "data", "schedule", "units", "steps")
    assert {key: results[key] for key in same} == {key: read(ours / "results.json")[key] for key in same}
    assert results["knn_top1_random_init"] is not None
    capsys.readouterr()
    assert peer_training.main([recipe, "seed=1"]) == 0 and "complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        "objective=simclr",
        "schedule=standard",
        "gradient_accumulation_steps=2",
        "max_grad_norm=1.0",
        "weight_decay_end=0.2",
        "objective_config.symmetric=true",
        "model_config.drop_path_rate=0.1",
        "cost=measured",
    ],
)
def test_what_the_peers_loop_does_not_do_is_refused(tmp_path, data, capsys, change):
    with pytest.raises(SystemExit):
        peer_training.main([write_recipe(tmp_path, data, objective_config={}), change])
    assert f"{change.partition('=')[0]}=" in capsys.readouterr().err
    assert not (tmp_path / "peer").exists()


def test_images_without_labels_are_refused(tmp_path, data, capsys):
    with pytest.raises(SystemExit):
        peer_training.main([write_recipe(tmp_path, data), "label_column=none"])
    assert "need labels" in capsys.readouterr().err


def test_weight_decay_is_for_matrices_only():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 2, bias=False))
    model[2].requires_grad_(False)
    decayed, others = peer_training.make_optimizer(model, 0.1).param_groups
    assert decayed["params"] == [model[0].weight] and decayed["weight_decay"] == 0.1
    assert others["weight_decay"] == 0.0 and len(others["params"]) == 3

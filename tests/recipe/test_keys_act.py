"""Every key of a recipe lands where it acts: a key that is ignored fails here."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from hf_accel.compression import Compression, Strategy
from hf_accel.data import load_sources
from hf_accel.objectives import MoCoForPreTraining, SimCLRForPreTraining
from hf_accel.recipe import EvaluateRecipe, PretrainRecipe, SearchRecipe
from hf_accel.tasks import evaluate, search, setup
from hf_accel.tasks.card import publication_of
from hf_accel.tasks.setup import build_objective, images_of, pretrain_config
from hf_accel.training.planning import make_plan
from hf_accel.training.publishing import PublishingTrainer

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SIZES: dict[str, Any] = {"image_size": 16, "patch_size": 4, "model": "vit_tiny", "model_config": TINY}
HEADS: dict[str, Any] = {"projector_hidden_size": 32, "projection_size": 16}
PLAIN: dict[str, Any] = {"budget": 640.0, "schedule": None, "batch_size": 16, "mixed_precision": "no"}
BASE = PretrainRecipe(data="photos", objective_config=HEADS, **PLAIN, **SIZES)

Observer = Callable[[Any, str], Any]
"""From a recipe, and the name of the key, what the key has come to."""


def setting(name: str = "") -> Observer:
    """The field of `PretrainConfig` that the key lands in; default: of its own name."""
    return lambda recipe, key: getattr(pretrain_config(recipe), name or key)


def images(recipe: Any, key: str) -> Any:
    """The argument that `load_sources` gets."""
    calls: list[dict[str, Any]] = []

    def load(*args: Any, **kwargs: Any):
        calls.append(inspect.signature(load_sources).bind(*args, **kwargs).arguments)
        return None, None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "load_sources", load)
        patch.setattr(setup, "describe_labels", lambda *_: "")
        images_of(recipe)
    return calls[0][{"data_config": "config"}.get(key, key)]


def encoder(recipe: Any, key: str) -> Any:
    return getattr(build_objective(recipe).encoder.config, key)


def publication(field: str) -> Observer:
    def observe(recipe: Any, key: str) -> Any:
        by_task = publication_of(recipe)
        trainer = PublishingTrainer.__new__(PublishingTrainer)
        trainer.args, trainer.given_record = pretrain_config(recipe), recipe.used()
        by_trainer = trainer.publication()
        found = [attrgetter(field)(made) for made in (by_task, by_trainer)]
        assert found[0] == found[1]
        return found[0]

    return observe


def plan(recipe: Any, key: str) -> tuple[int, Compression]:
    """Steps of the run, and the compression of the first one."""
    args = pretrain_config(recipe)
    made, _ = make_plan(
        args, recipe.encoder_config(), recipe.compression_schedule(), lambda s: 64 / s.online.patch_size**2, 1000
    )
    return len(made), made[0].strategy.online


STAGES = [{"until": 1.0, "patch_size": 8}]
PRETRAIN: dict[str, tuple[Any, ...]] = {
    # key: its value, where it acts, and what it is there if not the value
    "output_dir": ("runs/elsewhere", setting()),
    "seed": (3, lambda recipe, key: (images(recipe, key), pretrain_config(recipe).seed), (3, 3)),
    **{key: ("other", images) for key in ("data", "data_config", "train_split", "validation_split", "image_column")},
    "label_column": ("other", images),
    "streaming": (True, images),
    "num_workers": (97, setting("dataloader_num_workers")),
    "continue_from": ("run", setting()),
    "init_from": ("encoder", lambda recipe, key: started(recipe), "encoder"),
    "model": ("vit_small", lambda recipe, key: replace_config(recipe).encoder_config().hidden_size, 384),
    "model_config": (TINY | {"hidden_size": 16}, lambda recipe, key: encoder(recipe, "hidden_size"), 16),
    "num_channels": (5, lambda recipe, key: (images(recipe, key), encoder(recipe, key)), (5, 5)),
    "image_size": (32, encoder),
    "patch_size": (8, encoder),
    "attn_implementation": ("eager", lambda recipe, key: encoder(recipe, "_attn_implementation")),
    "torch_compile": (True, setting()),
    "objective": ("simclr", lambda recipe, key: type(build_objective(recipe)), SimCLRForPreTraining),
    "objective_config": (HEADS | {"temperature": 0.5}, lambda recipe, key: build_objective(recipe).temperature, 0.5),
    "budget": (64.0 * 7, plan, (7, Compression(4))),
    "batch_size": (32, plan, (5, Compression(4))),
    "schedule": (STAGES, plan, (40, Compression(8))),
    **{key: (value, setting()) for key, value in {"cost": "measured", "auto_share": 0.5, "auto_draws": 5}.items()},
    **{key: (value, setting()) for key, value in {"search_criterion": "gain", "lr_schedule": "poly"}.items()},
    **{key: (value, setting()) for key, value in {"warmup": 0.3, "weight_decay_end": 0.6, "knn_k": 3}.items()},
    **{key: (value, setting()) for key, value in {"augmentation": "digits", "view_resolution": "full"}.items()},
    **{key: (value, setting()) for key, value in {"freeze_encoder": 0.2, "layer_decay": 0.5}.items()},
    "normalisation": ("data", setting()),
    "view_backend": ("fused", setting()),
    "cache": ("ram", setting()),
    **{key: (value, setting()) for key, value in {"eval_points": [0.5], "keep_points": [0.5]}.items()},
    **{key: (value, setting()) for key, value in {"knn_temperature": 0.5, "max_grad_norm": 1.0}.items()},
    **{key: (value, setting()) for key, value in {"learning_rate": 1e-3, "weight_decay": 0.5}.items()},
    "gradient_accumulation_steps": (2, setting("per_device_train_batch_size"), 8),
    "mixed_precision": ("bf16", setting("precision")),
    "gradient_checkpointing": (True, setting("activation_checkpointing")),
    "logging_steps": (7, setting()),
    "report_to": (["trackio"], setting()),
    "save_steps": (0.25, setting()),
    "save_total_limit": (5, setting()),
    "push_to_hub": (True, setting()),
    "hub_model_id": ("me/model", publication("repository.name")),
    "hub_private": (True, publication("repository.private")),
    "hub_optimizer": (True, publication("optimizer")),
    "license": ("mit", publication("license")),
}


def started(recipe: Any) -> Any:
    """What the objective of the recipe starts from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoCoForPreTraining, "from_encoder", lambda model, *_, **__: model)
        return build_objective(replace(recipe, objective="moco"))


def replace_config(recipe: Any) -> Any:
    """The recipe without `model_config`, which says more than its preset."""
    return replace(recipe, model_config={})


@pytest.mark.parametrize("key", PRETRAIN)
def test_a_key_of_pretraining_acts(key):
    value, observe, *other = PRETRAIN[key]
    (expected,) = other or [value]
    assert observe(replace(BASE, **{key: value}), key) == expected != observe(BASE, key)


def test_workers_by_default_follow_the_cores_and_the_batch(monkeypatch):
    monkeypatch.setattr(setup, "count_workers", lambda batch_bytes: batch_bytes)
    monkeypatch.setenv("WORLD_SIZE", "2")
    recipe = replace(BASE, gradient_accumulation_steps=2)
    assert recipe.num_workers == "auto" and setup.choose_workers(recipe) == 4 * 12 * 16**2
    evaluation = EvaluateRecipe(checkpoint="encoder", **SIZES)
    assert setup.choose_workers(evaluation) == 256 * 12 * 16**2
    assert setup.choose_workers(replace(evaluation, num_workers=0)) == 0


def test_every_key_of_pretraining_is_in_the_table():
    assert PRETRAIN.keys() == PretrainRecipe.types().keys()


# The keys of a search choose its grid


GRID: dict[str, tuple[Any, list[Strategy]]] = {
    "search_token_dropout": ([0.0, 0.5], [Strategy(Compression(p, r)) for p in (4, 8) for r in (0.0, 0.5)]),
    "search_patch_size": ([4], [Strategy(Compression(4, tenth / 10)) for tenth in range(10)]),
}


def grid_of(recipe: Any) -> list[Strategy]:
    """The strategies that a search compares, without the one of its schedule."""
    costs = MagicMock(side_effect=KeyboardInterrupt)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(search, "make_forward_cost", costs)
        search.search_checkpoints(recipe, pretrain_config(recipe), [])
    return costs.call_args.args[-1][1:]


@pytest.mark.slow
def test_keys_of_the_grid_act():
    base = SearchRecipe(pilot="pilot", schedule=None, **SIZES)
    for key, (value, expected) in GRID.items():
        assert sorted(grid_of(replace(base, **{key: value})), key=str) == sorted(expected, key=str) != grid_of(base)
    symmetric = grid_of(replace(base, search_symmetry=["symmetric"]))
    assert all(strategy.online == strategy.target_branch for strategy in symmetric) and symmetric != grid_of(base)


# The keys of an evaluation reach what measures


EVALUATE: dict[str, tuple[str, Any, Callable[[Any], Any]]] = {
    # key: the evaluation, its value, and where the value stands among the arguments of what measures
    "knn_k": ("knn", 3, lambda given: given["k"]),
    "knn_temperature": ("knn", 0.5, lambda given: given["temperature"]),
    "linear_config": ("linear", {"epochs": 7}, lambda given: {"epochs": given["config"].epochs}),
    "finetune_config": ("finetune", {"epochs": 7}, lambda given: {"epochs": given["config"].epochs}),
    "logging_steps": ("finetune", 7, lambda given: given["arguments"]["logging_steps"]),
    "report_to": ("finetune", ["trackio"], lambda given: given["arguments"]["report_to"]),
    "num_workers": ("finetune", 2, lambda given: given["arguments"]["dataloader_num_workers"]),
    "mixed_precision": ("finetune", "bf16", lambda given: "bf16" if given["arguments"]["bf16"] else "no"),
}
MEASURES = {"knn": "knn_accuracy", "linear": "linear_probe", "finetune": "finetune"}


@pytest.mark.parametrize("key", EVALUATE)
def test_a_key_of_an_evaluation_acts(key, monkeypatch):
    name, value, find = EVALUATE[key]
    seen: list[dict[str, Any]] = []
    signature = inspect.signature(getattr(evaluate, MEASURES[name]))

    def measure(*args: Any, **kwargs: Any):
        seen.append(signature.bind(*args, **kwargs).arguments)
        return (torch.zeros(1, 2), 0.1) if name == "linear" else {"top1": 0.0, "top5": 0.0}

    monkeypatch.setattr(evaluate, MEASURES[name], measure)
    settings, run = evaluate.EVALUATIONS[name]
    base = EvaluateRecipe(checkpoint="encoder", mixed_precision="no", **SIZES)
    recipes = base, replace(base, **{key: value})
    for recipe in recipes:
        bench: Any = SimpleNamespace(recipe=recipe, encoder=None, processor=None, source=None, validation=None)
        bench.num_classes, bench.arguments = 2, SimpleNamespace(device="cpu", use_cpu=True)
        bench.features = lambda patch_size: (torch.zeros(1, 2), torch.zeros(1), torch.zeros(1, 2), torch.zeros(1))
        run(bench, None, 0, "folder")
    assert find(seen[1]) == value != find(seen[0])
    if key not in ("logging_steps", "report_to", "num_workers"):  # which the accuracy does not depend on
        assert settings(recipes[0]) != settings(recipes[1])

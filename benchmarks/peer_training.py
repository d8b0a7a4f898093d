"""Is a run of ours as accurate as a peer's? MoCo-v3 in the plain loop that a user of lightly writes.

    python -m benchmarks.peer_training RECIPE [key=value ...]

RECIPE is one of ours for MoCo-v3, with `schedule=null`. Heads and momentum update are lightly's where lightly can be
imported, and a transcription otherwise (`benchmarks.peers`). The encoder is transformers' `ViTModel`, which starts at
the weights that ours draws, and the optimizer is torch's AdamW. Ours are the images and their views, the number of
steps that the budget pays for, the settings as functions of progress, and the evaluation.

A run writes into `output_dir` what `benchmarks.speedup` reads of a run, and the encoder into `final/`. One that is
stopped starts from the beginning.
"""

import sys
import time
from argparse import Namespace
from typing import Any, cast

import torch
from torch import nn
from transformers import set_seed

from benchmarks.options import parser_of
from benchmarks.peers import Components, PeerMoCo, peer_components
from hf_accel.evaluation import raw_pixel_features
from hf_accel.objectives import MoCoForPreTraining
from hf_accel.recipe import Recipe, RecipeError, load_recipe
from hf_accel.report import environment
from hf_accel.run_folder import RunFolder
from hf_accel.tasks.setup import build_objective, continue_recipe, load_images, output_of, pretrain_config
from hf_accel.training.accuracy import measure_knn
from hf_accel.training.caching import start_cache
from hf_accel.training.trainer import PretrainTrainer
from hf_accel.training.views import start_views
from hf_accel.utils.clock import cpu_seconds
from hf_accel.utils.errors import fail
from hf_accel.utils.progress import cosine, learning_rate_factor
from hf_accel.utils.writing import write_json, write_text

NEEDED = {
    "task": "pretrain",
    "objective": "moco",
    "schedule": None,
    "gradient_accumulation_steps": 1,
    "max_grad_norm": 0.0,
    "weight_decay_end": None,
    "init_from": None,
    "continue_from": None,
    "torch_compile": False,
    "cost": "analytic",
}
"""Keys of a recipe that the loop does not take, and what they must be."""


class PeerRun:
    """A run of the peer. `source` is a trainer of ours that does not train: it has images, views, plan and settings."""

    def __init__(self, source: PretrainTrainer, components: Components):
        self.source, self.args, self.plan = source, source.args, source.plan
        self.ours: Any = source.objective
        self.peer = make_peer(self.ours, components).to(self.args.device).train()
        self.optimizer = make_optimizer(self.peer, self.args.weight_decay)
        self.history: list[dict[str, Any]] = []
        self.seconds = {"total": 0.0, "evaluation": 0.0}
        self.cpu_seconds = 0.0

    def train(self) -> None:
        start, cpu_start = time.perf_counter(), cpu_seconds()
        start_cache(self.source)
        start_views(self.source)
        points = list(self.args.eval_points)
        if 0.0 in points:
            self.evaluate(0)
        for batch in self.source.get_train_dataloader():
            step = batch["step"]
            loss = self.take_step(step, batch)
            done, before = (self.plan.share_done(number) + 1e-12 for number in (step + 1, step))
            if step % int(self.args.logging_steps) == 0:
                self.note(step + 1, loss=float(loss))
            if any(before < point <= done for point in points):
                self.evaluate(step + 1)
        self.seconds["total"] += time.perf_counter() - start
        self.cpu_seconds += cpu_seconds() - cpu_start

    def take_step(self, step: int, batch: dict[str, Any]) -> torch.Tensor:
        args, progress = self.args, self.plan[step].progress
        factor = learning_rate_factor(progress, args.lr_schedule, args.warmup)
        views = self.source.views_of(self.source._prepare_inputs(batch), self.source.view_size(step))
        for group in self.optimizer.param_groups:
            group["lr"] = cast(float, args.learning_rate) * factor
        with torch.autocast(args.device.type, args.autocast_dtype, enabled=args.autocast_dtype is not None):
            loss = self.peer.loss(views)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.peer.update_target(cosine(self.ours.momentum, self.ours.momentum_end, progress))
        return loss.detach()

    def evaluate(self, steps: int) -> None:
        """Measure kNN accuracy. The time of this does not count as training."""
        start, cpu_start = time.perf_counter(), cpu_seconds()
        encoder = cast(nn.Module, self.peer.to_accel_vit()).to(self.args.device)
        self.note(steps, eval_knn_top1=measure_knn(encoder, *self.images(), self.args)["top1"])
        taken = time.perf_counter() - start
        self.seconds["evaluation"] += taken
        self.cpu_seconds -= cpu_seconds() - cpu_start

    def images(self) -> tuple[Any, Any]:
        return self.source.source, self.source.validation

    def note(self, steps: int, **values: float) -> None:
        entry = {"step": steps, "units": self.plan.spent_after(steps), **values}
        print(", ".join(f"{name} {value:g}" for name, value in entry.items()), flush=True)
        self.history.append(entry)

    def results(self, peer: str) -> dict[str, Any]:
        """What results.json holds, by the names of our runs, and the name of the peer."""
        accuracies = {entry["step"]: entry["eval_knn_top1"] for entry in self.history if "eval_knn_top1" in entry}
        steps = self.plan.num_steps
        raw = measure_knn(self.ours.encoder, *self.images(), self.args, features=raw_pixel_features)
        return {
            "peer": peer,
            "knn_top1": accuracies.get(steps),
            "knn_top1_random_init": accuracies.get(0),
            "knn_top1_raw_pixels": raw["top1"],
            "units": self.plan.spent_after(steps),
            "steps": steps,
            "schedule": self.plan.followed().to_list(),
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            **{"view_backend": self.source.view_backend, "cache": self.source.cache},
            "data": self.source.describe_data(),
            "environment": environment(),
        }


def make_peer(ours: MoCoForPreTraining, components: Components) -> PeerMoCo:
    """The peer with the sizes, the temperature and the encoder's weights of our objective. Its heads are drawn."""
    heads = Namespace(projector_hidden_size=ours.settings["projector_hidden_size"])
    return PeerMoCo(ours.encoder, heads, components, ours.settings["projection_size"], ours.temperature)


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay for matrices, and none for biases and norms."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in learning if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in learning if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, fused=True)


def check(recipe: Recipe) -> None:
    """Raises RecipeError for a recipe that asks for more than the loop does."""
    for key, needed in NEEDED.items():
        if getattr(recipe, key) != needed:
            fail(key, getattr(recipe, key), f"the peer's loop needs {key}={needed!r}")
    for mapping, setting in (("objective_config", "symmetric"), ("model_config", "drop_path_rate")):
        if value := getattr(recipe, mapping).get(setting):
            fail(f"{mapping}.{setting}", value, "the peer's loop does not have it; leave it out")


def run(recipe: Recipe) -> None:
    """Train, evaluate and write, unless the run is complete already. Raises RecipeError for what it cannot do."""
    check(recipe)
    continue_recipe(recipe)
    folder = RunFolder(recipe.output_dir)
    if folder.is_complete():
        print(f"This run is complete: {folder.results}")
        return
    output_of(recipe)
    set_seed(recipe.seed)
    images = load_images(recipe)
    source = PretrainTrainer(build_objective(recipe), pretrain_config(recipe), *images, record=recipe.used())
    if not source.has_labels():
        fail("data", recipe.data, "training and validation images need labels, by which the peer is compared")
    write_text(folder.recipe, recipe.to_yaml())
    name, components = peer_components()
    print(f"peer: {name}", flush=True)
    trained = PeerRun(source, components)
    trained.train()
    trained.peer.to_accel_vit().save_pretrained(folder.final)
    cast(Any, source.processing_class).save_pretrained(folder.final)
    write_json(folder.log_history, {"log_history": trained.history})
    with folder.update_results() as written:
        written |= trained.results(name)
    source.end()


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("peer_training", __doc__)
    parser.add_argument("recipe", help="a recipe for MoCo-v3")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override keys of the recipe")
    words = parser.parse_args(arguments)
    try:
        run(load_recipe(words.recipe, words.overrides))
    except RecipeError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`GradientProbe`: the gradient of an objective at fixed parameters, for any draw under any strategy."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import distributed
from ..compression import Compression, Strategy
from ..data import AUGMENTATIONS, ImageSource, TrainSampler, ViewConfig, make_views, train_loader
from ..objectives import Draw, ObjectiveForPreTraining
from ..recipe import Recipe
from ..utils.seeding import generator


class GradientProbe:
    """Flat gradients of the recipe's batch loss; a call leaves the objective bit for bit as it found it.

    Every draw is a batch of the recipe's size, with its own images, views and kept tokens; the same draw has the same
    of each under every strategy. Negatives and BatchNorm statistics are those of that batch. In several processes each
    brings its share of the batch and all get the gradient of the whole.

    Args:
        objective: at the parameters of interest.
        recipe: batch size, accumulation, augmentation, precision and seed.
        source: training images.
        progress: where in training these parameters stand; the objective may depend on it.
    """

    def __init__(
        self,
        objective: ObjectiveForPreTraining,
        recipe: Recipe,
        source: ImageSource,
        progress: float = 0.0,
    ):
        self.objective, self.recipe, self.source, self.progress = objective, recipe, source, progress
        frozen = set(objective.frozen_parameters(progress))
        self.parameters = [p for p in objective.parameters() if p.requires_grad and p not in frozen]
        self.device = next(objective.parameters()).device
        self.precision = recipe.precision()
        self.loss_scale = 2.0**12 if self.precision == torch.float16 else 1.0  # fp16 loses small gradients
        self.base = Strategy(Compression(recipe.patch_size))
        self.seed = generator(recipe.seed, "probe").initial_seed()
        self._views: dict[tuple[int, int], list[list[Tensor]]] = {}

    def __call__(self, strategy: Strategy | None, draw: int) -> Tensor:
        """float32 (D,): the gradient of the draw, uncompressed where `strategy` is None."""
        strategy = strategy or self.base
        buffers = {name: buffer.clone() for name, buffer in self.objective.named_buffers()}
        training, random_state = self.objective.training, torch.get_rng_state()
        cuda_state = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        try:
            return self._gradient(strategy, draw)
        finally:
            with torch.no_grad():
                for name, buffer in self.objective.named_buffers():
                    buffer.copy_(buffers[name])
            self.objective.train(training)
            torch.set_rng_state(random_state)
            if cuda_state is not None:
                torch.cuda.set_rng_state(cuda_state, self.device)

    def _gradient(self, strategy: Strategy, draw: int) -> Tensor:
        self.objective.train()
        micro_batches = self._micro_batches(draw, self.recipe.view_size(strategy))
        total = torch.zeros(sum(parameter.numel() for parameter in self.parameters), device=self.device)
        for micro_step, views in enumerate(micro_batches):
            key = (draw, micro_step, distributed.rank())
            torch.manual_seed(generator(self.seed, "model", *key).initial_seed())
            with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
                loss = self.objective(views, strategy, Draw(self.seed, draw, micro_step), self.progress).loss
            # Not `backward`: engines wait for a step's gradients behind the parameters. One that a strategy does not
            # reach (a projection that is frozen for now) has none: zeros.
            loss = loss.float() * (self.loss_scale / len(micro_batches))
            pieces = torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True)
            total += torch.cat([piece.float().flatten() for piece in pieces])
        return distributed.all_reduce(total) / (distributed.world_size() * self.loss_scale)

    def _micro_batches(self, draw: int, size: int) -> list[list[Tensor]]:
        """The views of each micro-batch; those of the latest draw are kept for the next strategy."""
        if (draw, size) not in self._views:
            self._views = {key: views for key, views in self._views.items() if key[0] == draw}
            self._views[draw, size] = self._make(draw, size)
        return self._views[draw, size]

    def _make(self, draw: int, size: int) -> list[list[Tensor]]:
        recipe, source, world = self.recipe, self.source, distributed.world_size()
        share = recipe.batch_size // (recipe.gradient_accumulation_steps * world)
        # Each draw has an epoch of its own: batches of one epoch share no image, and were not independent.
        step = draw * (len(source) // recipe.batch_size)
        sampler = TrainSampler(
            len(source),
            share,
            world,
            distributed.rank(),
            recipe.gradient_accumulation_steps,
            self.seed,
            first_step=step,
            last_step=step + 1,
        )
        configs: Sequence[ViewConfig] = self.objective.view_configs(AUGMENTATIONS[recipe.augmentation])
        made = []
        pinned = self.device.type != "cpu"
        for batch in train_loader(source, sampler, configs, lambda step: size, 0, self.seed, pinned):
            for name in ("images", "crops"):
                if name in batch:
                    parts = batch[name] if name == "crops" else [batch[name]]
                    there = [part.to(self.device, non_blocking=True) for part in parts]
                    batch[name] = there if name == "crops" else there[0]
            where = (batch["step"], batch["micro_step"], batch["rows"], batch["global_batch"])
            made.append(make_views(batch, configs, size, self.seed, *where, source.mean, source.std))
        return made

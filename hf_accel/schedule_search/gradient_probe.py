"""`GradientProbe`: the gradient of an objective at fixed parameters, for any draw under any strategy."""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from .. import distributed
from ..compression import Compression, Strategy, forward_cost
from ..compression.strategy import check_compression, check_type
from ..data import AUGMENTATIONS, ImageSource, TrainSampler, ViewConfig, image_source, make_views, train_loader
from ..objectives import Draw, ObjectiveForPreTraining
from ..utils.errors import fail
from ..utils.seeding import generator
from .choose import build_grid
from .gradient_error import GradientError, estimate_errors


class GradientProbe:
    """Flat gradients of the loss of a batch; a call leaves the objective bit for bit as it found it.

    Every draw is a batch of the run's size, with its own images, views and kept tokens; the same draw has the same
    of each under every strategy. Negatives and BatchNorm statistics are those of that batch. In several processes each
    brings its share of the batch and all get the gradient of the whole.

    Args:
        objective: at the parameters of interest.
        args: a `PretrainConfig`: batch size, accumulation, augmentation, precision and seed.
        source: training images.
        progress: where in training these parameters stand; the objective may depend on it.
    """

    def __init__(
        self,
        objective: ObjectiveForPreTraining,
        args: Any,
        source: ImageSource,
        progress: float = 0.0,
    ):
        self.objective, self.args, self.source, self.progress = objective, args, source, progress
        frozen = set(objective.frozen_parameters(progress))
        self.parameters = [p for p in objective.parameters() if p.requires_grad and p not in frozen]
        self.device = next(objective.parameters()).device
        self.precision = args.autocast_dtype
        self.loss_scale = 2.0**12 if self.precision == torch.float16 else 1.0  # fp16 loses small gradients
        self.base = Strategy(Compression(objective.config.patch_size))
        self.seed = generator(args.seed, "probe").initial_seed()
        self.configs: Sequence[ViewConfig] = objective.view_configs(AUGMENTATIONS[args.augmentation])
        self._batches: dict[int, list[dict[str, Any]]] = {}
        self._views: dict[int, list[list[Tensor]]] = {}

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
        matched = self.args.view_resolution == "matched"
        size = self.objective.matched_view_size(strategy) if matched else self.objective.config.image_size
        micro_batches = self._micro_batches(draw, size)
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
        if draw not in self._batches:
            self._batches, self._views = {draw: self._load(draw)}, {}
        if size not in self._views:
            self._views[size] = [self._make(batch, size) for batch in self._batches[draw]]
        return self._views[size]

    def _make(self, batch: dict[str, Any], size: int) -> list[Tensor]:
        where = (batch["step"], batch["micro_step"], batch["rows"], batch["global_batch"])
        return make_views(batch, self.configs, size, self.seed, *where, self.source.mean, self.source.std)

    def _load(self, draw: int) -> list[dict[str, Any]]:
        """The micro-batches of a draw. Crops are cut once, for full views, of which smaller ones are made."""
        args, source, world = self.args, self.source, distributed.world_size()
        share = args.batch_size // (args.gradient_accumulation_steps * world)
        # Each draw has an epoch of its own: batches of one epoch share no image, and were not independent.
        step = draw * (len(source) // args.batch_size)
        among = (share, world, distributed.rank(), args.gradient_accumulation_steps)
        sampler = TrainSampler(len(source), *among, self.seed, first_step=step, last_step=step + 1)
        size, pinned = self.objective.config.image_size, self.device.type != "cpu"
        loader = train_loader(source, sampler, self.configs, lambda step: size, 0, self.seed, pinned)
        return [cast(Any, send_to_device(batch, self.device, non_blocking=True)) for batch in loader]


def estimate_gradient_errors(
    model: ObjectiveForPreTraining,
    args: Any,
    train_dataset: Any,
    strategies: Sequence[Strategy] | None = None,
    draws: int = 16,
    progress: float = 0.0,
    max_bytes: float = 4e9,
) -> dict[Strategy, GradientError]:
    """
    Estimate how wrong the gradients under each strategy are, at the present parameters of a model.

    Args:
        model: A model such as [`MoCoForPreTraining`], on the device to compute on. It stays bit for bit as it is.
        args ([`PretrainConfig`]): Batch size, augmentation, precision and seed.
        train_dataset: As that of a [`PretrainTrainer`].
        strategies (*optional*): Default: every possible patch size, with a token dropout of 0, 0.25, 0.5 and 0.75.
        draws: Paired gradients, at least 3. The intervals shrink with their number.
        progress: Share of the budget at which the parameters stand.
        max_bytes: Memory for sums of gradients. Less of it costs more passes.

    Returns:
        A [`GradientError`] for each strategy: squared bias, variance, cost-adjusted mean squared error and gain, with
        intervals of 95%.

    Raises:
        SettingError: progress outside of [0, 1].

    Example:
        >>> errors = estimate_gradient_errors(model, config, photos)
        >>> best = min(errors, key=lambda strategy: errors[strategy].ca_mse)
    """
    if not 0 <= progress <= 1:
        fail("progress", progress, "must lie in [0, 1], as the share of the budget at which the parameters stand")
    config = model.config
    source = image_source(train_dataset, "train_dataset", num_channels=config.num_channels)
    base = Strategy(Compression(config.patch_size))
    if strategies is None:
        strategies = build_grid(config.image_size, config.patch_size, [0.0, 0.25, 0.5, 0.75])
    for strategy in strategies:
        check_type("strategies", strategy, Strategy, "; write Strategy(Compression(patch_size))")
        for compression in (strategy.online, strategy.target_branch):
            check_compression(compression, config.image_size, config.patch_size)
    units = partial(model.units_per_image, forward_cost=partial(forward_cost, config))
    cost = {strategy: units(strategy) / units(base) for strategy in strategies}
    probe = GradientProbe(model, args, source, progress)
    return estimate_errors(probe, cost, range(draws), max_bytes, uncompressed=base)

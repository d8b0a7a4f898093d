"""DINO: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (arXiv 2104.14294)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from ..compression.cost import ForwardCost
from ..compression.strategy import Compression, Strategy
from ..data import ViewConfig
from ..distributed import all_reduce
from ..distributed.sharding import clip_each, drop_gradients
from ..models import AccelViTConfig, AccelViTModel
from ..utils.progress import cosine, linear
from .base import Draw, ObjectiveForPreTraining, ObjectiveOutput, check_range, embedding_std, keep_default_init
from .heads import PrototypeHead
from .momentum import copy_to_target, update_momentum

TOLERANCE = 0.02
"""How near to ln K or 0, relative to ln K, a loss or an entropy counts as being there."""

FREEZE = "a longer freeze_last_layer"
"""Helps against collapse (arXiv 2104.14294, section 5.3, and notes in its code)."""


def dino_loss(
    student_logits: Sequence[torch.Tensor],
    teacher_logits: Sequence[torch.Tensor],
    center: torch.Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> torch.Tensor:
    """Cross-entropy of the student against the teacher, over all pairs of different views (arXiv 2104.14294, eq. 3).

    Args:
        student_logits: one (N, K) a view; the first ones are the teacher's views.
        teacher_logits: one (N, K) a global view; no gradient flows into them.
        center: (K,) or (1, K), subtracted from the teacher's logits.
        student_temperature, teacher_temperature: both > 0.

    Returns:
        Scalar: the mean over pairs and images of -sum_k p_teacher log p_student.
    """
    with torch.autocast(student_logits[0].device.type, enabled=False):
        targets = teacher_probabilities(teacher_logits, center, teacher_temperature)
        predictions = [nn.functional.log_softmax(_full(s) / student_temperature, dim=-1) for s in student_logits]
        pairs = [
            -(target * prediction).sum(dim=-1).mean()
            for i, target in enumerate(targets)
            for j, prediction in enumerate(predictions)
            if i != j
        ]
        return torch.stack(pairs).mean()


@torch.no_grad()
def teacher_probabilities(
    teacher_logits: Sequence[torch.Tensor], center: torch.Tensor, temperature: float
) -> list[torch.Tensor]:
    """Centred and sharpened: one (N, K) a view."""
    return [nn.functional.softmax((_full(t) - center) / temperature, dim=-1) for t in teacher_logits]


def _full(logits: torch.Tensor) -> torch.Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


class DINOForPreTraining(ObjectiveForPreTraining):
    """Student against a teacher that is the average of the students before it; `encoder` is the teacher's.

    Args:
        config: the encoder's. Its stochastic depth acts in the student only.
        num_prototypes, head_hidden_size, bottleneck_size: widths of the head.
        norm_last_layer: prototypes of length 1; false lets their lengths learn, which the original does for ViT-S.
        student_temperature: of the student's softmax.
        teacher_temperature, teacher_temperature_start, teacher_temperature_warmup: the teacher's rises along a line
            from its start over this part of progress.
        center_momentum: weight kept by the centre of the teacher's logits at each step.
        momentum, momentum_end: weight kept by the teacher, from progress 0 to 1 along a cosine.
        freeze_last_layer: progress up to which the prototypes stay as they are.
        clip_grad: largest norm of each parameter's own gradient; 0 leaves gradients alone.
        num_local_crops, local_crop_size: small crops for the student, and their side in pixels.
        local_crop_scale, global_crop_scale: areas of crops where there are local ones; else the augmentation's.

    Example:
        >>> set_seed(0)  # of transformers; the first weights are drawn here
        >>> model = DINOForPreTraining(vit_tiny(), num_local_crops=4)
    """

    name, display_name = "dino", "DINO"
    citation = """
@inproceedings{caron2021emerging,
  title     = {Emerging Properties in Self-Supervised Vision Transformers},
  author    = {Caron, Mathilde and Touvron, Hugo and Misra, Ishan and J{\'e}gou, Herv{\'e} and Mairal, Julien and
               Bojanowski, Piotr and Joulin, Armand},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2021}
}"""
    base_learning_rate = 5e-4  # main_dino.py of the original code

    def __init__(
        self,
        config: AccelViTConfig,
        num_prototypes: int = 65536,
        head_hidden_size: int = 2048,
        bottleneck_size: int = 256,
        norm_last_layer: bool = True,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        teacher_temperature_start: float = 0.04,
        teacher_temperature_warmup: float = 0.3,
        center_momentum: float = 0.9,
        momentum: float = 0.996,
        momentum_end: float = 1.0,
        freeze_last_layer: float = 0.01,
        clip_grad: float = 3.0,
        num_local_crops: int = 0,
        local_crop_size: int = 96,
        local_crop_scale: tuple[float, float] = (0.05, 0.4),
        global_crop_scale: tuple[float, float] = (0.4, 1.0),
    ):
        super().__init__(config)
        widths = {"head_hidden_size": head_hidden_size, "bottleneck_size": bottleneck_size}
        check_range(1, num_prototypes=num_prototypes, **widths, local_crop_size=local_crop_size)
        check_range(1e-6, student_temperature=student_temperature, teacher_temperature=teacher_temperature)
        check_range(1e-6, teacher_temperature_start=teacher_temperature_start)
        check_range(0, 1, teacher_temperature_warmup=teacher_temperature_warmup, freeze_last_layer=freeze_last_layer)
        check_range(0, 1, center_momentum=center_momentum, momentum=momentum, momentum_end=momentum_end)
        check_range(0, clip_grad=clip_grad, num_local_crops=num_local_crops)
        for name, (low, high) in {"local_crop_scale": local_crop_scale, "global_crop_scale": global_crop_scale}.items():
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name}={[low, high]} must be two areas in (0, 1], the smaller one first")
        if num_local_crops and local_crop_size % config.patch_size:
            raise ValueError(f"local_crop_size={local_crop_size} is no multiple of the patch size {config.patch_size}")
        self.student_temperature, self.center_momentum = student_temperature, center_momentum
        self.teacher_temperatures = teacher_temperature_start, teacher_temperature, teacher_temperature_warmup
        self.momentum, self.momentum_end = momentum, momentum_end
        self.freeze_last_layer, self.clip_grad = freeze_last_layer, clip_grad
        self.num_local_crops, self.local_crop_size = num_local_crops, local_crop_size
        self.local_crop_scale, self.global_crop_scale = local_crop_scale, global_crop_scale
        sizes = (config.hidden_size, head_hidden_size, bottleneck_size, num_prototypes, norm_last_layer)
        self.student_encoder, self.student_head = AccelViTModel(config), PrototypeHead(*sizes)
        self.encoder, self.teacher_head = AccelViTModel(config), PrototypeHead(*sizes)
        keep_default_init(self.student_head, self.teacher_head)
        self.register_buffer("center", torch.zeros(1, num_prototypes))
        # Of this step's micro-batches; the centre moves with the weights, after the optimizer step.
        self.register_buffer("center_sum", torch.zeros(1, num_prototypes), persistent=False)
        self.register_buffer("center_rows", torch.zeros(()), persistent=False)
        self.post_init()
        copy_to_target(self.encoder, self.student_encoder)
        copy_to_target(self.teacher_head, self.student_head)

    def view_configs(self, augmentation: Sequence[ViewConfig]) -> list[ViewConfig]:
        """Two global crops, then the local ones, with the probabilities of the original's (its appendix and code)."""
        if not self.num_local_crops:
            return list(augmentation[:2])
        global_crops = [replace(config, crop_scale=tuple(self.global_crop_scale)) for config in augmentation[:2]]
        scale, size = cast(tuple[float, float], tuple(self.local_crop_scale)), self.local_crop_size
        # As many pixels of blur as in a global crop: the original's does not shrink with the crop.
        low, high = (sigma * self.config.image_size / size for sigma in augmentation[0].blur_sigma)
        blur = {"blur": 0.5, "blur_sigma": (low, high)}
        local = replace(augmentation[0], crop_scale=scale, solarize=0.0, size=size, **blur)
        return [*global_crops, *([local] * self.num_local_crops)]

    def forward(
        self, views: list[torch.Tensor], strategy: Strategy, draw: Draw, progress: float = 0.0
    ) -> ObjectiveOutput:
        teacher_logits = self.teacher(views[:2], strategy, draw)
        features = [*self.encode_views(self.student_encoder, views[:2], strategy.online, draw, "student")]
        if len(views) > 2:
            local, size = self.local_compression(strategy), self.local_crop_size
            features += self.encode_views(self.student_encoder, views[2:], local, draw, "local", size)
        student_logits = self.student_head(torch.cat(features)).chunk(len(views))
        temperature, center = self.teacher_temperature(progress), cast(torch.Tensor, self.center)
        loss = dino_loss(student_logits, teacher_logits, center, self.student_temperature, temperature)
        probabilities = torch.cat(teacher_probabilities(teacher_logits, center, temperature))
        marginal = probabilities.mean(dim=0)
        entropy, marginal_entropy = (
            -(p * p.clamp(min=1e-30).log()).sum(dim=-1).mean() for p in (probabilities, marginal)
        )
        metrics = {
            "embedding_std": embedding_std(features[0].detach()),
            "teacher_entropy": entropy,
            # Of the mean over the images: where it falls, too, few prototypes take all of them.
            "teacher_marginal_entropy": marginal_entropy,
            # Every teacher view takes part in equally many pairs: cross-entropy less entropy is the mean divergence.
            "teacher_student_kl": loss.detach() - entropy,
        }
        return ObjectiveOutput(loss=loss, metrics=metrics)

    @torch.no_grad()
    def teacher(self, views: Sequence[torch.Tensor], strategy: Strategy, draw: Draw) -> tuple[torch.Tensor, ...]:
        """Two (B, C, S, S) -> two (B, num_prototypes), which are also noted for the centre."""
        features = self.encode_views(self.encoder, views, strategy.target_branch, draw, "teacher")
        logits = self.teacher_head(torch.cat(features))
        if self.training:
            cast(torch.Tensor, self.center_sum).add_(logits.float().sum(dim=0, keepdim=True))
            cast(torch.Tensor, self.center_rows).add_(len(logits))
        return logits.chunk(2)

    def teacher_temperature(self, progress: float) -> float:
        start, end, warmup = self.teacher_temperatures
        return linear(start, end, min(1.0, progress / warmup) if warmup > 0 else 1.0)

    def local_compression(self, strategy: Strategy) -> Compression:
        return strategy.local or Compression(self.config.patch_size)

    def units_per_image(self, strategy: Strategy, forward_cost: ForwardCost) -> float:
        """3 c(online) + c(target) for each global crop, 3 c(local) for each local one."""
        units = 2 * (3 * forward_cost(strategy.online) + forward_cost(strategy.target_branch))
        if self.num_local_crops:
            units += 3 * self.num_local_crops * forward_cost(self.local_compression(strategy), self.local_crop_size)
        return units

    def before_optimizer_step(self, progress: float) -> None:
        if self.clip_grad > 0:
            clip_each(self.parameters(), self.clip_grad)
        drop_gradients(self.frozen_parameters(progress))

    def skip_warmup(self) -> None:
        """The teacher keeps the temperature that it has come to, and the prototypes learn from the first step on."""
        _, temperature, _ = self.teacher_temperatures
        self.teacher_temperatures, self.freeze_last_layer = (temperature, temperature, 0.0), 0.0

    def frozen_parameters(self, progress: float) -> list[nn.Parameter]:
        return self.student_head.last_layer() if progress < self.freeze_last_layer else []

    @torch.no_grad()
    def update_target(self, progress: float) -> None:
        momentum = cosine(self.momentum, self.momentum_end, progress)
        update_momentum(self.encoder, self.student_encoder, momentum)
        update_momentum(self.teacher_head, self.student_head, momentum)
        total, rows = cast(torch.Tensor, self.center_sum), cast(torch.Tensor, self.center_rows)
        sums, count = all_reduce(total), all_reduce(rows)
        weight = (1 - self.center_momentum) * (count > 0)  # a step without rows leaves the centre, on the device
        cast(torch.Tensor, self.center).lerp_(sums / count.clamp(min=1), weight)
        total.zero_()
        rows.zero_()

    def train(self, mode: bool = True):
        """The teacher stays in eval mode: no stochastic depth."""
        super().train(mode)
        self.encoder.eval()
        return self

    def collapse_symptoms(self, logs: Mapping[str, float]) -> dict[str, tuple[str, str]]:
        """As the base's. The loss of a student, and the entropy of a teacher, that find all prototypes equally likely
        are ln K; a teacher that gives every image the same prototype has no entropy."""
        found, uniform = super().collapse_symptoms(logs), math.log(self.student_head.prototypes.shape[0])
        share = {name: logs[name] / uniform for name in ("loss", "teacher_entropy") if name in logs}
        pinned = [name.replace("_", "'s ") for name, value in share.items() if abs(value - 1) < TOLERANCE]
        if pinned:
            stays = " and ".join(pinned) + (" stays" if len(pinned) == 1 else " stay")
            seen = f"the {stays} at ln(prototypes) = {uniform:.2f}: all prototypes are equally likely"
            found["uniform"] = (seen, f"a lower learning_rate, a lower teacher_temperature_start, {FREEZE}")
        if share.get("teacher_entropy", 1.0) < TOLERANCE:
            remedy = f"a lower learning_rate, a higher teacher_temperature reached later, {FREEZE}"
            found["one"] = (
                "the teacher's entropy stays at 0: one prototype takes every image",
                f"{remedy}; and see that the centre moves (center_momentum below 1)",
            )
        return found

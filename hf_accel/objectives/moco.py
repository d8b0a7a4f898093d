"""MoCo-v3: Chen, Xie, He, "An Empirical Study of Training Self-Supervised Vision Transformers" (arXiv 2104.02057)."""

import torch
from torch import nn

from ..compression.cost import ForwardCost
from ..compression.strategy import Strategy
from ..distributed import all_gather, rank
from ..models import AccelViTConfig, AccelViTModel
from ..utils.progress import cosine
from .base import Draw, ObjectiveForPreTraining, ObjectiveOutput, check_range, embedding_std, keep_default_init
from .heads import mlp
from .momentum import copy_to_target, update_momentum


def contrastive_loss(query: torch.Tensor, key: torch.Tensor, temperature: float) -> torch.Tensor:
    """InfoNCE of each query against the keys of the whole global batch, times 2 T (arXiv 2104.02057, algorithm 1).

    Args:
        query: (N, D), not normalised; carries gradient.
        key: (N, D), not normalised; key[i] is the positive of query[i], every other key of every process a negative. No
            gradient flows into keys gathered from other processes, nor into these.
        temperature: T > 0.

    Returns:
        Scalar: the mean over this process's queries.
    """
    with torch.autocast(query.device.type, enabled=False):
        half = query.dtype in (torch.float16, torch.bfloat16)
        query, key = (query.float(), key.float()) if half else (query, key.to(query.dtype))
        query = nn.functional.normalize(query, dim=1)
        keys = all_gather(nn.functional.normalize(key.detach(), dim=1))
        logits = query @ keys.T / temperature
        labels = torch.arange(len(query), device=query.device) + rank() * len(query)
        return nn.functional.cross_entropy(logits, labels) * (2 * temperature)


class MoCoForPreTraining(ObjectiveForPreTraining):
    """Encoder, projector and predictor against a momentum encoder and projector.

    Args:
        config: the encoder's.
        projector_hidden_size, projection_size: widths of the heads.
        temperature: T of the loss.
        symmetric: also swap the views' roles and add the losses, as the original code does; otherwise one direction,
            as in the accelerated setting of arXiv 2410.22364.
        momentum, momentum_end: weight kept by the momentum encoder, from progress 0 to 1 along a cosine.

    Example:
        >>> set_seed(0)  # of transformers; the first weights are drawn here
        >>> model = MoCoForPreTraining(vit_tiny(), temperature=0.2)
    """

    name, display_name = "moco", "MoCo-v3"
    citation = """
@inproceedings{chen2021empirical,
  title     = {An Empirical Study of Training Self-Supervised Vision Transformers},
  author    = {Chen, Xinlei and Xie, Saining and He, Kaiming},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2021}
}"""
    encoder_defaults = {"freeze_patch_projection": True}  # the stability trick of section 4.2
    base_learning_rate = 1.5e-4  # of the ViTs in CONFIG.md of the original code
    least_batch = 2

    def __init__(
        self,
        config: AccelViTConfig,
        projector_hidden_size: int = 4096,
        projection_size: int = 256,
        temperature: float = 0.2,
        symmetric: bool = False,
        momentum: float = 0.99,
        momentum_end: float = 1.0,
    ):
        super().__init__(config)
        check_range(1, projector_hidden_size=projector_hidden_size, projection_size=projection_size)
        check_range(1e-6, temperature=temperature)
        check_range(0, 1, momentum=momentum, momentum_end=momentum_end)
        self.temperature, self.symmetric = temperature, symmetric
        self.momentum, self.momentum_end = momentum, momentum_end
        self.encoder = AccelViTModel(config)
        self.projector = mlp(3, config.hidden_size, projector_hidden_size, projection_size)
        self.predictor = mlp(2, projection_size, projector_hidden_size, projection_size)
        self.momentum_encoder = AccelViTModel(config)
        self.momentum_projector = mlp(3, config.hidden_size, projector_hidden_size, projection_size)
        keep_default_init(self.projector, self.predictor, self.momentum_projector)
        self.post_init()
        copy_to_target(self.momentum_encoder, self.encoder)
        copy_to_target(self.momentum_projector, self.projector)

    def query(self, view: torch.Tensor, strategy: Strategy, draw: Draw, branch: str) -> torch.Tensor:
        """(B, C, S, S) -> (B, projection_size)."""
        features = self.encode(self.encoder, view, strategy.online, draw, branch)
        return self.predictor(self.projector(features))

    @torch.no_grad()
    def key(self, view: torch.Tensor, strategy: Strategy, draw: Draw, branch: str) -> torch.Tensor:
        """(B, C, S, S) -> (B, projection_size), without gradient."""
        features = self.encode(self.momentum_encoder, view, strategy.target_branch, draw, branch)
        return self.momentum_projector(features)

    def forward(
        self, views: list[torch.Tensor], strategy: Strategy, draw: Draw, progress: float = 0.0
    ) -> ObjectiveOutput:
        first, second = views
        query, key = self.query(first, strategy, draw, "query1"), self.key(second, strategy, draw, "key2")
        loss = contrastive_loss(query, key, self.temperature)
        if self.symmetric:
            other = self.query(second, strategy, draw, "query2")
            loss = loss + contrastive_loss(other, self.key(first, strategy, draw, "key1"), self.temperature)
        return ObjectiveOutput(loss=loss, metrics={"embedding_std": embedding_std(query)})

    def units_per_image(self, strategy: Strategy, forward_cost: ForwardCost) -> float:
        """3 c(online) + c(target); twice that for the symmetric loss."""
        one_direction = 3 * forward_cost(strategy.online) + forward_cost(strategy.target_branch)
        return 2 * one_direction if self.symmetric else one_direction

    def update_target(self, progress: float) -> None:
        momentum = cosine(self.momentum, self.momentum_end, progress)
        update_momentum(self.momentum_encoder, self.encoder, momentum)
        update_momentum(self.momentum_projector, self.projector, momentum)

    def train(self, mode: bool = True):
        """Stochastic depth is for the branch that learns: the momentum encoder stays in eval mode."""
        super().train(mode)
        self.momentum_encoder.eval()
        return self

"""SimCLR: Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual Representations"
(arXiv 2002.05709), as SLIP trains it with a ViT (arXiv 2112.12750).
"""

import torch
from torch import nn

from ..compression.cost import ForwardCost
from ..compression.strategy import Strategy
from ..distributed import all_gather_with_grad, rank
from ..models import AccelViTConfig, AccelViTModel
from .base import Draw, ObjectiveForPreTraining, ObjectiveOutput, check_range, embedding_std, keep_default_init
from .heads import mlp


def nt_xent_loss(a: torch.Tensor, b: torch.Tensor, temperature: float) -> torch.Tensor:
    """NT-Xent (arXiv 2002.05709, equation 1): each view picks its image's other view out of the global batch.

    Args:
        a, b: (N, D) each, the two views of N images, not normalised; both carry gradient.
        temperature: T > 0.

    Returns:
        Scalar: the mean, over this process's 2N anchors, of the cross-entropy against the 2 N_global - 1 other views of
        every process. In fp32 at least, whatever the inputs and the autocast.
    """
    # A view is a negative, or the positive, of anchors in every process, so its gradient is the sum over all their
    # losses: that is what the gather's backward gives. Data parallel training then averages the parameters' gradients
    # over processes, which is the gradient of the mean of their losses, the loss of one process with the whole batch:
    # no factor is missing. (Without gradient through the gather, all that an image does as a negative would be.)
    with torch.autocast(a.device.type, enabled=False):
        views = torch.stack([a, b], dim=1)  # an image's views stand side by side
        if views.dtype in (torch.float16, torch.bfloat16):
            views = views.float()
        views = nn.functional.normalize(views, dim=2)
        anchors, others = views.flatten(0, 1), all_gather_with_grad(views).flatten(0, 1)
        itself = torch.arange(len(anchors), device=anchors.device) + rank() * len(anchors)
        logits = anchors @ others.T / temperature
        logits = logits.scatter(1, itself[:, None], -torch.inf)
        return nn.functional.cross_entropy(logits, itself ^ 1)


class SimCLRForPreTraining(ObjectiveForPreTraining):
    """Encoder and projector; both views learn.

    There is no target branch: what a strategy says of one (`target`) is ignored, both views are encoded under `online`.

    Args:
        config: the encoder's.
        projector_hidden_size, projection_size: widths of the projector.
        temperature: T of the loss.

    Example:
        >>> set_seed(0)  # of transformers; the first weights are drawn here
        >>> model = SimCLRForPreTraining(vit_tiny(), temperature=0.1)
    """

    name, display_name = "simclr", "SimCLR"
    citation = """
@inproceedings{chen2020simple,
  title     = {A Simple Framework for Contrastive Learning of Visual Representations},
  author    = {Chen, Ting and Kornblith, Simon and Norouzi, Mohammad and Hinton, Geoffrey},
  booktitle = {Proceedings of the International Conference on Machine Learning (ICML)},
  year      = {2020}
}"""
    has_target_branch = False
    base_learning_rate = 2e-4  # SLIP's README: 3.2e-3 for 4,096 images
    least_batch = 2

    def __init__(
        self,
        config: AccelViTConfig,
        projector_hidden_size: int = 4096,
        projection_size: int = 256,
        temperature: float = 0.1,
    ):
        super().__init__(config)
        check_range(1, projector_hidden_size=projector_hidden_size, projection_size=projection_size)
        check_range(1e-6, temperature=temperature)
        self.temperature = temperature
        self.encoder = AccelViTModel(config)
        self.projector = mlp(3, config.hidden_size, projector_hidden_size, projection_size, last_norm=False)
        keep_default_init(self.projector)
        self.post_init()

    def forward(
        self, views: list[torch.Tensor], strategy: Strategy, draw: Draw, progress: float = 0.0
    ) -> ObjectiveOutput:
        features = self.encode_views(self.encoder, views, strategy.online, draw, "views")
        # One view at a time, as SLIP does: the BatchNorm's statistics are a view's own.
        first, second = (self.projector(feature) for feature in features)
        loss = nt_xent_loss(first, second, self.temperature)
        return ObjectiveOutput(loss=loss, metrics={"embedding_std": embedding_std(first)})

    def units_per_image(self, strategy: Strategy, forward_cost: ForwardCost) -> float:
        """3 c(online) for each of the two views."""
        return 6 * forward_cost(strategy.online)

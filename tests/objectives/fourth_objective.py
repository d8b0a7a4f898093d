"""An objective that the package does not have, as a user would write one: SimSiam (arXiv 2011.10566)."""

import torch.nn.functional as F
from torch import Tensor

from hf_accel.compression import Strategy
from hf_accel.compression.cost import ForwardCost
from hf_accel.models import AccelViTConfig, AccelViTModel
from hf_accel.objectives import Draw, ObjectiveForPreTraining, ObjectiveOutput
from hf_accel.objectives.base import embedding_std, keep_default_init
from hf_accel.objectives.heads import mlp


class SimSiamForPreTraining(ObjectiveForPreTraining):
    """Each view predicts the projection of the other one, which gets no gradient.

    Args:
        config: the encoder's.
        projector_hidden_size, projection_size: widths of the projector.
        predictor_hidden_size: width of the predictor.
    """

    name, display_name = "simsiam", "SimSiam"
    citation = "@inproceedings{chen2021exploring, title = {Exploring Simple Siamese Representation Learning}}"
    has_target_branch = False
    least_batch = 2

    def __init__(
        self,
        config: AccelViTConfig,
        projector_hidden_size: int = 2048,
        projection_size: int = 2048,
        predictor_hidden_size: int = 512,
    ):
        super().__init__(config)
        self.encoder = AccelViTModel(config)
        self.projector = mlp(3, config.hidden_size, projector_hidden_size, projection_size)
        self.predictor = mlp(2, projection_size, predictor_hidden_size, projection_size, last_norm=False)
        keep_default_init(self.projector, self.predictor)
        self.post_init()

    def forward(self, views: list[Tensor], strategy: Strategy, draw: Draw, progress: float = 0.0) -> ObjectiveOutput:
        one, other = map(self.projector, self.encode_views(self.encoder, views, strategy.online, draw, "views"))
        similarity = [
            F.cosine_similarity(self.predictor(a), b.detach()).mean() for a, b in ((one, other), (other, one))
        ]
        return ObjectiveOutput(loss=-sum(similarity) / 2, metrics={"embedding_std": embedding_std(one)})  # pyright: ignore

    def units_per_image(self, strategy: Strategy, forward_cost: ForwardCost) -> float:
        return 6 * forward_cost(strategy.online)

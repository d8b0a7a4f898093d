"""The peer of `benchmarks.objectives` and `benchmarks.peer_training`: our objectives from lightly's components."""

import copy
import importlib
from abc import abstractmethod
from argparse import Namespace
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import ViTConfig, ViTModel

from hf_accel.models import AccelViTModel
from hf_accel.models.conversion import POSITIONS, with_learned_positions

SIZE, TEMPERATURE, MOMENTUM = 256, 0.2, 0.99
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE, CENTER_MOMENTUM = 0.1, 0.04, 0.9


class PlainComponents:
    """What lightly would give, by plain torch."""

    def head(self, widths: Sequence[int], last_norm: bool) -> nn.Module:
        layers: list[nn.Module] = []
        for before, after in pairwise(widths[:-1]):
            layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
        layers.append(nn.Linear(widths[-2], widths[-1], bias=not last_norm))
        if last_norm:
            layers.append(nn.BatchNorm1d(widths[-1], affine=False))
        return nn.Sequential(*layers)

    def nt_xent(self, temperature: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """SLIP's four blocks of similarities, the diagonal of two of them masked."""

        def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            a, b = nn.functional.normalize(a, dim=1), nn.functional.normalize(b, dim=1)
            labels = torch.arange(len(a), device=a.device)
            itself = nn.functional.one_hot(labels, len(a)) * 1e9
            halves = []
            for one, other in ((a, b), (b, a)):
                logits = torch.cat([one @ other.T / temperature, one @ one.T / temperature - itself], dim=1)
                halves.append(nn.functional.cross_entropy(logits, labels))
            return (halves[0] + halves[1]) / 2

        return loss

    def prototype_head(self, widths: Sequence[int], num_prototypes: int) -> nn.Module:
        return PlainPrototypeHead(widths, num_prototypes)

    def dino_loss(self, num_prototypes: int) -> nn.Module:
        return PlainDINOLoss(num_prototypes)

    @torch.no_grad()
    def update_momentum(self, model: nn.Module, target: nn.Module, momentum: float) -> None:
        for online, kept in zip(model.parameters(), target.parameters(), strict=True):
            kept.mul_(momentum).add_(online, alpha=1 - momentum)


class PlainPrototypeHead(nn.Module):
    """DINO's: the weight-normalised last layer by torch's own parametrisation."""

    def __init__(self, widths: Sequence[int], num_prototypes: int):
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])
        last = nn.Linear(widths[-1], num_prototypes, bias=False)
        self.last_layer: Any = nn.utils.parametrizations.weight_norm(last)
        length = self.last_layer.parametrizations.weight.original0
        nn.init.ones_(length).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last_layer(nn.functional.normalize(self.layers(x), dim=-1))


class PlainDINOLoss(nn.Module):
    """The original's: a loop over pairs of views; the centre moves in the forward."""

    def __init__(self, num_prototypes: int):
        super().__init__()
        self.center: torch.Tensor
        self.register_buffer("center", torch.zeros(1, num_prototypes))

    def forward(self, teacher: list[torch.Tensor], student: list[torch.Tensor]) -> torch.Tensor:
        losses = []
        for i, target in enumerate(teacher):
            probabilities = nn.functional.softmax((target - self.center) / TEACHER_TEMPERATURE, dim=-1)
            for j, logits in enumerate(student):
                if i != j:
                    log = nn.functional.log_softmax(logits / STUDENT_TEMPERATURE, dim=-1)
                    losses.append(-(probabilities * log).sum(dim=-1).mean())
        mean = torch.cat(teacher).mean(dim=0, keepdim=True)
        self.center = self.center * CENTER_MOMENTUM + mean * (1 - CENTER_MOMENTUM)
        return torch.stack(losses).mean()


class LightlyComponents:
    def __init__(self):
        self.heads: Any = importlib.import_module("lightly.models.modules.heads")
        self.loss: Any = importlib.import_module("lightly.loss")
        self.utils: Any = importlib.import_module("lightly.models.utils")

    def head(self, widths: Sequence[int], last_norm: bool) -> nn.Module:
        hidden = [(before, after, nn.BatchNorm1d(after), nn.ReLU()) for before, after in pairwise(widths[:-1])]
        norm = nn.BatchNorm1d(widths[-1], affine=False) if last_norm else None
        return self.heads.ProjectionHead([*hidden, (widths[-2], widths[-1], norm, None)])

    def nt_xent(self, temperature: float) -> nn.Module:
        return self.loss.NTXentLoss(temperature)

    def prototype_head(self, widths: Sequence[int], num_prototypes: int) -> nn.Module:
        return self.heads.DINOProjectionHead(widths[0], widths[1], widths[-1], num_prototypes)

    def dino_loss(self, num_prototypes: int) -> nn.Module:
        return self.loss.DINOLoss(
            num_prototypes,
            teacher_temp=TEACHER_TEMPERATURE,
            student_temp=STUDENT_TEMPERATURE,
            center_momentum=CENTER_MOMENTUM,
        )

    def update_momentum(self, model: nn.Module, target: nn.Module, momentum: float) -> None:
        self.utils.update_momentum(model, target, momentum)


Components = PlainComponents | LightlyComponents


def peer_components() -> tuple[str, Components]:
    """lightly's with their version, or the plain ones with the reason."""
    try:
        components = LightlyComponents()
    except (ImportError, RuntimeError) as error:  # a torchvision made for another torch raises RuntimeError
        return f"plain transcription, for lightly cannot be imported: {error}", PlainComponents()
    return f"lightly {importlib.import_module('lightly').__version__}", components


class Peer(nn.Module):
    """An objective as a user of the peer would write it, on transformers' ViT with the first weights of `ours`."""

    def __init__(self, ours: AccelViTModel, components: Components):
        super().__init__()
        config = self.config = ours.config
        self.components = components
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels")
        same = {name: getattr(config, name) for name in (*sizes, "image_size", "patch_size", "layer_norm_eps")}
        self.encoder = ViTModel(ViTConfig(**same), add_pooling_layer=False)
        self.encoder.load_state_dict(with_learned_positions(config, ours.state_dict())[1])
        self.learns_positions = config.position_embedding_type == "learned"
        self.encoder.embeddings.position_embeddings.requires_grad_(self.learns_positions)
        if config.freeze_patch_projection:
            self.encoder.embeddings.patch_embeddings.requires_grad_(False)

    def features(self, encoder: nn.Module, view: torch.Tensor) -> torch.Tensor:
        tokens = encoder(view).last_hidden_state
        return tokens[:, 1:].mean(dim=1) if self.config.pooling == "mean" else tokens[:, 0]

    def to_accel_vit(self) -> AccelViTModel:
        """Copy the encoder into our class, for our evaluations."""
        state = {k: v for k, v in self.encoder.state_dict().items() if self.learns_positions or k != POSITIONS}
        model = AccelViTModel(self.config)
        model.load_state_dict(state)
        return model

    @abstractmethod
    def loss(self, views: list[torch.Tensor]) -> torch.Tensor: ...

    def update_target(self) -> None:
        """After the optimizer step."""


class PeerSimCLR(Peer):
    def __init__(self, ours: AccelViTModel, args: Namespace, components: Components):
        super().__init__(ours, components)
        width = args.projector_hidden_size
        self.projector = components.head([ours.config.hidden_size, width, width, SIZE], last_norm=False)
        self.nt_xent = components.nt_xent(TEMPERATURE)

    def loss(self, views: list[torch.Tensor]) -> torch.Tensor:
        first, second = (self.projector(self.features(self.encoder, view)) for view in views)
        return self.nt_xent(first, second)


class PeerMoCo(Peer):
    """MoCo-v3, one direction; its loss is the original's (lightly has none for keys of the same batch)."""

    def __init__(
        self,
        ours: AccelViTModel,
        args: Namespace,
        components: Components,
        projection_size: int = SIZE,
        temperature: float = TEMPERATURE,
    ):
        super().__init__(ours, components)
        self.temperature, width = temperature, args.projector_hidden_size
        self.projector = components.head([ours.config.hidden_size, width, width, projection_size], last_norm=True)
        self.predictor = components.head([projection_size, width, projection_size], last_norm=True)
        self.momentum_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def loss(self, views: list[torch.Tensor]) -> torch.Tensor:
        query = self.predictor(self.projector(self.features(self.encoder, views[0])))
        with torch.no_grad():
            key = self.momentum_projector(self.features(self.momentum_encoder, views[1]))
        query, key = nn.functional.normalize(query, dim=1), nn.functional.normalize(key, dim=1)
        labels = torch.arange(len(query), device=query.device)
        return nn.functional.cross_entropy(query @ key.T / self.temperature, labels) * (2 * self.temperature)

    def update_target(self, momentum: float = MOMENTUM) -> None:
        self.components.update_momentum(self.encoder, self.momentum_encoder, momentum)
        self.components.update_momentum(self.projector, self.momentum_projector, momentum)


class PeerDINO(Peer):
    """Two global views; lightly's own example, too, encodes them one after the other."""

    def __init__(self, ours: AccelViTModel, args: Namespace, components: Components):
        super().__init__(ours, components)
        widths = [ours.config.hidden_size, args.projector_hidden_size, args.projector_hidden_size, SIZE]
        self.head = components.prototype_head(widths, args.num_prototypes)
        self.teacher_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.teacher_head = components.prototype_head(widths, args.num_prototypes).requires_grad_(False)
        self.teacher_head.load_state_dict(self.head.state_dict())
        self.dino_loss = components.dino_loss(args.num_prototypes)

    def loss(self, views: list[torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            teacher = [self.teacher_head(self.features(self.teacher_encoder, view)) for view in views]
        student = [self.head(self.features(self.encoder, view)) for view in views]
        return self.dino_loss(teacher, student)

    def update_target(self) -> None:
        self.components.update_momentum(self.encoder, self.teacher_encoder, MOMENTUM)
        self.components.update_momentum(self.head, self.teacher_head, MOMENTUM)


PEERS: dict[str, type[PeerSimCLR] | type[PeerMoCo] | type[PeerDINO]] = {
    "moco": PeerMoCo,
    "simclr": PeerSimCLR,
    "dino": PeerDINO,
}

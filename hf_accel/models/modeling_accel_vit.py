"""PyTorch AccelViT model: a ViT whose sequences can be shortened, by a larger patch and by dropping patch tokens.

Sources: Lin et al., "Accelerating Augmentation Invariance Pretraining" (arXiv 2410.22364); Beyer et al., "FlexiViT"
(arXiv 2212.08013); Chen et al., MoCo-v3 (arXiv 2104.02057). Parameter names are those of transformers' ViT.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack  # pyright: ignore[reportAttributeAccessIssue]
from transformers.utils.generic import TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_accel_vit import AccelViTConfig
from .embeddings_accel_vit import AccelViTEmbeddings, AccelViTPatchProjection
from .shortening_accel_vit import check_patch_size, num_kept_tokens, resize_to_multiple, sample_kept_tokens


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, heads, N, d) each -> output (B, N, heads, d) and weights (B, heads, N, N)."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class AccelViTAttention(nn.Module):
    def __init__(self, config: AccelViTConfig):
        super().__init__()
        self.config = config
        self.num_attention_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False

        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, N, D) -> (B, N, D), and the weights (B, heads, N, N) if the attention implementation returns them."""
        batch_size, length, _ = hidden_states.shape
        heads = (batch_size, length, self.num_attention_heads, self.head_dim)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            self.q_proj(hidden_states).view(heads).transpose(1, 2),
            self.k_proj(hidden_states).view(heads).transpose(1, 2),
            self.v_proj(hidden_states).view(heads).transpose(1, 2),
            None,
            dropout=0.0,
            scaling=self.scaling,
            **kwargs,
        )
        attn_output = attn_output.reshape(hidden_states.shape).contiguous()
        return self.o_proj(attn_output), attn_weights


class AccelViTMLP(nn.Module):
    def __init__(self, config: AccelViTConfig):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class AccelViTLayerScale(nn.Module):
    """A learned factor per channel (arXiv 2103.17239)."""

    def __init__(self, config: AccelViTConfig):
        super().__init__()
        self.lambda1 = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.lambda1


class AccelViTDropPath(nn.Module):
    """Stochastic depth per sample (arXiv 1603.09382): in training a branch is zeroed with probability `drop_prob`."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return hidden_states
        keep_prob = 1 - self.drop_prob
        kept = torch.rand(hidden_states.shape[0], 1, 1, device=hidden_states.device) < keep_prob
        return hidden_states * (kept.to(hidden_states.dtype) / keep_prob)

    def extra_repr(self) -> str:
        return f"p={self.drop_prob}"


class AccelViTLayer(GradientCheckpointingLayer):
    def __init__(self, config: AccelViTConfig, drop_prob: float):
        super().__init__()
        scaled = config.layerscale_value is not None
        self.attention = AccelViTAttention(config)
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = AccelViTMLP(config)
        self.layer_scale1 = AccelViTLayerScale(config) if scaled else nn.Identity()
        self.layer_scale2 = AccelViTLayerScale(config) if scaled else nn.Identity()
        self.drop_path = AccelViTDropPath(drop_prob)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        """(B, N, D) -> (B, N, D)."""
        residual = hidden_states
        hidden_states, _ = self.attention(self.layernorm_before(hidden_states), **kwargs)
        hidden_states = self.drop_path(self.layer_scale1(hidden_states)) + residual

        residual = hidden_states
        hidden_states = self.mlp(self.layernorm_after(hidden_states))
        return self.drop_path(self.layer_scale2(hidden_states)) + residual


class AccelViTPreTrainedModel(PreTrainedModel):
    """Base class of the models. A model that holds an encoder calls it `encoder`; `AutoModel` finds it by this name."""

    config: AccelViTConfig
    config_class = AccelViTConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # pyright: ignore[reportAssignmentType]
    supports_gradient_checkpointing = True
    _no_split_modules = ["AccelViTEmbeddings", "AccelViTLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": AccelViTLayer, "attentions": AccelViTAttention}
    _input_embed_layer = "patch_embeddings"
    # A training checkpoint also holds heads and other branches, under names that its objective chooses. The report on
    # loading need not list these. It always lists weights that are missing or have another shape.
    _keys_to_ignore_on_load_unexpected = [r"^(?!(encoder|embeddings|layers|layernorm|classifier)\.)"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as MoCo-v3: Xavier uniform (the patch kernel as a Linear of its pixels), and CLS close to zero."""
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, AccelViTPatchProjection):
            bound = math.sqrt(6 / (module.weight[0].numel() + module.weight.shape[0]))
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, AccelViTLayerScale):
            init.constant_(module.lambda1, float(self.config.layerscale_value or 0.0))
        elif isinstance(module, AccelViTEmbeddings):
            if module.cls_token is not None:
                init.normal_(module.cls_token, std=1e-6)
            for parameter in (module.register_tokens, module.position_embeddings):
                if parameter is not None:
                    init.trunc_normal_(parameter, std=self.config.initializer_range)

    def initialize_weights(self) -> None:
        """Also freeze the patch projection. `from_pretrained` calls this last, after it has replaced the parameters."""
        super().initialize_weights()
        if self.config.freeze_patch_projection:
            for module in self.modules():
                if isinstance(module, AccelViTPatchProjection):
                    module.requires_grad_(False)


class AccelViTModel(AccelViTPreTrainedModel):
    """The encoder. `patch_size` and `token_dropout` shorten the sequence of a call, in train and eval mode alike.

    Example:
        >>> encoder = AccelViTModel(vit_tiny()).eval()
        >>> encoder(torch.zeros(1, 3, 224, 224), patch_size=32).last_hidden_state.shape  # CLS and 7 x 7 patches
        torch.Size([1, 50, 192])
    """

    def __init__(self, config: AccelViTConfig):
        super().__init__(config)
        self.embeddings = AccelViTEmbeddings(config)
        # These are plain numbers, because a torch.linspace would be on the meta device in from_pretrained.
        steps = max(config.num_hidden_layers - 1, 1)
        drop_probs = [config.drop_path_rate * layer / steps for layer in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList([AccelViTLayer(config, drop_prob) for drop_prob in drop_probs])
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        patch_size: int | None = None,
        token_dropout: float = 0.0,
        generator: torch.Generator | None = None,
        kept_tokens: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            Normalised images of any size. Sides that `patch_size` does not divide are resized to the nearest multiple.
        patch_size (`int`, *optional*):
            Side of a patch in pixels. `None` means `config.default_patch_size`, which `patch_size=` at load time sets,
            or otherwise the base patch size.
        token_dropout (`float`, *optional*, defaults to 0.0):
            Ratio of patch tokens to drop, in [0, 1). CLS and registers stay.
        generator (`torch.Generator`, *optional*):
            Draws the tokens that are kept. `None` means the default generator of the pixels' device.
        kept_tokens (`torch.Tensor` of shape `(batch_size, K)`, *optional*):
            Indices of the patch tokens to keep, in place of a draw. They are no part of a compiled graph, so a call
            with them is one graph.
        output_hidden_states, output_attentions (`bool`, *optional*):
            Also return the input and the output of every layer, or the attention weights (eager attention has them).

        Returns `last_hidden_state` (batch_size, num_prefix_tokens + kept patch tokens, hidden_size) after the last
        LayerNorm, and `pooler_output` (batch_size, hidden_size).

        Raises `ValueError` if `patch_size` or `token_dropout` is impossible.
        """
        pixel_values, patch_size = self.fit_to_patches(pixel_values, patch_size)
        if kept_tokens is None:
            kept_tokens = self.draw_kept_tokens(pixel_values, patch_size, token_dropout, generator)
        return self.encode(pixel_values, patch_size, kept_tokens, **kwargs)

    def draw_kept_tokens(
        self,
        pixel_values: torch.Tensor,
        patch_size: int,
        token_dropout: float,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor | None:
        """Draw the `kept_tokens` of `forward`, (batch_size, K) for pixels that fit the patches; None keeps all."""
        num_patches = (pixel_values.shape[-2] // patch_size) * (pixel_values.shape[-1] // patch_size)
        if token_dropout == 0 or num_kept_tokens(num_patches, token_dropout) == num_patches:
            return None
        return sample_kept_tokens(pixel_values.shape[0], num_patches, token_dropout, generator, pixel_values.device)

    def fit_to_patches(self, pixel_values: torch.Tensor, patch_size: int | None) -> tuple[torch.Tensor, int]:
        """Return the pixels in the dtype of the weights or of autocast, and the patch size, which divides their sides.

        Pixels that are in autocast's dtype already stay so, as the projection casts to it.
        """
        if patch_size is None:
            patch_size = self.config.default_patch_size or self.config.patch_size
        patch_size = check_patch_size(patch_size)
        device = pixel_values.device.type
        if not (torch.is_autocast_enabled(device) and pixel_values.dtype == torch.get_autocast_dtype(device)):
            pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        return resize_to_multiple(pixel_values, patch_size), patch_size

    # A generator breaks a compiled graph. This method is apart from `forward` so that the break lies outside of the
    # capturing of outputs. Inside, it would break the graph again at every layer.
    @capture_outputs(tie_last_hidden_states=False)
    def encode(
        self,
        pixel_values: torch.Tensor,
        patch_size: int,
        kept_tokens: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """`forward` for given kept tokens (batch_size, K), or all of them, and for sides that `patch_size` divides."""
        hidden_states = self.embeddings(pixel_values, patch_size, kept_tokens)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        sequence_output = self.layernorm(hidden_states)
        if self.config.pooling == "cls":
            pooled_output = sequence_output[:, 0]
        else:
            pooled_output = sequence_output[:, self.config.num_prefix_tokens :].mean(dim=1)
        return BaseModelOutputWithPooling(last_hidden_state=sequence_output, pooler_output=pooled_output)


class AccelViTForImageClassification(AccelViTPreTrainedModel):
    """The encoder with a linear classifier on its pooled output.

    Example:
        >>> classifier = AccelViTForImageClassification(vit_tiny(num_labels=10))
        >>> classifier(torch.zeros(1, 3, 224, 224)).logits.shape
        torch.Size([1, 10])
    """

    def __init__(self, config: AccelViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels or 0
        self.encoder = AccelViTModel(config)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels) if self.num_labels else nn.Identity()
        self.post_init()

    def loss_of(
        self,
        labels: torch.Tensor,
        logits: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """The loss, as a mean over `num_items_in_batch` labels, which are those of all micro-batches of a step.

        transformers' losses for several labels and for regression are means over the labels that they get. A Trainer
        that passes the number adds up the losses of the micro-batches and does not divide again.
        """
        if num_items_in_batch is None:
            return self.loss_function(labels, logits, self.config, **kwargs)
        if labels.is_floating_point():
            return self.loss_function(labels, logits, self.config, **kwargs) * (labels.numel() / num_items_in_batch)
        return self.loss_function(labels, logits, self.config, num_items_in_batch=num_items_in_batch, **kwargs)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        patch_size: int | None = None,
        token_dropout: float = 0.0,
        generator: torch.Generator | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        r"""
        labels (`torch.Tensor` of shape `(batch_size,)`, *optional*):
            Classes; `loss` is their cross-entropy, or what `config.problem_type` says. Several labels per image, and
            values of a regression, are floating-point numbers of shape `(batch_size, num_labels)`.

        The other arguments are those of [`AccelViTModel`].
        """
        outputs: BaseModelOutputWithPooling = self.encoder(pixel_values, patch_size, token_dropout, generator, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_of(labels, logits, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class AccelViTBackbone(BackboneMixin, AccelViTModel):
    """The encoder as a backbone of detectors and segmentation models, with the output of chosen layers as feature maps.

    Its weights are those of an [`AccelViTModel`] under the same names.

    Example:
        >>> backbone = AccelViTBackbone(vit_tiny(out_features=["stage6", "stage12"]))
        >>> [tuple(maps.shape) for maps in backbone(torch.zeros(1, 3, 224, 224)).feature_maps]
        [(1, 192, 14, 14), (1, 192, 14, 14)]
    """

    def __init__(self, config: AccelViTConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self, pixel_values: torch.Tensor, patch_size: int | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BackboneOutput:
        r"""
        The arguments are those of [`AccelViTModel`], except that no token can be dropped from a map.

        Returns `feature_maps`: for each stage in `config.out_features` (`"stem"`, what enters the first layer, or
        `"stage1"`, the output of the first layer, and so on) its patch tokens after the last LayerNorm, (batch_size,
        hidden_size, height / patch_size, width / patch_size).
        """
        pixel_values, patch_size = self.fit_to_patches(pixel_values, patch_size)
        grid = (pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size)
        outputs: Any = self.encode(pixel_values, patch_size, **kwargs)
        feature_maps = tuple(
            self.layernorm(hidden_state)[:, self.config.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)
            for stage, hidden_state in zip(self.stage_names, outputs.hidden_states, strict=True)
            if stage in self.out_features
        )
        return BackboneOutput(
            feature_maps=feature_maps, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["AccelViTBackbone", "AccelViTForImageClassification", "AccelViTModel", "AccelViTPreTrainedModel"]

"""Measure an encoder: features, weighted kNN, linear probe, logistic regression, fine-tuning; top-1 and top-5."""

from ..checkpoints import input_of, load_processor, refuse_run_folder
from .embeddings import EmbeddingTable
from .encoders import (
    base_patch_size,
    count_input_channels,
    describe_input,
    load_encoder,
    open_encoder,
    processed_loader,
    processor_for,
    takes_patch_size,
    weights_digest,
)
from .features import encoding, extract_features, raw_pixel_features
from .finetune import FineTuneConfig, NotFineTunable, finetune
from .knn import knn_accuracy, knn_predict
from .linear import LinearConfig, linear_probe, logistic_regression
from .metrics import TopKAccuracy, topk_accuracy, topk_hits
from .ridge import ridge_accuracy
from .spectrum import alpha_req, lidar, measure_spectrum, rank_me

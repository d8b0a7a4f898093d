"""How good the features of an encoder are: extraction, weighted kNN, top-1 and top-5 accuracy."""

from .features import extract_features, raw_pixel_features
from .knn import knn_accuracy, knn_predict
from .metrics import TopKAccuracy, topk_accuracy

__all__ = [
    "TopKAccuracy",
    "extract_features",
    "knn_accuracy",
    "knn_predict",
    "raw_pixel_features",
    "topk_accuracy",
]

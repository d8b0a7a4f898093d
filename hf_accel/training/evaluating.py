"""The part of `PretrainTrainer` that evaluates: what it measures of the encoder, and when a stop puts that off."""

import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn, cast

import torch

from ..compression import Compression, Plan, Strategy
from ..data import ViewConfig
from ..distributed.stopping import Stopped
from ..evaluation import lidar
from ..utils.clock import cpu_seconds
from .accuracy import Samples, choose_samples, measure_encoder, measure_knn
from .saving import SavingTrainer
from .view_features import encode_views


class EvaluatingTrainer(SavingTrainer):
    """A Trainer that measures the exported encoder, and counts the time of this apart from that of training."""

    plan: Plan
    view_configs: Sequence[ViewConfig]
    evaluation_due: bool
    seconds: dict[str, float]
    _cpu_before: float
    _window: tuple[float, int, float, float]

    def has_labels(self) -> bool:
        """Whether kNN accuracy can be measured."""
        return all(images is not None and images.labels is not None for images in (self.source, self.validation))

    def measure_encoder(self, encoder: Any) -> dict[str, float]:
        """Return what an evaluation of this run measures of an encoder."""
        samples = self._choose_samples(encoder)
        with torch.compiler.set_stance("force_eager"):  # its shapes are not worth a compilation
            found = measure_encoder(encoder, self.source, self.validation, self.args, samples.rank_me)
            if samples.lidar:
                rows, to_device = self.source.sample(samples.lidar), cast(Any, self._prepare_inputs)
                features = encode_views(encoder, self.source, rows, self.view_configs, self.args, to_device)
                with suppress(ValueError):  # of an encoder that has collapsed or diverged
                    found["lidar"] = lidar(features)
        return found

    def _choose_samples(self, encoder: Any) -> Samples:
        uncompressed = self.plan.units_per_image(Strategy(Compression(encoder.config.patch_size)))
        affordable = self.plan.budget / uncompressed
        evaluations = len({*self.args.eval_points, *([0.0] if self.objective.config.init_from else [])})
        return choose_samples(encoder.config.hidden_size, len(self.source), evaluations, affordable)

    def measure_accuracy(self, encoder: Any) -> dict[str, float]:
        """Return the kNN accuracies "top1" and "top5" of an encoder. Deprecated: `measure_encoder` measures more."""
        instead = "use measure_encoder(), which returns them as knn_top1 and knn_top5"
        warnings.warn(f"measure_accuracy() is deprecated and will be removed: {instead}", FutureWarning, stacklevel=2)
        with torch.compiler.set_stance("force_eager"):
            return measure_knn(encoder, self.source, cast(Any, self.validation), self.args)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """RankMe and alpha-ReQ of the exported encoder and, with labels, its kNN and linear accuracy, as fractions.

        LiDAR comes with them where the budget pays for its views.

        After a stop there is nothing, either, and the launch that resumes evaluates first of all.

        Raises:
            Stopped: the stop came before the first step of this launch, so that there is nothing to save.
            TypeError: images are passed, which would not be those that are measured.
        """
        if eval_dataset is not None:
            raise TypeError(
                "evaluate() measures the eval_dataset that the trainer was made with: pass other images to a "
                "PretrainTrainer of their own, or measure a saved encoder by hf-accel evaluate"
            )
        start, cpu_start = time.perf_counter(), cpu_seconds()
        metrics: dict[str, float] = {}
        self.evaluation_due = False
        try:
            measured = self.measure_encoder(self.whole_objective().encoder)
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
            if metrics:
                self.log(dict(metrics))
        except Stopped:
            if self.state.global_step == self._first_step:
                raise
            self.stopped = self.evaluation_due = True
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.stopped:
            self.control.should_save = self.control.should_training_stop = True
        taken = time.perf_counter() - start
        self.seconds["evaluation"] += taken
        self._cpu_before -= cpu_seconds() - cpu_start
        self._window = (self._window[0] + taken, *self._window[1:])
        return metrics

    def predict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse what the model cannot do: raises TypeError."""
        raise TypeError(
            "predict(): an encoder in pretraining predicts nothing. evaluate() measures it; for the features of images "
            "save it by save_model(FOLDER), and use hf-accel embed checkpoint=FOLDER data=IMAGES, or AutoModel"
        )

"""A collapse that lasts is reported once, with its kind and a remedy."""

import logging
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hf_accel import AccelViTConfig
from hf_accel.objectives import DINOForPreTraining, MoCoForPreTraining
from hf_accel.training.monitoring import FOR_LINES, FOR_PROGRESS, CollapseMonitor

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
CONFIG = AccelViTConfig(image_size=8, patch_size=4, **SIZES)
DINO = DINOForPreTraining(CONFIG, num_prototypes=1024, head_hidden_size=8, bottleneck_size=8)
MOCO = MoCoForPreTraining(CONFIG, projector_hidden_size=8, projection_size=8)
UNIFORM = math.log(1024)
HEALTHY = {"loss": 4.0, "teacher_entropy": 3.0, "teacher_student_kl": 1.0, "embedding_std": 0.5}
COLLAPSED = {
    "loss": ({"loss": UNIFORM * 0.999}, "uniform", "the loss stays"),
    "uniform teacher": ({"teacher_entropy": UNIFORM * 0.995}, "uniform", "teacher's entropy stays at ln"),
    "one prototype": ({"teacher_entropy": 0.01}, "one", "one prototype"),
    "one point": ({"embedding_std": 0.001}, "point", "same embedding"),
}


def feed(monitor: CollapseMonitor, lines: list[dict[str, float]], main: bool = True) -> None:
    state = SimpleNamespace(global_step=7, is_world_process_zero=main)
    for line in lines:
        monitor.on_log(cast(Any, None), cast(Any, state), cast(Any, None), logs=line)


def lasting(line: dict[str, float], lines: int = FOR_LINES, span: float = FOR_PROGRESS) -> list[dict[str, float]]:
    """Log lines like `line`, `span` of progress from the first to the last."""
    return [HEALTHY | line | {"progress": 0.1 + span * number / (lines - 1)} for number in range(lines)]


@pytest.mark.parametrize("line, kind, words", COLLAPSED.values(), ids=COLLAPSED)
def test_a_lasting_symptom_is_reported_once_with_a_remedy(caplog, line, kind, words):
    monitor = CollapseMonitor(DINO.collapse_symptoms)
    feed(monitor, lasting(line)[:-1])
    assert not caplog.records
    feed(monitor, lasting(line)[-1:] + lasting(line))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    text = record.getMessage()
    assert text.startswith("Collapse at step 7 (progress 0.15)") and words in text and "learning_rate" in text
    helps = {"uniform": "teacher_temperature_start", "one": "center_momentum", "point": "freeze_patch_projection"}
    assert [other for other in helps if helps[other] in text] == [kind]


@pytest.mark.parametrize("line", [line for line, *_ in COLLAPSED.values()], ids=COLLAPSED)
def test_a_passing_symptom_is_not_reported(caplog, line):
    few, short = lasting(line, lines=FOR_LINES - 1), lasting(line, span=FOR_PROGRESS * 0.9)
    interrupted = lasting(line, lines=2 * FOR_LINES - 1)
    interrupted[FOR_LINES - 1] |= HEALTHY
    for lines in (few, short, interrupted):
        feed(CollapseMonitor(DINO.collapse_symptoms), lines)
    assert not caplog.records
    feed(CollapseMonitor(DINO.collapse_symptoms), [*lasting({}, lines=50, span=0.9), *lasting(line)])
    assert len(caplog.records) == 1


def test_a_second_kind_is_reported_and_two_share_one_line(caplog):
    monitor = CollapseMonitor(DINO.collapse_symptoms)
    feed(monitor, [*lasting(COLLAPSED["loss"][0]), *lasting(COLLAPSED["one prototype"][0])])
    assert len(caplog.records) == 2
    feed(CollapseMonitor(DINO.collapse_symptoms), lasting(COLLAPSED["loss"][0] | COLLAPSED["one point"][0]))
    assert len(caplog.records) == 3
    text = caplog.records[2].getMessage()
    assert "teacher_temperature_start" in text and "freeze_patch_projection" in text


def test_embeddings_are_watched_without_prototypes(caplog):
    line = {"loss": UNIFORM, "embedding_std": 0.6, "progress": 0.5}
    symptoms = MOCO.collapse_symptoms
    assert symptoms(line) == {} and set(symptoms(line | {"embedding_std": 0.01})) == {"point"}
    feed(CollapseMonitor(symptoms), [{"eval_knn_top1": 0.5, "progress": 0.2}, {}])
    feed(CollapseMonitor(symptoms), [line | {"progress": step / 10} for step in range(10)])
    assert not caplog.records


def test_only_the_main_process_warns(caplog):
    feed(CollapseMonitor(DINO.collapse_symptoms), lasting(COLLAPSED["loss"][0]), main=False)
    assert not caplog.records

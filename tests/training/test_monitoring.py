"""Collapse in log lines: told once, when it lasts, with what it is and what helps."""

import logging
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hf_accel.training.monitoring import FOR_LINES, FOR_PROGRESS, REMEDIES, CollapseMonitor, symptoms

UNIFORM = math.log(1024)
HEALTHY = {"loss": 4.0, "teacher_entropy": 3.0, "teacher_student_kl": 1.0, "embedding_std": 0.5}
COLLAPSED = {
    "loss": ({"loss": UNIFORM * 0.999}, "uniform", "the loss stay"),
    "uniform teacher": ({"teacher_entropy": UNIFORM * 0.995}, "uniform", "teacher's entropy stay at ln"),
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
def test_a_lasting_symptom_is_told_once_with_what_helps(caplog, line, kind, words):
    monitor = CollapseMonitor(UNIFORM)
    feed(monitor, lasting(line)[:-1])
    assert not caplog.records
    feed(monitor, lasting(line)[-1:] + lasting(line))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    text = record.getMessage()
    assert text.startswith("Collapse at step 7 (progress 0.15)") and words in text and REMEDIES[kind] in text
    assert "learning_rate" in text
    assert [other for other in REMEDIES if other != kind and REMEDIES[other] in text] == []


@pytest.mark.parametrize("line", [line for line, *_ in COLLAPSED.values()], ids=COLLAPSED)
def test_what_passes_is_not_told(caplog, line):
    few, short = lasting(line, lines=FOR_LINES - 1), lasting(line, span=FOR_PROGRESS * 0.9)
    interrupted = lasting(line, lines=2 * FOR_LINES - 1)
    interrupted[FOR_LINES - 1] |= HEALTHY
    for lines in (few, short, interrupted):
        feed(CollapseMonitor(UNIFORM), lines)
    assert not caplog.records
    feed(CollapseMonitor(UNIFORM), [*lasting({}, lines=50, span=0.9), *lasting(line)])
    assert len(caplog.records) == 1


def test_a_second_kind_is_told_too_and_two_at_once_in_one_line(caplog):
    monitor = CollapseMonitor(UNIFORM)
    feed(monitor, [*lasting(COLLAPSED["loss"][0]), *lasting(COLLAPSED["one prototype"][0])])
    assert len(caplog.records) == 2
    feed(CollapseMonitor(UNIFORM), lasting(COLLAPSED["loss"][0] | COLLAPSED["one point"][0]))
    assert len(caplog.records) == 3
    assert all(REMEDIES[kind] in caplog.records[2].getMessage() for kind in ("uniform", "point"))


def test_objectives_without_prototypes_have_their_embeddings_watched(caplog):
    line = {"loss": UNIFORM, "embedding_std": 0.6, "progress": 0.5}
    assert symptoms(line) == {} and set(symptoms(line | {"embedding_std": 0.01})) == {"point"}
    feed(CollapseMonitor(), [{"eval_knn_top1": 0.5, "progress": 0.2}, {}])
    feed(CollapseMonitor(), [line | {"progress": step / 10} for step in range(10)])
    assert not caplog.records


def test_one_process_tells(caplog):
    feed(CollapseMonitor(UNIFORM), lasting(COLLAPSED["loss"][0]), main=False)
    assert not caplog.records

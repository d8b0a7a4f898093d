"""What messages call a set of images: its folder, and its split only where there is one or where it was asked for."""

from pathlib import Path
from typing import Any

import pytest

from hf_accel.data import load_sources
from hf_accel.data.labels import describe_labels
from tests.tiny_runs import image_folder


@pytest.fixture(scope="module")
def splits(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp("splits") / "photos", count=12)


def titles(data: Path, *splits: Any) -> list[str]:
    return [source.title for source in load_sources(str(data), *splits) if source is not None]


def test_a_folder_without_splits_is_named_by_itself(splits):
    classes, flat = splits / "train", splits / "train/a"
    assert titles(classes) == [str(classes), f"{classes} (held-out)"]
    assert titles(flat) == [str(flat)]
    assert load_sources(str(flat))[0].name == f"{flat}/train"  # It identifies results, which stay comparable.


def test_splits_are_named_where_they_are_real_or_asked_for(splits):
    assert titles(splits) == [f"{splits}/train", f"{splits}/validation"]
    assert titles(splits, "train[:5]") == [f"{splits} (split train[:5])", f"{splits}/validation"]
    assert titles(splits / "train/a", "train[:2]") == [f"{splits}/train/a (split train[:2])"]


def test_messages_use_the_title_also_of_a_part(splits):
    source: Any = load_sources(str(splits / "train"))[0]
    assert source.take(source.labels >= 0).title == source.renormalised([0] * 3, [1] * 3).title == source.title
    source.labels[0] = -1
    assert f" images of {splits / 'train'} have one" in describe_labels(source, None)

"""benchmarks/data.py at a toy size: all rows, from the same files."""

import json
from typing import Any

import pytest
import torch

from benchmarks import data, view_peers

SIZES = ["--size", "32", "--batch-size", "4", "--repeats", "1", "--device", "cpu", "--threads", "1"]


def test_files_are_those_of_the_dataset_or_synthetic(tmp_path) -> None:
    files = data.synthetic_files(3)
    for number, file in enumerate(files):
        (tmp_path / f"{number}.jpg").write_bytes(file)
    assert data.read_files(str(tmp_path), 4) == [*files, files[0]]
    assert data.read_files(None, 3) == files
    assert data.decode_by_pillow(files[0]).size == (500, 375)


@pytest.mark.parametrize("cached", [False, True])
def test_our_views_are_made_of_the_files(cached: bool) -> None:
    args = data.parse_arguments(SIZES)
    files = data.synthetic_files(4)
    views = data.ours(files, args, cached=cached, fused=False)()
    assert [view.shape for view in views] == [torch.Size([4, 3, 32, 32])] * 2
    assert 0.1 < views[0].std() < 3


@pytest.mark.slow
def test_rows_of_the_benchmark_of_data(tmp_path, capsys, monkeypatch) -> None:
    def missing(*_: Any) -> Any:
        raise ImportError("No module named 'kornia'")

    monkeypatch.setitem(view_peers.PEERS, "kornia", missing)
    output = tmp_path / "data.json"
    assert data.main([*SIZES, "--clock", "process", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == [*data.NAMES[:4], "kornia", "torchvision v2", "albumentations", "pillow"]
    assert rows["kornia"] == {"name": "kornia", "skipped": "No module named 'kornia'"}
    for name in (*data.NAMES[:4], "pillow"):
        assert rows[name]["images_per_second"] == pytest.approx(4 / rows[name]["seconds"])
    assert found["settings"]["clock"] == "process" and "| ours cached fused" in capsys.readouterr().out

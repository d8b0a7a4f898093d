"""benchmarks/views.py at a toy size: all rows, and counts of known operations."""

import json
from typing import Any

import pytest
import torch

from benchmarks import view_peers, views

SIZE, COUNT = 32, 4


def test_operations_and_bytes_are_counted() -> None:
    images, rows, factor = torch.rand(8, 3, 16, 16), torch.tensor([1, 2]), torch.rand(8, 1, 1, 1)
    image = 3 * 16 * 16 * 4

    def work() -> None:
        changed = images * factor  # reads and writes all
        changed.index_select(0, rows)  # reads and writes two
        changed.view(8, -1)  # moves nothing
        factor.add(1)  # no image

    assert views.count_eager(work, image) == (2, 2 * 8 * image + 8 * 4 + 2 * 2 * image)


@pytest.mark.parametrize("name", list(view_peers.PEERS))
def test_peers_make_two_views(name: str) -> None:
    pixels = torch.randint(256, (3, 3, 40, 40), dtype=torch.uint8)
    try:
        device = torch.device("cpu")
        made = view_peers.PEERS[name](SIZE, device)(view_peers.images_for(name, pixels, device))
    except ImportError:
        pytest.skip(f"{name} is not installed")
    for view in made:
        assert view.shape == (3, 3, SIZE, SIZE) and view.dtype == torch.float32
        assert view.abs().max() < 3 and view.std() > 0.1  # normalised by ImageNet's mean and deviation
    assert not torch.equal(*made)


@pytest.mark.slow
def test_rows_of_the_benchmark_of_views(tmp_path, capsys, monkeypatch) -> None:
    def missing(*_: Any) -> Any:
        raise ImportError("No module named 'kornia'")

    monkeypatch.setitem(view_peers.PEERS, "kornia", missing)
    output = tmp_path / "views.json"
    sizes = ["--size", str(SIZE), "--batch-size", str(COUNT), "--repeats", "1", "--device", "cpu", "--threads", "1"]
    assert views.main([*sizes, "--output", str(output)]) == 0
    rows = {row["name"]: row for row in json.loads(output.read_text())["rows"]}
    assert list(rows) == ["ours eager", "ours fused", "kornia", "torchvision v2", "albumentations", "pillow"]
    assert rows["kornia"] == {"name": "kornia", "skipped": "No module named 'kornia'"}
    for name in ("ours eager", "ours fused", "pillow"):
        assert rows[name]["images_per_second"] == pytest.approx(COUNT / rows[name]["seconds"])
    eager, fused = rows["ours eager"], rows["ours fused"]
    assert 0 < fused["launches"] <= 40 < eager["launches"]
    # every view is read as uint8 and written as float, and both crops are
    assert 2 * 3 * SIZE**2 * 9 / 1e6 < fused["megabytes_per_image"] < eager["megabytes_per_image"]
    assert "| ours fused" in capsys.readouterr().out

"""Three short runs on the bundled digits give the losses that were recorded before: no change of the code moved them.

On one machine and one thread they are the same to the last bit. Two threads, or a CPU's older instructions, changed
them by up to 2e-5 of their value.
Where a change is meant to move them, record them again and say in the commit why they moved:
`OMP_NUM_THREADS=1 python -m tests.test_golden_losses` writes tests/golden/losses.json.
"""

import json
import tempfile
from pathlib import Path

import pytest

import hf_accel.run as entry

FOLDER = Path(__file__).parent / "golden"
RECORDED, STEPS = FOLDER / "losses.json", 30
NAMES = ("moco", "simclr", "dino")

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")


def first_losses(name: str, output: Path) -> list[float]:
    """The losses of the first steps of tests/golden/NAME.yaml, run in this process."""
    entry.main([str(FOLDER / f"{name}.yaml"), f"output_dir={output}"])
    history = json.loads((output / "log_history.json").read_text())["log_history"]
    return [line["loss"] for line in history if "loss" in line][:STEPS]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "moco")) for name in NAMES])
def test_a_run_gives_the_losses_that_were_recorded(name, tmp_path):
    losses = first_losses(name, tmp_path / "run")
    assert len(losses) == STEPS
    assert losses == pytest.approx(json.loads(RECORDED.read_text())[name], rel=1e-3)


def record() -> None:
    with tempfile.TemporaryDirectory() as folder:
        losses = {name: first_losses(name, Path(folder) / name) for name in NAMES}
    RECORDED.write_text(json.dumps(losses, indent=1) + "\n")


if __name__ == "__main__":
    record()

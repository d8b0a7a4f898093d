"""A launch of a complete run: an encoder that was removed is written again, or the message says what is lost."""

import shutil
from pathlib import Path

import pytest

from hf_accel.evaluation import weights_digest
from hf_accel.models import AccelViTModel
from tests.tiny_runs import STEPS, launch, read

pytestmark = pytest.mark.usefixtures("own_cache_and_threads", "blank_figures")

DINO = ["objective=dino", "objective_config={head_hidden_size: 32, bottleneck_size: 16, num_prototypes: 32}"]


def contents(path: Path) -> dict[str, bytes]:
    files = {file.name: file.read_bytes() for file in path.iterdir()}
    # This is a note of transformers' Trainer, which has no effect on a loaded encoder.
    return {**files, "config.json": files["config.json"].replace(b'  "use_cache": false,\n', b"")}


@pytest.mark.slow
def test_a_final_that_was_removed_is_written_again(folder, tmp_path, capsys):
    output = launch(folder, tmp_path / "run")
    written, results = contents(output / "final"), read(output / "results.json")
    for lost in ("model.safetensors", None):
        capsys.readouterr()
        shutil.rmtree(output / "final") if lost is None else (output / "final" / lost).unlink()
        launch(folder, output)
        assert f"written again from {output}/checkpoint-{STEPS}" in capsys.readouterr().out
        assert contents(output / "final") == written and read(output / "results.json") == results
    launch(folder, output)
    assert "written again" not in capsys.readouterr().out
    shutil.rmtree(output / "final")
    shutil.rmtree(output / f"checkpoint-{STEPS}")
    lost = rf"its encoder .*final is missing.*checkpoint-{STEPS}: there is no such folder; restore one of them"
    with pytest.raises(SystemExit, match=lost):
        launch(folder, output)


@pytest.mark.slow
def test_the_teacher_is_the_encoder_that_is_written_again(folder, tmp_path):
    output = launch(folder, tmp_path / "run", *DINO)
    shutil.rmtree(output / "final")
    launch(folder, output, *DINO)
    encoder = AccelViTModel.from_pretrained(output / "final")
    assert weights_digest(encoder) == read(output / "results.json")["weights"]


def test_another_budget_of_a_complete_run_names_continue_from(folder, tmp_path):
    output = launch(folder, tmp_path / "run")
    with pytest.raises(SystemExit, match=rf"budget=1024: .*budget=512, which is complete.*continue_from={output} and"):
        launch(folder, output, "budget=1024")

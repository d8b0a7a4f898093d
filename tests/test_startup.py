"""What is answered before torch is imported, which takes seconds, and that `import hf_accel` registers the classes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import runpy, sys
sys.argv = ["hf_accel/run.py", *sys.argv[1:]]
sys.modules["__main__"].__file__ = "hf_accel/run.py"
try:
    runpy.run_path("hf_accel/run.py", run_name="__main__")
except SystemExit as end:
    print("END", end.code)
print("TORCH", "torch" in sys.modules, "TRANSFORMERS", "transformers" in sys.modules)
"""


def run(code: str, *arguments: str) -> str:
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--help"], "neighbours"),
        (["recipes/moco.yaml", "bacth_size=3"], "did you mean 'batch_size'"),
        (["recipes/moco.yaml", "batch_size=many"], "expected int"),
        (["recipes/moco.yaml", "objective=mocko"], "did you mean 'moco'"),
        (["recipes/moco.yaml", "objective_config.temprature=1"], "did you mean 'temperature'"),
        (["recipes/moco.yaml", "model_config.hiden_size=64"], "did you mean 'hidden_size'"),
        (["recipes/moco.yaml", "model_config.hidden_size=wide"], "expected int"),
        (["recipes/moco.yaml", "task=evaluate", "checkpoint=x", "finetune_config.epoch=3"], "did you mean 'epochs'"),
        (["recipes/moco.yaml", "schedule=[{until: 1.0, pach_size: 7}]"], "unknown key 'pach_size'"),
        (["recipes/moco.yaml", "checkpoint=x"], "task=pretrain does not read"),
        (["recipes/mocco.yaml"], "no recipe at"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_wrong_recipe_is_refused_before_torch_is_imported(arguments, answer):
    text = run(SCRIPT, *arguments)
    assert answer in text and text.endswith("TORCH False TRANSFORMERS False\n"), text


@pytest.mark.slow
def test_import_hf_accel_is_enough_for_automodel():
    code = "import hf_accel; from transformers import AutoModel, AutoConfig; print(AutoConfig.for_model('accel_vit')"
    code += ".model_type, hf_accel.AccelViTModel.__name__, AutoModel._model_mapping[hf_accel.AccelViTConfig].__name__)"
    assert run(code) == "accel_vit AccelViTModel AccelViTModel\n"

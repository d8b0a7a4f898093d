"""Launches and loads in processes of their own: HF_ENDPOINT is read once, when huggingface_hub is imported."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.hub.hub_server import TOKEN
from tests.tiny_runs import RECIPE

ROOT = Path(__file__).parents[2]

# huggingface_hub and we wait between attempts, for minutes in all; here each wait is short
LAUNCH = """
import sys, time
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.02))
from hf_accel.run import main
main(sys.argv[1:])
"""


def environment(url: str, home: Path, **changes: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "RANK", "WORLD_SIZE")}
    hub = {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HOME": str(home)}
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_OFFLINE": "1"}
    return {**kept, **hub, **quiet, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **changes}


def start(url: str, data: Path, output: Path, *overrides: str, two: bool = False, **changes: str) -> subprocess.Popen:
    """One launch of the command with push_to_hub; `two`: in two processes; `changes` are of the environment."""
    recipe = output.with_name(output.name + ".yaml")
    values: dict[str, Any] = {**RECIPE, "data": str(data), "output_dir": str(output), "push_to_hub": True}
    recipe.write_text(yaml.safe_dump(values))
    script = output.with_name(output.name + ".py")
    script.write_text(LAUNCH)
    config = ROOT / "accelerate_configs" / "cpu_2proc.yaml"
    launcher = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", str(config)]
    return subprocess.Popen(
        [*(launcher if two else [sys.executable]), str(script), str(recipe), *overrides],
        cwd=output.parent,
        env=environment(url, output.parent / "home", **changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen, status: int = 0) -> str:
    """What it printed, once it has ended, as it should."""
    text, _ = process.communicate(timeout=300)
    assert process.returncode == status, text[-3000:]
    return text


def launch(url: str, data: Path, output: Path, *overrides: str, status: int = 0, **changes: Any) -> str:
    return ended(start(url, data, output, *overrides, **changes), status)


def python(url: str, code: str, folder: Path, **changes: str) -> str:
    """What `code` prints, run in `folder` by someone with an empty cache; `changes` are of the environment."""
    home = folder / "elsewhere"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(url, home, **changes),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

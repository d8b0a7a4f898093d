"""`hf-accel env`: what a bug report should say about the machine."""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.commands.config.config_args import default_config_file

from ..report import environment

VARIABLES = ("ACCELERATE_", "CUDA_", "HF_", "NCCL_", "OMP_", "TORCH", "TRANSFORMERS_")
"""How the names of environment variables begin that change how a run computes."""

SECRETS = ("TOKEN", "KEY", "SECRET", "PASSWORD")


def read_accelerate_config() -> dict[str, Any]:
    """Return what `accelerate launch` takes for granted without options: the file that `accelerate config` wrote."""
    config = Path(default_config_file)
    return yaml.safe_load(config.read_text()) if config.is_file() else {}


def print_environment(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    parser.parse_args(argv)
    found = environment()
    del found["command"]
    found["torch"] = {
        "threads_between_operations": torch.get_num_interop_threads(),
        "accelerator": str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else None,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "distributed": torch.distributed.is_available(),
    }
    found["accelerate"] = read_accelerate_config() or "no default configuration"
    found["variables"] = {
        name: "(set)" if any(word in name for word in SECRETS) else value
        for name, value in sorted(os.environ.items())
        if name.startswith(VARIABLES)
    }
    print(yaml.safe_dump(found, sort_keys=False, width=120), end="")

"""`python -m hf_accel` is the `hf-accel` command."""

from .cli import main

main()

"""Training: the Trainer, its callbacks, and what happens around each step."""

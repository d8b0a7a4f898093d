"""Small modules that know nothing of images or models."""

"""Gradient errors, and the schedules that follow from them."""

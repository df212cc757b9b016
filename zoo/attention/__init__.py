"""Attention backends, one file each. `eager` is the formula; every other one is compared with it."""

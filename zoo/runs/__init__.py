"""Runs: from a recipe to a directory with a trained model in it. Read `run` first."""

"""Dtype policies: in which dtype weights are held and arithmetic runs."""

"""Arithmetic over specs: parameters, memory, FLOPs. No torch."""

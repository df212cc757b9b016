"""Data for training: formats, prompt masks, packing, token files, and batches as a function of seed and step."""

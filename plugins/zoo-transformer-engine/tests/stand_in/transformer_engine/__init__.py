"""A stand-in for TransformerEngine 2: its signatures, its checks and the keys of its state, in plain torch on the CPU.

What it computes is FP8 with factors of its own reckoning: it shows that calls say what they should, and no more.
"""

"""Keeps freed memory in the process, where glibc would return it to the kernel and fetch it back zeroed.

The activations of a few hundred tokens are just large enough to be mapped anew by every operation: tens of thousands
of page faults for a prompt of 512 tokens, a tenth of its time and at times a third.
"""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
_SETTINGS = {_TRIM_THRESHOLD: 1 << 30, _TOP_PAD: 1 << 26, _MMAP_THRESHOLD: 1 << 25}  # bytes; the last is its maximum


def keep_freed_memory() -> bool:
    """Returns whether it could: on Linux with glibc, unless the environment says how malloc is to work."""
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(parameter, value) == 1 for parameter, value in _SETTINGS.items())

"""The random number generators of a process: Python's, numpy's, torch's on the CPU and on every CUDA device."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

State = dict[str, Any]


def capture_rng() -> State:
    """All generators' states, as containers of numbers and tensors.

    CUDA devices count if the process has used CUDA: asking for their state would otherwise start it.
    """
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else [],
    }


def restore_rng(state: State) -> list[str]:
    """Set all generators to the captured states.

    Returns:
        What could not be restored here, in words: CUDA devices that this machine lacks, or has in addition.
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, device_state in enumerate(state["cuda"][:here]):
        torch.cuda.set_rng_state(device_state, device)
    saved = len(state["cuda"])
    if saved in (0, here):
        return []
    return [f"the random state of {saved} CUDA devices was saved and {here} are here: the others draw other numbers."]

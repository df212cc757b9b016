"""The command line keeps freed memory, so that activations are not mapped anew for every operation."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

if sys.platform != "linux":
    pytest.skip("glibc's malloc is meant", allow_module_level=True)

PROBE = """
import json, resource
from zoo.cli.allocator import keep_freed_memory
kept = keep_freed_memory()
import torch
torch.set_num_threads(1)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step = lambda: [torch.ones(1 << 20) * 2 for _ in range(4)]
step(); step()
before = faults()
for _ in range(8): step()
print(json.dumps({"kept": kept, "faults": faults() - before}))
"""


def probe(**environment: str) -> dict[str, int]:
    """What a fresh process finds that makes tensors of 4 MiB again and again."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**clean, **environment})
    found: dict[str, int] = json.loads(done.stdout)
    return found


def test_freed_memory_is_used_again() -> None:
    """A tensor of 4 MiB has a thousand pages: eight rounds of eight would be 65,000 faults."""
    found = probe()
    if not found["kept"]:
        pytest.skip("not glibc")
    assert found["faults"] < 4000


def test_the_users_setting_stands() -> None:
    assert not probe(MALLOC_TRIM_THRESHOLD_="131072")["kept"]

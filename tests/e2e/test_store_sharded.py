"""Sharded state (FSDP2 over gloo): real ranks save, die, and go on, also in another number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader, load  # type: ignore[attr-defined]

from tests.e2e.sharded_worker import Net

WORKER = Path(__file__).with_name("sharded_worker.py")
OTHERS: list[dict[str, Any]] = [{"world": 1}, {"world": 3}, {"world": 1, "kind": "plain"}, {"world": 2, "kind": "ddp"}]
if os.environ.get("ZOO_STRESS") == "1":
    OTHERS.append({"world": 6})  # more ranks than some tensors have rows for


def train(store: Path, code: Sequence[int] = (0,), **plan: Any) -> list[float]:
    out = store.parent / "losses.json"
    out.unlink(missing_ok=True)
    whole = {"store": str(store), "out": str(out), "dropout": 0.0, **plan}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    done = subprocess.run(
        [sys.executable, str(WORKER), json.dumps(whole)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode in code, done.stderr[-3000:]
    return list(json.loads(out.read_text())) if out.exists() else []


@pytest.mark.parametrize("background", [False, True])
def test_resume_is_exact(background: bool, tmp_path: Path) -> None:
    """Guards shards of weights and optimizer, and the random generators of each rank; with dropout."""
    straight = train(tmp_path / "straight", world=2, until=8, dropout=0.5)
    store = tmp_path / "store"
    train(store, (-9, 1, 137), world=2, until=8, save_at=4, die_at=6 + background, dropout=0.5, background=background)
    assert (store / "step-00000004" / "MANIFEST.json").exists()
    assert train(store, world=2, until=8, resume=True, dropout=0.5) == straight[4:]


def test_any_number_of_ranks_goes_on(tmp_path: Path) -> None:
    """Guards parts that are put together wrongly: two ranks save; one, three, and a plain model load."""
    straight = train(tmp_path / "straight", world=1, kind="plain", until=8)
    store = tmp_path / "store"
    two = train(store, world=2, until=4, save_at=4)
    assert two == pytest.approx(straight[:4], abs=1e-5)
    for options in OTHERS:
        assert train(store, until=8, resume=True, **options) == pytest.approx(straight[4:], abs=1e-5)
    plain = tmp_path / "plain"
    train(plain, world=1, kind="plain", until=4, save_at=4)
    assert train(plain, world=2, until=8, resume=True) == pytest.approx(straight[4:], abs=1e-5)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_torch_reads_the_shards(tmp_path: Path) -> None:
    """Guards the layout, which is that of torch.distributed.checkpoint's Hugging Face storage."""
    store = tmp_path / "store"
    train(store, world=2, until=2, save_at=2)
    whole = tmp_path / "one"
    train(whole, world=1, kind="plain", until=2, save_at=2)
    state = {name: torch.zeros_like(p) for name, p in Net(0.0).named_parameters()}
    load(state, storage_reader=HuggingFaceStorageReader(str(store / "step-00000002" / "model")), no_dist=True)
    from safetensors.torch import load_file

    expected = load_file(whole / "step-00000002" / "model" / "model.safetensors")
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    """Guards a part that only one rank reads."""
    store = tmp_path / "store"
    train(store, world=2, until=2, save_at=2)
    victim = store / "step-00000002" / "state" / "shared" / "shard-00002-model-00001-of-00001.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    plan = {"store": str(store), "out": "unused", "dropout": 0.0, "world": 2, "until": 3, "resume": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    done = subprocess.run(
        [sys.executable, str(WORKER), json.dumps(plan)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "shard-00002-model-00001-of-00001.safetensors: content changed since it was saved" in done.stderr

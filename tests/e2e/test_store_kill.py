"""``kill -9`` while saving: the newest committed step loads, and a run that was killed goes on to the bit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.store_lab import run_lab

KILLS = 1000 if os.environ.get("ZOO_STRESS") == "1" else 40


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("mode", "kills"), [("waiting", KILLS), ("background", KILLS // 4)])
def test_a_kill_at_any_moment_leaves_the_newest_step(tmp_path: Path, mode: str, kills: int) -> None:
    """Guards against a step that appears before it is complete, and one that is gone while it is replaced."""
    result = run_lab("kill", tmp_path / "store", str(kills), "7", mode)
    assert result["wrong"] == []
    assert result["interrupted"] >= kills // 8, "the kills hit processes that were saving"
    assert result["newest"] > 3, "and some of them had saved"


def test_a_killed_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    """Guards against any state that is not saved: moments, schedule, scale, every generator, the data's position."""
    result = run_lab("resumed", tmp_path / "store")
    assert result["loaded"] >= 10
    assert result["resumed"]["losses"] == result["straight"]["losses"] and len(result["straight"]["losses"]) == 20
    assert result["resumed"]["digest"] == result["straight"]["digest"]

"""The backend, and a line that says on what it ran."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import tier
import torch

collect_ignore = ["test_flash_attn_3.py"] if tier.ON_GPU else []
"""It needs the stand-in, which is not there where the kernels are."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"FlashAttention: {tier.TIER}")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def flash() -> tier.Backend:
    if tier.VERSION is None:
        pytest.skip("flash-attn is not installed: see the README of zoo-flash-attn")
    return tier.Backend()

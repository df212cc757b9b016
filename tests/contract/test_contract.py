"""What a contract does beside its checks: failures that are declared, checks that are removed, what can not run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from zoo.testing import PromptContract, SamplerContract

FILE = """
from typing import ClassVar
from zoo.testing import AttentionContract, SamplerContract


class Shortened(SamplerContract):
    component = "temperature"
    options: ClassVar = {"temperature": 0.5}
    test_the_distribution = None


class TestRemoved(Shortened):
    pass


class Mixin:
    def test_the_distribution(self):
        pass


class TestMixedIn(Mixin, SamplerContract):
    component = "temperature"
    options: ClassVar = {"temperature": 0.5}


class TestOverridden(SamplerContract):
    component = "temperature"
    options: ClassVar = {"temperature": 0.5}

    def test_the_distribution(self):
        pass

    def test_of_my_own(self):
        pass


class TestDeclared(SamplerContract):
    component = "temperature"
    options: ClassVar = {"temperature": 0.5}
    keeps_likeliest = False
    expected_failures: ClassVar = {"test_the_distribution": "it is not known to fail"}


class TestKnown(SamplerContract):
    component = "temperature"
    options: ClassVar = {"temperature": -1}
    expected_failures: ClassVar = {name: "no such temperature" for name in SamplerContract.checks()
                                   if name != "test_registration"}


class TestGpu(AttentionContract):
    component = "eager"
"""


def test_removed_overridden_and_declared(tmp_path: Path) -> None:
    """Guards the promise that a green contract is the whole contract."""
    path = tmp_path / "test_mine.py"
    path.write_text(FILE)
    options = ["-q", "-rA", "-p", "no:cacheprovider", "-k", "not Gpu or on_a_gpu", str(path)]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *options], cwd=tmp_path, capture_output=True, text=True, check=False
    ).stdout
    for name in ("TestRemoved", "TestMixedIn", "TestOverridden"):
        assert f"FAILED test_mine.py::{name}::test_the_distribution" in ran
        assert f"{name} replaces the standard check 'test_the_distribution'" in ran
    assert "PASSED test_mine.py::TestOverridden::test_of_my_own" in ran
    assert "FAILED test_mine.py::TestDeclared::test_the_distribution" in ran
    assert "[XPASS(strict)] it is not known to fail" in ran
    assert "XFAIL test_mine.py::TestKnown::test_greedy_is_greedy - no such temperature" in ran
    assert torch.cuda.is_available() or "not run: no GPU" in ran
    assert ran.count("\nFAILED ") == 4, ran


def test_a_declaration_that_says_nothing() -> None:
    """Guards against an expected failure of a check that there is not, and one without a reason."""
    with pytest.raises(TypeError, match="names 'test_nothing'; checks are test_registration, test_the_interface"):

        class _Misspelt(SamplerContract):
            expected_failures: ClassVar = {"test_nothing": "why not"}

    with pytest.raises(TypeError, match="no reason for 'test_one_bos'"):

        class _Unreasoned(PromptContract):
            expected_failures: ClassVar = {"test_one_bos": " "}

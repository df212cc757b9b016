"""Has pytest explain the asserts of contracts, which it does by default only for modules named ``test_*``."""

from __future__ import annotations

from pathlib import Path

import pytest

_HERE = {Path(__file__).stem, "__init__"}

pytest.register_assert_rewrite(
    *(f"{__package__}.{file.stem}" for file in Path(__file__).parent.glob("*.py") if file.stem not in _HERE)
)

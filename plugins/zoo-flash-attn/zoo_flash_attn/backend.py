"""What zoo imports for ``--attention flash``: this fails, with reason and remedy, where FlashAttention can not run."""

from __future__ import annotations

from zoo_flash_attn.flash import Flash
from zoo_flash_attn.install import check

__all__ = ["Flash"]

check()

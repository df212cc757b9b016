"""Methods that add nothing and train some of the model's own parameters: full finetuning, BitFit, norm tuning."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from zoo.adapters.base import Adapter, Part
from zoo.adapters.plans import BitFitOptions, FullOptions, NormOptions
from zoo.plan.sites import Addition


class Unfreeze(Adapter):
    """Trains what its plan names."""

    def part(self, addition: Addition, base: nn.Module) -> Part:
        """Never: its plan adds nothing."""
        raise NotImplementedError


class Full(Unfreeze):
    """Everything."""

    options_type: ClassVar[type] = FullOptions
    keeps_original: ClassVar[bool] = False  # it would take the memory of a second model


class BitFit(Unfreeze):
    """The biases."""

    options_type: ClassVar[type] = BitFitOptions


class NormTuning(Unfreeze):
    """The norms."""

    options_type: ClassVar[type] = NormOptions

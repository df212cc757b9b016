"""Methods that add nothing and train some of the model's own parameters: full finetuning, BitFit, norm tuning."""

from __future__ import annotations

from typing import ClassVar

from zoo.adapters.base import Adapter
from zoo.adapters.plans import BitFitOptions, FullOptions, NormOptions


class Full(Adapter):
    """Everything."""

    options_type: ClassVar[type] = FullOptions
    learning_rate: ClassVar[float] = 2e-5
    keeps_original: ClassVar[bool] = False  # it would take the memory of a second model


class BitFit(Adapter):
    """The biases."""

    options_type: ClassVar[type] = BitFitOptions
    learning_rate: ClassVar[float] = 1e-3


class NormTuning(Adapter):
    """The norms."""

    options_type: ClassVar[type] = NormOptions
    learning_rate: ClassVar[float] = 1e-3

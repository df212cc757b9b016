"""Contracts for what plugins add: subclass one, name a component, and pytest runs every check.

| kind | contract |
|---|---|
| a distribution | `PluginContract` |
| family | `FamilyContract` |
| attention | `AttentionContract` |
| adapter | `AdapterContract` |
| precision | `PrecisionContract` |
| quantizer | `QuantizerContract` |
| converter | `ConverterContract` |
| source | `SourceContract` |
| dataset | `DatasetContract` |
| prompt | `PromptContract` |
| sampler | `SamplerContract` |
| logger | `LoggerContract` |
| command | `CommandContract` |
"""

from __future__ import annotations

from zoo.testing import _asserts as _asserts
from zoo.testing.adapters import AdapterContract
from zoo.testing.attention import AttentionContract
from zoo.testing.command import CommandContract
from zoo.testing.contract import Contract
from zoo.testing.converter import ConverterContract
from zoo.testing.dataset import DatasetContract
from zoo.testing.family import FamilyContract
from zoo.testing.logger import LoggerContract
from zoo.testing.plugin import PluginContract
from zoo.testing.precision import PrecisionContract
from zoo.testing.prompt import PromptContract
from zoo.testing.quantizer import QuantizerContract
from zoo.testing.sampler import SamplerContract
from zoo.testing.source import SourceContract

CONTRACTS: dict[str, type[Contract]] = {
    contract.kind: contract
    for contract in (
        FamilyContract,
        AttentionContract,
        AdapterContract,
        PrecisionContract,
        QuantizerContract,
        ConverterContract,
        SourceContract,
        DatasetContract,
        PromptContract,
        SamplerContract,
        LoggerContract,
        CommandContract,
    )
}
"""The contract of each kind of component."""

__all__ = [
    "CONTRACTS",
    "AdapterContract",
    "AttentionContract",
    "CommandContract",
    "Contract",
    "ConverterContract",
    "DatasetContract",
    "FamilyContract",
    "LoggerContract",
    "PluginContract",
    "PrecisionContract",
    "PromptContract",
    "QuantizerContract",
    "SamplerContract",
    "SourceContract",
]

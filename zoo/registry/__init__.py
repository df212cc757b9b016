"""What zoo knows by name: components (code, imported when used) and model entries (data)."""

from __future__ import annotations

from zoo.registry.availability import Status, component_status, describe, import_target, probe
from zoo.registry.lookup import Registry
from zoo.registry.records import BUILT_IN, KINDS, Component, DeviceNeeds, ModelEntry, Origin

__all__ = [
    "BUILT_IN",
    "KINDS",
    "Component",
    "DeviceNeeds",
    "ModelEntry",
    "Origin",
    "Registry",
    "Status",
    "component_status",
    "describe",
    "import_target",
    "probe",
]

"""Puts registry.yaml, which lies at the root of the source tree, into the package of a wheel.

An editable install finds it where it lies; a copy would go stale.
"""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class RegistryHook(BuildHookInterface):  # type: ignore[type-arg]
    """The build hook that pyproject.toml names."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the file to standard wheels."""
        if version == "standard":
            build_data["force_include"]["registry.yaml"] = "zoo/registry.yaml"

"""Rotary settings as Hugging Face writes them: ``rope_theta`` and ``rope_scaling``, or one ``rope_parameters``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo.errors import InputError
from zoo.families.base import ConfigReader
from zoo.spec import RopeScaling

_KNOWN = {
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
}


def read_rope(
    read: ConfigReader, family: str, *, theta_key: str = "rope_theta"
) -> tuple[dict[str, Any], RopeScaling | None]:
    """The rotary parameters of a config (both spellings merged) and their scaling.

    Raises:
        InputError: a scaling of another kind, or a parameter that zoo does not understand.
    """
    parameters: dict[str, Any] = {**read.get("rope_scaling", {}), **read.get("rope_parameters", {})}
    parameters.setdefault("rope_theta", read.get(theta_key, 10_000.0))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise InputError(f"the {family} config scales its rotary positions by {kind!r}; zoo knows linear and llama3.")
    if unknown := sorted(set(parameters) - _KNOWN):
        raise InputError(f"the {family} config has unknown rotary parameters: {', '.join(unknown)}.")
    if kind == "default":
        return parameters, None
    if "factor" not in parameters:
        raise InputError(f"the {family} config scales its rotary positions by {kind!r} without a factor.")
    if kind == "linear":
        return parameters, RopeScaling(kind="linear", factor=float(parameters["factor"]))
    return parameters, _llama3(parameters, family)


def _llama3(parameters: Mapping[str, Any], family: str) -> RopeScaling:
    keys = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [key for key in keys if key not in parameters]:
        raise InputError(f"the {family} config scales its rotary positions by 'llama3' without {', '.join(missing)}.")
    return RopeScaling(
        kind="llama3",
        factor=float(parameters["factor"]),
        low_freq_factor=float(parameters["low_freq_factor"]),
        high_freq_factor=float(parameters["high_freq_factor"]),
        original_max_seq_len=parameters["original_max_position_embeddings"],
    )


def write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The value of ``rope_scaling`` for a spec's scaling."""
    if scaling is None:
        return None
    plain: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        plain["low_freq_factor"] = scaling.low_freq_factor
        plain["high_freq_factor"] = scaling.high_freq_factor
        plain["original_max_position_embeddings"] = scaling.original_max_seq_len
    return plain

"""Rotary settings as Hugging Face writes them: ``rope_theta`` and ``rope_scaling``, or one ``rope_parameters``."""

from __future__ import annotations

from collections.abc import Mapping
from math import log, sqrt
from typing import Any

from zoo.errors import InputError
from zoo.families.base import ConfigReader
from zoo.spec import ModelSpec, RopeScaling, RopeSpec

_KNOWN = {
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "short_factor",
    "long_factor",
    "attention_factor",
}


def read_rope_spec(
    read: ConfigReader,
    family: str,
    d_head: int,
    *,
    rotated: float | None = None,
    default_theta: float = 10_000.0,
    default_original: int | None = None,
) -> RopeSpec:
    """The rotary positions of a config.

    Args:
        rotated: the part of each head that turns by default; ``None``: the family always turns all of it.
        default_original: of ``original_max_position_embeddings``; ``None``: ``max_position_embeddings``.

    Raises:
        InputError: as `read_rope`, or the config has two spellings of a value that disagree.
    """
    parameters, scaling = read_rope(read, family, default_theta=default_theta, default_original=default_original)
    read.only("rope_theta", parameters["rope_theta"])
    default = 1.0 if rotated is None else rotated
    part = parameters.get("partial_rotary_factor", read.get("partial_rotary_factor", default))
    read.only("partial_rotary_factor", part)
    if rotated is None and part != 1.0:
        # As transformers 5, which ignores the part unless it scales the frequencies: then they fit no head.
        if scaling is not None:
            raise InputError(
                f"the {family} config scales rotary positions and has partial_rotary_factor = {part!r}; a {family} "
                "turns all of each head."
            )
        part = 1.0
    return RopeSpec(n_dims=int(d_head * part), base=float(parameters["rope_theta"]), scaling=scaling)


def write_rope_spec(spec: ModelSpec, *, partial: bool = False) -> dict[str, Any]:
    """The rotary keys of a config: what `read_rope_spec` reads.

    Args:
        partial: whether the family can turn a part of each head.
    """
    assert spec.rope is not None
    plain = {"rope_theta": spec.rope.base, "rope_scaling": write_scaling(spec.rope.scaling)}
    if partial:
        plain["partial_rotary_factor"] = spec.rope.n_dims / spec.d_head
    if spec.rope.scaling is not None and spec.rope.scaling.kind == "longrope":
        plain["original_max_position_embeddings"] = spec.rope.scaling.original_max_seq_len
    return plain


def read_rope(
    read: ConfigReader,
    family: str,
    *,
    theta_key: str = "rope_theta",
    default_theta: float = 10_000.0,
    default_original: int | None = None,
) -> tuple[dict[str, Any], RopeScaling | None]:
    """The rotary parameters of a config (both spellings merged) and their scaling.

    Raises:
        InputError: a scaling of another kind, or a parameter that zoo does not understand.
    """
    given: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        found = read.get(key, {})
        if not isinstance(found, dict):
            raise InputError(f"the {family} config has {key} = {found!r}; it must be an object.")
        given |= found
    parameters = {key: value for key, value in given.items() if value is not None}
    parameters.setdefault("rope_theta", read.get(theta_key, default_theta))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "linear", "llama3", "longrope", "su"):
        raise InputError(
            f"the {family} config scales its rotary positions by {kind!r}; zoo knows linear, llama3 and longrope."
        )
    if unknown := sorted(set(parameters) - _KNOWN):
        raise InputError(f"the {family} config has unknown rotary parameters: {', '.join(unknown)}.")
    if kind == "default":
        return parameters, None
    if kind in ("longrope", "su"):  # its name before it was published
        return parameters, _longrope(read, parameters, family, default_original)
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


def _longrope(
    read: ConfigReader, parameters: Mapping[str, Any], family: str, default_original: int | None
) -> RopeScaling:
    """LongRoPE. ``attention_factor`` is computed when it is missing, as in the paper (arXiv 2402.13753)."""
    if missing := [key for key in ("short_factor", "long_factor") if key not in parameters]:
        raise InputError(f"the {family} config scales its rotary positions by longrope without {', '.join(missing)}.")
    longest = read.require("max_position_embeddings")
    original = read.get("original_max_position_embeddings", default_original)
    inside = parameters.get("original_max_position_embeddings")
    original = original or inside or longest
    if inside not in (None, original):
        raise InputError(
            f"the {family} config has original_max_position_embeddings = {original}, and {inside} for rotary positions."
        )
    factor = parameters.get("factor") or longest / original
    attention = parameters.get("attention_factor")
    if attention is None:
        attention = sqrt(1 + log(factor) / log(original)) if factor > 1 else 1.0
    return RopeScaling(
        kind="longrope",
        original_max_seq_len=original,
        short_factors=tuple(map(float, parameters["short_factor"])),
        long_factors=tuple(map(float, parameters["long_factor"])),
        attn_factor=float(attention),
    )


def write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The value of ``rope_scaling`` for a spec's scaling."""
    if scaling is None:
        return None
    if scaling.kind == "longrope":
        return {
            "rope_type": "longrope",
            "short_factor": list(scaling.short_factors),
            "long_factor": list(scaling.long_factors),
            "attention_factor": scaling.attn_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    plain: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        plain["low_freq_factor"] = scaling.low_freq_factor
        plain["high_freq_factor"] = scaling.high_freq_factor
        plain["original_max_position_embeddings"] = scaling.original_max_seq_len
    return plain

"""Which layers slide, as Hugging Face says it: by keys of each family's own, and as a list ``layer_types``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zoo.errors import InputError
from zoo.families.base import ConfigReader
from zoo.spec import ModelSpec

SLIDING, FULL = "sliding_attention", "full_attention"


def read_windows(
    read: ConfigReader, family: str, n_layers: int, window: int | None, slides: Callable[[int], bool]
) -> dict[str, Any]:
    """``window`` and ``full_attention_layers`` of the spec; no window at all where no layer has one.

    Args:
        window: what the config's other keys say; ``None``: there is none.
        slides: whether the config's other keys give a layer the window.

    Raises:
        InputError: the config's ``layer_types`` say otherwise.
    """
    sliding = [window is not None and slides(layer) for layer in range(n_layers)]
    stated = read.get("layer_types")
    if stated is not None and list(stated) != [SLIDING if slide else FULL for slide in sliding]:
        raise InputError(
            f"the {family} config has layer_types = {stated}; by its other keys, the layers with a window are "
            f"{[layer for layer, slide in enumerate(sliding) if slide]}.",
            fix="Make them agree, or remove layer_types.",
        )
    if not any(sliding):
        return {"window": None}
    return {"window": window, "full_attention_layers": tuple(i for i, slide in enumerate(sliding) if not slide)}


def read_layer_types(
    read: ConfigReader, family: str, n_layers: int, window: int | None, slides: Callable[[int], bool]
) -> dict[str, Any]:
    """As `read_windows`, where ``layer_types`` decides and ``slides`` only says what it is when it is missing.

    Raises:
        InputError: a type is unknown, the list has another length, or windows are listed but have no size.
    """
    types = read.get("layer_types", [SLIDING if slides(layer) else FULL for layer in range(n_layers)])
    if len(types) != n_layers or not set(types) <= {FULL, SLIDING}:
        raise InputError(
            f"the {family} config has layer_types = {types!r}; "
            f"zoo needs {FULL!r} or {SLIDING!r} for each of its {n_layers} layers."
        )
    if SLIDING not in types:
        return {"window": None}
    if window is None:
        raise InputError(f"the {family} config has layers of type {SLIDING!r} but no window: its size is null.")
    return {"window": window, "full_attention_layers": tuple(i for i, kind in enumerate(types) if kind == FULL)}


def write_layer_types(spec: ModelSpec) -> list[str]:
    """The value of ``layer_types`` for a spec."""
    slides = [spec.window is not None and layer not in spec.full_attention_layers for layer in range(spec.n_layers)]
    return [SLIDING if slide else FULL for slide in slides]


def write_windows(spec: ModelSpec) -> dict[str, Any]:
    """The keys that most families share: ``use_sliding_window``, ``sliding_window`` and ``layer_types``."""
    if spec.window is None:
        return {"use_sliding_window": False}
    return {"use_sliding_window": True, "sliding_window": spec.window, "layer_types": write_layer_types(spec)}


def write_first_windows(spec: ModelSpec, family: str) -> dict[str, Any]:
    """As `write_windows`, with ``max_window_layers``: the number of layers before those that slide.

    Raises:
        InputError: a layer without a window follows one with it, which ``max_window_layers`` can not say.
    """
    if spec.window is None:
        return write_windows(spec)
    n_full = len(spec.full_attention_layers)
    if sorted(spec.full_attention_layers) != list(range(n_full)):
        raise InputError(
            f"full_attention_layers is {list(spec.full_attention_layers)}; {family} can only have the first layers "
            "without a window."
        )
    return write_windows(spec) | {"max_window_layers": n_full}

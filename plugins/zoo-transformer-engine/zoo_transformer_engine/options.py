"""The options of the FP8 precisions, by the names that TransformerEngine's recipes give them. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from zoo.errors import InputError, UnknownNameError

Scaling = Literal["delayed", "current", "mxfp8"]
Format = Literal["HYBRID", "E4M3"]
AmaxAlgorithm = Literal["max", "most_recent"]

E4M3_MAX, E5M2_MAX = 448.0, 57344.0
"""Largest numbers of the two formats (arXiv 2209.05433)."""
BLOCK = 32
"""Values that share a factor in MXFP8."""


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """How tensors become FP8.

    Attributes:
        scaling: ``delayed``: a factor per tensor, from its largest values in earlier steps; ``current``: from the
            tensor itself; ``mxfp8``: a power of two for each 32 values.
        fp8_format: ``HYBRID``: E4M3 forward and E5M2 for gradients; ``E4M3`` for all. By default what TransformerEngine
            takes: E4M3 for mxfp8, HYBRID otherwise.
        amax_history_len: steps that ``delayed`` looks back.
        amax_compute_algo: which value of the history counts, the largest (``max``) or the ``most_recent``.
        margin: ``delayed`` leaves so many powers of two as room for values that grow.
        skip: globs over the names of linears that stay as they are. By default the output projection, whose error
            reaches the loss as it is.
    """

    scaling: Scaling = "delayed"
    fp8_format: Format | None = None
    amax_history_len: int = 1024
    amax_compute_algo: AmaxAlgorithm = "max"
    margin: int = 0
    skip: tuple[str, ...] = ("head", "*lm_head")

    def __post_init__(self) -> None:
        choices = {"scaling": Scaling, "fp8_format": Format, "amax_compute_algo": AmaxAlgorithm}
        for name, known in choices.items():
            given = getattr(self, name)
            if given not in get_args(known) and not (name == "fp8_format" and given is None):
                raise UnknownNameError(f"{name} of FP8", str(given), get_args(known))
        if type(self.amax_history_len) is not int or self.amax_history_len < 1:
            raise InputError(f"amax_history_len is a number of steps, at least 1, not {self.amax_history_len!r}.")
        if type(self.margin) is not int:
            raise InputError(f"margin is a whole number of powers of two, not {self.margin!r}.")
        if isinstance(self.skip, str) or not all(isinstance(pattern, str) for pattern in self.skip):
            raise InputError(f"skip is a list of names, not {self.skip!r}.", fix='Such as ["head", "blocks.0.*"].')
        self._check_used()

    def _check_used(self) -> None:
        """An option that the scaling ignores is a mistake: it would seem to do something."""
        if self.scaling == "delayed":
            return
        defaults = {"amax_history_len": 1024, "amax_compute_algo": "max", "margin": 0}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                raise InputError(f"{name} is an option of delayed scaling, and the scaling is {self.scaling}.")

    @property
    def format(self) -> Format:
        """The format, chosen."""
        return self.fp8_format or ("E4M3" if self.scaling == "mxfp8" else "HYBRID")

    @property
    def multiple(self) -> int:
        """What both dimensions of a matrix are a multiple of, for the kernels."""
        return BLOCK if self.scaling == "mxfp8" else 16

    def describe(self) -> str:
        """In a few words."""
        formats = "E4M3 forward, E5M2 for gradients" if self.format == "HYBRID" else "E4M3"
        if self.scaling != "delayed":
            return f"{self.scaling} scaling, {formats}"
        back = f"{self.amax_compute_algo} of {self.amax_history_len} steps"
        return f"delayed scaling ({back}, margin {self.margin}), {formats}"


@dataclass(frozen=True, kw_only=True)
class EmulatedOptions(RecipeOptions):
    """Options of ``fp8-emulated``.

    Attributes:
        strict_shapes: leave linears alone that a GPU could not compute in FP8, so that what trains here is what would
            train there.
    """

    strict_shapes: bool = True


@dataclass(frozen=True, kw_only=True)
class EngineOptions(RecipeOptions):
    """Options of ``transformer-engine`` and ``transformer-engine-float16``.

    Attributes:
        layer_norm: take TransformerEngine's kernel for layer norms; they compute in the dtype that they had.
    """

    layer_norm: bool = True

"""The frozen description of one model's architecture. It names mechanisms, never brands, and imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from zoo.errors import InputError, UnknownNameError

NormKind = Literal["layer", "rms"]
NormPlace = Literal["before", "after", "both"]
QKNormKind = Literal["none", "head", "heads", "width"]
BlockKind = Literal["sequential", "parallel", "parallel_shared_norm"]
MLPKind = Literal["plain", "gated"]
Activation = Literal["gelu", "gelu_tanh", "silu", "relu"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the ones trained on.

    ``linear`` divides every frequency by ``factor``. ``llama3`` divides the slow ones, keeps the fast ones and
    interpolates between (Llama 3.1 release notes; wavelengths relative to ``original_max_seq_len``). ``longrope``
    (arXiv 2402.13753) divides each by a factor of its own, of ``short_factors`` for sequences of up to
    ``original_max_seq_len`` tokens and of ``long_factors`` beyond (the longest of a batch decides for all of it), and
    multiplies q and k by ``attn_factor``.
    """

    kind: Literal["linear", "llama3", "longrope"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attn_factor: float = 1.0

    def __post_init__(self) -> None:
        _check_values(self, "spec.rope.scaling")


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) on the first ``n_dims`` of each head."""

    n_dims: int
    base: float = 10_000.0
    interleaved: bool = False
    """Rotate neighbouring pairs (GPT-J) rather than the two halves of the rotary dimensions (GPT-NeoX)."""
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        _check_values(self, "spec.rope")
        if self.scaling is not None and self.scaling.kind == "longrope":
            for name in ("short_factors", "long_factors"):
                if len(getattr(self.scaling, name)) != self.n_dims // 2:
                    raise InputError(
                        f"longrope needs {self.n_dims // 2} {name}, one for each rotated pair, not "
                        f"{len(getattr(self.scaling, name))}."
                    )


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Architecture of one decoder-only transformer. Lengths are in tokens, widths in features."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_ffn: int
    vocab_size: int
    max_seq_len: int

    norm: NormKind
    norm_eps: float
    norm_place: NormPlace = "before"
    """Where a sequential block normalizes: what attention and feed-forward read, what they write, or both."""
    norm_offset: float = 0.0
    """Added to the stored weight of RMS norms (Gemma stores weight - 1)."""
    norm_affine: bool = True
    """Whether norms have weights at all."""
    block: BlockKind = "sequential"
    mlp: MLPKind = "plain"
    activation: Activation = "gelu"
    rope: RopeSpec | None = None
    """``None``: positions are a learned table that is added to the embedding."""
    unrotated_layers: tuple[int, ...] = ()
    """Layers whose q and k are not rotated."""
    embed_scale: float | None = None
    """Factor on the token embeddings."""

    norm_bias: bool = False
    qkv_bias: bool = False
    attn_out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    tie_embeddings: bool = False

    attn_scale: float | None = None
    """Factor on the attention scores; ``None``: ``d_head ** -0.5``."""
    attn_scale_by_layer: bool = False
    """Divide the scores of layer ``i`` by ``i + 1`` as well."""
    attn_softcap: float | None = None
    """``c``: scores become ``c * tanh(scores / c)``."""
    head_softcap: float | None = None
    """As `attn_softcap`, for the logits."""
    window: int | None = None
    """How many keys back a query sees, its own included."""
    full_attention_layers: tuple[int, ...] = ()
    """Layers that see everything although there is a ``window``."""
    qk_norm: QKNormKind = "none"
    """Normalization of q and k: over each head with one weight for all heads (``head``) or one per head (``heads``),
    or over all heads together (``width``)."""
    qkv_clip: float | None = None
    """q, k and v are clamped to within this of zero."""

    embed_dropout: float = 0.0
    attn_dropout: float = 0.0
    resid_dropout: float = 0.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        _check_values(self, "spec")
        for name in ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_ffn", "vocab_size", "max_seq_len"):
            _check_positive(name, getattr(self, name))
        if self.n_heads % self.n_kv_heads:
            raise InputError(f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads}).")
        if self.norm_place != "before" and self.block != "sequential":
            raise InputError(f"norm_place {self.norm_place!r} needs a sequential block, not {self.block!r}.")
        if self.rope is not None and (self.rope.n_dims % 2 or not 0 < self.rope.n_dims <= self.d_head):
            raise InputError(f"rope.n_dims must be even and within 2..d_head ({self.d_head}), not {self.rope.n_dims}.")
        for name in ("embed_dropout", "attn_dropout", "resid_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"{name} must be within [0, 1), not {getattr(self, name)!r}.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelSpec:
        """Build a spec from plain data (a registry entry, ``zoo.yaml``).

        ``n_kv_heads``, ``d_head``, ``d_ffn`` and ``rope.n_dims`` may be left out: they become ``n_heads``,
        ``d_model / n_heads``, ``4 * d_model`` and ``d_head``.

        Raises:
            InputError: a key is unknown or missing, or a value is out of range.
        """
        filled = _with_tuples(values)
        _check_keys(cls, filled, "spec")
        if "n_heads" in filled and "d_model" in filled:
            _check_positive("n_heads", filled["n_heads"])
            _check_positive("d_model", filled["d_model"])
            filled.setdefault("n_kv_heads", filled["n_heads"])
            if "d_head" not in filled and filled["d_model"] % filled["n_heads"]:
                raise InputError(f"d_model ({filled['d_model']}) must be a multiple of n_heads ({filled['n_heads']}).")
            filled.setdefault("d_head", filled["d_model"] // filled["n_heads"])
            filled.setdefault("d_ffn", 4 * filled["d_model"])
        if isinstance(filled.get("rope"), Mapping):
            filled["rope"] = _rope_from_dict(filled["rope"], filled.get("d_head"))
        _check_missing(cls, filled, "spec")
        return cls(**filled)

    def to_dict(self) -> dict[str, Any]:
        """Plain data from which `from_dict` builds an equal spec; values equal to their default are left out."""
        plain = asdict(self, dict_factory=_with_lists)
        kept = {
            f.name: plain[f.name] for f in fields(self) if f.default is MISSING or getattr(self, f.name) != f.default
        }
        return kept


def _rope_from_dict(values: Mapping[str, Any], d_head: int | None) -> RopeSpec:
    filled = dict(values)
    _check_keys(RopeSpec, filled, "spec.rope")
    if d_head is not None:
        filled.setdefault("n_dims", d_head)
    if isinstance(filled.get("scaling"), Mapping):
        scaling = _with_tuples(filled["scaling"])
        _check_keys(RopeScaling, scaling, "spec.rope.scaling")
        _check_missing(RopeScaling, scaling, "spec.rope.scaling")
        filled["scaling"] = RopeScaling(**scaling)
    _check_missing(RopeSpec, filled, "spec.rope")
    return RopeSpec(**filled)


def _with_lists(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Tuples as lists, and what is empty left out: plain data for a file."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in items if value not in (None, ())}


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lists as tuples: a spec hashes."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _check_keys(cls: type, values: Mapping[str, Any], where: str) -> None:
    known = [f.name for f in fields(cls)]
    for key in values:
        if key not in known:
            raise UnknownNameError(f"key of {where}", key, known)


def _check_missing(cls: type, values: Mapping[str, Any], where: str) -> None:
    missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}.")


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be a positive integer, not {value!r}.")


def _check_values(instance: Any, where: str) -> None:
    """Each value is of its field's type: plain data may hold anything."""
    for name, (choices, types, described) in _rules(type(instance)).items():  # type: ignore[arg-type]  # mypy doubts that classes hash
        value = getattr(instance, name)
        if choices and value not in choices:
            raise InputError(f"{where}.{name} must be one of {', '.join(choices)}, not {value!r}.")
        if (isinstance(value, bool) and bool not in types) or not isinstance(value, types):
            raise InputError(f"{where}.{name} must be {described}, not {value!r}.")


@cache
def _rules(cls: type) -> dict[str, tuple[tuple[str, ...], tuple[type, ...], str]]:
    """For each field: the strings it may be, the types it may have, and those in words."""
    rules = {}
    for name, hint in get_type_hints(cls).items():
        is_tuple = get_origin(hint) is tuple
        parts = (tuple,) if is_tuple else get_args(hint) or (hint,)
        choices = tuple(part for part in parts if isinstance(part, str))
        types = {part for part in parts if isinstance(part, type)} | ({str} if choices else set())
        described = " or ".join("null" if t is type(None) else t.__name__ for t in sorted(types, key=str))
        rules[name] = (choices, tuple(types | ({int} if float in types else set())), described)
    return rules

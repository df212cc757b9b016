"""The contract of a family: two pure functions between spec and config, and two-column key maps, read both ways."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeVar

from torch import Tensor, nn

from zoo.errors import FileFormatError, InputError, UnknownNameError, ZooError
from zoo.families.transforms import TRANSFORMS, Transform
from zoo.plan.parameters import Shapes, parameter_shapes
from zoo.spec import Activation, BlockKind, ModelSpec

Config = Mapping[str, Any]
Line = tuple[str, tuple[str, ...], str]
"""Stored name, our names, transform."""
T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """One stored tensor and the parameters of ours that it holds."""

    stored: str
    ours: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    transform: Transform
    spec: ModelSpec

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the stored tensor."""
        return self.transform.stored_shape(self.shapes, self.spec)

    def split(self, stored: Tensor) -> list[Tensor]:
        """Our tensors, in the order of ``ours``."""
        return self.transform.split(stored, self.shapes, self.spec)

    def split_rows(self, stored: Tensor) -> list[Tensor]:
        """As `split`, for a tensor that has a row for each row of the stored one (`Transform.moves_rows`)."""
        shapes = [(shape[0], *stored.shape[1:]) for shape in self.shapes]
        return self.transform.split(stored, shapes, self.spec)

    def merge(self, ours: Sequence[Tensor]) -> Tensor:
        """The stored tensor, contiguous."""
        return self.transform.merge(ours, self.spec).contiguous()


class KeyMap:
    """A bijection between stored tensor names and our parameters, written as a table.

    One line each: stored name, our name, and a transform if values move. ``{i}`` runs over the layers, ``{n}`` over
    the heads; ``attn.{q,k,v}`` names several parameters that one stored tensor holds, in its order, and so does
    ``{n}`` where only our name has it::

        h.{i}.ln_1.weight          blocks.{i}.attn_norm.weight
        h.{i}.attn.c_attn.weight   blocks.{i}.attn.{q,k,v}.weight    transposed

    Args:
        table: the lines. Parameters that a spec does not have (biases, say) are left out for that spec.
        prefix: what stored names begin with in a causal-LM file; a file without it is understood too.
        ignore: regular expressions of stored names that carry no weights (old buffers).
        by_block: more lines for one kind of block, where the stored names depend on it.
        shapes: our parameters, if they are not those of zoo's decoder.

    Raises:
        InputError: a line is malformed, or names a transform that there is not.
    """

    def __init__(
        self,
        table: str,
        *,
        prefix: str = "",
        ignore: Sequence[str] = (),
        by_block: Mapping[BlockKind, str] | None = None,
        shapes: Callable[[ModelSpec], Shapes] = parameter_shapes,
    ) -> None:
        self._lines = _parse_table(table)
        self._by_block = {block: _parse_table(lines) for block, lines in (by_block or {}).items()}
        self.prefix = prefix
        self._ignore = re.compile("|".join(ignore)) if ignore else None
        self._shapes = shapes

    def rules(self, spec: ModelSpec) -> list[Rule]:
        """Every rule that ``spec`` needs, in the order of our parameters.

        Raises:
            ZooError: the table is no bijection: it lacks a parameter of the model, or names one twice.
        """
        shapes = self._shapes(spec)
        rules = list(self._rules(spec, shapes))
        _check_bijection(rules, shapes)
        order = {name: i for i, name in enumerate(shapes)}
        return sorted(rules, key=lambda rule: order[rule.ours[0]])

    def stored_names(self, spec: ModelSpec) -> list[str]:
        """Names of the tensors that a file of ``spec`` has; a parameter that the table lacks is passed over."""
        return [rule.stored for rule in self._rules(spec, self._shapes(spec))]

    def _rules(self, spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Rule]:
        for stored, ours, transform in [*self._lines, *self._by_block.get(spec.block, ())]:
            layers = range(spec.n_layers) if "{i}" in stored else [0]
            heads = range(spec.n_heads) if "{n}" in stored else [0]
            for layer, head in product(layers, heads):
                of_heads = [head] if "{n}" in stored else range(spec.n_heads)
                names = tuple(one for name in ours for one in _every(name, layer, of_heads, shapes))
                if any(name in shapes for name in names):
                    name_shapes = tuple(shapes[name] for name in names if name in shapes)
                    yield Rule(_numbered(stored, layer, head), names, name_shapes, TRANSFORMS[transform], spec)

    def locate(self, spec: ModelSpec, stored_names: Sequence[str], where: str) -> dict[str, Rule]:
        """Match the names in a file to rules.

        Raises:
            FileFormatError: a tensor is missing, or one is neither consumed nor declared ignorable.
        """
        rules = {rule.stored: rule for rule in self.rules(spec)}
        located: dict[str, Rule] = {}
        unknown = []
        for name in stored_names:
            rule = rules.get(name) or rules.get(self.prefix + name)
            if rule is not None:
                located[name] = rule
            elif not self.ignores(name, spec):
                unknown.append(name)
        missing = [name for name in rules if name not in {rule.stored for rule in located.values()}]
        problems = []
        if missing:
            problems.append(f"lacks {len(missing)} tensors of the model: {_some(missing)}")
        if unknown:
            problems.append(f"holds {len(unknown)} tensors that the model lacks: {_some(unknown)}")
        if problems:
            raise FileFormatError(f"{where} {'; it '.join(problems)}.")
        return located

    def ignores(self, name: str, spec: ModelSpec) -> bool:
        """Whether a stored name is declared to carry nothing: an old buffer, or the head of a tied model."""
        if self._ignore and self._ignore.search(name):
            return True
        heads = [stored for stored, ours, _ in self._lines if ours == ("head.weight",)]
        return spec.tie_embeddings and name in heads


def _numbered(name: str, layer: int, head: int) -> str:
    return name.replace("{i}", str(layer)).replace("{n}", str(head))


def _every(name: str, layer: int, heads: Sequence[int], shapes: Mapping[str, Any]) -> list[str]:
    """The parameters that a name of a line stands for: one, or one for each of the heads that the model has."""
    if "{n}" not in name or len(heads) == 1:
        return [_numbered(name, layer, heads[0])]
    return [one for one in (_numbered(name, layer, head) for head in heads) if one in shapes]


def _parse_table(table: str) -> list[Line]:
    return [_parse(line) for line in table.strip().splitlines() if line.strip()]


def _parse(line: str) -> Line:
    words = line.split()
    if len(words) not in (2, 3):
        raise InputError(
            f"a line of a key map is a stored name, our name and perhaps a transform, not {line.strip()!r}."
        )
    stored, ours, transform = words if len(words) == 3 else (*words, "same")
    if transform not in TRANSFORMS:
        raise UnknownNameError("transform", transform, TRANSFORMS)
    choice = re.search(r"\{([^{}]*,[^{}]*)\}", ours)
    names = tuple(ours.replace(choice[0], part) for part in choice[1].split(",")) if choice else (ours,)
    return stored, names, transform


def _check_bijection(rules: Sequence[Rule], shapes: Mapping[str, Any]) -> None:
    """A parameter without a line would be loaded as nothing, and left out of what is saved."""
    counts = Counter(name for rule in rules for name in rule.ours)
    stored = Counter(rule.stored for rule in rules)
    for what, names in (
        ("has no line for", [name for name in shapes if not counts[name]]),
        ("has more than one line for", [name for name in shapes if counts[name] > 1]),
        ("has more than one line for the stored", [name for name in stored if stored[name] > 1]),
        ("joins to others what the model does not have:", [name for name in counts if name not in shapes]),
    ):
        if names:
            raise ZooError(f"the family's key map {what} {_some(names)}.")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


@dataclass(frozen=True)
class GGUFMap:
    """How llama.cpp stores a family: its ``general.architecture``, the metadata as a config, the tensor names."""

    architecture: str
    read_config: Callable[[Config], dict[str, Any]]
    """From GGUF metadata to the Hugging Face config that the family reads; `zoo.families.gguf_metadata` has what else
    it finds among them. What it says about ``tie_word_embeddings`` goes before whether the file has a head."""
    keys: KeyMap
    write_metadata: Callable[[ModelSpec], dict[str, Any]] | None = None
    """The inverse: ``ARCHITECTURE.*`` metadata of a spec, and ``rope_freqs`` where the file has that tensor. What a
    spec says and they do not is found by reading them back. ``None``: zoo can not write this family as GGUF."""
    opens: bool = True
    """Whether files of the architecture are of this family. No: only written, and opened as the family whose
    mathematics they have."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """How the specs of one family map to Hugging Face files, and others."""

    name: str
    model_type: str
    architecture: str
    """The ``transformers`` class that ``architectures`` in config.json names."""
    read_config: Callable[[Config], ModelSpec]
    """Raises `InputError` for a key that changes the mathematics and is not understood."""
    write_config: Callable[[ModelSpec], dict[str, Any]]
    keys: KeyMap
    gguf: GGUFMap | None = None
    build: Callable[[ModelSpec], nn.Module] | None = None
    """Makes the model, where that is no decoder of zoo's but a module of the family's own: it maps token ids (B, T) to
    logits (B, T, V), and ``keys`` are of its parameters, such as `zoo.families.own.SameNames`."""


class ConfigReader:
    """Reads a config and remembers which keys were understood, so that none is dropped in silence."""

    def __init__(self, config: Config, family: str) -> None:
        self._config, self._family = config, family
        self._seen: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of ``key``; a missing or null one is ``default``."""
        self._seen.add(key)
        value = self._config.get(key)
        return default if value is None else value

    def nullable(self, key: str, default: Any) -> Any:
        """The value of ``key`` where null means that there is none of it; only a missing one is ``default``."""
        self._seen.add(key)
        return self._config.get(key, default)

    def require(self, key: str) -> Any:
        """The value of ``key``.

        Raises:
            InputError: it is missing.
        """
        value = self.get(key)
        if value is None:
            raise InputError(f"the {self._family} config lacks {key!r}.")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Accept ``key`` only when it is missing, null or one of ``allowed``.

        Raises:
            InputError: it has another value, which zoo does not implement for this family.
        """
        value = self.get(key, allowed[0])
        if value not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise InputError(f"the {self._family} config has {key} = {value!r}; zoo implements only {wanted}.")

    def choose(self, key: str, choices: Mapping[str, T], default: str) -> T:
        """Translate the value of ``key``.

        Raises:
            InputError: the value is none of ``choices``.
        """
        value = self.get(key, default)
        if not isinstance(value, str) or value not in choices:
            raise InputError(f"the {self._family} config has {key} = {value!r}; zoo knows {', '.join(choices)}.")
        return choices[value]

    def finish(self, *harmless: str) -> None:
        """Check that every key was read, is one of ``harmless``, or never changes the mathematics.

        Raises:
            InputError: a key is left over.
        """
        left = [
            k for k, v in self._config.items() if v is not None and k not in self._seen | HARMLESS_KEYS | set(harmless)
        ]
        if left:
            shown = ", ".join(f"{key} = {self._config[key]!r}" for key in sorted(left))
            raise InputError(
                f"the {self._family} config has keys that zoo does not understand: {shown}.",
                fix="If they do not change what the model computes, remove them from config.json.",
            )


HARMLESS_KEYS = frozenset(
    """
    architectures auto_map model_type torch_dtype dtype transformers_version _name_or_path name_or_path use_cache
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id decoder_start_token_id
    task_specific_params gradient_checkpointing output_attentions output_hidden_states return_dict
    return_dict_in_generate torchscript use_bfloat16 tokenizer_class prefix problem_type id2label label2id num_labels
    finetuning_task forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens bad_words_ids
    do_sample early_stopping max_length min_length max_new_tokens num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size num_return_sequences
    encoder_no_repeat_ngram_size exponential_decay_length_penalty remove_invalid_values output_scores
    chunk_size_feed_forward keys_to_ignore_at_inference _attn_implementation_autoset _commit_hash
    is_decoder is_encoder_decoder initializer_range unsloth_fixed unsloth_version transformers.js_config
    pretraining_tp onnx language license
    """.split()
)
"""Keys of config.json that never change the logits of a causal language model."""

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
"""Hugging Face's names of activations and ours."""


def activation_name(activation: str) -> str:
    """The Hugging Face name that a family writes for one of our activations, unless it has a reason for another."""
    return {"gelu_tanh": "gelu_pytorch_tanh"}.get(activation, activation)

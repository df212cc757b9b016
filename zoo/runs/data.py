"""The data of a run: read, encoded, and told about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from zoo.data.encode import EncodedData, encode_samples
from zoo.data.finetuning import FinetuningData
from zoo.data.load import load_samples, resolve_data
from zoo.data.pretraining import PretrainingData
from zoo.data.token_file import TokenFile
from zoo.errors import InputError
from zoo.registry import Registry
from zoo.text.prompts import PromptStyle, choose_prompt_style
from zoo.text.samples import Encoded, Sample
from zoo.text.tokenizer import Tokenizer
from zoo.train.loop import TrainingData
from zoo.train.recipe import Recipe

Say = Callable[[str], None]


@dataclass(frozen=True)
class RunData:
    """What a run trains on.

    Attributes:
        data: its batches.
        steps_per_epoch: optimizer steps for all of it once.
        facts: what to tell about it: names and values.
        style: how conversations became text; ``None``: there are none.
        first: the first sample, to be shown with its mask.
        held_out: validation samples, to be asked about.
        longest: tokens of the longest row.
    """

    data: TrainingData
    steps_per_epoch: int
    facts: dict[str, str]
    style: PromptStyle | None = None
    first: Encoded | None = None
    held_out: Sequence[Sample] = ()
    longest: int = 0


def finetuning_data(recipe: Recipe, tokenizer: Tokenizer, context: int, registry: Registry, say: Say) -> RunData:
    """Samples, encoded.

    Args:
        context: tokens that the model can see.

    Raises:
        InputError: there is nothing to train on, or it can not be encoded.
        FileFormatError: a file is damaged; the message has the line.
    """
    limit = _limit(recipe, context)
    loaded = load_samples(
        resolve_data(recipe.data, registry, report=say),
        val_fraction=0.0 if recipe.val_data else 0.05 if recipe.val_fraction is None else recipe.val_fraction,
        seed=recipe.seed,
    )
    held_out = loaded.validation
    if recipe.val_data is not None:
        held_out = load_samples(resolve_data(recipe.val_data, registry, report=say), val_fraction=0.0).train
    plain = loaded.format in ("completion", "text")
    style = choose_prompt_style(recipe.prompt_style, tokenizer, registry, plain=plain)

    def encode(samples: Sequence[Sample]) -> EncodedData:
        return encode_samples(samples, style, tokenizer, max_seq_len=limit, train_on_prompt=recipe.train_on_prompt)

    train = encode(loaded.train)
    validation = encode(held_out) if held_out else None
    data = FinetuningData(
        train.sequences,
        validation.sequences if validation else (),
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        packing=recipe.packing,
        max_seq_len=limit if recipe.packing else None,
    )
    counts = train.report
    facts = {
        "data": f"{recipe.data}: {loaded.format}, {counts.n_kept:,} samples to train on"
        + (f", {validation.report.n_kept:,} to validate" if validation else ", none to validate"),
        "tokens": f"{counts.n_tokens:,}, {counts.n_supervised:,} of them learnt; longest {counts.longest:,}",
        "prompt style": style.name + (", prompts are learnt too" if recipe.train_on_prompt else ""),
    }
    if lost := left_out(loaded.n_without_reply, counts.n_truncated, counts.n_masked, limit):
        facts["left out"] = lost
    if loaded.ignored:
        facts["columns not used"] = ", ".join(loaded.ignored)
    longest = max(len(encoded) for encoded in train.sequences)
    return RunData(data, data.steps_per_epoch, facts, style, train.sequences[0], held_out, min(longest, limit))


def _limit(recipe: Recipe, context: int) -> int:
    if recipe.max_seq_len is not None and recipe.max_seq_len > context:
        raise InputError(f"max_seq_len {recipe.max_seq_len} is beyond the model's context of {context} tokens.")
    return recipe.max_seq_len or context


def left_out(n_without_reply: int, n_truncated: int, n_masked: int, limit: int) -> str:
    """What was lost of samples on the way to sequences of so many tokens, in words; nothing: none was."""
    counts = (
        (n_without_reply, "without anything to learn"),
        (n_truncated, f"cut at {limit:,} tokens"),
        (n_masked, "of which nothing learnt is within that"),
    )
    return ", ".join(f"{n:,} {what}" for n, what in counts if n)


def pretraining_data(recipe: Recipe, tokens: Path, tokenizer: Tokenizer, context: int) -> RunData:
    """Windows of a token file, as `zoo prepare` writes it.

    Args:
        tokens: a directory with ``train.bin`` and perhaps ``val.bin``.
    """
    train = TokenFile.open(tokens / "train.bin", tokenizer)
    validation = TokenFile.open(tokens / "val.bin", tokenizer) if (tokens / "val.bin").is_file() else None
    block = _limit(recipe, context)
    data = PretrainingData(train, validation, batch_size=recipe.batch_size, block_size=block, seed=recipe.seed)
    n_held_out = len(validation) if validation else 0
    facts = {
        "data": f"{recipe.data}: {len(train):,} tokens to train on, {n_held_out:,} to validate",
        "windows": f"{recipe.batch_size} of {block} tokens each step",
    }
    return RunData(data, data.steps_per_epoch, facts, longest=block)

"""Checks what a conversion has written: every parameter, read back, and the logits of another implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.attention.eager import Eager
from zoo.convert.base import Checkpoint, ParameterReader, Writing
from zoo.convert.load import load_any, load_model, open_checkpoint
from zoo.convert.references import REFERENCES
from zoo.errors import InputError, ZooError
from zoo.models.cache import KVCache
from zoo.models.decoder import decoder_of
from zoo.models.gpt import GPT
from zoo.registry import Registry

_LENGTHS = (1, 8, 24)
_ROWS, _TOKENS = 16, 32
"""Of the text that a model writes to have its quantized self compared on."""
_ALLOWED = 1e-4
"""Of zoo against itself, as a part of the greatest logit."""


@dataclass(frozen=True)
class Verified:
    """What a check has found to be right."""

    n_parameters: int
    reference: str
    difference: float
    """Greatest, between two logits."""
    allowed: float
    divergence: float | None = None
    """Of quantized weights: mean KL divergence from the unquantized model, in nats per token."""

    def __str__(self) -> str:
        if self.divergence is not None:
            return (
                f"{self.n_parameters} parameters read back; KL divergence from the unquantized model "
                f"{self.divergence:.4f} nats per token, on {_ROWS * _TOKENS} tokens of its own text"
            )
        return (
            f"{self.n_parameters} parameters read back bit for bit; logits within {self.difference:.1e} of "
            f"{self.reference} (allowed: {self.allowed:.1e})"
        )


def verify(
    checkpoint: Checkpoint,
    destination: Path,
    writing: Writing,
    format_name: str,
    registry: Registry,
    *,
    report: Callable[[str], None] = lambda line: None,
) -> Verified:
    """Compare ``checkpoint``, its values rounded as they were to be written, with what is in ``destination``.

    The reference is the implementation that the format was made for, where it is installed, or where the environment
    says which interpreter has it (`zoo.convert.references.Reference.variable`); else zoo itself.

    Args:
        report: called with a line when the reference is not there.

    Raises:
        ZooError: a parameter or a logit differs, or the destination can not be read.
        UnavailableError: the reference that the environment names can not be used.
    """
    try:
        again = open_checkpoint(destination, registry, format_name=format_name)
        n_parameters = _compare_parameters(checkpoint, again, writing.rounded)
    except InputError as error:
        raise ZooError(f"what was written can not be read back: {error.message}", fix=error.fix) from None
    if again.quantizer is not None:
        return Verified(n_parameters, "the unquantized model", 0.0, 0.0, _divergence(checkpoint, again))
    sequences = _sequences(checkpoint)
    ours = _logits(checkpoint, sequences, writing.rounded)
    reference = REFERENCES.get(format_name)
    answer = reference.logits(destination, sequences) if reference else None
    if reference and answer:
        (name, theirs), allowed = answer, reference.allowed
    else:
        if reference:
            report(
                f"{reference.name} is not installed, so zoo read {destination} itself to verify it. "
                f"({reference.variable}=PYTHON names an interpreter that has it.)"
            )
        name, theirs, allowed = "zoo itself", _logits(again, sequences, lambda _, values: values), _ALLOWED
    allowed *= max(1.0, ours.abs().max().item())
    difference = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else float("inf")
    if not difference <= allowed:  # NaN is no agreement
        raise ZooError(
            f"{destination} is not what {checkpoint.path} is: its logits by {name} differ from zoo's by up to "
            f"{difference:.1e}; {allowed:.1e} is allowed."
        )
    return Verified(n_parameters, name, difference, allowed)


def _compare_parameters(checkpoint: Checkpoint, again: Checkpoint, rounded: Callable[[str, Tensor], Tensor]) -> int:
    """Number of parameters, all equal."""
    source = ParameterReader(checkpoint)
    differences: dict[str, float] = {}
    count = 0
    for name, found in again.parameters():
        count += 1
        wanted = rounded(name, source.get(name)).float()
        if not torch.equal(wanted, found.float()):
            differences[name] = (wanted - found.float()).abs().max().item()
    if differences:
        worst = max(differences, key=lambda name: differences[name])
        raise ZooError(
            f"{again.path} is not what {checkpoint.path} is: {len(differences)} of {count} parameters differ, "
            f"{worst} by up to {differences[worst]:.1e}."
        )
    return count


def _sequences(checkpoint: Checkpoint) -> list[list[int]]:
    """Random ids, the same each time."""
    random, spec = torch.Generator().manual_seed(0), checkpoint.spec
    lengths = [min(length, spec.max_seq_len) for length in _LENGTHS]
    return [torch.randint(spec.vocab_size, (length,), generator=random).tolist() for length in lengths]


@torch.no_grad()
def _logits(
    checkpoint: Checkpoint, sequences: Sequence[Sequence[int]], rounded: Callable[[str, Tensor], Tensor]
) -> Tensor:
    """Logits (T, V) of all sequences in a row, in float32 by the attention that is written out."""
    model = load_any(checkpoint, Eager(), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.data = rounded(name, parameter.data).float()
    decoder = decoder_of(model, checkpoint.spec)
    return torch.cat([decoder(torch.tensor([list(ids)]))[0] for ids in sequences])


@torch.no_grad()
def _divergence(checkpoint: Checkpoint, quantized: Checkpoint) -> float:
    """KL(p || q) in nats per token, p of the checkpoint, on text drawn from p: so that no text has to be chosen."""
    model = load_model(checkpoint, Eager(), dtype=torch.float32)
    ids_BT, logits_BTV = _own_text(model)
    del model
    others_BTV = load_model(quantized, Eager(), dtype=torch.float32)(ids_BT)
    return F.kl_div(
        others_BTV.log_softmax(-1).flatten(0, 1),
        logits_BTV.log_softmax(-1).flatten(0, 1),
        log_target=True,
        reduction="batchmean",
    ).item()


def _own_text(model: GPT) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) that a model draws after a random one, the same each time, and its logits (B, T, V)."""
    random, spec = torch.Generator().manual_seed(0), model.spec
    n_tokens = min(_TOKENS, spec.max_seq_len)
    cache = KVCache(spec, capacity=n_tokens, batch=_ROWS, dtype=torch.float32, device="cpu")
    ids = [torch.randint(spec.vocab_size, (_ROWS, 1), generator=random)]
    logits = []
    for _ in range(n_tokens):
        logits.append(model(ids[-1], cache=cache))
        ids.append(torch.multinomial(logits[-1][:, 0].softmax(-1), 1, generator=random))
    return torch.cat(ids[:-1], dim=1), torch.cat(logits, dim=1)

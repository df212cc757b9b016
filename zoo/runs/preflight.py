"""What is shown and proved before the first step, when nothing is lost yet."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatchcase as fnmatch

import torch
from torch import Tensor

from zoo.adapters.proof import without_gradient
from zoo.data.audit import bos_eos_audit, masked_text
from zoo.errors import InputError, ZooError
from zoo.models.gpt import GPT
from zoo.runs.data import RunData
from zoo.runs.model import Trained
from zoo.train.loss import SupervisedLoss
from zoo.train.progress import Limits
from zoo.train.recipe import Recipe


@dataclass(frozen=True)
class Preflight:
    """What a run will do.

    Attributes:
        facts: names and values, in the order in which they are told.
        sample: the first sample as text, in pieces, each with whether it is learnt.
        warnings: what is likely to be a mistake.
    """

    facts: dict[str, str]
    sample: Sequence[tuple[str, bool]] = ()
    warnings: Sequence[str] = field(default=())


class NoGradientError(ZooError):
    """A parameter that is to be trained has no effect on the loss."""


def preflight(
    recipe: Recipe,
    trained: Trained,
    data: RunData,
    limits: Limits,
    module: SupervisedLoss,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Preflight:
    """Look at everything, prove that what is to be trained learns, and time a micro-batch.

    Raises:
        NoGradientError: a trainable parameter gets no gradient.
        InputError: the data does not end as the model should learn to.
    """
    lm, handle = trained.lm, trained.handle
    n_trained = handle.n_trained
    n_all = sum(p.numel() for p in lm.model.parameters())
    is_training, state = module.training, torch.random.get_rng_state()
    module.eval()
    with autocast():
        silent = _prove(recipe, trained, data, module)
        seconds = _seconds_of_micro_batch(recipe, trained, data, module)
    module.train(is_training)
    torch.random.set_rng_state(state)
    n_tensors = len(handle.trainable())
    facts = {
        "model": f"{recipe.model}: {n_all - (0 if n_all == n_trained else n_trained):,} parameters, "
        f"{lm.precision} on {lm.device}, {lm.attention} attention" + (f", {lm.quantized}" if lm.quantized else ""),
        **({} if lm.converted is None else {"layers": lm.converted.describe()}),
        "trained": f"{recipe.adapter.use}: {n_trained:,} parameters ({n_trained / n_all:.2%}) in {n_tensors} tensors",
        **data.facts,
        "gradients": f"every one of the {n_tensors} tensors gets one"
        if not silent
        else f"all but {len(silent)} of {n_tensors} tensors get one; the loss can not depend on {silent[0]}",
        "steps": _steps(recipe, data, limits),
        "time": _duration(seconds, recipe, limits, plain=lm.converted is not None),
    }
    sample, warnings = _shown(trained, data)
    return Preflight(facts, sample, warnings)


def _prove(recipe: Recipe, trained: Trained, data: RunData, module: SupervisedLoss) -> list[str]:
    """Names of tensors that can not have a gradient, found on a few rows."""
    batch = data.data.step(0, rank=0, world_size=1, micro_batch_size=2)[-1].to(trained.lm.device)

    def loss() -> Tensor:
        value: Tensor = module(batch) / max(1, batch.n_supervised)
        return value

    silent = without_gradient(trained.handle, loss)
    allowed = (*recipe.without_gradient, *_invariant(trained))
    if unexpected := [name for name in silent if not any(fnmatch(name, pattern) for pattern in allowed)]:
        more = f" and {len(unexpected) - 3} more" if len(unexpected) > 3 else ""
        raise NoGradientError(
            f"{', '.join(unexpected[:3])}{more} would be trained, and the loss does not depend on them.",
            fix="Leave them out of the adapter's targets; or, if this is meant to be, name them: "
            f"--set 'without_gradient=[{unexpected[0]}]'.",
        )
    return silent


def _seconds_of_micro_batch(recipe: Recipe, trained: Trained, data: RunData, module: SupervisedLoss) -> float:
    """Forward and backward of what one process computes at a time; no gradient is left."""
    batch = data.data.step(0, rank=0, world_size=recipe.world_size, micro_batch_size=recipe.micro_batch)[0]
    started = time.perf_counter()
    value: Tensor = module(batch.to(trained.lm.device))
    value.backward()
    value.item()  # a GPU is done then
    trained.handle.root.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def _invariant(trained: Trained) -> tuple[str, ...]:
    """What can have no gradient: a bias on keys adds the same to all scores of a query, unless they are rotated."""
    spec = trained.lm.spec
    is_plain = spec.rope is None and spec.qk_norm == "none" and spec.attn_softcap is None
    return ("*attn.k.bias",) if is_plain and isinstance(trained.lm.model, GPT) else ()


def _steps(recipe: Recipe, data: RunData, limits: Limits) -> str:
    ends = [f"{limits.steps:,}" if limits.steps is not None else "until"]
    if limits.tokens is not None:
        ends.append(f"at most {limits.tokens:,} tokens")
    if limits.seconds is not None:
        ends.append(f"at most {limits.seconds / 60:g} minutes")
    rows = f"of {recipe.batch_size} rows, {recipe.micro_batch} at a time on each of {recipe.world_size}"
    return f"{', '.join(ends)} {rows}; {data.steps_per_epoch:,} are an epoch"


def _duration(seconds: float, recipe: Recipe, limits: Limits, *, plain: bool) -> str:
    per_step = seconds * (recipe.batch_size // (recipe.micro_batch * recipe.world_size))
    before = " before --compile" if recipe.compile else ""
    before += f" without {recipe.precision.use}" if plain else ""  # whose layers compute so in training alone
    if limits.steps is None:
        return f"about {per_step:.2g} s a step{before}"
    return f"about {per_step:.2g} s a step, {minutes(per_step * limits.steps)} in all{before}"


def minutes(seconds: float) -> str:
    """A time as a person says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _shown(trained: Trained, data: RunData) -> tuple[list[tuple[str, bool]], list[str]]:
    if data.first is None:
        return [], []
    tokenizer = trained.lm.tokenizer
    audit = bos_eos_audit(data.first, tokenizer)
    if audit.double_bos and tokenizer.bos_id != tokenizer.eos_id:
        raise InputError(f"the first sample: {audit.problems(tokenizer)[0]}", fix="Take another --prompt-style.")
    return list(masked_text(data.first, tokenizer)), audit.problems(tokenizer)

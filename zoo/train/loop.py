"""The loop, one for pretraining and finetuning: they differ in data, loss mask and which parameters train."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zoo.data.batches import Batch
from zoo.errors import ZooError
from zoo.models.memory import peak_memory
from zoo.store.fence import Fence
from zoo.store.signals import StopSignals
from zoo.store.store import CheckpointStore
from zoo.train.metrics import Logger
from zoo.train.progress import Limits, Progress


class TrainingData(Protocol):
    """Micro-batches as a function of the step's number: nothing else is needed to go on after an interruption."""

    def step(self, number: int, *, rank: int, world_size: int, micro_batch_size: int) -> list[Batch]:
        """One rank's micro-batches of a step; equally many on each rank."""

    def n_supervised(self, number: int) -> int:
        """Tokens that are learnt in a step, on all ranks together."""

    def validation(self, *, rank: int, world_size: int, micro_batch_size: int) -> Iterable[Batch]:
        """One rank's share of the validation set; equally many batches on each rank."""


@dataclass(frozen=True)
class Every:
    """How often things happen, in steps; ``None`` is never before the end."""

    log: int = 1
    evaluate: int | None = None
    save: int | None = None


@dataclass
class Parts:
    """What the loop puts together.

    Attributes:
        fabric: launched.
        module: set up by Fabric; called with a `Batch`, it returns the loss summed over the supervised tokens.
        optimizer: set up by Fabric, over the parameters that train.
        schedule: the learning rate of the step that follows so many.
        saved: objects and data that a checkpoint holds, besides the optimizer and the progress.
        sample: writes text with the model as it is; rank 0 calls it after each evaluation.
    """

    fabric: Any
    fence: Fence
    signals: StopSignals
    module: nn.Module
    optimizer: Any
    schedule: Callable[[int], float]
    data: TrainingData
    store: CheckpointStore
    loggers: Logger | None
    saved: dict[str, Any]
    sample: Callable[[int], None] | None = None


class NotFiniteError(ZooError):
    """A loss or a gradient is no finite number. The model is as it was after the step before."""


class Trainer:
    """Runs the steps of a recipe.

    Args:
        micro_batch_size: rows of one forward and backward.
        grad_clip: largest global norm of the gradients; 0 is off.
    """

    def __init__(
        self, parts: Parts, progress: Progress, limits: Limits, every: Every, *, micro_batch_size: int, grad_clip: float
    ) -> None:
        self.parts, self.progress, self.limits, self.every = parts, progress, limits, every
        self._micro_batch_size, self._grad_clip = micro_batch_size, grad_clip
        self._share = {"rank": parts.fabric.global_rank, "world_size": parts.fabric.world_size}
        self._started = time.perf_counter() - progress.seconds
        self._saved_step, self._evaluated_step = progress.step, -1
        self.val_loss: float | None = None
        self._window = Window()

    def fit(self) -> str:
        """Train until a limit is reached or a signal comes; returns why it ended. The last step is saved.

        Raises:
            NotFiniteError: the loss or a gradient became infinite or no number; nothing of that step is kept.
            FenceError: a rank was lost, or did something else than the others.
        """
        if self.progress.step == 0:
            self._evaluate()
        while (ending := self._agree()) is None:
            values = self._step()
            self.progress.step += 1
            self._log(values)
            if self._is_due(self.every.evaluate):
                self._evaluate()
            if self._is_due(self.every.save):
                self._save()
        if self._evaluated_step != self.progress.step and self.parts.signals.received is None:
            self._evaluate()
        if self._saved_step != self.progress.step:
            self._save()
        return ending

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.progress.step % every == 0

    def _agree(self) -> str | None:
        """Why the run ends here, the same on all ranks: rank 0's clock counts, and a signal on any of them."""
        self.progress.seconds = time.perf_counter() - self._started
        said = {"seconds": self.progress.seconds, "signal": self.parts.signals.received}
        posts: list[Any] = self.parts.fence.gather("step", said, fingerprint={"step": self.progress.step})
        self.progress.seconds = posts[0]["seconds"]
        for rank, post in enumerate(posts):
            if post["signal"]:
                return f"{post['signal']} came" + (f" to rank {rank}" if len(posts) > 1 else "")
        return self.limits.reached(self.progress)

    def _step(self) -> dict[str, float]:
        """One optimizer step: the loss is a sum over the step's supervised tokens, divided by their global number."""
        parts, step = self.parts, self.progress.step
        lr = parts.schedule(step)
        for group in parts.optimizer.param_groups:
            group["lr"] = lr
        batches = parts.data.step(step, **self._share, micro_batch_size=self._micro_batch_size)
        n_supervised = parts.data.n_supervised(step)
        parts.module.train()
        sums = torch.tensor([0.0, sum(batch.n_tokens for batch in batches)], device=parts.fabric.device)
        for number, batch in enumerate(batches):
            with parts.fabric.no_backward_sync(parts.module, enabled=number < len(batches) - 1):
                loss_sum = parts.module(batch.to(parts.fabric.device))
                # Fabric's strategies average gradients over ranks: undo the division by their number.
                parts.fabric.backward(loss_sum * (parts.fabric.world_size / n_supervised))
            sums[0] += loss_sum.detach()
        loss_sum, n_tokens = parts.fabric.all_reduce(sums, reduce_op="sum").tolist()
        loss = loss_sum / n_supervised
        norm = self._clip()
        self._refuse_not_finite(loss, norm)
        parts.optimizer.step()
        parts.optimizer.zero_grad()
        self.progress.tokens += int(n_tokens)
        self._window.add(int(n_tokens))
        return {"loss": loss, "lr": lr, "grad_norm": norm, "tokens": self.progress.tokens, "supervised": n_supervised}

    def _clip(self) -> float:
        """The global norm of the gradients before they are scaled down to the limit."""
        limit = self._grad_clip or math.inf
        norm: Tensor = self.parts.fabric.clip_gradients(
            self.parts.module, self.parts.optimizer, max_norm=limit, error_if_nonfinite=False
        )
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _refuse_not_finite(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradients is {norm}"
        self.parts.optimizer.zero_grad()
        raise NotFiniteError(
            f"{what} in step {self.progress.step + 1}; the run stops, and the model is as it was before it.",
            fix=f"Step {self._saved_step} is saved, and --resume comes to the same batch again. Take a smaller --lr, "
            "more --warmup-steps, or --precision 32-true.",
        )

    def _log(self, values: dict[str, float]) -> None:
        if self.progress.step % self.every.log and self.progress.step != self.limits.steps:
            return
        measured = self._window.measured() | {"peak_memory": peak_memory(self.parts.fabric.device)}
        if self.parts.loggers is not None:
            self.parts.loggers.log(self.progress.step, values | measured)

    @torch.no_grad()
    def _evaluate(self) -> None:
        """The validation loss, over the whole set; nothing happens where there is none."""
        parts, where = self.parts, {"step": self.progress.step}
        parts.fence.gather("evaluate", fingerprint=where)
        batches = parts.data.validation(**self._share, micro_batch_size=self._micro_batch_size)
        loss_sum, n_supervised = 0.0, 0
        parts.module.eval()
        for batch in batches:
            loss_sum += float(parts.module(batch.to(parts.fabric.device)))
            n_supervised += batch.n_supervised
        sums: list[Any] = parts.fence.gather("evaluated", [loss_sum, n_supervised], fingerprint=where)
        self._evaluated_step, self.val_loss = self.progress.step, None
        if n_supervised := sum(post[1] for post in sums):
            self.val_loss = sum(post[0] for post in sums) / n_supervised
            is_best = self.progress.evaluated(self.val_loss)
            if parts.loggers is not None:
                parts.loggers.log(self.progress.step, {"val_loss": self.val_loss, "best": int(is_best)})
        if parts.sample is not None and parts.fabric.global_rank == 0:
            parts.sample(self.progress.step)
        self._window.restart()

    def _save(self) -> None:
        step = self.progress.step
        loss = self.val_loss if self._evaluated_step == step else None
        metrics = {} if loss is None else {"val_loss": loss}
        self.progress.seconds = time.perf_counter() - self._started
        self.parts.store.save(step, state_of(self.parts, self.progress), metrics=metrics)
        self._saved_step = step
        self._window.restart()


def state_of(parts: Parts, progress: Progress) -> dict[str, Any]:
    """What a checkpoint of a run holds; the store adds the random generators of every rank."""
    return {**parts.saved, "optimizer": parts.optimizer, "progress": progress}


class Window:
    """Tokens and time since the last line that was logged."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin anew: evaluation and saving are no part of the throughput."""
        self._tokens, self._since = 0, time.perf_counter()

    def add(self, tokens: int) -> None:
        """Count the tokens of a step."""
        self._tokens += tokens

    def measured(self) -> dict[str, float]:
        """Seconds and tokens per second since the last call."""
        seconds, tokens = time.perf_counter() - self._since, self._tokens
        self.restart()
        return {"seconds": round(seconds, 4), "tokens_per_second": round(tokens / max(seconds, 1e-9), 1)}

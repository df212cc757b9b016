"""One run as it is put together, by every rank alike; rank 0 alone writes and shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from zoo.data.load import resolve_data
from zoo.data.prepare import corpus_tokenizer, prepare_corpus, read_tokenizer
from zoo.errors import InputError
from zoo.precision.base import plain_precision
from zoo.registry import Registry
from zoo.runs.data import RunData, finetuning_data, pretraining_data
from zoo.runs.directory import RunDirectory, trains_all
from zoo.runs.ending import finish
from zoo.runs.files import AdapterFiles, ModelDirectoryFiles
from zoo.runs.model import Trained, build_trained, gathered, load_trained
from zoo.runs.outcome import Display, Outcome
from zoo.runs.preflight import preflight
from zoo.runs.samples import Sampler, questions_of
from zoo.runs.watching import Watched, make_logger
from zoo.store.fence import Fence
from zoo.store.signals import StopSignals
from zoo.store.store import CheckpointStore
from zoo.text.tokenizer import Tokenizer
from zoo.train.activation_checkpointing import set_activation_checkpointing
from zoo.train.compiling import compile_blocks
from zoo.train.loop import Every, Parts, Trainer, state_of
from zoo.train.loss import SupervisedLoss
from zoo.train.metrics import Loggers, MetricsFile
from zoo.train.optim import build_optimizer
from zoo.train.progress import Limits, Progress, limits_of
from zoo.train.recipe import Recipe, Use
from zoo.train.recipe_file import recipe_values
from zoo.train.schedule import Schedule, build_schedule

PRETRAINING_RATE = 6e-4
"""As GPT-3's and nanoGPT's smallest model."""
MAX_WARMUP = 100
OFTEN = 10
"""Steps between two evaluations, at least, where the recipe does not say."""


class Assembly:
    """One run.

    Args:
        fabric: launched.
    """

    def __init__(
        self,
        recipe: Recipe,
        directory: RunDirectory,
        registry: Registry,
        fabric: Any,
        fence: Fence,
        signals: StopSignals,
        display: Display,
    ) -> None:
        self.recipe, self.directory, self.registry = recipe, directory, registry
        self.fabric, self.fence, self.signals, self.display = fabric, fence, signals, display
        self.is_first = fabric.global_rank == 0

    def run(self, *, resume: bool, dry_run: bool) -> Outcome:
        """Put it together, show it, and train."""
        recipe, directory = self.recipe, self.directory
        if not dry_run and self.is_first:
            directory.go_on(recipe) if resume else directory.begin(recipe)
        self.fence.gather("begin", fingerprint={"recipe": recipe_values(recipe)})
        torch.manual_seed(recipe.seed)
        trained, data = self._pretraining(dry_run) if recipe.task == "pretrain" else self._finetuning()
        limits = limits_of(recipe, data.steps_per_epoch)
        schedule = self._schedule(trained, limits)
        module = SupervisedLoss(trained.lm.model)
        set_activation_checkpointing(trained.lm.model, recipe.activation_checkpointing)
        if self.is_first:
            found = preflight(recipe, trained, data, limits, module, self.fabric.autocast)
            self.display.preflight(found)
        if dry_run:
            return Outcome(directory.path, "a dry run: nothing was trained")
        if recipe.compile:
            compile_blocks(trained.lm.model)
        return self._train(trained, data, module, limits, schedule, resume=resume)

    def _finetuning(self) -> tuple[Trained, RunData]:
        trained = load_trained(self.recipe, self.registry, self.display.say)
        lm = trained.lm
        data = finetuning_data(self.recipe, lm.tokenizer, lm.spec.max_seq_len, self.registry, self.display.say)
        assert data.style is not None
        lm.use_style(data.style)
        return trained, data

    def _pretraining(self, dry_run: bool) -> tuple[Trained, RunData]:
        tokens, tokenizer = self._corpus(dry_run)
        trained = build_trained(self.recipe, tokenizer, self.registry)
        return trained, pretraining_data(self.recipe, tokens, tokenizer, trained.lm.spec.max_seq_len)

    def _corpus(self, dry_run: bool) -> tuple[Path, Tokenizer]:
        """Token files: those that are given, or made by rank 0 of the text that is given."""
        given = Path(self.recipe.data).expanduser()
        if (given / "train.bin").is_file():
            return given, read_tokenizer(self.recipe.tokenizer or str(given))
        if self.recipe.tokenizer is None:
            raise InputError(
                f"{self.recipe.data} is text, and needs a tokenizer.", fix="Give --tokenizer byte, char or a directory."
            )
        source = resolve_data(self.recipe.data, self.registry, report=self.display.say)
        tokenizer = corpus_tokenizer(self.recipe.tokenizer, source)
        fraction = 0.1 if self.recipe.val_fraction is None else self.recipe.val_fraction
        tokens = self.directory.tokens(dry_run=dry_run)
        if self.is_first and not (tokens / "train.bin").is_file():
            prepare_corpus(source, tokenizer, tokens, val_fraction=fraction)
        self.fence.gather("tokens")
        return tokens, tokenizer

    def _schedule(self, trained: Trained, limits: Limits) -> Schedule:
        recipe = self.recipe
        lr = recipe.lr or (
            PRETRAINING_RATE if recipe.task == "pretrain" else type(trained.handle.adapter).learning_rate
        )
        steps = limits.steps or 1
        warmup = recipe.warmup_steps
        return build_schedule(
            recipe.schedule.use,
            recipe.schedule.options,
            lr=lr,
            total_steps=steps,
            warmup_steps=min(MAX_WARMUP, steps // 10) if warmup is None else warmup,
            min_lr_ratio=recipe.min_lr_ratio,
        )

    def _train(
        self,
        trained: Trained,
        data: RunData,
        module: SupervisedLoss,
        limits: Limits,
        schedule: Schedule,
        *,
        resume: bool,
    ) -> Outcome:
        recipe = self.recipe
        wrapped = self.fabric.setup_module(module, move_to_device=recipe.strategy != "fsdp")
        optimizer = self.fabric.setup_optimizers(
            build_optimizer(
                wrapped, lr=schedule.lr, weight_decay=recipe.weight_decay, betas=(recipe.beta1, recipe.beta2)
            )
        )
        files = ModelDirectoryFiles(trained, self.registry) if trains_all(recipe) else AdapterFiles(trained, data.style)
        progress = Progress()
        with self._store(trained, files) as store:
            parts = Parts(
                fabric=self.fabric,
                fence=self.fence,
                signals=self.signals,
                module=wrapped,
                optimizer=optimizer,
                schedule=schedule,
                data=data.data,
                store=store,
                loggers=None,
                saved=self._saved(trained),
            )
            torch.manual_seed(recipe.seed + self.fabric.global_rank)  # dropout differs from rank to rank
            if resume and store.latest() is not None:
                loaded = store.load(state_of(parts, progress), other_world_size=True)
                for line in (*loaded.skipped, *loaded.notes, f"going on from step {loaded.step}"):
                    self.display.say(line)
            parts = replace(parts, **self._watchers(trained, data, progress.step, limits))
            trainer = Trainer(
                parts,
                progress,
                limits,
                self._every(limits),
                micro_batch_size=recipe.micro_batch,
                grad_clip=recipe.grad_clip,
            )
            ending = _fitted(trainer)
        if self._is_sharded:
            files = replace(files, trained=self._whole(trained))
        self.fence.gather("end", fingerprint={"step": progress.step})
        return finish(self.recipe, self.directory, files, progress, ending, trainer.val_loss, is_first=self.is_first)

    @property
    def _is_sharded(self) -> bool:
        return self.recipe.strategy == "fsdp" and self.fabric.world_size > 1

    def _whole(self, trained: Trained) -> Trained:
        """On rank 0 a model that is not sharded, with what was trained; it is made anew, in host memory."""
        state = gathered(trained)
        if not self.is_first:
            return trained
        recipe = self.recipe.model_copy(update={"device": "cpu"})
        if trained.lm.converted is not None:  # what is converted is for training, and may need a GPU
            plain = Use(use=plain_precision(trained.lm.decoder.dtype))
            recipe = recipe.model_copy(update={"precision": plain})
        if recipe.task == "pretrain":
            whole = build_trained(recipe, trained.lm.tokenizer, self.registry)
        else:
            whole = load_trained(recipe, self.registry, self.display.say)
            whole.lm.style = trained.lm.style
        whole.handle.load_state_dict(state)
        return whole

    def _saved(self, trained: Trained) -> dict[str, Any]:
        """What a checkpoint holds of the model: what is trained, and what its precision has seen."""
        converted = trained.lm.converted
        return {"model": trained.handle} | ({} if converted is None else {"precision": converted})

    def _store(self, trained: Trained, files: AdapterFiles | ModelDirectoryFiles) -> CheckpointStore:
        """Another model's steps do not fit, whatever their shapes."""
        return CheckpointStore(
            self.directory.checkpoints,
            keep=self.recipe.keep,
            keep_best="val_loss",
            fence=self.fence,
            identity={"spec": trained.lm.spec.to_dict(), "adapter": self.recipe.adapter.use},
            model_files=files,
        )

    def _watchers(self, trained: Trained, data: RunData, after: int, limits: Limits) -> dict[str, Any]:
        """Loggers and samples, which are rank 0's alone."""
        if not self.is_first:
            return {}
        recipe, directory = self.recipe, self.directory
        others = {use.use: make_logger(use, directory.path, recipe, self.registry) for use in recipe.loggers}
        loggers = Loggers(MetricsFile(directory.metrics, after=after), others, self.display.say)
        watchers: dict[str, Any] = {"loggers": Watched(loggers, self.display, limits.steps)}
        if self._is_sharded:
            self.display.say("no samples are written: the model is sharded, and one rank alone can not run it.")
            return watchers
        questions = questions_of(data.held_out, recipe.sample_prompts, chat=data.style is not None)
        if questions:
            stop = data.style.stop if data.style else ()
            watchers["sample"] = Sampler(
                trained.lm, questions, directory.samples, stop=stop, after=after, say=self.display.answer
            )
        return watchers

    def _every(self, limits: Limits) -> Every:
        recipe = self.recipe
        tenth = None if limits.steps is None else max(OFTEN, limits.steps // 10)
        evaluate = recipe.eval_every or tenth
        return Every(log=recipe.log_every, evaluate=evaluate, save=recipe.save_every or evaluate)


def _fitted(trainer: Trainer) -> str:
    """Why the training ended. Loggers are told, however it ends: some write what they hold only then."""
    try:
        return trainer.fit()
    finally:
        if trainer.parts.loggers is not None:
            trainer.parts.loggers.finish()

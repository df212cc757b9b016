"""`CheckpointStore`: the steps of one run in one directory, saved and loaded by all ranks together."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from zoo.errors import InputError, ZooError
from zoo.store.background import BackgroundWork
from zoo.store.commit import Saving, announce, delete, write_and_commit
from zoo.store.fence import Fence
from zoo.store.layout import Step, check_is_store, hold, listing, verify_all
from zoo.store.loading import Loaded, load, refuse_other_identity
from zoo.store.lock import WriteLock
from zoo.store.parts import ModelFiles, Parts, divide, fingerprint
from zoo.store.ranks import PATIENCE_S, Ranks, carry_out
from zoo.store.reading import Loading
from zoo.store.retention import Best
from zoo.store.rng import capture_rng
from zoo.store.signals import StopSignals


class CheckpointStore:
    """The steps of one run: each is a directory that is complete or not there.

    Every rank makes one with the same arguments and makes the same calls; what only one rank does is an error on all
    of them. Use it in a ``with`` block, or call `close` at the end.

    Example:
        >>> store = CheckpointStore("run/checkpoints", keep=3, keep_best="val_loss")
        >>> state = {"model": model, "optimizer": optimizer, "data": {"position": 0}}
        >>> if store.latest():
        ...     store.load(state)
        >>> store.save(100, state, metrics={"val_loss": 2.1})

    Args:
        directory: a store, or a directory that is new or empty.
        fabric: a launched Fabric, whose ranks save together.
        keep: how many of the newest steps stay; None for all.
        keep_best: the best step by this metric stays too: ``"val_loss"``, ``"accuracy:max"``.
        fence: how the ranks meet, if not by Fabric's or torch's process group.
        background: save in a thread: `save` returns when it has a copy of the state in host memory.
        signals: until `close`, the first SIGTERM, SIGINT or SIGUSR1 on any rank is what `step` reports on all of them;
            a second one stops its process at once. Python allows it in the main thread only.
        identity: what this run is, as JSON: a hash of its spec. Another run's steps are refused.
        model_files: the format of ``model/``, if not plain ``model.safetensors``.
        read_only: load only, also while another process writes.
        lock: False for file systems that have no locks.

    Raises:
        InputError: the directory is something else, can not be written, or is not the same on all ranks.
        StoreLockedError: another process writes it.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        fabric: Any = None,
        *,
        keep: int | None = 3,
        keep_best: str | None = None,
        fence: Ranks | None = None,
        background: bool = False,
        signals: bool = False,
        identity: Any = None,
        model_files: ModelFiles | None = None,
        read_only: bool = False,
        lock: bool = True,
    ) -> None:
        if keep is not None and (type(keep) is not int or keep < 1):
            raise InputError(f"keep={keep!r} is no number of steps.", fix="Keep at least 1, or None for all.")
        self.directory = Path(directory).absolute()
        self._keep, self._best = keep, Best.parse(keep_best) if keep_best else None
        self._background, self._identity = background, _as_json(identity)
        self._files, self._read_only = model_files, read_only
        self._loaded: frozenset[int] = frozenset()
        self._may_save = False
        self._work: BackgroundWork[Step] | None = None
        self._deletion: threading.Thread | None = None
        self._lock: WriteLock | None = None
        self._signals = StopSignals() if signals else None
        self._must_stop = False
        self._owns_fence = fence is None
        self._ranks: Ranks = Fence.connect(fabric) if fence is None else fence
        try:
            self._open(lock=lock)
            if self._signals is not None:
                self._signals.install()
        except BaseException:
            self.close()
            raise

    @property
    def stop_requested(self) -> bool:
        """Whether a signal asked the run to save and stop: what the last `step` returned, the same on all ranks."""
        return self._must_stop

    def step(self, step: int) -> bool:
        """Meet before a step: call it on every rank, before the first collective of the step.

        A rank that is elsewhere is then an error on all of them, and no hang. A save in the background is seen to.

        Args:
            step: the number of optimizer steps taken so far; the same on all ranks.

        Returns:
            Whether to save and stop, because a signal came to any of the ranks. See ``signals``.

        Raises:
            FenceError: the ranks are not all here, or at other steps.
            SaveError: a save in the background failed.
        """
        _check_step(step)
        received = self._signals.received if self._signals is not None else None
        if any(self._ranks.gather("step", received, fingerprint={"step": step})):
            self._must_stop = True
        self.poll()
        return self._must_stop

    def save(self, step: int, state: Mapping[str, Any], *, metrics: Mapping[str, Any] | None = None) -> Step | None:
        """Save a step; one that is there is replaced.

        Args:
            step: the number of optimizer steps taken.
            state: ``"model"`` and ``"optimizer"``, and whatever else there is: objects with ``state_dict()``, tensors,
                arrays, anything JSON. The random generators of every rank are saved too.
            metrics: what was measured at this step: numbers by name, or tensors of one number. Rank 0's count.

        Returns:
            The step; None while it is being written in the background.

        Raises:
            SaveError: it could not be saved, on any rank. In the background: the step before could not be saved.
        """
        self._finish()
        saving = Saving(
            root=self.directory,
            step=step,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            metrics=metrics or {},
            identity=self._identity,
            keep=self._keep,
            best=self._best,
            needed=self._loaded,
            files=self._files,
            background=self._background,
        )
        parts, nonce = carry_out(announce(saving, lambda: self._divided(saving, state)), self._ranks)
        self._may_save = True  # what is here is of this run
        procedure = write_and_commit(saving, parts, nonce)
        if not self._background:
            done = carry_out(procedure, self._ranks)
            self._deletion = threading.Thread(target=delete, args=(saving.trash,), name="delete")
            self._deletion.start()
            return done
        self._work = BackgroundWork(procedure, self._ranks)
        return None

    def poll(self) -> Step | None:
        """See to a save in the background; with several ranks, call it at every step. Never waits for a disk.

        Returns:
            The step that has been committed, once.

        Raises:
            SaveError: it could not be saved.
        """
        if self._work is None:
            return None
        return self._done(self._work, self._work.poll)

    def load(
        self,
        state: dict[str, Any],
        which: str | int = "latest",
        *,
        partial: bool = False,
        check_finite: bool = True,
        other_world_size: bool = False,
    ) -> Loaded:
        """Load a step into the objects of a state; plain values in it are replaced. All of it, or nothing.

        It takes host memory for what the rank reads, and for a second copy of the model while it can be taken back.

        Args:
            state: as for `save`.
            which: ``"latest"``, ``"best"`` or a step number. The first two take the next one if a step is damaged.
            partial: take only what ``state`` names, and leave the random generators as they are.
            check_finite: refuse parameters with infinities or NaN.
            other_world_size: accept a step that was saved by more or fewer ranks.

        Raises:
            InputError: there is no such step, or it does not fit the objects here, such as another run's.
            ZooError: every step is damaged, or an object refused its state; everything is as it was.
        """
        self._finish()
        if which not in ("latest", "best") and (type(which) is not int or which < 0):
            raise InputError(f"which={which!r} is no step.", fix='Say "latest", "best" or a step number.')
        loading = Loading(
            root=self.directory,
            which=which,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            best=self._best,
            identity=self._identity,
            files=self._files,
            partial=partial,
            check_finite=check_finite,
            other_world_size=other_world_size,
        )
        loaded = carry_out(load(loading, state), self._ranks)
        self._loaded = frozenset({loaded.step})
        return loaded

    def latest(self) -> Step | None:
        """The step that was saved last, of those whose files have the right sizes; None if there is none."""
        steps = self.list()
        return steps[-1] if steps else None

    def verify(self) -> Mapping[str, Sequence[str]]:
        """Read every byte of every step.

        Returns:
            Of each step, by the name of its directory, what is wrong with it; nothing for one that is whole.
        """
        return self._on_rank_0("verify", lambda: verify_all(self.directory))

    def close(self) -> None:
        """Finish a save in the background, and let other processes write. Raises as `poll`."""
        try:
            self._finish()
        finally:
            if self._signals is not None:
                self._signals.restore()
            if self._lock is not None:
                self._lock.release()
            if self._owns_fence and isinstance(self._ranks, Fence):
                self._ranks.close()

    def __enter__(self) -> CheckpointStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None and self._ranks.world_size > 1:
            self._work = None  # the others may not be here to commit it
            if self._owns_fence and isinstance(self._ranks, Fence):
                self._ranks.__exit__(kind, error, at)  # they hear why
        self.close()

    def _open(self, lock: bool) -> None:
        """Rank 0 sees that this is a store, and holds it; the others hear whether it does."""

        def prepare() -> None:
            check_is_store(self.directory, must_exist=self._read_only)
            if not self._read_only:
                self._lock = hold(self.directory, lock=lock)
            if steps := listing(self.directory).steps:
                refuse_other_identity(self._identity, steps[-1].manifest.identity, str(steps[-1].path))

        payload = {"path": str(self.directory)}
        first, *others = self._alike("open", lambda: prepare() if self._ranks.rank == 0 else None, payload)
        for rank, other in enumerate(others, start=1):
            if other["path"] != first["path"]:
                raise InputError(
                    f"the store is {first['path']} on rank 0 and {other['path']} on rank {rank}.",
                    fix="Give all ranks the same directory, on a file system that they share.",
                )

    def _divided(self, saving: Saving, state: Mapping[str, Any]) -> Parts:
        """The parts of a state that may be saved here."""
        if self._read_only:
            raise InputError(f"{self.directory} was opened with read_only=True.")
        _check_step(saving.step)
        if self._lock is not None and not self._lock.is_held:
            raise ZooError("this process did not open the store, or has closed it.", fix="Open one in this process.")
        parts = divide(state, capture_rng())
        if saving.rank == 0 and not self._may_save:
            self._refuse_other_model(parts)
        return parts

    def _refuse_other_model(self, parts: Parts) -> None:
        """Before the first save: retention must not delete the steps of another run."""
        steps = listing(self.directory).steps
        known = steps[-1].manifest.parameters if steps else None
        if known and parts.model is not None and known != fingerprint(parts.model):
            raise InputError(
                f"{steps[-1].path} is of a model with other parameters.", fix="Save this run in a directory of its own."
            )

    def _finish(self) -> None:
        """Wait for a save in the background."""
        if self._deletion is not None:
            self._deletion.join()
        if self._work is not None:
            work = self._work
            self._done(work, lambda: [work.wait()])

    def _done(self, work: BackgroundWork[Step], ask: Callable[[], Sequence[Step]]) -> Step | None:
        self._work = None
        if result := ask():
            return result[0]
        self._work = work
        return None

    def _on_rank_0(self, kind: str, work: Callable[[], Any]) -> Any:
        """What rank 0 finds, on all ranks: decisions follow from it, which must be the same everywhere."""
        payload: dict[str, Any] = {"found": None}

        def look() -> None:
            if self._ranks.rank == 0:
                payload["found"] = work()

        return self._alike(kind, look, payload)[0]["found"]

    def _alike(self, kind: str, work: Callable[[], object], payload: dict[str, Any]) -> Sequence[dict[str, Any]]:
        """Do something, meet, and raise on all ranks what it raised on any."""
        own: ZooError | None = None
        try:
            work()
        except ZooError as error:
            own = error
            payload["error"] = [error.message, error.fix]
        except OSError as error:
            own = InputError(f"{self.directory} can not be used: {error}.")
            payload["error"] = [own.message, None]
        payloads = self._ranks.gather(f"checkpoint store: {kind}", payload, timeout=PATIENCE_S)
        if own is not None:
            raise own
        for rank, other in enumerate(payloads):
            if "error" in other:
                raise ZooError(f"on rank {rank}: {other['error'][0]}", fix=other["error"][1])
        return payloads

    def list(self) -> Sequence[Step]:
        """The steps whose files have the right sizes, in the order in which they were saved."""
        found = self._on_rank_0("list", lambda: [step.to_json() for step in listing(self.directory).steps])
        return [Step.from_json(self.directory, content) for content in found]


def _check_step(step: Any) -> None:
    if type(step) is not int or step < 0:
        raise InputError(f"step={step!r} is no step number.", fix="Count optimizer steps from 0.")


def _as_json(identity: Any) -> Any:
    try:
        return json.loads(json.dumps(identity, allow_nan=False))
    except (TypeError, ValueError):
        raise InputError(f"identity={identity!r} is not JSON.", fix="Give strings, numbers, lists and dicts.") from None

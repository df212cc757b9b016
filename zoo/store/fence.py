"""A place where all ranks of a job meet on the host, and say what they are about to do, before any collective."""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
import traceback
from types import TracebackType
from typing import Any, NoReturn

import torch.distributed as dist

from zoo.store.lifeline import FenceError, Lifeline, describe_stacks
from zoo.store.positions import Json, Place, Post, canonical, disagreement, names, remedy
from zoo.store.rendezvous import Meeting, group_of, meet

__all__ = ["Fence", "FenceError", "Json"]

_LINGER = 5.0
"""Seconds that rank 0, which has ended, goes on hosting the store for the others."""
_SHORTEST, _LONGEST = 5e-5, 0.02
"""Seconds between two looks at the store. In between they grow with the time waited, so that a wait ends a twentieth
late at most. A wait inside the store would be deaf to signals and to failures."""
_NAMED = 3
"""Ranks of which a message says where they are."""


class Fence:
    """Ranks that agree before they act.

    Every rank calls `gather` for each region that all enter together (a step, an evaluation, a save, a load, the end).
    A call that not all make alike raises `FenceError` on all of them, with the position of each: at once when the ranks
    say different things or one has died, after ``timeout`` seconds when one does not come. No collective of the
    training is used. A process that can not raise, because it is in a collective that never ends, prints the reason
    and exits with code 70 after ``grace`` seconds.

    A rank that is alive and silent is waited for until ``timeout``: it compiles, or its storage is slow. After
    ``notice`` seconds, and ever less often, the waiting ranks print where its main thread is.

    A fence belongs to the thread that connected it. A call costs each rank O(world size) reads from the store of rank
    0: for more than 64 ranks, do not call it for every step. With one rank there is no store, thread or socket.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        meeting: Meeting | None = None,
        *,
        timeout: float = 600.0,
        notice: float = 10.0,
        grace: float = 3.0,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self._timeout, self._notice, self._grace = timeout, notice, grace
        self._place: Place | None = None
        self._calls = 0
        self._keys: list[list[str]] = []
        self._is_inside = self._is_closed = False
        self._process = os.getpid()
        self._line: Lifeline | None = None
        if meeting is not None:
            self._store = meeting.store
            self._line = Lifeline(rank, world_size, meeting.sockets, grace=grace)
            atexit.register(self._at_exit)

    @classmethod
    def connect(
        cls, fabric: Any | None = None, *, timeout: float = 600.0, notice: float = 10.0, grace: float = 3.0
    ) -> Fence:
        """Connect the ranks of a Fabric (launched), or of the default process group; every rank calls it.

        Args:
            fabric: anything with ``global_rank``, ``world_size`` and ``broadcast(object, src=0)``.
            timeout: seconds until a rank that does not come has failed.
            notice: seconds after which the waiting ranks print what they wait for.
            grace: seconds after a failure until a process that does not raise is ended.

        Raises:
            FenceError: a rank can not be reached, or did not come within ``timeout``.
        """
        group = group_of(fabric)
        meeting = meet(group, timeout=timeout, notice=notice) if group.world_size > 1 else None
        return cls(group.rank, group.world_size, meeting, timeout=timeout, notice=notice, grace=grace)

    def gather(
        self, kind: str, payload: Json = None, *, fingerprint: Json = None, timeout: float | None = None
    ) -> list[Json]:
        """The payloads of all ranks, by rank, once every rank has called with the same kind and fingerprint.

        Payloads make a round trip through JSON, with one rank as with many: tuples become lists.

        Raises:
            FenceError: the ranks disagree, or one of them failed, died, ended or did not come in time.
        """
        place = Place(kind, self._calls + 1, fingerprint)
        if self._is_closed:
            raise FenceError(f"rank {self.rank} called {place} of a fence that is closed.")
        full, shown = canonical(fingerprint)
        post = Post(kind, shown, payload)
        encoded = post.encode()
        self._calls, before, self._place = place.number, self._place, place
        if self._line is None:
            return [Post.decode(encoded.encode()).payload]
        limit = self._timeout if timeout is None else timeout
        self._is_inside = True
        try:
            return self._meet(self._line, post, encoded, full, limit, before)
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            self._line.hears_failure(patience=1.0)
            self._raise_if_failed(self._line)
            self._fail(FenceError("rank 0 is gone, and with it the store that it hosted."), error)
        finally:
            self._is_inside, self._line.give_up_at = False, None

    def fail(self, why: str, *, fix: str | None = None) -> NoReturn:
        """Tell all ranks why they can not go on, and raise it here.

        The others raise it in the call that they are in or come to; one that does not within the grace is ended.
        """
        self._fail(FenceError(why, fix=fix))

    def close(self) -> None:
        """A normal end. Ranks that then wait for this one learn that it has ended; rank 0 waits briefly for them."""
        if self._is_closed or self._is_in_fork():
            return
        self._is_closed = True
        if self._line is None:
            return
        atexit.unregister(self._at_exit)
        known = self._line.failure
        self._line.end(f"after {self._place}" if self._place else "before any call", patience=_LINGER)
        if self._line.failure and not known:
            sys.stderr.write(f"zoo: rank {self.rank} had ended when the others failed: {self._line.failure}\n")
        self._line.close()
        del self._store

    def __enter__(self) -> Fence:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None and self._line is not None and not (self._is_closed or self._is_in_fork()):
                self._leave(self._line, error)
        finally:
            self.close()

    def _leave(self, line: Lifeline, error: BaseException) -> None:
        """This rank ends with an error: the others hear of it, unless the error only follows from theirs."""
        if isinstance(error, FenceError | SystemExit):
            return
        follows = type(error) is RuntimeError or isinstance(error, dist.DistError)
        if follows and line.hears_failure(patience=1.0):
            self._raise_if_failed(line, error)  # a collective broke because a peer is gone: say which, and why
        line.fail(FenceError(f"rank {self.rank} ended with an error{self._at()}:\n{_last_lines(error)}"))

    def _is_in_fork(self) -> bool:
        """A forked process that leaves our ``with`` or ends is not this rank."""
        return os.getpid() != self._process

    def _at_exit(self) -> None:
        """The process ends without `close`: perhaps by an error, which the interpreter has kept."""
        if self._is_in_fork() or self._line is None:
            return
        error = getattr(sys, "last_value", None)
        if self._line.failure and not isinstance(error, FenceError):
            sys.stderr.write(f"zoo: rank {self.rank}: {self._line.failure}\n")
            self._line.leave()
        elif isinstance(error, BaseException) and not isinstance(error, FenceError):
            self._line.fail(FenceError(f"rank {self.rank} ended with an error{self._at()}:\n{_last_lines(error)}"))
        self.close()

    def _meet(
        self, line: Lifeline, post: Post, encoded: str, full: str, limit: float, before: Place | None
    ) -> list[Json]:
        self._raise_if_failed(line)
        if line.ended:  # who has ended posts nothing more, and with rank 0 went the store
            self._fail(self._ended(line.ended, set(line.ended), before))
        line.give_up_at = time.monotonic() + limit + self._grace
        self._publish(post, encoded, full)
        posts = self._wait(line, limit, before)
        self._compare(posts)
        self._forget()
        return [posts[rank].payload for rank in range(self.world_size)]

    def _publish(self, post: Post, encoded: str, full: str) -> None:
        key = f"{self._calls}/{self.rank}"
        keys = [key]
        if post.is_hashed:  # needed only to say in what it differs, so the others do not read it
            self._store.set(f"{key}/fingerprint", full)
            keys.append(f"{key}/fingerprint")
        self._store.set(key, encoded)
        self._keys.append(keys)

    def _forget(self) -> None:
        """Delete our keys of the call before: who has posted this one has read that one."""
        while len(self._keys) > 1:
            for key in self._keys.pop(0):
                self._store.delete_key(key)

    def _wait(self, line: Lifeline, limit: float, before: Place | None) -> dict[int, Post]:
        keys = [f"{self._calls}/{rank}" for rank in range(self.world_size)]
        started = time.monotonic()
        look_at, notice_at = 1.0, min(self._notice, limit / 2)
        while not self._store.check(keys):
            waited = time.monotonic() - started
            if line.ended or waited >= min(look_at, limit, notice_at):
                ended = dict(line.ended)  # before the posts: who posts and then ends has made this call
                posts = self._arrived(keys)
                self._compare(posts)
                missing = set(range(self.world_size)) - set(posts)
                if missing & set(ended):
                    self._fail(self._ended(ended, missing, before))
                if waited >= limit and missing:
                    self._fail(self._absent(line, missing, limit, before))
                if waited >= notice_at and missing:
                    self._notify(line, missing, waited, limit)
                    notice_at = 2 * waited
                look_at = waited + 1.0
            time.sleep(min(max(_SHORTEST, waited / 20), _LONGEST))
            if line.failure and not self._store.check(keys):  # a call that all have made counts, whatever came then
                self._raise_if_failed(line)
        return self._read(keys)

    def _arrived(self, keys: list[str]) -> dict[int, Post]:
        there = [rank for rank, key in enumerate(keys) if self._store.check([key])]
        posts = self._store.multi_get([keys[rank] for rank in there])
        return {rank: Post.decode(post) for rank, post in zip(there, posts, strict=True)}

    def _read(self, keys: list[str]) -> dict[int, Post]:
        return {rank: Post.decode(post) for rank, post in enumerate(self._store.multi_get(keys))}

    def _compare(self, posts: dict[int, Post]) -> None:
        if len({(post.kind, post.shown) for post in posts.values()}) <= 1:
            return
        places = {}
        for rank, post in posts.items():
            key = f"{self._calls}/{rank}/fingerprint"
            full = self._store.get(key) if post.is_hashed else post.shown
            places[rank] = Place(post.kind, self._calls, json.loads(full))
        message, fix = disagreement(places)
        self._fail(FenceError(message, fix=fix))

    def _ended(self, ended: dict[int, str], missing: set[int], before: Place | None) -> FenceError:
        who = ", ".join(f"rank {rank} has ended {ended[rank]}" for rank in sorted(missing & set(ended))[:_NAMED])
        kinds = {place.kind for place in (self._place, before) if place}
        return FenceError(f"{self._own_position()}, but {who}.", fix=remedy(kinds))

    def _absent(self, line: Lifeline, missing: set[int], limit: float, before: Place | None) -> FenceError:
        stacks = line.stacks(missing)
        last = f"; the last call of all ranks was {before}" if before else ""
        message = f"{self._own_position()}, where {names(missing)} did not come within {limit:g} s{last}."
        for rank, stack in list(stacks.items())[:_NAMED]:
            place = f"in {stack.line}" if stack else "alive and does not answer"
            message += f" Rank {rank} is {place}."
        kinds = [self._place.kind] if self._place else []
        slow = f"{names(missing)} {'is' if len(missing) == 1 else 'are'} only slow"
        return FenceError(message, fix=f"{remedy(kinds)} If {slow}, allow a longer timeout.")

    def _notify(self, line: Lifeline, missing: set[int], waited: float, limit: float) -> None:
        sys.stderr.write(
            f"zoo: {self._own_position()} and has waited {waited:.0f} s for {names(missing)}, "
            f"of {limit:g} s at most.\n{describe_stacks(line.stacks(missing))}"
        )
        sys.stderr.flush()

    def _own_position(self) -> str:
        return f"rank {self.rank} is {'at' if self._is_inside else 'past'} {self._place}"

    def _at(self) -> str:
        return f" after {self._place}" if self._place else ""

    def _raise_if_failed(self, line: Lifeline, cause: BaseException | None = None) -> None:
        if line.failure is None:
            return
        failure = line.failure
        line.leave()
        space = "\n" if "\n" in failure.message else " "
        own = f"{space}Here {self._own_position()}." if self._place else ""
        raise FenceError(failure.message + own, fix=failure.fix) from cause

    def _fail(self, failure: FenceError, cause: BaseException | None = None) -> NoReturn:
        if self._line is not None:
            self._line.fail(failure)
        raise failure from cause


def _last_lines(error: BaseException) -> str:
    """Where an error was raised and what it says."""
    frames = traceback.extract_tb(error.__traceback__)[-2:]
    return "".join([*traceback.format_list(frames), *traceback.format_exception_only(error)]).rstrip()

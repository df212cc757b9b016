"""Signals that ask for a stop, sent to real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from zoo.errors import InputError
from zoo.store.signals import StopSignals

ROOT = Path(__file__).parents[2]

PROGRAM = """
import ctypes, os, signal, sys, time
from zoo.store.signals import StopSignals

def wait():
    print("ready", flush=True)
    until = time.monotonic() + 30
    while not signals.received and time.monotonic() < until:
        time.sleep(0.01)
    print(signals.received, flush=True)

def stuck():
    print("ready", flush=True)
    lock = ctypes.create_string_buffer(64)  # a mutex that this thread takes twice: no signal interrupts that
    library = ctypes.CDLL(None)
    library.pthread_mutex_lock(lock)
    library.pthread_mutex_lock(lock)

try:
    with StopSignals() as signals:
        BODY
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def run(body: str, *sent: signal.Signals) -> tuple[int, list[str], str]:
    """Start a process, send each signal when it has printed a line; its exit code, those lines and its errors."""
    program = PROGRAM.replace("BODY", body)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        lines: list[str] = []
        for number in sent:
            if lines:
                time.sleep(1.2)  # what comes sooner counts as the first once more
            lines.append(process.stdout.readline().strip())
            process.send_signal(number)
        out, errors = process.communicate(timeout=60)
        return process.returncode, [*lines, *out.split()], errors


TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


@pytest.mark.parametrize("number", [TERM, INT, USR1])
def test_the_first_signal_is_only_noted(number: signal.Signals) -> None:
    """Guards against a process that dies in the middle of a step when it is asked to stop."""
    assert run("wait()", number)[:2] == (0, ["ready", number.name])


@pytest.mark.parametrize(("first", "second", "code"), [(TERM, TERM, -TERM), (USR1, USR1, -USR1), (INT, TERM, -TERM)])
def test_the_second_signal_ends_the_process(first: signal.Signals, second: signal.Signals, code: int) -> None:
    """Guards against a user who can not stop a process that saves for too long."""
    assert run("wait(); time.sleep(30)", first, second)[:2] == (code, ["ready", first.name])


def test_what_comes_at_once_is_one_signal() -> None:
    """Guards against a launcher that passes on what the whole job was sent: torchrun under SLURM ends it unsaved."""
    twice = "os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM); time.sleep(1.5); wait()"
    assert run(twice)[:2] == (0, ["ready", "SIGTERM"])


@pytest.mark.parametrize("first", [INT, TERM])
def test_a_second_ctrl_c_interrupts(first: signal.Signals) -> None:
    """Guards against Ctrl-C that is swallowed for good."""
    assert run("wait(); time.sleep(30)", first, INT)[:2] == (0, ["ready", first.name, "interrupted"])


def test_a_second_signal_ends_a_process_that_is_stuck() -> None:
    """Guards against handlers that never run, since the main thread is in a collective: Python has no other."""
    program = "import threading; threading.Timer(0.5, lambda: print('again', flush=True)).start(); stuck()"
    code, lines, errors = run(program, TERM, TERM)
    assert (code, lines) == (128 + TERM, ["ready", "again"])
    assert "stopped by a second signal, SIGTERM" in errors


def test_forked_children_can_be_terminated_and_do_not_count() -> None:
    """Guards against workers that a pool can not end, die of Ctrl-C in the terminal, or count for their parent."""
    body = """
        child = os.fork()
        if child == 0:
            print("ready", flush=True)
            time.sleep(30)
            os._exit(1)
        time.sleep(0.3)
        os.kill(child, signal.SIGINT)
        os.kill(child, signal.SIGUSR1)
        time.sleep(0.3)
        os.kill(child, signal.SIGTERM)
        print(os.WTERMSIG(os.waitpid(child, 0)[1]), signals.received, flush=True)
        time.sleep(1.5)
"""
    assert run(body.strip())[:2] == (0, ["ready", str(int(TERM)), "None"])


def test_previous_handlers_come_back() -> None:
    """Guards against a program that is deaf to Ctrl-C after its training."""

    def own(number: int, frame: object) -> None: ...

    kept = signal.signal(USR1, own)
    try:
        before: list[Callable[..., object] | int | None] = [signal.getsignal(n) for n in (TERM, INT, USR1)]
        with StopSignals() as signals:
            assert signal.getsignal(INT) not in before
        assert [signal.getsignal(n) for n in (TERM, INT, USR1)] == before
        assert signals.received is None
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        signal.signal(USR1, kept)


def test_only_the_main_thread_can_catch_signals() -> None:
    """Guards against Python's own ValueError, or handlers that are silently missing."""
    with ThreadPoolExecutor(1) as pool, pytest.raises(InputError, match="main thread"):
        pool.submit(StopSignals().install).result()

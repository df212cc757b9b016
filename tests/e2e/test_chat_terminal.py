"""``zoo chat`` in a real terminal: Ctrl-C stops the answer, not the program."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import reference

if sys.platform == "win32":
    pytest.skip("needs a pseudo-terminal", allow_module_level=True)
import pty


class Terminal:
    """A program in a pseudo-terminal."""

    def __init__(self, *command: str) -> None:
        self._fd, theirs = pty.openpty()
        # A session of its own, with the terminal as its controlling one: Ctrl-C then arrives as SIGINT.
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import os, sys; os.login_tty(0); os.execvp(sys.argv[1], sys.argv[1:])",
                *command,
            ],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=False,
        )
        os.close(theirs)
        self.seen = ""
        self._read_to = 0

    def wait_for(self, text: str, seconds: float = 60.0) -> None:
        """Read until ``text`` has come since the last wait."""
        deadline, start = time.monotonic() + seconds, self._read_to
        while text not in self.seen[start:]:
            ready, _, _ = select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, self.seen
            try:
                self.seen += os.read(self._fd, 65536).decode(errors="replace")
            except OSError:  # the program has ended
                assert text in self.seen[start:], self.seen
        self._read_to = self.seen.index(text, start) + len(text)

    def watch(self, seconds: float) -> None:
        """Read for so long: a terminal that nobody reads from fills up, and its program waits."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self._fd], [], [], left)[0]:
                self.seen += os.read(self._fd, 65536).decode(errors="replace")

    def type(self, text: str) -> None:
        """What a person types."""
        os.write(self._fd, text.encode())


@pytest.fixture
def chat(tmp_path: Path) -> Iterator[Terminal]:
    """A chat with a tiny model that has much to say."""
    reference.save_tiny_chat_model(tmp_path, max_position_embeddings=100_000)
    never = {"eos_token_id": 999}  # not in the vocabulary
    (tmp_path / "generation_config.json").write_text(json.dumps(never))
    terminal = Terminal(sys.executable, "-m", "zoo", "chat", str(tmp_path), "--no-plugins", "--seed", "1")
    yield terminal
    terminal.process.kill()
    terminal.process.wait()


def test_control_c(chat: Terminal, tmp_path: Path) -> None:
    """Guards the reply that is broken off: the prompt comes back, what was said is kept, /exit leaves with 0."""
    chat.wait_for("> ")
    chat.type("Hi\n")
    chat.wait_for("Hi")
    chat.watch(1.0)
    chat.type("\x03")
    chat.wait_for("[stopped]")
    chat.type(f"/save {tmp_path / 'chat.json'}\n")
    chat.wait_for("saved 2 messages")
    chat.wait_for("> ")
    chat.watch(0.5)  # readline takes the terminal over after it has printed the prompt
    chat.type("\x03")
    chat.wait_for("/exit leaves")
    chat.type("/exit\n")
    assert chat.process.wait(timeout=30) == 0

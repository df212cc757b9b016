"""Stop strings across token borders."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.errors import InputError
from zoo.generate.stopping import StopStrings

letters = st.text(alphabet="ab\n", max_size=12)


@given(st.lists(letters, max_size=8), st.lists(letters.filter(bool), max_size=3))
def test_equals_cutting_the_whole_text(pieces: list[str], stop: list[str]) -> None:
    """Guards every way of cutting a text into pieces: what is shown is the text before the first stop string."""
    stopper = StopStrings(stop)
    shown = ""
    for piece in pieces:
        shown += stopper.push(piece)
        if stopper.hit is not None:
            break
    shown += stopper.finish()
    text = "".join(pieces)
    assert text.startswith(shown)
    if stopper.hit is None:
        assert shown == text
        assert not any(s in text for s in stop)
    else:
        assert text.startswith(shown + stopper.hit)
        assert not any(s in shown for s in stop)


def test_text_is_not_held_back_longer_than_needed() -> None:
    """Guards streaming: only what could still become a stop string waits."""
    stopper = StopStrings(["END"])
    assert stopper.push("the E") == "the "
    assert stopper.push("N") == ""
    assert stopper.push("T") == "ENT"


def test_the_earliest_wins() -> None:
    """Guards the choice among several found at once."""
    stopper = StopStrings(["b", "ab"])
    assert stopper.push("xaby") == "x"
    assert stopper.hit == "ab"


def test_empty_stop_string() -> None:
    """Guards against ending before anything is said."""
    with pytest.raises(InputError, match="must not be empty"):
        StopStrings(["ok", ""])

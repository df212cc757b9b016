"""A step that was damaged in any way is named and skipped, and an older one is used."""

from __future__ import annotations

import json
import os
import pickletools
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.store_lab import Training, digest
from zoo.errors import InputError, ZooError
from zoo.store.files import Damage
from zoo.store.manifest import read_manifest, verify
from zoo.store.store import CheckpointStore

CORRUPTIONS = 500 if os.environ.get("ZOO_STRESS") == "1" else 60


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, str]]:
    """A store of three steps, and the digest of each."""
    directory = tmp_path_factory.mktemp("verify") / "store"
    training, digests = Training(), {}
    with CheckpointStore(directory) as store:
        for step in (1, 2, 3):
            training.step()
            store.save(step, training.state())
            digests[step] = digest(training.state())
    return directory, digests


@pytest.fixture
def store(saved: tuple[Path, dict[int, str]], tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(saved[0], tmp_path / "store"))


def files_of(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def truncate(step: Path, chance: random.Random) -> Path:
    path = chance.choice(files_of(step))
    os.truncate(path, chance.randrange(path.stat().st_size))
    return path


def flip(step: Path, chance: random.Random) -> Path:
    path = chance.choice(files_of(step))
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return path


def delete(step: Path, chance: random.Random) -> Path:
    path = chance.choice(files_of(step))
    path.unlink()
    return path


def swap(step: Path, chance: random.Random) -> Path:
    first, second = chance.sample(files_of(step), 2)
    aside = first.rename(step / "aside")
    second.rename(first)
    aside.rename(second)
    return step / "MANIFEST.json" if step / "MANIFEST.json" in (first, second) else chance.choice([first, second])


def tear(step: Path, chance: random.Random) -> Path:
    """One file of an older step, of the same size where there is one."""
    older = step.parent / "step-00000002"
    pairs = [(path, older / path.relative_to(step)) for path in files_of(step)]
    path, other = chance.choice([(a, b) for a, b in pairs if a.read_bytes() != b.read_bytes()])
    shutil.copyfile(other, path)
    return path


DAMAGES: list[Callable[[Path, random.Random], Path]] = [truncate, flip, delete, swap, tear]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_no_damage_goes_unseen(
    store: Path, saved: tuple[Path, dict[int, str]], damage: Callable[[Path, random.Random], Path]
) -> None:
    """Guards against a byte of a step that nothing watches over: the manifest's own bytes are among them."""
    for seed in range(CORRUPTIONS // len(DAMAGES)):
        newest = store / "step-00000003"
        shutil.rmtree(newest)
        shutil.copytree(saved[0] / newest.name, newest)
        path = damage(newest, random.Random(seed))
        name = path.relative_to(newest).as_posix()
        found = verify(newest, 3)
        assert any(problem.startswith((f"{name}:", f"no {name}")) for problem in found), (seed, name, found)
        training = Training(seed=5)
        state = training.state()
        with CheckpointStore(store, read_only=True) as opened:
            loaded = opened.load(state)
        training.take(state)
        assert loaded.step == 2 and digest(training.state()) == saved[1][2]
        assert (
            len(loaded.skipped) == 1 and loaded.skipped[0].startswith("step-00000003: ") and name in loaded.skipped[0]
        )


def test_every_byte_of_the_manifest_counts(store: Path) -> None:
    """Guards against a metric, a step number or a space that changes unseen: no other file watches over this one."""
    step = store / "step-00000003"
    content = (step / "MANIFEST.json").read_bytes()
    for i in range(len(content)):
        changed = bytearray(content)
        changed[i] ^= 1 << (i % 7)
        (step / "MANIFEST.json").write_bytes(changed)
        with pytest.raises(Damage, match=r"MANIFEST\.json: content changed since it was saved"):
            read_manifest(step, 3)


def test_the_messages(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against messages that do not say which file and how much of it is left."""
    newest = store / "step-00000003"
    tensors, own = newest / "model/model.safetensors", newest / "state/rank-00000.json"
    size = tensors.stat().st_size
    os.truncate(tensors, 100)
    own.write_text(own.read_text() + " ")
    (newest / "state/shared.json").unlink()
    (newest / "notes.txt").touch()
    content = bytearray((newest / "state/shared.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "state/shared.safetensors").write_bytes(content)
    length = len(own.read_text())
    assert sorted(verify(newest)) == [
        f"model/model.safetensors: truncated, 100 bytes of {size}",
        "notes.txt: not a file of this step",
        f"state/rank-00000.json: longer than it was saved, {length} bytes instead of {length - 1}",
        "state/shared.json: missing",
        "state/shared.safetensors: content changed since it was saved",
    ]
    with CheckpointStore(store, read_only=True) as opened:
        assert opened.verify()["step-00000002"] == []
        assert [step.step for step in opened.list()] == [1, 2]
        assert opened.load(Training().state()).step == 2
        (store / "step-00000002/MANIFEST.json").unlink()
        assert opened.verify()["step-00000002"] == ["no MANIFEST.json (the save was interrupted)"]
        assert opened.load(Training().state()).step == 1
    assert "skipped step-00000002: no MANIFEST.json (the save was interrupted)" in caplog.text


def test_a_renamed_step_is_not_taken_for_another(store: Path) -> None:
    """Guards against a copy of step 1 that calls itself step 9."""
    shutil.copytree(store / "step-00000001", store / "step-00000009")
    with CheckpointStore(store, read_only=True) as opened:
        loaded = opened.load(Training().state())
        assert loaded.step == 3
        assert loaded.skipped == ["step-00000009: MANIFEST.json: is of step 1, and the directory is named after step 9"]


def test_a_file_more_does_not_keep_a_step_from_loading(store: Path) -> None:
    """Guards against a note of the user's that sends a run back to an older step."""
    (store / "step-00000003/NOTES").write_text("the good one")
    with CheckpointStore(store, read_only=True) as opened:
        loaded = opened.load(Training().state())
    assert (loaded.step, loaded.skipped, loaded.notes) == (3, [], ["NOTES: not a file of this step"])


def test_when_nothing_is_left_every_reason_is_given(store: Path) -> None:
    """Guards against a load that begins from random weights without a word."""
    for step in (1, 2, 3):
        (store / f"step-0000000{step}/state/model.json").unlink()
    training = Training(seed=4)
    before = digest(training.state())
    with CheckpointStore(store, read_only=True) as opened:
        with pytest.raises(ZooError) as caught:
            opened.load(training.state())
        assert all(f"step-0000000{step}: state/model.json: missing" in str(caught.value) for step in (1, 2, 3))
        with pytest.raises(InputError, match=r"step 2 of .* can not be used. step-00000002: state/model.json: missing"):
            opened.load(training.state(), 2)
    assert digest(training.state()) == before


def test_content_is_checked_for_an_exact_step_too(store: Path) -> None:
    """Guards against a named step that is loaded with damage, or replaced by another one."""
    path = store / "step-00000003/model/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes(content)
    with CheckpointStore(store, read_only=True) as opened, pytest.raises(ZooError, match="content changed"):
        opened.load(Training().state(), 3)


def test_a_newer_format_is_refused_with_the_remedy(store: Path) -> None:
    """Guards against an old zoo that goes back to an older step because it can not read the newest."""
    from zoo.store.manifest import _text

    path = store / "step-00000003/MANIFEST.json"
    content: dict[str, Any] = json.loads(path.read_text())
    del content["sha256"]
    path.write_text(_text({**content, "format_version": 2, "new": 1}))
    for read_only in (True, False):
        with pytest.raises(InputError, match=r"format version 2 .* up to 1 .* Upgrade zoo"):
            with CheckpointStore(store, read_only=read_only) as opened:
                opened.load(Training().state())


def test_there_is_no_pickle_in_a_step(store: Path) -> None:
    """Guards against a file that runs code when it is loaded."""
    for path in files_of(store):
        content = path.read_bytes()
        assert path.name == ".lock" or path.suffix in (".json", ".safetensors")
        assert not content.startswith((b"PK\x03\x04", b"\x80")), path
        with pytest.raises(ValueError):  # noqa: PT011 - pickletools has no other
            list(pickletools.genops(content))

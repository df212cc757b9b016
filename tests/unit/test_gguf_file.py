"""The GGUF container: tensors mapped or dequantized, whatever is damaged named."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from tests import gguf_files
from zoo.convert.gguf import GGUF
from zoo.convert.gguf_file import GGUFTensors
from zoo.errors import FileFormatError, InputError
from zoo.registry import Registry


@pytest.fixture
def matrix() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A file of metadata of every kind and two tensors, without padding at its end."""
    metadata = {
        "llama.block_count": 1,
        "a.text": "x" * 9,
        "a.list": ["one", "two"],
        "a.numbers": [1, 2],
        "a.flag": True,
    }
    tensors = {"a": (np.ones((3, 2), np.float32), Kind.F32), "b": gguf_files.encode(np.ones((16, 32)), Kind.Q8_0)}
    return gguf_files.write(tmp_path / "small.gguf", "llama", metadata, tensors)


def one_tensor(path: Path, stored: gguf_files.Stored) -> GGUFTensors:
    return GGUFTensors(gguf_files.write(path, "llama", {}, {"t": stored}))


# --- tensors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype"), [(Kind.F32, torch.float32), (Kind.F16, torch.float16), (Kind.BF16, torch.bfloat16)]
)
def test_plain_tensors_are_mapped(kind: Kind, dtype: torch.dtype, matrix: np.ndarray, tmp_path: Path) -> None:
    """Guards against a copy per `get`, and against a type that is widened when nobody asked for it."""
    tensors = one_tensor(tmp_path / "m.gguf", gguf_files.encode(matrix, kind))
    assert tensors.dtype("t") == dtype
    first, second = tensors.get("t"), tensors.get("t", dtype)
    assert first.data_ptr() == second.data_ptr()
    assert torch.equal(first, torch.from_numpy(matrix).to(dtype))
    assert not tensors.quantized


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16])
def test_offsets(kind: Kind, matrix: np.ndarray, tmp_path: Path) -> None:
    """Guards what is taken off before values are rounded: 1 + 2 ** -9 is 1 as bfloat16, and 2 ** -9 is not 0."""
    tensors = one_tensor(tmp_path / "m.gguf", gguf_files.encode(np.full((2, 32), 1 + 2**-9), kind))
    tensors.offsets = {"t": 1.0}
    assert tensors.dtype("t") == tensors.get("t").dtype == torch.float32
    assert tensors.get("t", torch.bfloat16).dtype == torch.bfloat16
    for dtype in (None, torch.bfloat16):
        assert torch.all(tensors.get("t", dtype) == 2**-9)


def test_writing_to_a_tensor_leaves_the_file_alone(matrix: np.ndarray, tmp_path: Path) -> None:
    """Guards the copy-on-write mapping: a shared one would let training alter the user's file."""
    tensors = one_tensor(tmp_path / "m.gguf", (matrix, Kind.F32))
    before = tensors.path.read_bytes()
    tensors.get("t").zero_()
    assert tensors.path.read_bytes() == before
    assert torch.equal(GGUFTensors(tensors.path).get("t"), torch.from_numpy(matrix))


def test_shape_is_row_major(matrix: np.ndarray, tmp_path: Path) -> None:
    tensors = one_tensor(tmp_path / "m.gguf", gguf_files.encode(matrix, Kind.Q8_0))
    assert tensors.shape("t") == tuple(tensors.get("t").shape) == (6, 64)
    assert tensors.names() == ["t"]


def test_conversion(matrix: np.ndarray, tmp_path: Path) -> None:
    """Guards rounding once, from the dequantized float32, and the dtype that is promised beforehand."""
    tensors = one_tensor(tmp_path / "m.gguf", gguf_files.encode(matrix, Kind.Q4_1))
    assert tensors.dtype("t") == tensors.get("t").dtype == torch.float32
    assert torch.equal(tensors.get("t", torch.bfloat16), tensors.get("t").bfloat16())
    assert tensors.quantized


@pytest.mark.parametrize("kind", gguf_files.RANDOM_KINDS, ids=lambda kind: kind.name)
def test_dequantized_in_pieces(kind: Kind, tmp_path: Path) -> None:
    """Guards the cutting of a large tensor: three whole pieces and a part of one."""
    stored = gguf_files.random_blocks((100, 1024 + 256), kind)
    tensors = one_tensor(tmp_path / "m.gguf", stored)
    wanted = torch.from_numpy(gguf.quants.dequantize(*stored))
    assert torch.equal(tensors.get("t"), wanted)
    assert wanted.isfinite().all()


@pytest.mark.parametrize("kind", [Kind.I32, Kind.F64])
def test_a_type_that_can_not_be_read(kind: Kind, tmp_path: Path) -> None:
    values = np.zeros((2, 4), {Kind.I32: np.int32, Kind.F64: np.float64}[kind])
    path = gguf_files.write(tmp_path / "m.gguf", "llama", {}, {"odd.weight": (values, kind)})
    with pytest.raises(FileFormatError, match=rf"m\.gguf.*odd\.weight.*{kind.name}"):
        GGUFTensors(path)


def test_a_type_that_nobody_knows(matrix: np.ndarray, tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "m.gguf", "llama", {}, {"odd.weight": (matrix, Kind.F32)})
    name_end = path.read_bytes().index(b"odd.weight") + len("odd.weight")
    patch(path, name_end + 4 + 2 * 8, struct.pack("<I", 999))
    with pytest.raises(FileFormatError, match=r"odd\.weight.*number 999"):
        GGUFTensors(path)


def test_no_such_tensor(matrix: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="'other'"):
        one_tensor(tmp_path / "m.gguf", (matrix, Kind.F32)).get("other")


# --- damage ----------------------------------------------------------------------------------------------------


def patch(path: Path, at: int, replacement: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(replacement)] = replacement
    path.write_bytes(data)


def test_truncated_anywhere(small: Path) -> None:
    """Guards every bound of the header and of the tensors: each shorter file is damaged, and says so."""
    whole = small.read_bytes()
    assert GGUFTensors(small).names() == ["a", "b"]
    for length in range(len(whole)):
        small.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match=r"small\.gguf"):
            GGUFTensors(small)


def test_a_text_longer_than_the_file(tmp_path: Path) -> None:
    """Guards the one length that nothing after it would give away."""
    path = gguf_files.write(tmp_path / "m.gguf", "llama", {"a.text": "x" * 9}, {})
    assert GGUFTensors(path).metadata["a.text"] == "x" * 9
    patch(path, path.read_bytes().index(b"xxx") - 8, struct.pack("<Q", 10**6))
    with pytest.raises(FileFormatError, match="truncated"):
        GGUFTensors(path)


@pytest.mark.parametrize("kind", [9, 13, 2**32 - 1])
def test_a_list_of_what_no_list_holds(kind: int, small: Path) -> None:
    """Guards against lists of lists, which need no memory in the file and any amount here."""
    patch(small, small.read_bytes().index(b"a.numbers") + len("a.numbers") + 4, struct.pack("<I", kind))
    with pytest.raises(FileFormatError, match=r"small\.gguf is damaged"):
        GGUFTensors(small)


def test_a_model_truncated(tmp_path: Path, registry: Registry) -> None:
    path = gguf_files.write_llama(tmp_path / "m.gguf")
    whole = path.read_bytes()
    for length in range(0, len(whole), 1024):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match=r"m\.gguf"):
            list(GGUF().open(path, registry).parameters())


@pytest.mark.parametrize("garbage", [b"\xff" * 8, b"\x00" * 8, b"\xff\xff\xff\x7f\x00\x00\x00\x00"])
def test_overwritten_anywhere(garbage: bytes, tmp_path: Path, registry: Registry) -> None:
    """Guards against huge counts (a hang, a memory error) and against other exceptions than ours."""
    path = gguf_files.write_llama(tmp_path / "m.gguf")
    whole = path.read_bytes()
    for at in range(4, int(gguf.GGUFReader(path).data_offset), 3):
        path.write_bytes(whole)
        patch(path, at, garbage)
        try:
            list(GGUF().open(path, registry).parameters())
        except InputError as error:
            assert "m.gguf" in str(error)  # noqa: PT017 - most, but not all, of these are damage


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04" + bytes(60), b"GGUF", b"GGUF" + b"\xa5" * 500])
def test_other_content(content: bytes, tmp_path: Path, registry: Registry) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=r"m\.gguf"):
        GGUF().open(path, registry)


@pytest.mark.parametrize(
    ("version", "says"),
    [(1, "version 1"), (4, "version 4"), (int.from_bytes(struct.pack(">I", 3), "little"), "big-endian")],
)
def test_other_versions(version: int, says: str, small: Path) -> None:
    patch(small, 4, struct.pack("<I", version))
    with pytest.raises(FileFormatError, match=rf"small\.gguf .*{says}"):
        GGUFTensors(small)


@pytest.mark.parametrize("offset", [0, 33, 64, 2**40, 2**64 - 32])
def test_impossible_offset(offset: int, small: Path) -> None:
    """Guards against reading another tensor's bytes, or none."""
    at = small.read_bytes().index(struct.pack("<IQ", Kind.Q8_0, 32)) + 4
    patch(small, at, struct.pack("<Q", offset))
    with pytest.raises(FileFormatError, match="tensor 'b'"):
        GGUFTensors(small)


def test_impossible_alignment(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "m.gguf", "llama", {"general.alignment": 32}, {})
    at = path.read_bytes().index(b"general.alignment") + len("general.alignment") + 4
    for value in (0, 3, 4, 48):
        patch(path, at, struct.pack("<I", value))
        with pytest.raises(FileFormatError, match=r"m\.gguf .*alignment"):
            GGUFTensors(path)

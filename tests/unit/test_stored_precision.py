"""``--precision auto`` goes by the weights of a file, whatever else lies in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import zoo
from tests import reference
from zoo.registry import Registry


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float16, "16-true"), (torch.float32, "32-true")])
def test_the_masks_in_old_files_do_not_decide(
    dtype: torch.dtype, precision: str, tmp_path: Path, registry: Registry
) -> None:
    """Guards against taking ``h.0.attn.bias``, the first name in such a file and a mask of bytes, for a weight."""
    reference.save_tiny(tmp_path, "gpt2", reference.GPT2)
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor.to(dtype) for name, tensor in load_file(file).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
    save_file(tensors, file)

    lm = zoo.load(tmp_path, device="cpu", registry=registry)

    assert lm.precision == precision
    assert {parameter.dtype for parameter in lm.model.parameters()} == {dtype}

"""Asks other implementations for logits. Each runs in a process of its own: zoo imports none of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zoo.errors import UnavailableError, ZooError

_MISSING = 42
"""Exit code of a program whose library is not installed."""

_PROGRAM = """
import json, sys
try:
{imports}
except ImportError:
    sys.exit({missing})
import numpy
request = json.load(sys.stdin)
path, sequences = request["path"], request["sequences"]
{body}
numpy.save(request["output"], numpy.concatenate([numpy.asarray(l, dtype=numpy.float32) for l in logits]))
print("\\n" + version)
"""

_TRANSFORMERS = """
version = transformers.__version__
model = transformers.AutoModelForCausalLM.from_pretrained(
    path, dtype=torch.float32, attn_implementation="eager", local_files_only=True).eval()
with torch.no_grad():
    logits = [model(torch.tensor([ids])).logits[0].numpy() for ids in sequences]
"""

_LITGPT = """
import importlib.metadata, pathlib
version = importlib.metadata.version("litgpt")
folder = pathlib.Path(path)
with torch.device("meta"):
    model = litgpt.GPT(litgpt.Config.from_file(folder / "model_config.yaml"))
state = torch.load(folder / "lit_model.pth", weights_only=True, mmap=True)
model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
with torch.device("cpu"):
    model.cos, model.sin = model.rope_cache(device=torch.device("cpu"))
with torch.no_grad():
    logits = [model.eval()(torch.tensor([ids]))[0].numpy() for ids in sequences]
"""

_LLAMA_CPP = """
version = f"(llama-cpp-python {llama_cpp.__version__})"
model = llama_cpp.Llama(path, n_ctx=max(map(len, sequences)), logits_all=True, verbose=False, flash_attn=False,
                        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)
logits = []
for ids in sequences:
    model.reset()
    model.eval(ids)
    logits.append(model.scores[: len(ids)].copy())
"""


@dataclass(frozen=True)
class Reference:
    """The implementation that a format was made for."""

    name: str
    imports: str
    body: str
    allowed: float
    """Greatest difference from zoo's logits, as a part of the greatest logit."""

    @property
    def variable(self) -> str:
        """The environment variable that names an interpreter with it."""
        return f"ZOO_{self.name.upper().replace('.', '_')}_PYTHON"

    def logits(self, path: Path, sequences: Sequence[Sequence[int]]) -> tuple[str, Tensor] | None:
        """Its version, and the logits (T, V) of all sequences in a row, float32; ``None`` if it is not installed.

        Raises:
            UnavailableError: the environment names an interpreter that does not have it.
            ZooError: it can not read ``path``.
        """
        chosen = os.environ.get(self.variable)
        program = _PROGRAM.format(imports=f"    import {self.imports}", missing=_MISSING, body=self.body)
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch) / "logits.npy"
            request = json.dumps({"path": str(path), "sequences": sequences, "output": str(output)})
            try:
                done = subprocess.run(
                    [chosen or sys.executable, "-c", program],
                    input=request,
                    capture_output=True,
                    text=True,
                    check=False,
                    env={**os.environ, "HF_HUB_OFFLINE": "1"},
                )
            except OSError as error:
                raise UnavailableError(f"{self.variable} is {chosen!r}: {error.strerror}.") from None
            if done.returncode == _MISSING and chosen:
                raise UnavailableError(f"{self.variable} is {chosen!r}, which has no {self.name}.")
            if done.returncode == _MISSING:
                return None
            if done.returncode:
                why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise ZooError(f"{self.name} does not read {path}: {why}")
            return f"{self.name} {done.stdout.splitlines()[-1]}", torch.from_numpy(np.load(output))


REFERENCES = {
    "hf": Reference("transformers", "torch, transformers", _TRANSFORMERS, 1e-4),
    "litgpt": Reference("litgpt", "torch, litgpt", _LITGPT, 1e-4),
    # It rounds activations to the type of the weights, and looks GELU up in a float16 table.
    "gguf": Reference("llama.cpp", "llama_cpp", _LLAMA_CPP, 1e-1),
}
"""By the format that each reads."""

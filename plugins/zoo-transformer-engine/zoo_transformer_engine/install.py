"""TransformerEngine's classes, or why they can not be had on this machine and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from zoo.errors import UnavailableError
from zoo.registry import describe
from zoo_transformer_engine import INSTALL, REQUIREMENT
from zoo_transformer_engine.options import RecipeOptions

MIN_CAPABILITY = (8, 9)
"""Ada and Hopper, the first with FP8."""

_REBUILD = (
    "python -m pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps "
    '"transformer-engine[pytorch]>=2.0" transformer-engine-torch'
)


@dataclass(frozen=True)
class Engine:
    """What this plugin calls of TransformerEngine.

    Attributes:
        pytorch: its module ``transformer_engine.pytorch``.
        recipe: its module ``transformer_engine.common.recipe``.
    """

    pytorch: Any
    recipe: Any

    def autocast(self, recipe: Any) -> AbstractContextManager[None]:
        """Where its layers compute in FP8; by the name that this version does not call deprecated."""
        autocast: Callable[..., AbstractContextManager[None]] | None = getattr(self.pytorch, "autocast", None)
        if autocast is None:
            return self.pytorch.fp8_autocast(enabled=True, fp8_recipe=recipe)
        return autocast(enabled=True, recipe=recipe)

    def why_not(self, options: RecipeOptions) -> str | None:
        """Why this GPU can not do what a recipe needs, in TransformerEngine's words."""
        name = "is_mxfp8_available" if options.scaling == "mxfp8" else "is_fp8_available"
        is_available = getattr(self.pytorch, name, None)
        if is_available is not None:
            found, reason = is_available(return_reason=True)
        else:  # before 2.8
            manager = import_module("transformer_engine.pytorch.fp8").FP8GlobalStateManager
            found, reason = getattr(manager, name)()
        return None if found else " ".join(str(reason).split()).rstrip(".")

    def make_recipe(self, options: RecipeOptions) -> Any:
        """Its recipe of these options."""
        fp8_format = getattr(self.recipe.Format, options.format)
        if options.scaling == "current":
            return self.recipe.Float8CurrentScaling(fp8_format=fp8_format)
        if options.scaling == "mxfp8":
            return self.recipe.MXFP8BlockScaling(fp8_format=fp8_format)
        return self.recipe.DelayedScaling(
            margin=options.margin,
            fp8_format=fp8_format,
            amax_history_len=options.amax_history_len,
            amax_compute_algo=options.amax_compute_algo,
        )


def check() -> None:
    """Load TransformerEngine and run it once on the current GPU.

    Raises:
        UnavailableError: that is not possible; one sentence says why, and ``fix`` what to do.
    """
    if torch.version.cuda is None:
        raise UnavailableError(
            f"this torch ({torch.__version__}) is built without CUDA",
            fix="Install one that is: https://pytorch.org/get-started/locally/. Or take --precision fp8-emulated.",
        )
    _check_gpu(load_engine())


@cache
def load_engine() -> Engine:
    """TransformerEngine.

    Raises:
        UnavailableError: it is not installed, or its installation is broken.
    """
    try:
        import_module("transformer_engine")
        engine = Engine(import_module("transformer_engine.pytorch"), import_module("transformer_engine.common.recipe"))
        for name in ("Linear", "LayerNorm"):
            getattr(engine.pytorch, name)
        for name in ("DelayedScaling", "Float8CurrentScaling", "MXFP8BlockScaling"):
            getattr(engine.recipe, name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # It loads several libraries of CUDA by hand, and fails in as many ways.
        raise _diagnosis(error) from error
    return engine


def _diagnosis(error: BaseException) -> UnavailableError:
    whose, said = f"TransformerEngine {_installed()}", describe(error)
    if isinstance(error, ModuleNotFoundError):
        return _missing(whose, error)
    built = f"torch {torch.__version__} with CUDA {torch.version.cuda}"
    cuda = "Set LD_LIBRARY_PATH or CUDA_HOME to where cuDNN, cuBLAS and NVRTC are, or install nvidia-cudnn-cu12."
    signs = {
        "meta package": ("is an empty package without its libraries", f"{INSTALL}."),
        "undefined symbol": (f"is not built for {built}: {said}", f"{_REBUILD}."),
        "libcuda.so": (f"needs NVIDIA's driver: {said}", "See what nvidia-smi says."),
        "shared object": (f"does not find a library of CUDA: {said}", cuda),
        "AttributeError": (f"is too old: {said}", f'python -m pip install -U "{REQUIREMENT}".'),
    }
    for sign, (what, fix) in signs.items():
        if sign in said:
            return UnavailableError(f"{whose} {what}", fix=fix)
    return UnavailableError(f"{whose} fails when it is imported: {said}", fix=f"{_REBUILD}.")


def _missing(whose: str, error: ModuleNotFoundError) -> UnavailableError:
    name = error.name or ""
    if name == "transformer_engine":
        return UnavailableError("TransformerEngine is not installed", fix=f"{INSTALL}.")
    if name.startswith("transformer_engine"):
        what = f"is installed without its part for PyTorch: {describe(error)}"
        return UnavailableError(f"{whose} {what}", fix=f"{INSTALL}.")
    return UnavailableError(f"{whose} needs {name}, which is not installed", fix=f"python -m pip install {name}.")


def _installed() -> str:
    try:
        return version("transformer-engine")
    except PackageNotFoundError:
        return "(of unknown version)"


def _check_gpu(engine: Engine) -> None:
    try:
        torch.cuda.init()
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    except (RuntimeError, AssertionError) as error:
        raise UnavailableError(
            f"torch can not use a CUDA GPU here: {describe(error)}",
            fix="See what nvidia-smi says, and whether CUDA_VISIBLE_DEVICES hides the GPU.",
        ) from error
    if capability < MIN_CAPABILITY:
        has, needs = (".".join(map(str, pair)) for pair in (capability, MIN_CAPABILITY))
        raise UnavailableError(
            f"{name} has compute capability {has}, and FP8 needs {needs} (Ada, Hopper) or newer",
            fix="Take --precision bf16-true; --precision fp8-emulated shows what FP8 would do.",
        )
    if reason := engine.why_not(RecipeOptions()):
        raise UnavailableError(f"TransformerEngine {_installed()} has no FP8 here: {reason}", fix="Update CUDA.")
    try:
        layer = engine.pytorch.Linear(16, 16, bias=False, params_dtype=torch.bfloat16)
        with engine.autocast(engine.make_recipe(RecipeOptions())):
            layer(torch.zeros(16, 16, dtype=torch.bfloat16, device="cuda"))
        torch.cuda.synchronize()
    except (RuntimeError, AssertionError) as error:
        raise UnavailableError(
            f"TransformerEngine {_installed()} does not run on {name}: {describe(error)}", fix=f"{_REBUILD}."
        ) from error

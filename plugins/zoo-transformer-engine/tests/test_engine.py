"""TransformerEngine's layers over a stand-in for it, and each fault of Fabric's plugin, which has it here too."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import fp8_tiny as tiny
import pytest
import torch
from torch import Tensor, nn
from zoo_transformer_engine import install
from zoo_transformer_engine.engine import EngineLayerNorm, EngineLayers, EngineLinear, TransformerEngine
from zoo_transformer_engine.options import EngineOptions

import zoo
from zoo import CheckpointStore
from zoo.errors import InputError

STAND_IN = Path(__file__).parent / "stand_in"
METADATA = "Metadata-Version: 2.1\nName: transformer_engine\nVersion: 2.20.0\n"


@pytest.fixture(autouse=True)
def te(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in, installed for one test."""
    installed = tmp_path_factory.mktemp("installed")
    (installed / "transformer_engine-2.20.0.dist-info").mkdir()
    (installed / "transformer_engine-2.20.0.dist-info" / "METADATA").write_text(METADATA, encoding="utf-8")
    for path in (STAND_IN, installed):
        monkeypatch.syspath_prepend(str(path))
    _forget()
    module = import_module("transformer_engine.pytorch")
    yield module
    _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        del sys.modules[name]
    install.load_engine.cache_clear()
    import_module("zoo_transformer_engine.engine")._recipe.cache_clear()


def precision(**options: Any) -> TransformerEngine:
    return TransformerEngine(
        name="transformer-engine", param_dtype=torch.bfloat16, options=EngineOptions(**options), recomputes=False
    )


class Trained:
    """A model that computes in FP8, as we or Fabric set it up; optimizers are known before or after."""

    def __init__(self, how: str, model: nn.Module, *, optimizer_first: bool = False, **options: Any) -> None:
        self.model = model
        self.optimizer = tiny.optimizer_of(model) if optimizer_first else None
        if how == "ours":
            self.precision: Any = precision(**options)
            self.layers: EngineLayers | None = self.precision.convert(model)
        else:
            from lightning.fabric.plugins.precision.transformer_engine import TransformerEnginePrecision

            self.precision = TransformerEnginePrecision(weights_dtype=torch.bfloat16)
            self.model, self.layers = self.precision.convert_module(model), None
        self.optimizer = self.optimizer or tiny.optimizer_of(self.model)

    def loss(self, model: nn.Module, tokens: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Fabric's: of a name that is deprecated, and of CUDA that is not there
            with self.precision.context() if self.layers else self.precision.forward_context():
                return tiny.loss_of(model, tokens)

    def train(self, steps: range) -> list[float]:
        assert self.optimizer is not None
        return tiny.train(self.model, self.optimizer, steps, self.loss)


def both(reason: str) -> pytest.MarkDecorator:
    """We, and Fabric's plugin, in which the test must find a fault."""
    fault = pytest.mark.xfail(reason=reason, strict=True)
    return pytest.mark.parametrize("how", ["ours", pytest.param("fabric", marks=fault)])


@both("the optimizer has the parameters of before, and the new ones never move")
def test_an_optimizer_from_before_trains_all_layers(how: str, te: Any) -> None:
    trained = Trained(how, tiny.gpt(), optimizer_first=True)
    before = {name: p.detach().clone() for name, p in trained.model.named_parameters()}
    trained.train(range(3))
    assert "fp8" in te.CALLS
    still = [name for name, p in trained.model.named_parameters() if torch.equal(p, before[name])]
    assert all(name.endswith("attn.k.bias") for name in still), still


@both("a new weight for the head, which is the embedding's no longer")
def test_ties_survive(how: str) -> None:
    model = nn.Module()
    model.embed, model.out = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
    model.out.weight = model.embed.weight
    trained = Trained(how, model)
    assert trained.model.get_parameter("out.weight") is trained.model.get_parameter("embed.weight")


class LowRank(nn.Linear):
    """As loralib's: a linear that is its own adapter."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out)
        self.A, self.B = nn.Parameter(torch.randn(4, d_in)), nn.Parameter(torch.zeros(d_out, 4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.A.T @ self.B.T


@both("every subclass of torch.nn.Linear is replaced, and what it adds is lost")
def test_adapters_of_others_survive(how: str) -> None:
    trained = Trained(how, nn.Sequential(LowRank(32, 32), nn.Linear(32, 32)))
    assert {"0.A", "0.B"} <= dict(trained.model.named_parameters()).keys()
    if trained.layers:
        assert trained.layers.chosen.skipped == {"0": "it is a LowRank, which may do more than a linear"}


@both("the third positional argument of TransformerEngine's Linear is another")
def test_a_linear_without_bias_has_none(how: str, te: Any) -> None:
    if how == "ours":
        model = nn.Sequential(nn.Linear(32, 32, False))  # as a model's code has it
        precision().convert(model)
    else:
        from lightning.fabric.plugins.precision.transformer_engine import TransformerEnginePrecision

        with TransformerEnginePrecision(weights_dtype=torch.float32, replace_layers=True).module_init_context():
            model = nn.Sequential(torch.nn.Linear(32, 32, False))
    assert list(dict(model.named_parameters())) == ["0.weight"]


@both("8 and 24 inputs are converted, which the kernels refuse, and 40 outputs are not")
@pytest.mark.parametrize("shape", [(24, 32), (8, 64)])
def test_only_shapes_that_the_kernels_take(how: str, shape: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Linear(32, shape[0]), nn.Linear(*shape)) if how == "fabric" else nn.Sequential(
        nn.Linear(32, shape[0]), nn.Linear(*shape), nn.Linear(shape[1], 32)
    )  # fmt: skip
    trained = Trained(how, model.bfloat16())
    context = trained.precision.context() if trained.layers else trained.precision.forward_context()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with context:
            y = trained.model(torch.randn(16, 32, dtype=torch.bfloat16))
    y.float().sum().backward()
    if trained.layers:
        assert [type(m).__name__ for m in model] == ["Linear", "Linear", "EngineLinear"]


@both("a step's tokens are any number, and the kernels take multiples of 8 and 16")
@pytest.mark.parametrize("n_rows", [1, 3])
def test_any_number_of_tokens(how: str, n_rows: int, te: Any) -> None:
    trained = Trained(how, tiny.gpt())
    tokens = tiny.chain(n_rows, seed=1)[:, :6]
    trained.loss(trained.model, tokens).backward()
    assert te.CALLS.count("fp8") == 12


def test_padding_changes_nothing(te: Any) -> None:
    """Guards what is filled up with zeros: outputs and gradients are those of a full matrix."""
    x = torch.randn(16, 32)
    x[0, 0] = 9  # the largest, whatever the number of rows
    model = nn.Sequential(nn.Linear(32, 48))
    weight = model[0].get_parameter("weight")
    precision(scaling="current").convert(model.train())
    found = []
    for rows in (x, x[:11]):
        weight.grad = None
        with precision(scaling="current").context():
            y = model(rows)
        y[:11].square().sum().backward()
        found.append((y[:11].detach(), weight.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)
    assert te.CALLS == ["fp8", "fp8"]


def test_layers_and_what_is_said_of_them() -> None:
    model = tiny.gpt(norm_bias=True)
    made = precision(scaling="delayed", amax_history_len=16, margin=1).convert(model)
    assert sum(isinstance(m, EngineLinear) for m in model.modules()) == 12
    assert sum(isinstance(m, EngineLayerNorm) for m in model.modules()) == 5
    said = made.describe()
    assert said.startswith("12 of 13 linears in FP8 with delayed scaling (max of 16 steps, margin 1)")
    assert "head stays as it is: named by skip; 5 layer norms are TransformerEngine's" in said
    without = nn.Sequential(nn.LayerNorm(32, bias=False), nn.Linear(32, 32), nn.LayerNorm((2, 32)), nn.RMSNorm(32))
    made = precision().convert(without)
    assert [type(m).__name__ for m in without] == ["LayerNorm", "EngineLinear", "LayerNorm", "RMSNorm"]
    assert made.norms.skipped == dict.fromkeys("02", "TransformerEngine's has one dimension, a weight and a bias")
    kept = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32))
    precision(layer_norm=False).convert(kept)
    assert type(kept[0]) is nn.LayerNorm


def test_the_head_is_never_taken() -> None:
    """Guards the loss, whose parts are computed twice, which TransformerEngine's layers do not allow."""
    model = tiny.gpt()
    precision(skip=()).convert(model)
    assert type(model.get_submodule("head")) is nn.Linear


def test_names_are_those_of_the_model(te: Any) -> None:
    """Guards exports and checkpoints: TransformerEngine's own layers are in no state dict."""
    model = tiny.gpt()
    before = {name: id(p) for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    precision().convert(model)
    assert {name: id(p) for name, p in model.named_parameters()} == before and list(model.state_dict()) == keys


def test_the_recipe(te: Any) -> None:
    """Guards options that do not arrive."""
    engine = install.load_engine()
    recipe = engine.recipe
    options = EngineOptions(margin=2, fp8_format="E4M3", amax_history_len=7, amax_compute_algo="most_recent")
    assert engine.make_recipe(options) == recipe.DelayedScaling(
        margin=2, fp8_format=recipe.Format.E4M3, amax_history_len=7, amax_compute_algo="most_recent"
    )
    assert engine.make_recipe(EngineOptions(scaling="current")) == recipe.Float8CurrentScaling()
    assert engine.make_recipe(EngineOptions(scaling="mxfp8")) == recipe.MXFP8BlockScaling()


def test_a_gpu_without_mxfp8(te: Any) -> None:
    """Guards Hopper, which is new enough for FP8 and not for MXFP8."""
    assert precision().supports("cuda") == []
    (reason,) = precision(scaling="mxfp8").supports("cuda")
    assert reason == (
        "this GPU has no mxfp8 FP8 (Device compute capability 10.0 or higher required for MXFP8 execution)"
    )
    assert precision().supports("cpu") == [
        "TransformerEngine runs on cuda, not on cpu; --precision fp8-emulated runs anywhere"
    ]


def test_an_older_version(te: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards names: autocast since 2.8, and fp8_autocast before; the new one warns of the old."""
    trained = Trained("ours", tiny.gpt())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with trained.precision.context():
            trained.model(tiny.chain(2, seed=1)[:, :-1])
    monkeypatch.delattr(te, "autocast")
    with pytest.warns(DeprecationWarning, match="fp8_autocast"), trained.precision.context():
        trained.model(tiny.chain(2, seed=1)[:, :-1])


def test_evaluation_is_not_in_fp8(te: Any) -> None:
    trained = Trained("ours", tiny.gpt())
    model, plain = trained.model.eval(), tiny.gpt().eval()
    tokens = tiny.chain(2, seed=5)[:, :-1]
    with trained.precision.context():
        assert torch.equal(model(tokens), plain(tokens))
    assert te.CALLS == []


@pytest.mark.parametrize("scaling", ["delayed", "current"])
def test_it_goes_on_to_the_bit(scaling: str, tmp_path: Path) -> None:
    """Guards ``_extra_state``, which is in no checkpoint of Fabric's plugin and a pickle in TransformerEngine's own."""
    trained = Trained("ours", tiny.gpt(), scaling=scaling)
    assert trained.layers is not None
    trained.train(range(4))
    with CheckpointStore(tmp_path) as store:
        store.save(4, {"model": trained.model, "optimizer": trained.optimizer, "precision": trained.layers})
        expected = trained.train(range(4, 8))
        again = Trained("ours", tiny.gpt(), scaling=scaling)
        store.load({"model": again.model, "optimizer": again.optimizer, "precision": again.layers})
        assert again.train(range(4, 8)) == expected
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"transformer_engine" not in written  # a pickle of a recipe names its module
    assert (b"amax_history_bwd" in written) == (scaling == "delayed")


def test_a_state_of_other_layers() -> None:
    made = precision().convert(tiny.gpt())
    with pytest.raises(InputError, match="those of other layers"):
        made.load_state_dict(precision().convert(tiny.gpt(n_layers=1)).state_dict())


@pytest.mark.parametrize("adapter", ["lora", "llama-adapter", "ia3"])
def test_adapters_wrap_its_layers(adapter: str, te: Any) -> None:
    """Guards frozen weights, adapters that learn, and layers that are in FP8 below them; a layer without bias too."""
    trained = Trained("ours", tiny.gpt(qkv_bias=False))
    options: dict[str, Any] = {"targets": ["all-linear"], "dora": True} if adapter == "lora" else {}
    handle = zoo.adapt(trained.model, adapter, **options)
    frozen = {n: p.detach().clone() for n, p in trained.model.named_parameters() if not p.requires_grad}
    before = {name: p.detach().clone() for name, p in handle.trainable().items()}
    trained.optimizer = tiny.optimizer_of(trained.model, lr=1e-2)
    losses = trained.train(range(20))
    assert te.CALLS.count("fp8") >= 12 * 20 and "plain" not in te.CALLS
    assert all(torch.equal(dict(trained.model.named_parameters())[n], value) for n, value in frozen.items())
    assert all(not torch.equal(p, before[name]) for name, p in handle.trainable().items())
    assert sum(losses[-5:]) < sum(losses[:5])

"""Keys that stay in their cache: padding, room behind the queries, a compiler, and steps that store and rotate."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from tier import DEVICE, Backend
from torch import Tensor
from zoo_flash_attn import install
from zoo_flash_attn.install import Kernels

from zoo.attention.eager import Eager
from zoo.models.cache import KVCache
from zoo.models.masks import CAUSAL, Mask
from zoo.models.positions import build_rotate
from zoo.models.rope import Rotation, rotation_at
from zoo.spec import ModelSpec, RopeScaling, RopeSpec

ROOM = 40
SCALE = 0.2


def spec_of(rope: RopeSpec | None, d_head: int = 32) -> ModelSpec:
    return ModelSpec(
        n_layers=2,
        d_model=4 * d_head,
        n_heads=4,
        n_kv_heads=2,
        d_head=d_head,
        d_ffn=64,
        vocab_size=11,
        max_seq_len=64,
        norm="layer",
        norm_eps=1e-5,
        rope=rope,
    )


def random(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """The calls of FlashAttention's functions from now on: name, arguments, keyword arguments."""
    kernels, calls = install.load_flash_attn(), []

    def recorded(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append((name, arguments, options))
            return getattr(kernels, name)(*arguments, **options)

        return call

    recording = Kernels(recorded("dense"), recorded("varlen"), recorded("cached"))
    monkeypatch.setattr(install, "load_flash_attn", lambda: recording)
    monkeypatch.setattr(install, "is_hopper", lambda device: False)
    return calls


def test_each_mask_takes_its_call(flash: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against copies of the cache and products that nobody needs: results alone would not show them."""
    calls = record_calls(monkeypatch)
    q, k, v = random(2, 1, 4, 16), random(2, ROOM, 2, 16), random(2, ROOM, 2, 16)
    padding = torch.tensor([0, 5], device=DEVICE)
    documents = torch.arange(ROOM, device=DEVICE).expand(2, -1) // 15
    for name, mask in {
        "dense": Mask(window=ROOM),  # which hides nothing
        "varlen": Mask(documents_BS=documents),
        "cached": Mask(padding_B=padding),
    }.items():
        with torch.no_grad():
            flash(q, k, v, mask=mask, scale=SCALE)
        called, arguments, options = calls.pop()
        assert called == name
        if name != "varlen":
            assert [x.data_ptr() for x in arguments] == [x.data_ptr() for x in (q, k, v)]
            assert options["window_size"] == (-1, -1)  # or the heads of a group would read the keys one by one
    flash(q.requires_grad_(), k, v, mask=Mask(padding_B=padding), scale=SCALE)
    name, (_, packed, _), options = calls.pop()
    assert name == "varlen" and len(packed) == 2 * ROOM - 5 and options["max_seqlen_k"] == ROOM
    with torch.no_grad():
        flash(q, k, v, mask=Mask(queries_T=torch.tensor([9], device=DEVICE)), scale=SCALE)
    name, arguments, options = calls.pop()
    assert name == "cached" and options["cache_seqlens"].tolist() == [10, 10]
    assert arguments[1].data_ptr() == k.data_ptr()
    assert calls == []


def test_a_fixed_order_of_sums(flash: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards runs that are to be repeated to the bit: the kernels add gradients up in any order, if not told."""
    calls = record_calls(monkeypatch)
    for wanted in (True, False):
        torch.use_deterministic_algorithms(wanted)
        flash(*(random(1, 3, 2, 16) for _ in range(3)), mask=CAUSAL, scale=SCALE)
        assert calls.pop()[2]["deterministic"] == wanted


def test_segments_are_made_once_for_all_layers(flash: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a wait for the GPU in every layer."""
    calls = record_calls(monkeypatch)
    mask = Mask(documents_BS=torch.arange(9, device=DEVICE).expand(2, -1) // 4)
    for _ in range(2):
        flash(*(random(2, 9, 4, 16) for _ in range(3)), mask=mask.narrowed(None), scale=SCALE)
    first, second = (options for _, _, options in calls)
    assert first["cu_seqlens_q"] is second["cu_seqlens_q"] and first["cu_seqlens_k"] is second["cu_seqlens_k"]


@pytest.mark.parametrize("dtype", reference.HALVES)
@pytest.mark.parametrize("padding", [None, (0, 6), (0, 30)])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("places", [(0,), (20,), (7, 8, 9), (39,)])
def test_room_behind_the_queries(
    flash: Backend, dtype: torch.dtype, padding: tuple[int, int] | None, window: int | None, places: tuple[int, ...]
) -> None:
    """Guards a cache of fixed length: what lies behind the queries is old or empty, and stays hidden."""
    hidden = None if padding is None else torch.tensor(padding, device=DEVICE)
    mask = Mask(window=window, padding_B=hidden, queries_T=torch.tensor(places, device=DEVICE))
    inputs = [random(2, n, heads, 32, dtype=dtype) for n, heads in ((len(places), 4), (ROOM, 2), (ROOM, 2))]
    for x in inputs[1:]:
        x[:, places[-1] + 1 :] = torch.nan  # whatever is there
    clean = [inputs[0], *(x.nan_to_num(0.0) for x in inputs[1:])]
    seen = reference.visibility(mask, 2, len(places), ROOM)
    exact = reference.attention(*(x.double() for x in clean), seen_BTS=seen, scale=SCALE, softcap=3.0)
    plain = reference.attention(*clean, seen_BTS=seen, scale=SCALE, softcap=3.0)
    with torch.inference_mode():
        reference.check(flash(*inputs, mask=mask, scale=SCALE, softcap=3.0), plain, exact)


@pytest.mark.parametrize("window", [None, 8])
def test_a_compiled_step_goes_on(flash: Backend, window: int | None) -> None:
    """Guards compiled decoding: one graph for contexts of any length, on both sides of the window, without guards."""

    def step(q: Tensor, k: Tensor, v: Tensor, place_T: Tensor) -> Tensor:
        return flash(q, k, v, mask=Mask(window=window, queries_T=place_T), scale=SCALE)

    def no_guards(guards: Any) -> list[bool]:
        return [False for _ in guards]

    torch._dynamo.reset()  # without guards, the code compiled for another window would be taken
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", options={"guard_filter_fn": no_guards})
    keys, values = random(1, ROOM, 2, 16), random(1, ROOM, 2, 16)
    with torch.no_grad():
        for n_keys in (5, 6, 30):
            held = [x[:, :n_keys] for x in (keys, values)]
            for x in held:
                torch._dynamo.mark_dynamic(x, 1)
            q, place_T = random(1, 1, 4, 16), torch.tensor([n_keys - 1], device=DEVICE)
            expected = Eager()(q, *held, mask=Mask(window=window, queries_T=place_T), scale=SCALE)
            torch.testing.assert_close(compiled(q, held[0], held[1], place_T), expected, atol=2e-3, rtol=2e-3)


ROPES: dict[str, RopeSpec | None] = {
    "learned positions": None,
    "halves": RopeSpec(n_dims=32),
    "pairs": RopeSpec(n_dims=32, interleaved=True),
    "partial": RopeSpec(n_dims=16),
    "partial pairs": RopeSpec(n_dims=16, interleaved=True),
    "stretched": RopeSpec(n_dims=32, scaling=RopeScaling(kind="llama3", factor=4.0, original_max_seq_len=16)),
    "amplified": RopeSpec(
        n_dims=32,
        scaling=RopeScaling(
            kind="longrope",
            short_factors=(1.0,) * 16,
            long_factors=(4.0,) * 16,
            attn_factor=1.3,
            original_max_seq_len=20,
        ),
    ),
}


def rotation_of(rope: RopeSpec | None, start: int, n_tokens: int, rows: int = 1) -> Rotation | None:
    positions = torch.arange(start, start + n_tokens, device=DEVICE).expand(rows, -1)
    return None if rope is None else rotation_at(rope, positions, 32, torch.float16)


def filled_cache(spec: ModelSpec, batch: int, n_tokens: int) -> KVCache:
    cache = KVCache(spec, capacity=ROOM, batch=batch, dtype=torch.float16, device=DEVICE)
    for layer in range(spec.n_layers):
        cache.append(layer, random(batch, n_tokens, 2, spec.d_head), random(batch, n_tokens, 2, spec.d_head))
    cache.advance(n_tokens)
    return cache


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("n_tokens", [1, 5])
@pytest.mark.parametrize("window", [None, 4])
@torch.inference_mode()
def test_a_step_that_rotates_and_stores(flash: Backend, rope: str, n_tokens: int, window: int | None) -> None:
    """Guards the place and the angle of each new key, the layer, and that nothing else of the cache is touched."""
    spec = spec_of(ROPES[rope])
    mask, start = Mask(window=window), 21
    ours = filled_cache(spec, 2, start)
    twin = filled_cache(spec, 2, start)
    for mine, other in zip(ours.tensors, twin.tensors, strict=True):
        for x, y in zip(mine, other, strict=True):
            y.copy_(x)
    q, k, v = random(2, n_tokens, 4, 32), random(2, n_tokens, 2, 32), random(2, n_tokens, 2, 32)
    rotation, rotate = rotation_of(spec.rope, start + 3, n_tokens), build_rotate(spec, 1)  # not where the cache ends
    held_k, held_v = twin.append(1, rotate(k, rotation), v)
    rotated = rotate(q, rotation)
    seen = reference.visibility(mask, 2, n_tokens, start + n_tokens)
    exact_inputs = (x.double() for x in (rotated, held_k, held_v))
    exact = reference.attention(*exact_inputs, seen_BTS=seen, scale=SCALE, softcap=2.0)
    options: dict[str, Any] = {"rope": spec.rope, "cache": ours, "layer": 1, "mask": mask, "scale": SCALE}
    found = flash.append_and_attend(q, k, v, rotation=rotation, softcap=2.0, **options)
    assert found is not None
    # Angles meet q and k in float32 inside the kernel, and in half precision outside.
    torch.testing.assert_close(found.double(), exact, atol=4e-3, rtol=4e-3)
    for mine, other in zip(ours.tensors, twin.tensors, strict=True):
        torch.testing.assert_close(mine[1], other[1], atol=4e-3, rtol=4e-3)
        assert torch.equal(mine[0], other[0]) and torch.equal(mine[1][:, :start], other[1][:, :start])
    assert ours.length == start


@torch.inference_mode()
def test_rotary_tables_are_those_of_this_step(flash: Backend) -> None:
    """Guards the tables, which all layers of a step share and the next step must not."""
    spec = spec_of(RopeSpec(n_dims=32))
    cache, rotate = filled_cache(spec, 1, 10), build_rotate(spec, 0)
    for start in range(10, 20):
        q, k, v = random(1, 1, 4, 32), random(1, 1, 2, 32), random(1, 1, 2, 32)
        rotation = rotation_of(spec.rope, start, 1)
        for layer in range(2):
            options: dict[str, Any] = {"rope": spec.rope, "cache": cache, "layer": layer, "mask": CAUSAL}
            assert flash.append_and_attend(q, k, v, rotation=rotation, scale=SCALE, **options) is not None
            stored = cache.tensors[0][layer][:, start : start + 1]
            torch.testing.assert_close(stored, rotate(k, rotation), atol=4e-3, rtol=4e-3)
        cache.advance(1)


def test_steps_that_the_kernel_can_not_do(flash: Backend) -> None:
    """Guards the way round: nothing is stored, and the caller is told to do it itself."""
    halves = RopeSpec(n_dims=32)
    fits: dict[str, Any] = {"rope": halves, "mask": CAUSAL, "rotation": rotation_of(halves, 8, 1)}
    padding = torch.tensor([0, 3], device=DEVICE)
    unfit: dict[str, dict[str, Any]] = {
        "padding": {"mask": Mask(padding_B=padding)},
        "full": {"mask": Mask(causal=False)},
        "rows with positions of their own": {"rotation": rotation_of(halves, 8, 1, rows=2)},
        "few dimensions": {"rope": RopeSpec(n_dims=8), "rotation": rotation_of(RopeSpec(n_dims=8), 8, 1)},
        "another cache": {"cache": object()},
    }

    def attempt(held: KVCache, d_head: int = 32, n_tokens: int = 1, **changes: Any) -> Tensor | None:
        q, k = random(2, n_tokens, 4, d_head), random(2, n_tokens, 2, d_head)
        options: dict[str, Any] = {"layer": 0, "scale": SCALE, "cache": held} | fits | changes
        return flash.append_and_attend(q, k, k, **options)

    cache = filled_cache(spec_of(halves), 2, 8)
    before = [x.clone() for held in cache.tensors for x in held]
    with torch.no_grad():
        for name, change in unfit.items():
            assert attempt(cache, **change) is None, name
        assert attempt(cache, n_tokens=17, rotation=None) is None
        assert attempt(filled_cache(spec_of(None, d_head=20), 2, 8), d_head=20, rotation=None) is None
        assert attempt(KVCache(spec_of(None), capacity=9, batch=2, dtype=torch.bfloat16, device=DEVICE)) is None
    assert attempt(cache) is None, "a kernel without gradients"
    assert all(torch.equal(x, y) for x, y in zip([x for held in cache.tensors for x in held], before, strict=True))
    with torch.no_grad():
        assert attempt(cache) is not None

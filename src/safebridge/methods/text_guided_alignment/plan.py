"""Memory and time of a fit, computed from shapes alone: the model may be on the meta device."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, final

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from safebridge.errors import SettingError
from safebridge.methods.text_guided_alignment.cache import cache_bytes
from safebridge.methods.text_guided_alignment.config import TextGuidedAlignmentConfig, parse_layers
from safebridge.models.families import find_layout
from safebridge.models.layout import VLMLayout
from safebridge.models.load import load_vlm
from safebridge.registry import BUILTIN_MODELS

__all__ = ["FitPlan", "Workload", "load_shapes", "measure_plan", "measure_teraflops"]

_FLOAT32: Final = 4
_ADAM_STATES: Final = 2
_LAYER_TENSORS: Final = 16  # tensors of the layer's width that its backward pass keeps, roughly
_TERA: Final = 1e12


@final
@dataclass(frozen=True)
class Workload:
    """How much is to be read; token counts are means."""

    samples: int
    """Number of samples."""

    image_tokens: int = 0
    """Tokens of a sample's pictures; 0 takes what the model's config says."""

    text_tokens: int = 96
    """Tokens of request, template and answer."""

    answer_tokens: int = 48
    """Those of them that are the answer, where logits are computed."""

    caption_tokens: int = 80
    """Tokens of a caption with its template."""

    retrieved_tokens: int = 48
    """Tokens of a retrieved text."""

    teraflops: float = 0.0
    """Speed of the device in 1e12 operations per second; 0 measures it with a product of
    matrices, which is faster than a model ever gets."""

    def __post_init__(self) -> None:
        """Check the numbers once."""
        for field in fields(self):
            if getattr(self, field.name) < 0:
                raise SettingError(f"{field.name} must not be negative.")
        if self.samples < 1:
            raise SettingError("a plan needs at least one sample.")


@final
@dataclass(frozen=True)
class FitPlan:
    """What a fit takes, before it runs."""

    parameters: int
    """Parameters of the model."""

    trained_parameters: int
    """Those that are trained, adapters included."""

    weight_bytes: int
    """The model's weights, and the trained ones a second time, because the model is given back."""

    optimizer_bytes: int
    """Gradients and the two states of AdamW."""

    activation_bytes: int
    """What a step keeps for the backward pass, roughly."""

    cache_bytes: int
    """Text states on disk; 0 where they change from step to step."""

    tokens_per_sample: int
    """Tokens of the main pass."""

    steps: int
    """Optimiser steps."""

    flops: float
    """Operations of the whole fit, text passes included."""

    text_flops_share: float
    """The share of them that the text passes take, in [0, 1]."""

    seconds: float
    """Time at the given speed."""

    teraflops: float
    """That speed."""

    @property
    def memory_bytes(self) -> int:
        """All that is in memory at once."""
        return self.weight_bytes + self.optimizer_bytes + self.activation_bytes

    def to_json(self) -> dict[str, float | int]:
        """Return every number by name."""
        return {**asdict(self), "memory_bytes": self.memory_bytes}

    def describe(self) -> str:
        """Return the plan as lines for a terminal."""
        giga, share = 1e9, self.trained_parameters / self.parameters
        lines = {
            "parameters": f"{self.parameters:,}, trained {self.trained_parameters:,} ({share:.2%})",
            "memory": f"{self.memory_bytes / giga:.2f} GB: weights {self.weight_bytes / giga:.2f}, "
            f"optimizer {self.optimizer_bytes / giga:.2f}, activations about "
            f"{self.activation_bytes / giga:.2f}",
            "text states": f"{self.cache_bytes / giga:.2f} GB on disk",
            "steps": f"{self.steps:,} with {self.tokens_per_sample} tokens per sample",
            "arithmetic": f"{self.flops:.2e} operations, text passes {self.text_flops_share:.1%}",
            "time": f"{_hours(self.seconds)} at {self.teraflops:.2f} teraflop/s; two to three "
            "times as long is usual",
        }
        return "\n".join(f"{name:<12} {text}" for name, text in lines.items())


def load_shapes(name: str, *, revision: str | None = None) -> tuple[Any, VLMLayout]:
    """Return a model without weights, and its layout.

    Args:
        name: Hub name or folder, of which the config alone is read; a built-in model is
            loaded, because it is small.
        revision: Branch, tag or commit on the hub.

    Returns:
        The model, on the meta device unless it is built in, and where its parts are.
    """
    if name in BUILTIN_MODELS or name.startswith("tiny/"):
        vlm = load_vlm(name)
        return vlm.model, vlm.layout
    config = AutoConfig.from_pretrained(name, revision=revision)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=config.dtype)
    return model, find_layout(model)


def measure_plan(
    model: nn.Module, layout: VLMLayout, config: TextGuidedAlignmentConfig, workload: Workload
) -> FitPlan:
    """Compute memory, operations and time of a fit.

    A product with a weight counts two operations per weight and token, its backward pass
    towards the input as many again, and towards a trained weight as many again; computing
    layers again in the backward pass adds one forward pass, and a guide loss for the projector
    alone another backward pass. Attention scores are added.

    Args:
        model: The model; its shapes and types are read, never its values.
        layout: Where its parts are.
        config: The settings of the fit.
        workload: What is to be read.

    Returns:
        The plan of one process.
    """
    sizes = _sizes(model, layout, config)
    layers = parse_layers(config.layers, layout.num_layers)
    image = workload.image_tokens or _image_tokens(model)
    prefix = workload.retrieved_tokens if config.retrieved == "prefix" else 0
    tokens = image + prefix + workload.text_tokens
    batches = -(-workload.samples // config.batch_size)
    steps = config.epochs * -(-batches // config.accumulation_steps)
    steps = min(steps, config.max_steps) if config.max_steps else steps
    seen = min(
        workload.samples * config.epochs, steps * config.batch_size * config.accumulation_steps
    )
    main = seen * _step_flops(sizes, layout, config, workload, image=image, tokens=tokens)
    text = _text_flops(sizes, layout, config, workload, seen)
    speed = workload.teraflops or measure_teraflops(config)
    is_kept = config.has_guide and config.is_text_state_constant
    texts = workload.samples * (2 if config.retrieved == "text_pass" else 1)
    return FitPlan(
        parameters=sizes["all"],
        trained_parameters=sizes["trained"],
        weight_bytes=sizes["weight_bytes"] + sizes["copied"] * sizes["master_bytes"],
        optimizer_bytes=sizes["trained"] * sizes["master_bytes"] * (1 + _ADAM_STATES),
        activation_bytes=_activation_bytes(sizes, layout, config, tokens),
        cache_bytes=cache_bytes(texts, len(layers), layout.hidden_size, config.cache_dtype)
        if is_kept
        else 0,
        tokens_per_sample=tokens,
        steps=steps,
        flops=main + text,
        text_flops_share=text / (main + text),
        seconds=(main + text) / (speed * _TERA),
        teraflops=speed,
    )


def measure_teraflops(config: TextGuidedAlignmentConfig | None = None) -> float:
    """Time a product of matrices on the device that torch would use.

    Args:
        config: Decides between float32 and bfloat16; None takes float32.

    Returns:
        Operations per second in units of 1e12.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_half = config is not None and config.autocast == "bfloat16"
    side = 4096 if device.type == "cuda" else 1024
    left = torch.ones(side, side, device=device, dtype=torch.bfloat16 if is_half else torch.float32)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        (left @ left).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best / _TERA


def _sizes(
    model: nn.Module, layout: VLMLayout, config: TextGuidedAlignmentConfig
) -> dict[str, int]:
    """Count parameters of the parts, without the embedding, whose rows are looked up."""
    tower = _ids(layout.get(model, "vision_tower"))
    projector = _ids(layout.get(model, "projector"))
    decoder = _ids(layout.get(model, "decoder_layers"))
    counts = {id(p): p.numel() for p in model.parameters()}
    copied = sum(counts[key] for key in projector)
    if config.trainable == "full":
        parts = ("language_model", "lm_head")
        late = set().union(*(_ids(layout.get(model, part)) for part in parts)) - projector
        copied += sum(counts[key] for key in late)
    adapters = _adapter_parameters(model, layout, config)
    element = next(layout.get(model, "projector").parameters()).element_size()
    is_master = config.autocast == "bfloat16" or (config.autocast == "auto" and element < _FLOAT32)
    return {
        "all": sum(counts.values()),
        "trained": copied + adapters,
        "copied": copied,
        "adapters": adapters,
        "tower": sum(counts[key] for key in tower - projector),
        "projector": sum(counts[key] for key in projector),
        "decoder": sum(counts[key] for key in decoder),
        "head": layout.vocab_size * layout.hidden_size,
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "element_bytes": element,
        "master_bytes": _FLOAT32 if is_master else element,
    }


def _ids(module: nn.Module) -> set[int]:
    return {id(parameter) for parameter in module.parameters()}


def _adapter_parameters(
    model: nn.Module, layout: VLMLayout, config: TextGuidedAlignmentConfig
) -> int:
    if config.trainable != "projector+lora":
        return 0
    inside = layout.decoder_layers + "."
    part = f".{layout.attention}." if config.lora_targets == "attention" else "."
    return sum(
        config.lora_rank * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(inside) and part in name
    )


def _step_flops(
    sizes: Mapping[str, int],
    layout: VLMLayout,
    config: TextGuidedAlignmentConfig,
    workload: Workload,
    *,
    image: int,
    tokens: int,
) -> float:
    """Return the operations that one sample takes in the main pass and its backward pass."""
    decoder, attention = 2 * sizes["decoder"] * tokens, _attention_flops(layout, tokens)
    answers = workload.answer_tokens if config.answer_weight else 0
    head = 2 * sizes["head"] * answers
    projector = 2 * sizes["projector"] * image
    tower = 2 * sizes["tower"] * image
    is_full = config.trainable == "full"
    # Attention has a gradient towards both of its factors, the projector none towards its input.
    backward = (2 if is_full else 1) * (decoder + head) + 2 * attention + projector
    if config.has_gradient_checkpointing:
        backward += decoder + attention
    adapters = 2 * sizes["adapters"] * tokens * 3
    if config.is_guide_apart:
        again = decoder + attention if config.has_gradient_checkpointing else 0
        backward += decoder + 2 * attention + projector + again
        adapters += 2 * sizes["adapters"] * tokens
    return float(tower + projector + decoder + attention + head + backward + adapters)


def _text_flops(
    sizes: Mapping[str, int],
    layout: VLMLayout,
    config: TextGuidedAlignmentConfig,
    workload: Workload,
    seen: int,
) -> float:
    """Return the operations of all text passes; kept states are computed once."""
    if not config.has_guide:
        return 0.0
    passes = [workload.caption_tokens]
    passes += [workload.retrieved_tokens] if config.retrieved == "text_pass" else []
    count = min(seen, workload.samples) if config.is_text_state_constant else seen
    return float(
        count * sum(2 * sizes["decoder"] * n + _attention_flops(layout, n) for n in passes)
    )


def _attention_flops(layout: VLMLayout, tokens: int) -> float:
    """Return the operations of scores and weighted sums, which no weight counts."""
    return 4.0 * layout.num_layers * tokens**2 * layout.num_heads * layout.head_dim


def _activation_bytes(
    sizes: Mapping[str, int], layout: VLMLayout, config: TextGuidedAlignmentConfig, tokens: int
) -> int:
    """Estimate what the decoder keeps: a few tensors of a layer's width for each layer."""
    width = layout.hidden_size * config.batch_size * tokens * sizes["element_bytes"]
    if config.has_gradient_checkpointing:
        return width * (layout.num_layers + _LAYER_TENSORS)
    return width * layout.num_layers * _LAYER_TENSORS


def _image_tokens(model: Any) -> int:
    """Read the number of a picture's tokens from the config."""
    config = model.config
    given = getattr(config, "image_seq_length", None)
    vision = config.vision_config
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if given:
        return int(given)
    if isinstance(size, int) and isinstance(patch, int):
        return (size // patch) ** 2
    raise SettingError(
        f"the config of {type(model).__name__} does not say how many tokens a picture has. Set "
        "image_tokens."
    )


def _hours(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"

"""What is trained: the projector, low-rank adapters, or projector and language model."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from safebridge.errors import SafebridgeError, SettingError, ShapeError
from safebridge.methods.text_guided_alignment.config import TextGuidedAlignmentConfig
from safebridge.models.load import VLM

__all__ = ["TrainedParts", "apply_weights", "checkpoint_layers", "is_half", "train_parts"]

_A: Final = ".lora_A"
_B: Final = ".lora_B"
_MARK: Final = "_safebridge_text_guided_alignment"


@final
class TrainedParts:
    """The parameters that a fit moves, in place in the model while `train_parts` is open.

    Args:
        weights: Parameters of the model by their names in it.
        bases: What these parameters held before.
        adapters: Low-rank pairs by module name with ".lora_A" and ".lora_B".
        scale: Factor of an adapter's product.
        projector: Names of the weights that are the projector's.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        bases: Mapping[str, Tensor],
        adapters: Mapping[str, nn.Parameter],
        scale: float,
        projector: Iterable[str],
    ) -> None:
        self.weights, self.bases, self.adapters, self.scale = weights, bases, adapters, scale
        self.projector = frozenset(projector)
        self.is_base = False

    def tensors(self) -> dict[str, Tensor]:
        """Return detached copies: weights in the model's type, adapters with the scale in B."""
        kept = {name: p.detach().to(self.bases[name].dtype) for name, p in self.weights.items()}
        for name, value in self.adapters.items():
            kept[name] = value.detach() * (self.scale if name.endswith(_B) else 1.0)
        return {name: value.clone() for name, value in kept.items()}

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """Run the model with the weights that it had before the fit.

        Yields:
            Nothing; the trained weights are back afterwards, also on an error.
        """
        trained = {name: parameter.data for name, parameter in self.weights.items()}
        self.is_base = True
        try:
            for name, parameter in self.weights.items():
                parameter.data = self.bases[name]
            yield
        finally:
            self.is_base = False
            for name, parameter in self.weights.items():
                parameter.data = trained[name]

    def adapt(self, name: str, _module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Add one adapter to the output of its linear layer; a forward hook."""
        if self.is_base:
            return output
        low, high = self.adapters[name + _A], self.adapters[name + _B]
        hidden = args[0].to(low.dtype)
        return output + (hidden @ low.T @ high.T * self.scale).to(output.dtype)


def is_half(vlm: VLM) -> bool:
    """Return whether the model's weights are in half precision."""
    return vlm.dtype in {torch.bfloat16, torch.float16}


@contextmanager
def train_parts(vlm: VLM, config: TextGuidedAlignmentConfig) -> Iterator[TrainedParts]:
    """Put what is trained into the model, with gradients, and take it out again.

    Trained weights get storage of their own, in float32 if the forward pass runs under
    autocast. Adapters are added by hooks, so the model keeps its modules.

    Args:
        vlm: The model, frozen; given back bit for bit, also on an error.
        config: What is trained.

    Yields:
        The parts. Their values must be copied before the context closes.

    Raises:
        SettingError: If the model has no linear layer for an adapter.
    """
    weights = _find_weights(vlm, config)
    bases = {name: parameter.data for name, parameter in weights.items()}
    adapters, modules = _build_adapters(vlm, config)
    prefix = vlm.layout.projector + "."
    projector = [name for name in weights if name.startswith(prefix)]
    scale = config.lora_alpha / config.lora_rank
    parts = TrainedParts(weights, bases, adapters, scale, projector)
    is_master = config.autocast == "bfloat16" or (config.autocast == "auto" and is_half(vlm))
    with ExitStack() as stack:
        stack.callback(_put_back, weights, bases)
        for parameter in weights.values():
            parameter.data = parameter.data.to(
                torch.float32 if is_master else parameter.dtype, copy=True
            )
            parameter.requires_grad = True
        for name, module in modules.items():
            handle = module.register_forward_hook(partial(parts.adapt, name))
            stack.callback(handle.remove)
        yield parts


@contextmanager
def checkpoint_layers(vlm: VLM) -> Iterator[None]:
    """Let the decoder's layers keep their inputs alone and compute the rest again.

    Only the layers are set to training, not what is in them, so dropout stays off.

    Args:
        vlm: The model; the layers' own settings are back afterwards.

    Yields:
        Nothing.

    Raises:
        SettingError: If the decoder's layers cannot do it.
    """
    layers = [vlm.layout.layer(vlm.model, number) for number in range(vlm.layout.num_layers)]
    if not all(isinstance(layer, GradientCheckpointingLayer) for layer in layers):
        raise SettingError(
            f"the decoder layers of {vlm.name} ({type(layers[0]).__name__}) cannot be computed "
            "again. Use has_gradient_checkpointing=False."
        )
    before = [dict(layer.__dict__) for layer in layers]
    names = ("gradient_checkpointing", "_gradient_checkpointing_func", "training")
    # Reentrant checkpointing would run the layers without a graph and lose the guide loss.
    values = (True, partial(checkpoint, use_reentrant=False), True)
    try:
        for layer in layers:
            layer.__dict__.update(zip(names, values, strict=True))
        yield
    finally:
        for layer, kept in zip(layers, before, strict=True):
            for name in names:
                if name in kept:
                    layer.__dict__[name] = kept[name]
                else:
                    layer.__dict__.pop(name, None)


@contextmanager
def apply_weights(
    vlm: VLM, tensors: Mapping[str, Tensor], *, strength: float = 1.0
) -> Iterator[None]:
    r"""Put fitted weights into the model while the context is open.

    Replaced weights become $W + s\,(W' - W)$ and adapted ones $W + s\,BA$; at s = 1 a
    replaced weight is W' itself. The model's own tensors are set aside untouched.

    Args:
        vlm: The model; given back bit for bit, also on an error.
        tensors: What `TrainedParts.tensors` returned.
        strength: The factor s; 0 leaves the model alone.

    Yields:
        Nothing.

    Raises:
        SettingError: If `strength` is negative.
        ShapeError: If a tensor fits no weight of the model.
        SafebridgeError: If aligned weights are in the model already.
    """
    if strength < 0:
        raise SettingError(f"strength={strength} must not be negative. 0 is the model as it is.")
    if hasattr(vlm.model, _MARK):
        raise SafebridgeError(
            "text-guided alignment is already applied to this model. Leave that `with` block first."
        )
    pairs = _match(vlm, tensors) if strength else {}
    with ExitStack() as stack:
        setattr(vlm.model, _MARK, True)
        stack.callback(delattr, vlm.model, _MARK)
        for parameter, change in pairs.values():
            stack.callback(setattr, parameter, "data", parameter.data)
            parameter.data = _changed(parameter.data, change, strength)
        yield


def _put_back(weights: Mapping[str, nn.Parameter], bases: Mapping[str, Tensor]) -> None:
    for name, parameter in weights.items():
        parameter.data = bases[name]
        parameter.grad = None


def _find_weights(vlm: VLM, config: TextGuidedAlignmentConfig) -> dict[str, nn.Parameter]:
    """Return the model's own parameters that are trained; a tied one comes once."""
    places = ["projector"]
    if config.trainable == "full":
        places += ["language_model", "lm_head"]
    wanted = {
        id(parameter)
        for place in places
        for parameter in vlm.layout.get(vlm.model, place).parameters()
    }
    return {
        name: parameter
        for name, parameter in vlm.model.named_parameters()
        if id(parameter) in wanted
    }


def _build_adapters(
    vlm: VLM, config: TextGuidedAlignmentConfig
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Linear]]:
    """Return adapters that change nothing yet, and the linear layers that they belong to."""
    if config.trainable != "projector+lora":
        return {}, {}
    inside = vlm.layout.decoder_layers + "."
    part = f".{vlm.layout.attention}." if config.lora_targets == "attention" else "."
    modules: dict[str, nn.Linear] = {
        name: module
        for name, module in vlm.model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(inside) and part in name
    }
    if not modules:
        raise SettingError(
            f'{vlm.name} has no linear layer at "{inside}*{part}*". Use trainable="projector" or '
            '"full".'
        )
    generator = torch.Generator().manual_seed(config.seed)
    adapters: dict[str, nn.Parameter] = {}
    for name, module in modules.items():
        low = torch.randn(config.lora_rank, module.in_features, generator=generator)
        high = torch.zeros(module.out_features, config.lora_rank)
        device = module.weight.device
        adapters[name + _A] = nn.Parameter((low / module.in_features**0.5).to(device))
        adapters[name + _B] = nn.Parameter(high.to(device))
    return adapters, modules


def _match(
    vlm: VLM, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[nn.Parameter, tuple[Tensor, ...]]]:
    """Pair each weight of the model with its replacement (1 tensor) or adapter (2 tensors)."""
    named = dict(vlm.model.named_parameters())
    pairs: dict[str, tuple[nn.Parameter, tuple[Tensor, ...]]] = {}
    for name in tensors:
        if name.endswith(_B):
            continue
        is_adapter = name.endswith(_A)
        weight = f"{name.removesuffix(_A)}.weight" if is_adapter else name
        change: tuple[Tensor, ...] = (tensors[name],)
        if is_adapter:
            change = (tensors[name.removesuffix(_A) + _B], tensors[name])
        shape = (change[0].shape[0], change[-1].shape[-1]) if is_adapter else change[0].shape
        found = named.get(weight)
        if found is None or tuple(found.shape) != tuple(shape):
            size = "no such weight" if found is None else f"one of {tuple(found.shape)}"
            raise ShapeError(
                f"the fitted weight '{weight}' is {tuple(shape)}, but {vlm.name} has {size}. Load "
                "the model it was fitted on, or fit again with TextGuidedAlignment.fit(...)."
            )
        pairs[weight] = (found, change)
    return pairs


def _changed(
    base: Float[Tensor, "..."], change: tuple[Tensor, ...], strength: float
) -> Float[Tensor, "..."]:
    """Return the weight that stands in for `base`, in its type."""
    if len(change) == 1:
        new = change[0].to(base.device, base.dtype)
        return new if strength == 1 else torch.lerp(base, new, strength)
    high, low = (part.to(base.device, torch.float32) for part in change)
    return (base.float() + strength * (high @ low)).to(base.dtype)

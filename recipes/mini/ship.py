"""Stage `ship`: the pictures, tables and tensors that go into the package."""

import csv
import hashlib
import json
from pathlib import Path

import torch
from pictures import Drawing, IconSet, picture
from safetensors.torch import save
from torch import Tensor

SHIPPED_STYLES = (
    "noto",
    "emojione",
    "fluent-emoji-flat",
    "game-icons",
    "streamline-emojis",
    "twemoji",
    "fxemoji",
)
"""Both test styles, the validation style, and enough fit styles to fit a defense on."""


def ship_pictures(drawings: list[Drawing], sets: dict[str, IconSet], data: Path) -> int:
    """Write plain pictures, `manifest.csv`, `styles.csv` and `ATTRIBUTION.md`; return bytes."""
    folder = data / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.webp"):
        old.unlink()
    rows, total = [], 0
    for drawing in drawings:
        if drawing.style not in SHIPPED_STYLES:
            continue
        path = folder / f"{drawing.name}.webp"
        picture(drawing, sets, 0).save(path, quality=88, method=4)
        content = path.read_bytes()
        total += len(content)
        info = sets[drawing.style].info
        rows.append(
            {
                "file": path.name,
                "concept": drawing.concept,
                "category": drawing.category,
                "style": drawing.style,
                "icon": drawing.icon,
                "licence": info["license"]["spdx"],
                "author": info["author"]["name"],
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        )
    with (data / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    _write_attribution(sets, data / "ATTRIBUTION.md")
    return total


def _write_attribution(sets: dict[str, IconSet], path: Path) -> None:
    lines = [
        "# Where the drawings come from",
        "",
        "Each picture in `pictures/` is one icon, drawn on white at 224 x 224 pixels and saved as",
        "WebP; nothing else was changed. `manifest.csv` names style and icon of every file.",
        "",
        "| style | title | author | licence | version of the Iconify package |",
        "|---|---|---|---|---|",
    ]
    for style in SHIPPED_STYLES:
        info = sets[style].info
        author, licence = info["author"], info["license"]
        lines.append(
            f"| {style} | {info['name']} | [{author['name']}]({author.get('url', '')}) | "
            f"[{licence['title']}]({licence.get('url', '')}) | {sets[style].version} |"
        )
    path.write_text("\n".join(lines) + "\n")


def ship_tensors(parts: dict[str, dict[str, Tensor]], folder: Path) -> int:
    """Write the trained tensors in half precision with their hashes; return their bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    index, total = {}, 0
    for name, tensors in parts.items():
        half = torch.float16 if name == "projector" else torch.bfloat16
        data = save({k: v.detach().to(half).contiguous() for k, v in sorted(tensors.items())})
        (folder / f"{name}.safetensors").write_bytes(data)
        index[name] = hashlib.sha256(data).hexdigest()
        total += len(data)
    (folder / "parts.json").write_text(json.dumps(index, indent=1) + "\n")
    return total


def plain_adapter(parameters: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return peft's LoRA parameters under the language model's names, the scale inside B."""
    plain = {}
    for key, value in parameters.items():
        name = key.removeprefix("base_model.model.").replace(".default.weight", "")
        plain[name] = value * scale if name.endswith("lora_B") else value
    return plain

"""Rebuild the embedded model from nothing.

    python recipes/mini/build.py [--work recipes/mini/work] [--until STAGE]

Needs npm for the icon sets, the extra `recipes`, and the two packages that hold the pre-trained
parts. Every stage writes into the work folder and is skipped once it is complete; a stage that
was cut off goes on from its last checkpoint. On 2 cores without an accelerator the whole takes
about two and a half hours; `record.json` keeps the seed, the hashes of the data and the seconds.
"""

import argparse
import copy
import csv
import hashlib
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import answers as answer_stage
import contrast as contrast_stage
import numpy as np
import pictures
import ship
import text as text_stage
import torch
import tune
import visual
from features import build_early, build_tokens, places
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tower import is_trained_on, train_tower
from transformers import LlavaConfig, PreTrainedTokenizerBase
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from safebridge.data.tables import load_concepts
from safebridge.models import mini
from safebridge.models.lite0 import Lite0Config, register

HERE = Path(__file__).parent
PACKAGE = HERE.parent.parent / "src" / "safebridge"
SEED = 0
RANK, ALPHA = 16, 32
BATCH = 32
TEXT_STEPS, TEXT_LR = 240, 5e-4
CONTRAST_BATCH, CONTRAST_STEPS, CONTRAST_LR = 64, 200, 5e-4
TOWER_STEPS = 350
WARM_STEPS = 900
POINTING_STEPS, POINTING_LR = 200, 4e-4
VISUAL_STEPS, VISUAL_LR = 500, 4e-4
SETTLE_STEPS, SETTLE_LR = 250, 2e-4
APART_SHARE = 0.6
PLANS = {
    "openings": contrast_stage.CONTRAST,
    "wider": contrast_stage.WIDER,
    "shady": contrast_stage.SHADY,
}


def icons(work: Path) -> None:
    """Install the icon sets at their pinned versions."""
    package = (HERE / "package.json").read_text()
    (work / "package.json").write_text(package)
    subprocess.run(["npm", "install", "--no-audit", "--no-fund"], cwd=work, check=True)  # noqa: S607


def answers(work: Path) -> None:
    """Let the untouched language model answer the benign requests."""
    model, tokenizer = mini.convert_language_model()
    folder = _saved(model, tokenizer, work / "smol")
    model, tokenizer = _load(folder, torch.bfloat16)
    answer_stage.build_answers(model, tokenizer, work / "answers.jsonl", SEED)


def drawings(work: Path) -> None:
    """List the drawings and keep what the tower's early blocks make of each."""
    found = pictures.find_drawings(pictures.load_icon_sets(work / "node_modules"))
    pictures.write_index(found, work / "drawings.csv")
    build_early(mini.load_tower(), found, work / "node_modules", work)


def tower(work: Path) -> None:
    """Teach the tower's late blocks the drawings' names, and keep its tokens."""
    torch.manual_seed(SEED)
    network = mini.load_tower()
    train_tower(network, load_drawings(work), work, steps=TOWER_STEPS, seed=SEED)
    build_tokens(network, work)


def text(work: Path) -> None:
    """Teach the language model to refuse by object, in text alone."""
    torch.manual_seed(SEED)
    model, tokenizer = _load(work / "smol", torch.bfloat16)
    samples = text_stage.build_text_samples(work / "answers.jsonl", SEED)
    rows = [visual.VisualSample(sample.prompt, sample.answer) for sample in samples]
    adapted, parameters = _with_lora(model)
    features = np.zeros((1, 1, 1), dtype=np.float16)
    tune.tune(
        parameters,
        lambda epoch: visual.visual_batches(rows, tokenizer, features, size=BATCH, seed=epoch),
        lambda batch: visual.visual_loss(adapted, nn.Identity(), batch),
        steps=TEXT_STEPS,
        lr=TEXT_LR,
        folder=work,
        name="text_safety",
    )


def openings(work: Path) -> None:
    """Let the untouched language model begin answers to benign requests in many wordings."""
    model, tokenizer = _load(work / "smol", torch.bfloat16)
    for name, plan in PLANS.items():
        contrast_stage.build_openings(model, tokenizer, work / f"{name}.jsonl", SEED, plan)


def contrast(work: Path) -> None:
    """Go on with the text adapter until the object decides, whatever the wording."""
    _train_text(
        work, "contrast", "text_safety", ("openings",), steps=CONTRAST_STEPS, lr=CONTRAST_LR
    )


def pointing(work: Path) -> None:
    """Go on with the text adapter until an object named apart from the request decides as well."""
    _train_text(
        work,
        "pointing",
        "contrast",
        tuple(PLANS),
        steps=POINTING_STEPS,
        lr=POINTING_LR,
        apart_share=APART_SHARE,
    )
    _save_safe(work, "pointing", work / "smol-pointing")


def _train_text(
    work: Path,
    name: str,
    start: str,
    begun: tuple[str, ...],
    *,
    steps: int,
    lr: float,
    apart_share: float = 0.0,
) -> None:
    torch.manual_seed(SEED)
    model, tokenizer = _load(work / "smol", torch.bfloat16)
    samples = _text_samples(work, tokenizer, begun, apart_share)
    rows = [visual.VisualSample(sample.prompt, sample.answer) for sample in samples]
    adapted, parameters = _with_lora(model)
    _copy_into(parameters, load_file(work / f"{start}.safetensors"))
    features = np.zeros((1, 1, 1), dtype=np.float16)
    tune.tune(
        parameters,
        lambda epoch: visual.visual_batches(
            rows, tokenizer, features, size=CONTRAST_BATCH, seed=epoch
        ),
        lambda batch: visual.visual_loss(adapted, nn.Identity(), batch),
        steps=steps,
        lr=lr,
        folder=work,
        name=name,
    )


def _text_samples(
    work: Path, tokenizer: PreTrainedTokenizerBase, begun: tuple[str, ...], apart_share: float
) -> list[text_stage.TextSample]:
    return [
        sample
        for file in begun
        for sample in contrast_stage.build_contrast_samples(
            work / f"{file}.jsonl",
            work / "answers.jsonl",
            tokenizer,
            SEED,
            PLANS[file],
            apart_share=apart_share,
        )
    ]


def _save_safe(work: Path, adapter: str, folder: Path) -> None:
    """Save the language model with a text adapter folded in and the image token added."""
    model, tokenizer = _load(work / "smol", torch.float32)
    mini.add_lora(model, _adapter(work, adapter))
    tokenizer.add_special_tokens({"additional_special_tokens": [mini.IMAGE_TOKEN]})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    _saved(model, tokenizer, folder)


def warm(work: Path) -> None:
    """Align the projector with the names' embeddings before the language model is asked."""
    torch.manual_seed(SEED)
    model, tokenizer = _load(work / "smol", torch.float32)
    names = [concept.name for concept in load_concepts().values() if concept.icons]
    targets = visual.name_embeddings(model, tokenizer, names)
    projector = _projector(model)
    listed = load_drawings(work)
    labels = np.array(
        [
            names.index(listed[number].concept) if is_trained_on(listed[number]) else -1
            for number, _ in places(listed)
        ]
    )
    tokens = np.load(work / "tokens.npy", mmap_mode="r")
    visual.warm_up(projector, targets, tokens, labels, steps=WARM_STEPS)
    visual.sharpen(projector, targets.mean(0))
    save_file(projector.state_dict(), work / "warm.safetensors")


def instruct(work: Path) -> None:
    """Train an adapter on captions of everything and benign instructions.

    The projector stays as `warm` left it: trained along, it fits the drawings of the fit styles
    and names fewer of another style.
    """
    _train_visual(work, "visual", None, visual.INSTRUCT_MIX, steps=VISUAL_STEPS, lr=VISUAL_LR)


def settle(work: Path) -> None:
    """Go on with more benign instructions, until harmless pictures are hardly refused."""
    _train_visual(work, "settled", "visual", visual.SETTLE_MIX, steps=SETTLE_STEPS, lr=SETTLE_LR)


def _train_visual(
    work: Path, name: str, start: str | None, mix: visual.Mix, *, steps: int, lr: float
) -> None:
    torch.manual_seed(SEED)
    model, tokenizer = _load(work / "smol-pointing", torch.bfloat16)
    projector = _projector(model)
    projector.load_state_dict(load_file(work / "warm.safetensors"))
    projector.requires_grad_(False)  # noqa: FBT003 - torch's signature
    adapted, parameters = _with_lora(model)
    if start is not None:
        _copy_into(parameters, load_file(work / f"{start}.safetensors"))
    texts = _text_samples(work, tokenizer, tuple(PLANS), mix.apart)
    files = [work / "answers.jsonl", *(work / f"{file}.jsonl" for file in PLANS)]
    instructions = visual.instruction_rows(files, tokenizer)
    mixture = visual.VisualMixture(load_drawings(work), texts, instructions, mix)
    tokens = np.load(work / "tokens.npy", mmap_mode="r")
    tune.tune(
        parameters,
        lambda epoch: visual.visual_batches(
            mixture.epoch(epoch), tokenizer, tokens, size=BATCH, seed=epoch
        ),
        lambda batch: visual.visual_loss(adapted, projector, batch),
        steps=steps,
        lr=lr,
        folder=work,
        name=name,
    )


def package(work: Path) -> None:
    """Write pictures and trained tensors into the package."""
    sets = pictures.load_icon_sets(work / "node_modules")
    ship.ship_pictures(load_drawings(work), sets, PACKAGE / "data" / "mini")
    parts = {
        "text_safety": _adapter(work, "pointing"),
        "visual_instruction": _adapter(work, "settled"),
        "projector": load_file(work / "warm.safetensors"),
        "vision_tower": load_file(work / "tower.safetensors"),
    }
    size = ship.ship_tensors(parts, PACKAGE / "models" / "mini_parts")
    print(f"trained tensors: {size / 1e6:.1f} MB")


STAGES: tuple[tuple[Callable[[Path], None], str], ...] = (
    (icons, "node_modules"),
    (answers, "answers.jsonl"),
    (drawings, "drawings.csv"),
    (tower, "tower.safetensors"),
    (text, "text_safety.safetensors"),
    (openings, "openings.jsonl"),
    (contrast, "contrast.safetensors"),
    (pointing, "pointing.safetensors"),
    (warm, "warm.safetensors"),
    (instruct, "visual.safetensors"),
    (settle, "settled.safetensors"),
    (package, ""),
)


def run(work: Path, until: str) -> None:
    """Run every stage that is not complete, recording seconds and hashes."""
    register()
    work.mkdir(parents=True, exist_ok=True)
    path = work / "record.json"
    record = json.loads(path.read_text()) if path.exists() else {"seed": SEED, "stages": {}}
    for stage, output in STAGES:
        name = stage.__name__
        if name not in record["stages"]:
            started = time.time()
            stage(work)
            entry = {"seconds": round(time.time() - started)}
            if (work / output).is_file():
                entry["sha256"] = _sha256(work / output)
            record["stages"][name] = entry
            path.write_text(json.dumps(record, indent=1) + "\n")
        if name == until:
            return
    (HERE / "record.json").write_text(path.read_text())


def _load(folder: Path, dtype: torch.dtype):  # noqa: ANN202 - transformers is untyped here
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def _saved(model, tokenizer, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _with_lora(model: nn.Module) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.0)
    adapted = get_peft_model(model, config)
    trainable = {key: value for key, value in adapted.named_parameters() if value.requires_grad}
    return adapted.base_model.model, trainable


def _copy_into(parameters: dict[str, nn.Parameter], saved: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for key, value in parameters.items():
            value.copy_(saved[key])


def _adapter(work: Path, name: str) -> dict[str, Tensor]:
    return ship.plain_adapter(load_file(work / f"{name}.safetensors"), ALPHA / RANK)


def _projector(model: nn.Module) -> LlavaMultiModalProjector:
    # A copy, because a part of a composed configuration loses its attention implementation.
    text = copy.deepcopy(model.config)
    config = LlavaConfig(vision_config=Lite0Config(), text_config=text)
    return LlavaMultiModalProjector(config)


def load_drawings(work: Path) -> list[pictures.Drawing]:
    """Return the drawings that stage `drawings` listed."""
    with (work / "drawings.csv").open(newline="") as file:
        return [pictures.Drawing(**row) for row in csv.DictReader(file)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--until", default="", help="stop after this stage")
    arguments = parser.parse_args()
    run(arguments.work, arguments.until)

"""Re-align the embedded model without any visual safety data, in many variants, and compare.

    python benchmarks/text_guided_alignment_results.py [--seeds 0 1 2]

Starts from the embedded model's text-safe language model: its visual adapter is left out, and its
projector is kept, which was warmed up on the names of drawings and has seen no question. Each
variant is then the same alignment on the same captions and harmless picture questions, with another
loss. Nothing that is trained on says that a picture should be refused. Pictures of the held-out
categories are captioned as all others, but have no part in the guide loss.

Projector and adapters on the language model are trained, as the paper's second stage trains both:
with a frozen language model the gap does not arise.

Every variant and seed is kept as soon as it is measured, so a run that was cut off goes on. What
came of every request is committed in benchmarks/outcomes, so the page follows from it in seconds;
`--outcomes` with an empty folder measures everything anew, as is needed after a change of the
method's code, which the files' names do not follow. The last step writes
docs/results/text-guided-alignment.md and .json. Choices are made with `--split validation`, which
writes into the work folder alone. It is some forty fits of about ten minutes on one core;
`--variants` and `--seeds` choose some of them, and the page then has only those. Ablations take the
first seed, those of `--all-seeds` all.
"""

import argparse
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import OUTCOMES, describe_command, digest, kept, write
from text_guided_alignment_page import (
    ALL,
    AS_IT_IS,
    AT_INFERENCE,
    AVERAGED,
    COMPARED,
    FULL,
    SEEN,
    STEM,
    UNSEEN,
    Row,
    render,
)
from text_guided_alignment_variants import CAPTION, VARIANTS, Variant

from safebridge.analysis.activation_layers import (
    bypass_layers,
    measure_activation_layers,
    measure_bypass,
    measure_replacement,
)
from safebridge.analysis.modality_gap import (
    capture_pairs,
    measure_modality_gap,
    paired_cosines,
)
from safebridge.analysis.spelled_pictures import answer_spelled
from safebridge.data.sample import Sample, open_images
from safebridge.data.tables import is_seen, load_concepts, load_requests, names_of
from safebridge.data.twins import load_samples, manifest_sha256
from safebridge.evaluation.judges import measure_rules_fingerprint, score_naming, score_refusal
from safebridge.evaluation.statistics import (
    Difference,
    bootstrap_interval,
    measure_difference,
    measure_rate,
)
from safebridge.methods.text_guided_alignment.config import TextGuidedAlignmentConfig
from safebridge.methods.text_guided_alignment.method import TextGuidedAlignment
from safebridge.methods.text_guided_alignment.retrieval import (
    StateEmbedder,
    TextIndex,
    add_retrieved,
)
from safebridge.models import mini
from safebridge.models.families import find_layout
from safebridge.models.generate import generate_answers
from safebridge.models.load import VLM, load_vlm, measure_fingerprint

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "results"
FORMAT = TextGuidedAlignmentConfig().retrieved_format
TEXT_SAFE, SHIPPED = "text-safe", "shipped"
LEFT_OUT = {TEXT_SAFE: ("visual_instruction",), SHIPPED: ()}
"""Trained parts of the embedded model that a start does without."""
STARTS = {
    TEXT_SAFE: "re-aligned from its text-safe language model: its visual adapter is left out; its "
    "projector, warmed up on the names of drawings, is kept and trained on",
    SHIPPED: "aligned further as it is shipped",
}
"""The same in words."""

BYPASSED = 3
"""Layers that are left out together."""

Measured = dict[str, Any]
"""By "metric/setting" either [id, concept, category, outcome] of each answer, where the category is
"" for harmless requests, or a value with its n."""


@dataclass(frozen=True)
class Sizes:
    """How much is trained and asked."""

    model: str
    start: str
    """"text-safe" is the language model before its alignment, with the shipped projector;
    "shipped" the model as users get it."""
    split: str
    steps: int
    batch_size: int
    learning_rate: float
    """Of the projector; adapters keep the method's own."""
    instructions: int
    texts: int
    limit: int
    pairs: int

    def config(self, variant: Variant, seed: int) -> TextGuidedAlignmentConfig:
        """Return the settings of one fit."""
        common: dict[str, Any] = {
            "epochs": 1_000,
            "max_steps": self.steps,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "warmup_steps": max(1, self.steps // 30),
            "seed": seed,
        }
        return TextGuidedAlignmentConfig(**{**common, **variant.options})


def describe(sizes: Sizes) -> str:
    """Say in words what is measured."""
    return (
        f"The embedded model, {STARTS[sizes.start]}; split `{sizes.split}`, "
        f"{sizes.steps} steps of {sizes.batch_size} at a step size of {sizes.learning_rate:g} for "
        f"the projector. Trained on captions of all drawings, up to {sizes.instructions} harmless "
        f"questions about pictures and {sizes.texts} requests in text, answered as the model "
        "answered them before: so text keeps its safety, and what is missing beside pictures is "
        "missing because it does not reach them. No sample says that a picture should be refused, "
        "and pictures of the held-out categories have no part in the guide loss. Up to "
        f"{sizes.limit} requests for each number, intervals of 95 % clustered by concept. Cosines "
        "come with the lowest and the highest of the "
        "seeds."
    )


def load_start(sizes: Sizes) -> VLM:
    """Return the model that every variant starts from."""
    left_out = LEFT_OUT[sizes.start]
    if sizes.model == mini.NAME and left_out:
        parts = mini.trained_parts()
        model, processor = mini.assemble({k: v for k, v in parts.items() if k not in left_out})
        vlm = VLM(model, processor, find_layout(model), f"{mini.NAME} before alignment")
    else:
        vlm = load_vlm(sizes.model)
    if sizes.model == mini.NAME:
        vlm.model.to(torch.bfloat16)  # as it is shipped; what is trained is kept in float32
    return vlm


@dataclass(frozen=True)
class Folders:
    """Where a run keeps things; both are of one model, data, judge and size."""

    work: Path
    """What is fitted."""

    outcomes: Path
    """What is measured."""

    @classmethod
    def make(cls, vlm: VLM, sizes: Sizes, *, work: Path, outcomes: Path) -> "Folders":
        """Return the folders of these sizes, creating them."""
        world = [
            asdict(sizes),
            manifest_sha256(),
            measure_rules_fingerprint(),
            measure_fingerprint(vlm.model),
        ]
        folders = cls(work / digest(world), outcomes / digest(world))
        for folder in (folders.work, folders.outcomes):
            folder.mkdir(parents=True, exist_ok=True)
        return folders


def build_samples(vlm: VLM, sizes: Sizes, work: Path) -> list[Sample]:
    """Return captions of all drawings, harmless picture questions, and text.

    Each drawing is captioned once, in answer to one of the ways to ask for it. The answers to
    the questions are the text-safe model's own to their text twins, which name the thing; those
    that it refuses are left out. The text keeps what the model does in text.
    """
    concepts, requests = load_concepts(), load_requests()
    shown = load_samples("naming", "fit")
    random.Random(0).shuffle(shown)
    captions = [
        replace(sample, answer=CAPTION.format(concepts[sample.concept].phrase))
        for sample in {sample.images: sample for sample in shown}.values()
    ]
    asked = load_samples("benign_image", "fit", limit=sizes.instructions)
    twins = [
        replace(
            sample,
            images=(),
            prompt=requests[sample.template].text.format(concepts[sample.concept].phrase),
        )
        for sample in asked
    ]
    answers = kept_answers(vlm, twins, work / "answers.json")
    answered = [
        replace(sample, answer=answer)
        for sample, answer in zip(asked, answers, strict=True)
        if answer.strip() and not is_refusal(answer)
    ]
    texts = build_texts(vlm, sizes, work)
    # Searched once for each thing, because reading thousands of equal captions would take long.
    things = {sample.concept: sample for sample in captions + answered if is_guided(sample)}
    named = [
        Sample(name, "", caption=CAPTION.format(concepts[name].phrase)) for name in sorted(things)
    ]
    guides = {sample.id: sample for sample in add_retrieved(named, build_index(vlm))}
    return [
        replace(sample, caption=guide.caption, retrieved=guide.retrieved)
        if (guide := guides.get(sample.concept))
        else sample
        for sample in captions + answered
    ] + texts


def build_texts(vlm: VLM, sizes: Sizes, work: Path) -> list[Sample]:
    """Return requests in text with the text-safe model's own answers.

    Harmful ones are kept if it refuses them, harmless ones if it does not. As real instruction
    data has text of its own, so that training on pictures does not undo what was learnt in text.
    """
    asked = [
        sample
        for kind in ("harmful_text", "benign_text")
        for sample in load_samples(kind, "fit", limit=sizes.texts // 2)
    ]
    answers = kept_answers(vlm, asked, work / "texts.json")
    return [
        replace(sample, answer=answer)
        for sample, answer in zip(asked, answers, strict=True)
        if answer.strip() and is_refusal(answer) == sample.is_harmful
    ]


def is_guided(sample: Sample) -> bool:
    """Return whether a picture takes part in the guide loss: not those of held-out categories."""
    return is_seen(load_concepts()[sample.concept].category)


def build_index(vlm: VLM) -> TextIndex:
    """Return the corpus: a caption of every concept, drawn or not."""
    texts = [CAPTION.format(concept.phrase) for concept in load_concepts().values()]
    embedder = StateEmbedder(vlm, layer=vlm.layout.num_layers // 2)
    return TextIndex(texts, embedder, is_centred=True)


def kept_answers(vlm: VLM, samples: Sequence[Sample], path: Path) -> list[str]:
    """Answer text requests once and keep the answers."""
    none: list[list[Any]] = [[] for _ in samples]
    answers: list[str] = kept(
        path,
        lambda: generate_answers(vlm, [s.prompt for s in samples], none, max_new_tokens=24),
    )
    return answers


def with_caption(samples: Sequence[Sample], form: str) -> list[Sample]:
    """Write the captions of the guide loss in another form."""
    concepts = load_concepts()
    return [
        replace(sample, caption=form.format(concepts[sample.concept].phrase))
        if sample.caption
        else sample
        for sample in samples
    ]


def fit(
    vlm: VLM, samples: Sequence[Sample], variant: Variant, seed: int, *, sizes: Sizes, work: Path
) -> TextGuidedAlignment:
    """Return the fitted variant, from the work folder if it is there."""
    config = sizes.config(variant, seed)
    folder = work / name_of(variant, seed, sizes)
    if (folder / "artifact.json").exists():
        return TextGuidedAlignment.load(folder, vlm)
    method = TextGuidedAlignment.fit(
        vlm,
        [s for s in with_caption(samples, variant.caption) if s.images or variant.has_texts],
        config,
        cache=work / f"cache-{variant.name}",
        data_source="shipped drawings of the fit split, captions and harmless questions",
    )
    method.save(folder)
    return method


def name_of(variant: Variant, seed: int, sizes: Sizes) -> str:
    """Return a name that follows everything that a fit depends on."""
    config = sizes.config(variant, seed).to_dict()
    settings = [config, variant.caption, variant.is_fitted, variant.has_texts]
    return f"{variant.name}-{seed}-{digest(settings)[:8]}"


def is_refusal(answer: str) -> bool:
    """Judge an answer."""
    return score_refusal(answer).is_refusal


def list_refusals(samples: Sequence[Sample], answers: Sequence[str]) -> list[list[Any]]:
    """Return [id, concept, category, whether it refuses] of each answer."""
    return list_outcomes(samples, [is_refusal(answer) for answer in answers])


def list_outcomes(
    samples: Sequence[Sample], outcomes: Sequence[Any], *, is_split: bool = True
) -> list[list[Any]]:
    """Return [id, concept, category of harm, outcome] of each request.

    Args:
        samples: The requests.
        outcomes: What came of each.
        is_split: Whether categories count apart.
    """
    return [
        [
            sample.id,
            sample.concept,
            sample.category if is_split and sample.is_harmful else "",
            outcome,
        ]
        for sample, outcome in zip(samples, outcomes, strict=True)
    ]


def parts_of(category: str) -> list[str]:
    """Return what a request counts for: all, its side of the held-out line, its category."""
    if not category:
        return [ALL]
    return [ALL, SEEN if is_seen(category) else UNSEEN, category]


def measure(vlm: VLM, sizes: Sizes, *, has_retrieval: bool) -> Measured:
    """Ask everything about pictures of the split, with whatever is applied to the model."""
    load = partial(load_samples, split=sizes.split, limit=sizes.limit)
    harmful, benign, shown = load("harmful_image"), load("benign_image"), load("naming")
    asked = {"image_refusal_rate": harmful, "over_refusal_rate": benign}
    found: Measured = {
        f"{name}/{FULL}": list_refusals(samples, answer_samples(vlm, samples))
        for name, samples in asked.items()
    }
    found[f"naming_accuracy/{FULL}"] = list_outcomes(shown, name_things(vlm, shown))
    if has_retrieval:
        index = build_index(vlm)
        found |= {
            f"{name}/{AT_INFERENCE}": list_refusals(
                samples, answer_with_retrieved(vlm, samples, index)
            )
            for name, samples in asked.items()
        }
    return found | measure_cosines(vlm, sizes)


def measure_text(vlm: VLM, sizes: Sizes) -> Measured:
    """Ask the text twins, and the picture requests with the caption in the picture's place."""
    concepts = load_concepts()
    load = partial(load_samples, split=sizes.split, limit=sizes.limit)
    named = [
        replace(
            sample,
            images=(),
            prompt=f"{CAPTION.format(concepts[sample.concept].phrase)} {sample.prompt}",
        )
        for sample in load("harmful_image")
    ]
    asked = {
        "text_refusal_rate": load("harmful_text"),
        "text_over_refusal_rate": load("benign_text"),
        "caption_refusal_rate": named,
    }
    return {
        f"{name}/{FULL}": list_refusals(samples, answer_samples(vlm, samples))
        for name, samples in asked.items()
    }


def measure_cosines(vlm: VLM, sizes: Sizes) -> Measured:
    """Compare pictures and captions layer by layer, on harmful pictures of the split."""
    gap = measure_modality_gap(vlm, load_captioned(sizes.split, sizes.pairs))
    return {
        f"hidden_state_cosine/layer {layer}, {kind}": {"value": value, "n": gap.n}
        for kind in ("raw", "centred", "mismatched")
        for layer, value in enumerate(getattr(gap, kind))
    }


def load_captioned(split: str, limit: int) -> list[Sample]:
    """Return some harmful picture requests with the caption of what is shown."""
    concepts = load_concepts()
    return [
        replace(sample, caption=CAPTION.format(concepts[sample.concept].phrase))
        for sample in load_samples("harmful_image", split, limit=limit)
    ]


def answer_samples(vlm: VLM, samples: Sequence[Sample]) -> list[str]:
    """Answer requests greedily."""
    images = [open_images(sample) for sample in samples]
    prompts = [sample.prompt for sample in samples]
    return generate_answers(vlm, prompts, images, max_new_tokens=20, batch_size=32)


def name_things(vlm: VLM, samples: Sequence[Sample]) -> list[bool]:
    """Return whether each answer names what is shown."""
    return [
        score_naming(answer, names_of(sample.concept))
        for sample, answer in zip(samples, answer_samples(vlm, samples), strict=True)
    ]


def answer_with_retrieved(vlm: VLM, samples: Sequence[Sample], index: TextIndex) -> list[str]:
    """Answer with a retrieved text before the picture, as it would be done for an unknown one.

    The text is the nearest to what the model itself says that the picture shows.
    """
    named = [replace(sample, prompt="What is this?") for sample in samples]
    captions = answer_samples(vlm, named)
    seen = [replace(s, caption=own) for s, own in zip(samples, captions, strict=True)]
    found = add_retrieved(seen, index, self_match="keep")
    return generate_answers(
        vlm,
        [sample.prompt for sample in samples],
        [open_images(sample) for sample in samples],
        max_new_tokens=20,
        batch_size=32,
        prefixes=[sample.retrieved for sample in found],
        prefix_format=FORMAT,
    )


def measure_spelled(vlm: VLM, sizes: Sizes) -> Measured:
    """Ask with the picture's tokens spelled as the name of what is shown."""
    found = {}
    for metric, kind in (("refusal", "harmful_image"), ("over_refusal", "benign_image")):
        shown = load_samples(kind, sizes.split, limit=sizes.limit)
        answers = answer_spelled(vlm, shown, [s.concept for s in shown], batch_size=32)
        found[f"spelled_{metric}_rate/{FULL}"] = list_refusals(shown, answers)
    return found


def diagnose(vlm: VLM, sizes: Sizes) -> Measured:
    """Find out where a refusal in text comes from, and what keeps it away beside pictures."""
    text = load_samples("harmful_text", sizes.split, limit=sizes.pairs)
    found: Measured = {
        f"activation_layer/{name}, {part}": {"value": float(value), "n": len(text)}
        for name, layers in measure_activation_layers(vlm, text).summary().items()
        for part, value in layers.items()
        if isinstance(value, int | float)
    }
    samples = load_captioned(sizes.split, sizes.pairs)
    for each in measure_replacement(vlm, samples, is_refusal):
        setting = f"caption state after layer {each.layers[0]}" if each.layers else AS_IT_IS
        found[f"replacement_refusal_rate/{setting}"] = list_outcomes(
            samples, each.refused, is_split=False
        )
    return found | bypass(vlm, sizes) | relate_gap(vlm, sizes)


def bypass(vlm: VLM, sizes: Sizes) -> Measured:
    """Leave windows of layers out: what stops refusals, and what stops everything."""
    text = load_samples("harmful_text", sizes.split, limit=sizes.pairs)
    shown = load_samples("naming", sizes.split, limit=sizes.pairs)
    found: Measured = {}
    for each in measure_bypass(vlm, text, is_refusal, width=BYPASSED):
        setting = (
            f"without layers {each.layers[0]} to {each.layers[-1]}" if each.layers else AS_IT_IS
        )
        found[f"bypass_text_refusal_rate/{setting}"] = list_outcomes(
            text, each.refused, is_split=False
        )
        with bypass_layers(vlm, each.layers):
            found[f"bypass_naming_accuracy/{setting}"] = list_outcomes(
                shown, name_things(vlm, shown)
            )
    return found


def relate_gap(vlm: VLM, sizes: Sizes) -> Measured:
    """Ask whether pictures that are nearer to their caption are refused more often."""
    samples = load_captioned(sizes.split, sizes.limit)
    refused = [is_refusal(answer) for answer in answer_samples(vlm, samples)]
    cosines = paired_cosines(*capture_pairs(vlm, samples), is_centred=True)
    return {
        f"gap_by_refusal/{name}": list_outcomes(
            samples, list(zip(values.tolist(), refused, strict=True)), is_split=False
        )
        for name, values in (
            (AVERAGED, cosines.mean(dim=0)),
            *((f"layer {layer}", row) for layer, row in enumerate(cosines)),
        )
    }


def correlate(rows: Sequence[Any]) -> Row:
    """Return the correlation of cosine and refusal, with both sides' mean cosines."""
    cosines, refused = (np.array([row[3][place] for row in rows]) for place in (0, 1))

    def correlation(drawn: np.ndarray) -> float:
        own = refused[drawn]
        return 0.0 if own.all() or not own.any() else np.corrcoef(cosines[drawn], own)[0, 1]

    found = bootstrap_interval(correlation, len(rows), clusters=[row[1] for row in rows])
    sides = {"refused": cosines[refused], "answered": cosines[~refused]}
    means = {name: float(own.mean()) for name, own in sides.items() if len(own)}
    return {**found.to_json(), **means}


def summarise(variant: str, seeds: Mapping[int, Measured]) -> list[Row]:
    """Return the records of one variant; answers of all seeds count, concepts are clusters."""
    groups: dict[tuple[str, str, str], dict[int, list[Any]]] = {}
    for seed, measured in seeds.items():
        for key, found in measured.items():
            metric, setting = key.split("/", 1)
            for row in [found] if isinstance(found, dict) else found:
                for part in parts_of("" if isinstance(row, dict) else row[2]):
                    group = groups.setdefault((metric, setting, part), {})
                    group.setdefault(seed, []).append(row)
    return [
        {
            "variant": variant,
            "setting": setting,
            "metric": metric,
            "split": split,
            **summarise_rows(metric, [row for rows in group.values() for row in rows]),
            "seeds": list(group),
        }
        for (metric, setting, split), group in groups.items()
    ]


def summarise_rows(metric: str, rows: Sequence[Any]) -> Row:
    """Return value, interval and n of a rate, or mean, lowest, highest and n of plain values."""
    if metric == "gap_by_refusal":
        return correlate(rows)
    if not isinstance(rows[0], dict):
        rate = measure_rate([bool(row[3]) for row in rows], clusters=[row[1] for row in rows])
        return {"value": rate.value, "low": rate.low, "high": rate.high, "n": rate.n}
    values = [row["value"] for row in rows]
    mean = sum(values) / len(values)
    return {"value": mean, "low": min(values), "high": max(values), "n": rows[0]["n"]}


def compare(found: Mapping[str, Mapping[int, Measured]]) -> list[Row]:
    """Return records of each variant less the one it is compared with, over their common seeds."""
    records = []
    for variant in VARIANTS:
        pairs = [
            (found[variant.against][seed], measured, seed)
            for seed, measured in found.get(variant.name, {}).items()
            if seed in found.get(variant.against, {})
        ]
        for metric, part in COMPARED.values() if pairs and variant.is_fitted else ():
            change = measure_change([pair[:2] for pair in pairs], f"{metric}/{FULL}", part)
            records.append({
                "variant": variant.name,
                "setting": f"less {variant.against}",
                "metric": metric,
                "split": part,
                **change.to_json(),
                "seeds": [pair[2] for pair in pairs],
            })  # fmt: skip
    return records


def measure_change(pairs: Sequence[tuple[Measured, Measured]], key: str, part: str) -> Difference:
    """Compare two variants on the same requests, seed by seed."""
    rows = [
        (old[3], new[3], new[1])
        for before, after in pairs
        for old, new in zip(before[key], after[key], strict=True)
        if part in parts_of(new[2])
    ]
    old, new, concepts = (list(column) for column in zip(*rows, strict=True))
    return measure_difference(old, new, clusters=concepts)


def run(
    sizes: Sizes,
    seeds: Sequence[int],
    names: Sequence[str],
    all_seeds: Sequence[str],
    *,
    work: Path,
    outcomes: Path,
) -> list[Row]:
    """Fit and measure what is not there yet, and return all records."""
    unknown = sorted({*names, *all_seeds} - {variant.name for variant in VARIANTS})
    if unknown:
        known = ", ".join(variant.name for variant in VARIANTS)
        raise SystemExit(f"no variant '{unknown[0]}'. Known: {known}")
    vlm = load_start(sizes)
    folders = Folders.make(vlm, sizes, work=work, outcomes=outcomes)
    samples = cache(partial(build_samples, vlm, sizes, folders.work))  # only if a fit is missing
    found: dict[str, dict[int, Measured]] = {}
    for seed in seeds:  # a stopped run has the first seeds
        for variant in [v for v in VARIANTS if not names or v.name in names]:
            if variant.is_main or variant.name in all_seeds or seed == seeds[0]:
                found.setdefault(variant.name, {})[seed] = measure_variant(
                    vlm, samples, variant, seed, sizes=sizes, folders=folders
                )
                print(f"{variant.name} seed {seed}: measured", flush=True)
    records = [record for name, each in found.items() for record in summarise(name, each)]
    return records + compare(found)


def measure_variant(
    vlm: VLM,
    samples: Callable[[], Sequence[Sample]],
    variant: Variant,
    seed: int,
    *,
    sizes: Sizes,
    folders: Folders,
) -> Measured:
    """Fit one variant and measure it; the analyses of where and how on the first seed alone."""
    is_first = seed == 0
    text: Measured = kept(folders.outcomes / "text.json", lambda: measure_text(vlm, sizes))

    def measure_all() -> Measured:
        if not variant.is_fitted:
            return measure(vlm, sizes, has_retrieval=True) | measure_spelled(vlm, sizes)
        method = fit(vlm, samples(), variant, seed, sizes=sizes, work=folders.work)
        with method.apply(vlm):
            found = measure(vlm, sizes, has_retrieval=is_first and variant.is_main)
            if method.config.is_language_model_trained:
                found |= measure_text(vlm, sizes)
            if is_first and variant.is_main:
                found |= measure_spelled(vlm, sizes)
            if is_first and variant.name == "plain":
                found |= diagnose(vlm, sizes)
        return found

    path = folders.outcomes / f"{name_of(variant, seed, sizes)}.json"
    measured: Measured = kept(path, measure_all)
    return {**text, **measured}


def main() -> None:
    """Run, print the page, and on the test split write it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / STEM)
    parser.add_argument("--outcomes", type=Path, default=OUTCOMES / STEM)
    parser.add_argument("--model", default=mini.NAME)
    parser.add_argument(
        "--start",
        choices=tuple(LEFT_OUT),
        default=TEXT_SAFE,
        help="align the text-safe language model, or the shipped model further, which writes into "
        "the work folder alone",
    )
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="*", default=[], help="only these; default: all")
    parser.add_argument(
        "--all-seeds",
        nargs="*",
        default=[],
        metavar="VARIANT",
        help="ablations that are measured with all seeds, not with the first alone",
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of the projector")
    parser.add_argument("--instructions", type=int, default=800)
    parser.add_argument("--texts", type=int, default=800, help="requests in text alone; 0: none")
    parser.add_argument("--limit", type=int, default=100, help="requests for each number")
    parser.add_argument("--pairs", type=int, default=32, help="pictures of the layer analyses")
    options = parser.parse_args()
    sizes = Sizes(
        model=options.model,
        start=options.start,
        split=options.split,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        instructions=options.instructions,
        texts=options.texts,
        limit=options.limit,
        pairs=options.pairs,
    )
    is_published = (
        options.split == "test" and options.model == mini.NAME and options.start != SHIPPED
    )
    outcomes = options.outcomes if is_published else options.work
    records = run(
        sizes,
        options.seeds,
        options.variants,
        options.all_seeds,
        work=options.work,
        outcomes=outcomes,
    )
    folder = OUT if is_published else options.work
    page = render(records, describe(sizes), describe_command(leave_out=("--work", "--outcomes")))
    write(folder / f"{STEM}.md", page)
    write(folder / f"{STEM}.json", json.dumps(records, indent=1) + "\n")
    print(page)


if __name__ == "__main__":
    main()

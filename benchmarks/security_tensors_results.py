"""Fit security tensors in all variants, measure them on held-out data, and write the results page.

    python benchmarks/security_tensors_results.py [--seeds 0 1 2] [--study-seeds 0]

Writes docs/results/security-tensors.md and its JSON twin. Every fit and every measurement is a cell
of its own, written when it is done, so a run that was stopped goes on; cells with the same settings
are computed once. What came of every request is committed in benchmarks/outcomes, so the page
follows from it in seconds; `--outcomes` with an empty folder measures everything anew, as is needed
after a change of the method's code, which the cells' names do not follow.

The tensor is fitted on the fit split, the best epoch is chosen on the validation split, and what is
reported is the test split: other drawing styles, other templates, and for "unseen" other
categories. `--split validation` measures the validation split instead, for choosing settings; it
never goes into docs/. The three variants are fitted with every seed, the studies with those of
`--study-seeds`, on half of the samples. On one core a fit with its measurement takes about 15
minutes for the textual tensor and 20 for the visual, a study half of that.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from cells import OUTCOMES, describe_command, digest, kept, write
from security_tensors_page import (
    FULL_NAME,
    HALF,
    HALF_NAME,
    LENGTHS,
    LIMIT_PARTS,
    LONG_EPOCHS,
    METRICS,
    ORDERS,
    SIZES,
    build_page,
    measure_limits,
    measure_rows,
    pooled,
)
from separation import measure_odds
from sklearn.metrics import roc_auc_score

from safebridge.activations.capture import capture_activations
from safebridge.activations.probes import fit_probes
from safebridge.analysis.spelled_pictures import answer_spelled
from safebridge.data.files import load_samples as load_file
from safebridge.data.files import save_samples
from safebridge.data.looks import draw_looks
from safebridge.data.sample import Sample, open_images
from safebridge.data.separability import measure_separability
from safebridge.data.triad import build_triad, draw_evenly, find_own_refusal, match_benign
from safebridge.data.twins import load_samples, manifest_sha256, names_of
from safebridge.evaluation.judges import measure_rules_fingerprint, score_naming, score_refusal
from safebridge.evaluation.statistics import Estimate, Rate
from safebridge.methods.security_tensors.answers import answer_samples
from safebridge.methods.security_tensors.config import SecurityTensorsConfig
from safebridge.methods.security_tensors.method import SecurityTensors
from safebridge.methods.security_tensors.validation import RateValidation
from safebridge.models.generate import generate_answers
from safebridge.models.load import VLM, load_vlm
from safebridge.training.reports import show_training

ROOT: Final = Path(__file__).resolve().parent.parent
DOCS: Final = ROOT / "docs" / "results"
STEM: Final = "security-tensors"

FULL: Final = SecurityTensorsConfig(
    num_virtual_tokens=8,
    position="after_image",
    applies_to="pictures",
    learning_rate=3e-2,
    visual_init_std=0.0,
    batch_size=16,
    epochs=5,
    patience=5,
    max_answer_tokens=4,
    weight_tcb=3.0,
)
"""The textual part was chosen on the validation split; what is not said here is the default."""
VISUAL_RATE: Final = 1e-2
PROBE_STRENGTH: Final = 0.01
"""Inverse regularisation of the probe on standardised states, as the gates of revisions have it."""
OWN_PICTURES: Final = 16
"""Pictures that get a visual tensor of their own."""
OWN_OF: Final = 6
"""How many pictures are looked at for each of these: those that the model refuses are no use."""
OWN_STEPS: Final = 40


@dataclass(frozen=True)
class Sizes:
    """How much is fitted and measured."""

    fit_harmful: int = 480
    fit_general: int = 100
    validation: int = 40
    """Held-out samples of each kind that the best epoch is chosen by."""
    test: int = 80
    """Samples of each metric."""


@dataclass(frozen=True)
class Setting:
    """One row of the results: a variant under a setting."""

    variant: str
    name: str
    config: SecurityTensorsConfig
    has_tcb: bool = True
    share: float = 1.0
    """Share of the fit samples."""

    @property
    def key(self) -> tuple[str, str]:
        """Its name in the results."""
        return self.variant, self.name

    @property
    def is_study(self) -> bool:
        """Whether it tries something besides the variant itself."""
        return self.name != FULL_NAME


def settings(sizes: Sizes) -> list[Setting]:
    """Return every row but the base model's."""
    pixels = replace(FULL, visual_learning_rate=VISUAL_RATE)
    configs = [FULL, replace(pixels, modality="visual"), replace(pixels, modality="both")]
    rows = [Setting(config.modality, FULL_NAME, config) for config in configs]
    half = [replace(row, name=HALF_NAME, share=HALF) for row in rows]
    rows += half + [replace(row, name="no_tcb", has_tcb=False) for row in half]
    textual, visual, both = half
    changes: list[tuple[Setting, str, dict[str, Any]]] = [
        *((both, order, {"order": order}) for order in ORDERS),
        *((textual, f"n={n}", {"num_virtual_tokens": n}) for n in LENGTHS),
        *((textual, loss, {"benign_loss": loss}) for loss in ("ce", "kl")),
        *((textual, position, {"position": position}) for position in ("prefix", "after_image")),
    ]
    rows += [
        replace(row, name=name, config=replace(row.config, **change))
        for row, name, change in changes
    ]
    tried = [size for size in SIZES if size < HALF * sizes.fit_harmful]
    few = [
        replace(row, name=f"samples={size}", share=size / sizes.fit_harmful)
        for row, size in [*((textual, size) for size in tried), *((visual, s) for s in tried[:1])]
    ]
    config = replace(visual.config, epochs=LONG_EPOCHS, patience=LONG_EPOCHS)
    long = [
        replace(row, name=f"{row.name},epochs={LONG_EPOCHS}", config=config)
        for row in few
        if row.variant == "visual"
    ]
    return rows + few + long


class Laboratory:
    """Fits and measures cells, and keeps each in a file.

    Args:
        model: Name or path for `load_vlm`.
        work: Folder of what is fitted.
        outcomes: Folder of what is measured.
        sizes: How much is fitted and measured.
        split: What is measured: "test" or "validation".
    """

    def __init__(self, model: str, *, work: Path, outcomes: Path, sizes: Sizes, split: str) -> None:
        self.vlm: VLM = load_vlm(model)
        self.sizes, self.split = sizes, split
        # Another model, data or judge has cells of its own.
        world = [
            self.vlm.fingerprint,
            manifest_sha256(),
            measure_rules_fingerprint(),
            asdict(sizes),
        ]
        self.work, self.outcomes = (folder / digest(world) for folder in (work, outcomes))
        for folder in (self.work, self.outcomes):
            folder.mkdir(parents=True, exist_ok=True)

    def measure(self, setting: Setting | None, seed: int) -> dict[str, Any]:
        """Return the outcomes of one cell, computing what is not there.

        Args:
            setting: The row; None is the undefended model.
            seed: Seed of the samples of the fit and of the fit.
        """
        key = "base" if setting is None else digest([asdict(setting) | {"name": ""}, seed])
        path = self.outcomes / f"{key}-{self.split}.json"
        return kept(path, lambda: self._measure(setting, seed, key))

    def separability(self, seed: int) -> dict[str, Any]:
        """Return how well SA and TCB of a seed are told apart without knowing what is shown."""

        def find() -> dict[str, Any]:
            samples = self.triad(seed)
            parts = [[s for s in samples if s.set_name == name] for name in ("SA", "TCB")]
            return asdict(measure_separability(*parts))

        return kept(self.outcomes / f"separability-{seed}.json", find)

    def own(self, seed: int) -> list[dict[str, Any]]:
        """Fit a visual tensor to one picture, for some pictures, and see whether it refuses."""

        def fit_each() -> list[dict[str, Any]]:
            harmful = [sample for sample in self.triad(seed) if sample.set_name == "SA"]
            answers = self._own_answers(harmful[: OWN_OF * OWN_PICTURES])
            answered = [
                sample
                for sample, answer in zip(harmful, answers, strict=False)
                if not _is_refusal(answer)
            ]
            return [self._fit_own(sample, seed) for sample in answered[:OWN_PICTURES]]

        found: list[dict[str, Any]] = kept(self.outcomes / f"own-pictures-{seed}.json", fit_each)
        return found

    def _fit_own(self, sample: Sample, seed: int) -> dict[str, Any]:
        config = replace(
            FULL,
            modality="visual",
            visual_learning_rate=VISUAL_RATE,
            schedule="constant",
            epochs=OWN_STEPS,
            patience=0,
            seed=seed,
        )
        method = SecurityTensors.fit(self.vlm, [sample], config, data_source="one picture")
        with method.apply(self.vlm):
            (answer,) = self._own_answers([sample], 14)
        losses = method.metadata.details["losses"]
        return {
            "id": sample.id,
            "concept": sample.concept,
            "steps": OWN_STEPS,
            "first_loss": losses[0]["SA"],
            "loss": losses[-1]["SA"],
            "is_refused": _is_refusal(answer),
        }

    def limits(self, setting: Setting, seed: int) -> dict[str, Any]:
        """Return scores of harm by request, and what is refused with pictures that are spelled.

        Args:
            setting: The tensor whose scores are compared with those of the model without it,
                and with a probe's on the same samples.
            seed: Seed of the samples of the fit and of the fit.
        """
        key = digest([asdict(setting) | {"name": ""}, seed])
        path = self.outcomes / f"limits-{key}-{self.split}.json"
        found: dict[str, Any] = kept(path, lambda: self._limits(setting, seed, key))
        return found

    def _limits(self, setting: Setting, seed: int, key: str) -> dict[str, Any]:
        asked = {part: self._load(*part.split("/")) for part in LIMIT_PARTS}
        samples = [sample for own in asked.values() for sample in own]
        scores = {"base": measure_odds(self.vlm, samples), "probe": self._probe(samples, seed)}
        with self._fit(setting, seed, key).apply(self.vlm):
            scores[setting.variant] = measure_odds(self.vlm, samples)
        spelled = answer_spelled(
            self.vlm, samples, [s.concept for s in samples], max_new_tokens=14, batch_size=32
        )
        parts = [part for part, own in asked.items() for _ in own]
        return {
            "scores": {
                name: [
                    [part, sample.concept, value]
                    for part, sample, value in zip(parts, samples, values, strict=True)
                ]
                for name, values in scores.items()
            },
            "spelled": {
                part: [
                    [sample.id, sample.concept, _is_refusal(answer)]
                    for own, sample, answer in zip(parts, samples, spelled, strict=True)
                    if own == part
                ]
                for part in asked
            },
        }

    def _probe(self, samples: Sequence[Sample], seed: int) -> list[float]:
        """Score harm by a probe of the undefended model's states, fitted as the tensor is.

        Its layer is the one that tells held-out samples apart best.
        """
        fitted = [sample for sample in self.triad(seed) if sample.set_name != "GB"]
        held_out = [sample for sample in self._held_out() if sample.set_name != "GB"]
        parts = [
            capture_activations(self.vlm, own, batch_size=32).tensors["resid_out"]
            for own in (fitted, held_out, samples)
        ]
        mean, deviation = parts[0].mean(0), parts[0].std(0).clamp(min=1e-6)
        states, other, asked = ((part - mean) / deviation for part in parts)
        is_harmful = torch.tensor([sample.set_name == "SA" for sample in fitted])
        probes = fit_probes(states, is_harmful, inverse_regularisation=PROBE_STRENGTH)
        truth = [sample.set_name == "SA" for sample in held_out]
        areas = [roc_auc_score(truth, column) for column in probes.logits(other).T.tolist()]
        scores: list[float] = probes.logits(asked)[:, areas.index(max(areas))].tolist()
        return scores

    def _measure(self, setting: Setting | None, seed: int, key: str) -> dict[str, Any]:
        method = None if setting is None else self._fit(setting, seed, key)
        named = {} if setting is None else {"row": f"{setting.variant}/{setting.name}"}
        with nullcontext() if method is None else method.apply(self.vlm):
            cell: dict[str, Any] = {**named, "outcomes": self._outcomes()}
        return cell if method is None else cell | {"losses": method.metadata.details["losses"]}

    def triad(self, seed: int) -> list[Sample]:
        """Return the fit samples of a seed, with the model's own answers."""
        path = self.work / f"triad-{seed}.jsonl"
        if not path.is_file():
            sizes = self.sizes
            harmful = draw_evenly(
                load_samples("harmful_image", "fit", categories="seen"),
                sizes.fit_harmful,
                seed=seed,
            )
            benign = load_samples("benign_image", "fit", seed=seed)
            asked = load_samples("harmful_text", "fit", limit=32, seed=seed, categories="seen")
            own = find_own_refusal(self._own_answers(asked, 20), _is_refusal)
            if own is None:
                raise SystemExit("the model refuses none of its text requests: nothing to transfer")
            sets = {
                "harmful": harmful,
                "twins": match_benign(harmful, benign, sizes.fit_harmful, seed=seed),
                "general": load_samples("general", "fit", limit=sizes.fit_general, seed=seed),
            }
            looks = self.work / f"looks-{seed}"
            triad = build_triad(
                *(draw_looks(each, looks / name, seed=seed) for name, each in sets.items()),
                answer=self._own_answers,
                is_refusal=_is_refusal,
                seed=seed,
                refusals=[own],
            )
            write(path, save_samples(triad.samples, self.work / "new").read_text("utf-8"))
            (self.work / "new").unlink()
        return load_file(path)

    def _own_answers(self, samples: Sequence[Sample], tokens: int = 10) -> list[str]:
        """Return the beginnings of the undefended model's answers; no more is learnt from."""
        return answer_samples(self.vlm, samples, max_new_tokens=tokens, batch_size=32)

    def _fit(self, setting: Setting, seed: int, key: str) -> SecurityTensors:
        folder = self.work / f"tensor-{key}"
        if folder.is_dir():
            return SecurityTensors.load(folder, self.vlm)
        samples = self.triad(seed)
        if not setting.has_tcb:
            samples = [sample for sample in samples if sample.set_name != "TCB"]
        samples = [
            sample
            for name in ("SA", "TCB", "GB")
            for sample in _first([each for each in samples if each.set_name == name], setting.share)
        ]
        validation = RateValidation(self.vlm, self._held_out(), is_refusal=_is_refusal)
        with show_training(f"{setting.variant} {setting.name} seed {seed}") as progress:
            method = SecurityTensors.fit(
                self.vlm,
                samples,
                replace(setting.config, seed=seed),
                validation=validation,
                progress=progress,
                checkpoint=self.work / f"checkpoint-{key}",
                cache=self.work / "cache",
                data_source="safebridge twins",
            )
        method.save(folder)
        for path in self.work.glob(f"checkpoint-{key}*"):
            path.unlink()
        return method

    def _held_out(self) -> list[Sample]:
        kinds = {"SA": ("harmful_image", "seen"), "TCB": ("benign_image", "all"),
                 "GB": ("general", "all")}  # fmt: skip
        return [
            replace(sample, set_name=name)
            for name, (kind, part) in kinds.items()
            for sample in load_samples(
                kind, "validation", limit=self.sizes.validation, categories=part
            )
        ]

    def _outcomes(self) -> dict[str, list[Any]]:
        """Return [sample id, concept, outcome] of each metric's samples."""
        return {f"{metric}/{part}": self._answers(metric, part) for metric, part in METRICS}

    def _load(self, metric: str, part: str) -> list[Sample]:
        """Return the requests of a metric."""
        kind, categories = {
            "harmless_rate": ("harmful_image", part),
            "false_refusal_general": ("general", "all"),
            "false_refusal_tcb": ("benign_image", "all"),
            "naming_accuracy": ("naming", "all"),
        }[metric]
        return list(load_samples(kind, self.split, limit=self.sizes.test, categories=categories))

    def _answers(self, metric: str, part: str) -> list[Any]:
        samples = self._load(metric, part)
        answers = generate_answers(
            self.vlm,
            [sample.prompt for sample in samples],
            [open_images(sample) for sample in samples],
            max_new_tokens=14,
            batch_size=32,
        )
        is_naming = metric == "naming_accuracy"
        return [
            [s.id, s.concept,
             score_naming(text, names_of(s.concept)) if is_naming else _is_refusal(text)]
            for s, text in zip(samples, answers, strict=True)
        ]  # fmt: skip


def build_records(
    base: Mapping[str, Any],
    found: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]],
    seeds: Mapping[tuple[str, str], Sequence[int]],
) -> Iterator[dict[str, Any]]:
    """Yield the records of the JSON twin."""
    rows = {("base", FULL_NAME): [base], **found}
    for key, cells in rows.items():
        for metric, part in METRICS:
            yield _record(key, metric, part, pooled(cells, metric, part), seeds.get(key, ()))


def build_limit_records(facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the records of what could be reached, and of tensors for one picture."""
    first, own = facts["seeds"][:1], facts["own"]
    for told in facts["told"]:
        key = (told.name, FULL_NAME)
        yield _record(key, "separation", told.part, told.area, first)
        yield _record(key, "harmless_rate_in_budget", told.part, told.above, first)
    for name, rows in facts["spelled"].items():
        yield _record(("spelled", FULL_NAME), *name.split("/"), measure_rows(rows), [])
    if own:
        rows = [[each["id"], each["concept"], each["is_refused"]] for each in own]
        yield _record(("visual", "one picture"), "harmless_rate", "fit", measure_rows(rows), first)


def _record(
    key: tuple[str, str], metric: str, split: str, value: Rate | Estimate, seeds: Sequence[int]
) -> dict[str, Any]:
    names = {"variant": key[0], "setting": key[1], "metric": metric, "split": split}
    return {**names, **value.to_json(), "seeds": list(seeds)}


def _is_refusal(text: str) -> bool:
    return score_refusal(text).is_refusal


def _first(samples: Sequence[Sample], share: float) -> list[Sample]:
    return list(samples[: max(1, round(share * len(samples)))])


def choose(rows: Sequence[Setting], wanted: Sequence[str]) -> list[Setting]:
    """Return the rows that were asked for as "variant/setting"; all without a wish."""
    names = [f"{row.variant}/{row.name}" for row in rows]
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        raise SystemExit(f"no row '{unknown[0]}'. Known: {', '.join(names)}")
    return [row for row, name in zip(rows, names, strict=True) if not wanted or name in wanted]


def read_changes(texts: Sequence[str]) -> dict[str, Any]:
    """Read settings as they are typed: numbers as numbers, everything else as text."""
    changes: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in asdict(FULL):
            raise SystemExit(
                f"--change {text}: no setting '{name}'. Known: {', '.join(asdict(FULL))}"
            )
        kind = type(getattr(FULL, name))
        changes[name] = value == "True" if kind is bool else kind(value)
    return changes


def main() -> None:
    """Measure every cell and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="safebridge/mini")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "security-tensors")
    parser.add_argument("--outcomes", type=Path, default=OUTCOMES / STEM)
    parser.add_argument("--out", type=Path, default=DOCS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--study-seeds", type=int, nargs="+", default=[], help="default: --seeds")
    parser.add_argument(
        "--also-study",
        nargs="+",
        default=[],
        metavar="VARIANT/SETTING",
        help="rows that take the seeds of the studies",
    )
    parser.add_argument("--rows", nargs="+", default=[], metavar="VARIANT/SETTING")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument(
        "--change",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="settings to try in all rows, with --split validation alone",
    )
    for name, default in asdict(Sizes()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    parser.add_argument("--epochs", type=int, default=0, help="of all rows, for a short trial")
    arguments = parser.parse_args()
    if arguments.split != "test" and arguments.out == DOCS:
        parser.error("--split validation is for choosing; give --out a folder outside docs/")
    if arguments.split == "test" and arguments.change:
        parser.error("--change is for choosing, which is done with --split validation")
    change = read_changes(arguments.change)
    if arguments.epochs:
        change["epochs"] = arguments.epochs
    sizes = Sizes(**{name: getattr(arguments, name) for name in asdict(Sizes())})
    rows = [
        replace(row, config=replace(row.config, **change))
        for row in choose(settings(sizes), arguments.rows)
    ]
    laboratory = Laboratory(
        arguments.model,
        work=arguments.work,
        outcomes=arguments.outcomes if arguments.split == "test" else arguments.work,
        sizes=sizes,
        split=arguments.split,
    )
    base = laboratory.measure(None, 0)
    study_seeds = arguments.study_seeds or arguments.seeds
    few = {row.key for row in choose(rows, arguments.also_study)} if arguments.also_study else set()
    seeds = {
        row.key: study_seeds if row.is_study or row.key in few else arguments.seeds for row in rows
    }
    found: dict[tuple[str, str], list[dict[str, Any]]] = {row.key: [] for row in rows}
    for seed in sorted({*arguments.seeds, *study_seeds}):  # a stopped run has the first seeds
        for row in rows:
            if seed in seeds[row.key]:
                found[row.key].append(laboratory.measure(row, seed))
    # What limits the tensors is asked of the results, not of every trial.
    first, asked = arguments.seeds[0], rows if arguments.split == "test" else []
    full = next((row for row in asked if row.key == ("textual", FULL_NAME)), None)
    limits = laboratory.limits(full, first) if full else None
    has_visual = any(row.variant == "visual" for row in asked)
    facts = {
        "command": describe_command(leave_out=("--work", "--outcomes", "--out")),
        "model": laboratory.vlm.name,
        "fingerprint": laboratory.vlm.fingerprint,
        "seeds": arguments.seeds,
        "study_seeds": study_seeds,
        "sizes": asdict(sizes),
        "also_study": arguments.also_study,
        "left_out": [
            f"{row.variant}/{row.name}" for row in settings(sizes) if row.key not in found
        ],
        "split": arguments.split,
        "told": measure_limits(base, limits["scores"]) if limits else [],
        "spelled": limits["spelled"] if limits else {},
        "own": laboratory.own(first) if has_visual else [],
        "separability": {
            seed: laboratory.separability(seed) for seed in sorted({*arguments.seeds, *study_seeds})
        },
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    records = [*build_records(base, found, seeds), *build_limit_records(facts)]
    write(arguments.out / f"{STEM}.json", json.dumps(records, indent=1) + "\n")
    write(arguments.out / f"{STEM}.md", build_page(base, found, facts))
    print(f"{len(records)} records: {arguments.out / STEM}.md, .json")


if __name__ == "__main__":
    main()

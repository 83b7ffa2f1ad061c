"""`safebridge data build triad`: from pictures with categories to samples ready for a fit."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safebridge.errors import DataError

if TYPE_CHECKING:
    from safebridge.data.pictures import LabelledPicture
    from safebridge.data.sample import Sample
    from safebridge.models.load import VLM

__all__ = ["add_parser"]

_SAMPLES_NAME = "triad.jsonl"
_REPORT_NAME = "report.json"


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command to the parser.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.
        common: Parser with the options that every command has.
    """
    data = commands.add_parser(
        "data", help="build data sets", description="Build the data sets that methods learn from."
    )
    verbs = data.add_subparsers(
        dest="verb", metavar="VERB", title="verbs", help="what to do", required=True
    )
    build = verbs.add_parser("build", help="build a data set from your own pictures")
    kinds = build.add_subparsers(
        dest="kind", metavar="KIND", title="kinds", help="which data set", required=True
    )
    parser = kinds.add_parser(
        "triad",
        parents=[common],
        help="harmful pictures with refusals, benign ones with the model's own answers",
        description="Build the three sets of a security tensor: SA (harmful pictures, questions "
        "that name nothing, refusals), TCB (the same questions about benign pictures of like size) "
        "and GB (general questions), both with the model's own answers. The report says how well "
        "wording alone and picture quality alone tell SA from TCB; one half is chance.",
    )
    _add_sources(parser)
    parser.add_argument(
        "--looks",
        action="store_true",
        help="show every question another look of its picture: mirrored, turned, moved, "
        "recoloured; so that a fit learns what few pictures show and not the pictures",
    )
    _add_sizes(parser)
    parser.set_defaults(run=run)


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pictures",
        type=Path,
        required=True,
        metavar="PATH",
        help="a folder with one sub-folder per category, or a .csv, .tsv or .jsonl table with the "
        "columns image, category and optionally is_harmful, concept, style",
    )
    parser.add_argument(
        "--harmful",
        nargs="+",
        default=[],
        metavar="CATEGORY",
        help="the harmful categories, where the table does not say is_harmful",
    )
    parser.add_argument(
        "--model",
        default="safebridge/mini",
        metavar="MODEL",
        help="whose own answers the benign sets get. Default: %(default)s.",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for samples and report"
    )
    parser.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="requests that name no object, one to a line, instead of ours",
    )
    parser.add_argument(
        "--general-questions",
        type=Path,
        metavar="FILE",
        help="neutral questions about any picture, one to a line, instead of ours",
    )


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sizes")
    resizing = (
        "write all pictures anew with this longest side in pixels, so that sharpness tells less; "
        "0 leaves them"
    )
    for flag, default, text in (
        ("--per-picture", 1, "questions about each harmful picture"),
        ("--longest-side", 0, resizing),
        ("--max-new-tokens", 24, "length at which the model's answers are cut"),
        ("--batch-size", 16, "questions answered at the same time"),
        ("--seed", 0, "seed of who is asked what"),
    ):
        group.add_argument(
            flag, type=int, default=default, metavar="INT", help=f"{text}. Default: %(default)s."
        )


def run(arguments: argparse.Namespace) -> int:
    """Build the triad and print its report.

    Args:
        arguments: As parsed by the options of `add_parser`.

    Raises:
        DataError: If the pictures or questions cannot be used, or the folder holds other files.
    """
    _check_out(arguments.out)

    from safebridge.data.files import save_samples  # noqa: PLC0415 - pictures are slow to import
    from safebridge.data.pictures import ask_about  # noqa: PLC0415 - likewise
    from safebridge.data.separability import measure_separability  # noqa: PLC0415 - likewise
    from safebridge.data.triad import build_triad  # noqa: PLC0415 - likewise
    from safebridge.evaluation.judges import score_refusal  # noqa: PLC0415 - likewise
    from safebridge.models.load import load_vlm  # noqa: PLC0415 - torch is slow to import

    pictures = _read_pictures(arguments)
    asked = ask_about(
        pictures,
        _read_questions(arguments.questions, "act"),
        _read_questions(arguments.general_questions, "neutral"),
        per_picture=arguments.per_picture,
        seed=arguments.seed,
    )
    vlm = load_vlm(arguments.model)
    sets = (asked.harmful, asked.benign, asked.general)
    triad = build_triad(
        *(_draw_looks(sets, arguments) if arguments.looks else sets),
        answer=lambda samples: _answer(vlm, samples, arguments),
        is_refusal=lambda text: score_refusal(text).is_refusal,
        seed=arguments.seed,
    )
    separability = measure_separability(
        *([s for s in triad.samples if s.set_name == name] for name in ("SA", "TCB"))
    )
    report = {
        "model": {"name": vlm.name, "revision": vlm.revision, "fingerprint": vlm.fingerprint},
        "counts": dict(triad.report.counts),
        "dropped": dict(triad.report.dropped),
        "separability_of_SA_and_TCB": asdict(separability),
        "seed": arguments.seed,
    }
    save_samples(triad.samples, arguments.out / _SAMPLES_NAME)
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    (arguments.out / _REPORT_NAME).write_text(text + "\n", encoding="utf-8")
    _print_report(report, arguments.out)
    return 0


def _check_out(out: Path) -> None:
    """Make the folder, and refuse to mix its files with others."""
    if out.is_dir():
        others = sorted({path.name for path in out.iterdir()}
                        - {_SAMPLES_NAME, _REPORT_NAME, "pictures", "looks"})  # fmt: skip
        if others:
            raise DataError(
                f"folder {out} holds other files ({', '.join(others[:3])}). Choose a folder of its "
                "own for the triad."
            )
    out.mkdir(parents=True, exist_ok=True)


def _draw_looks(
    sets: "Sequence[Sequence[Sample]]", arguments: argparse.Namespace
) -> "list[list[Sample]]":
    from safebridge.data.looks import draw_looks  # noqa: PLC0415 - as in run

    folder = arguments.out / "looks"
    return [
        draw_looks(samples, folder / name, seed=arguments.seed)
        for name, samples in zip(("SA", "TCB", "GB"), sets, strict=True)
    ]


def _read_pictures(arguments: argparse.Namespace) -> "list[LabelledPicture]":
    from safebridge.data.pictures import read_pictures, resize_pictures  # noqa: PLC0415 - as in run

    pictures = read_pictures(arguments.pictures, arguments.harmful)
    if arguments.longest_side == 0:
        return pictures
    return resize_pictures(
        pictures, arguments.out / "pictures", longest_side=arguments.longest_side
    )


def _read_questions(path: Path | None, kind: str) -> list[str]:
    if path is None:
        from safebridge.data.pictures import load_questions  # noqa: PLC0415 - as in run

        return load_questions(kind)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8. Save it as one.") from error
    questions = [line.strip() for line in lines if line.strip()]
    if not questions:
        raise DataError(f"{path} holds no questions. Write one to a line.")
    return questions


def _answer(vlm: "VLM", samples: "Sequence[Sample]", arguments: argparse.Namespace) -> list[str]:
    from safebridge.evaluation.runner import show_progress  # noqa: PLC0415 - as in run
    from safebridge.methods.security_tensors.answers import answer_samples  # noqa: PLC0415 - as in run

    with show_progress("the model's own answers", len(samples)) as progress:
        return answer_samples(
            vlm,
            samples,
            max_new_tokens=arguments.max_new_tokens,
            batch_size=arguments.batch_size,
            progress=progress,
        )


def _print_report(report: dict[str, Any], out: Path) -> None:
    counts = ", ".join(f"{name} {count}" for name, count in report["counts"].items())
    lines = [f"samples: {out / _SAMPLES_NAME} ({counts})"]
    lines += [f"left out: {number} ({reason})" for reason, number in report["dropped"].items()]
    found = report["separability_of_SA_and_TCB"]
    lines.append(
        "SA told from TCB (50% is chance): by whole requests "
        f"{found['request_accuracy']:.0%}, by words {found['words_accuracy']:.0%}"
    )
    if found["image_accuracy"] is not None:
        verdict = "as by chance" if found["image_accuracy"] <= found["image_chance_95"] else (
            "above chance: picture quality gives the set away; match sources or use --longest-side"
        )  # fmt: skip
        lines.append(
            f"SA told from TCB by picture quality: {found['image_accuracy']:.0%} ({verdict}; up to "
            f"{found['image_chance_95']:.0%} is chance)"
        )
    sys.stdout.write("\n".join([*lines, f"report: {out / _REPORT_NAME}"]) + "\n")

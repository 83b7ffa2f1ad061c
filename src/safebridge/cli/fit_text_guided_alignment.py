"""`safebridge fit text-guided-alignment`: pictures' states are drawn to those of their captions."""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safebridge.cli.fields import add_config_arguments, read_config
from safebridge.cli.options import add_training_options
from safebridge.errors import DataError
from safebridge.methods.text_guided_alignment.config import TextGuidedAlignmentConfig

if TYPE_CHECKING:
    from safebridge.data.sample import Sample
    from safebridge.methods.text_guided_alignment.retrieval import TextEmbedder, TextIndex
    from safebridge.models.load import VLM

__all__ = ["HELP", "NAME", "add_options", "fit"]

NAME = "text-guided-alignment"
HELP = "align a model's pictures with their captions, so that its text safety sees them"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this method.

    Args:
        parser: Receives them.
    """
    _add_data_options(parser.add_argument_group("data"))
    _add_guide_options(parser.add_argument_group("captions and retrieved texts"))
    _add_plan_options(parser.add_argument_group("plan"))
    add_training_options(
        parser,
        cache="keeps the states of captions where they do not change, for later fits as well",
    )
    add_config_arguments(parser, TextGuidedAlignmentConfig, "settings")


def _add_data_options(group: Any) -> None:
    group.add_argument(
        "--pictures",
        type=Path,
        metavar="FOLDER",
        help="folder of the pictures of a LLaVA-style .json file. Default: the file's folder.",
    )
    group.add_argument(
        "--turns",
        choices=("first", "all"),
        default="first",
        help="take the first request of a conversation, or each as a sample of its own. "
        "Default: %(default)s.",
    )
    group.add_argument(
        "--text-only-mark",
        default="",
        metavar="TEXT",
        help='records whose id contains this lose their picture; "tox" in the authors\' files',
    )
    group.add_argument(
        "--validation",
        type=Path,
        metavar="FILE",
        help="held-out samples; after each epoch their loss is measured, and the best epoch kept",
    )


def _add_guide_options(group: Any) -> None:
    group.add_argument(
        "--captions",
        metavar="SOURCE",
        help='"model" lets the model describe the pictures that have no caption; else a JSON '
        "file of picture names and captions",
    )
    group.add_argument(
        "--corpus",
        metavar="SOURCE",
        help='texts to retrieve from: a file with one text per line, or "captions" for those of '
        "the samples",
    )
    group.add_argument(
        "--embedder",
        default="words",
        metavar="NAME",
        help='how texts are compared: "words" (spelling), "states" (the model\'s own), or the '
        "folder or hub name of a sentence encoder or, with --retrieve-by picture, of a model such "
        "as CLIP. Default: %(default)s.",
    )
    group.add_argument(
        "--retrieve-by",
        choices=("caption", "picture"),
        default="caption",
        help="what the corpus is searched by. Default: %(default)s.",
    )
    group.add_argument(
        "--backend",
        choices=("exact", "faiss", "faiss-hnsw"),
        default="exact",
        help="how the corpus is searched. Default: %(default)s.",
    )
    group.add_argument(
        "--self-match",
        choices=("exclude", "halve", "keep"),
        default="exclude",
        help="what to do when the nearest text is the sample's own caption. Default: %(default)s.",
    )
    group.add_argument(
        "--guided",
        type=Path,
        metavar="FILE",
        help="where the samples with captions and retrieved texts are kept; as --data of a later "
        "fit it saves the work. Default: OUT-guided.json beside --out.",
    )


def _add_plan_options(group: Any) -> None:
    group.add_argument(
        "--plan",
        action="store_true",
        help="print memory and time of the fit, from the model's shapes alone, and stop",
    )
    for name, default, text in (
        ("image-tokens", 0, "tokens of a picture; 0 takes what the model's config says"),
        ("text-tokens", 96, "tokens of request, template and answer"),
        ("caption-tokens", 80, "tokens of a caption with its template"),
        ("retrieved-tokens", 48, "tokens of a retrieved text"),
    ):
        group.add_argument(
            f"--{name}",
            type=int,
            default=default,
            metavar="INT",
            help=f"{text}. Default: {default}.",
        )
    group.add_argument(
        "--teraflops",
        type=float,
        default=0.0,
        metavar="FLOAT",
        help="speed of the device in 1e12 operations per second; 0 measures this one. Default: 0.",
    )


def fit(arguments: argparse.Namespace) -> list[str]:
    """Fit the alignment and save it, or print its plan.

    Args:
        arguments: As parsed.

    Returns:
        What to print.

    Raises:
        DataError: If the samples cannot be used.
    """
    config = read_config(TextGuidedAlignmentConfig, arguments.config, vars(arguments))
    if arguments.plan:
        return _plan(arguments, config)

    from safebridge.methods.text_guided_alignment.method import (  # noqa: PLC0415 - torch is slow
        TextGuidedAlignment,
    )
    from safebridge.models.load import load_vlm  # noqa: PLC0415 - likewise
    from safebridge.training.processes import (  # noqa: PLC0415 - likewise
        find_device,
        is_main_process,
    )

    samples = _read_file(arguments.data, arguments)
    held_out = None if arguments.validation is None else _read_file(arguments.validation, arguments)
    vlm = load_vlm(arguments.model, dtype=arguments.dtype, device_map=find_device())
    samples = _guide(vlm, samples, arguments)
    with _show(arguments) as progress:
        method = TextGuidedAlignment.fit(
            vlm,
            samples,
            config,
            validation=held_out,
            progress=progress,
            checkpoint=arguments.checkpoint,
            cache=arguments.cache,
            data_source=str(arguments.data),
        )
    if not is_main_process():
        return []
    method.save(arguments.out)
    details = method.metadata.details
    last = "  ".join(f"{name} {value:.3f}" for name, value in sorted(details["losses"][-1].items()))
    return [f"fitted in {details['steps']} steps: {last}", f"artifact: {arguments.out}"]


def _plan(arguments: argparse.Namespace, config: TextGuidedAlignmentConfig) -> list[str]:
    """Return the plan of a fit on these samples."""
    from safebridge.methods.text_guided_alignment.plan import (  # noqa: PLC0415 - torch is slow
        Workload,
        load_shapes,
        measure_plan,
    )

    model, layout = load_shapes(arguments.model)
    workload = Workload(
        samples=len(_read_file(arguments.data, arguments)),
        image_tokens=arguments.image_tokens,
        text_tokens=arguments.text_tokens,
        answer_tokens=arguments.text_tokens // 2,
        caption_tokens=arguments.caption_tokens,
        retrieved_tokens=arguments.retrieved_tokens,
        teraflops=arguments.teraflops,
    )
    return [measure_plan(model, layout, config, workload).describe()]


def _read_file(path: Path, arguments: argparse.Namespace) -> "Sequence[Sample]":
    """Read our JSON lines, or a LLaVA-style file sample by sample as they are needed."""
    from safebridge.data.files import load_samples  # noqa: PLC0415 - as in fit
    from safebridge.methods.text_guided_alignment.llava_json import LlavaFile  # noqa: PLC0415

    if path.suffix.lower() != ".json":
        return load_samples(path)
    return LlavaFile(
        path,
        image_folder=arguments.pictures,
        turns=arguments.turns,
        text_only_mark=arguments.text_only_mark,
    )


def _guide(
    vlm: "VLM", samples: "Sequence[Sample]", arguments: argparse.Namespace
) -> "Sequence[Sample]":
    """Add captions and retrieved texts, by way of a file, so that no list is held in memory."""
    if arguments.captions is None and arguments.corpus is None:
        return samples

    from safebridge.methods.text_guided_alignment.captions import (  # noqa: PLC0415 - as in fit
        FileCaptioner,
        ModelCaptioner,
        add_captions,
    )
    from safebridge.methods.text_guided_alignment.llava_json import (  # noqa: PLC0415 - likewise
        LlavaFile,
        write_llava,
    )
    from safebridge.methods.text_guided_alignment.retrieval import (  # noqa: PLC0415 - likewise
        add_retrieved,
    )
    from safebridge.optional import require  # noqa: PLC0415 - likewise

    if require("accelerate", extra="training").PartialState().num_processes > 1:
        raise DataError(
            "captions and retrieved texts are made by one process. Run this once without "
            "`accelerate launch` and with --max-steps 1, then pass the guided file as --data."
        )
    guided = arguments.guided or arguments.out.parent / f"{arguments.out.name}-guided.json"
    guided.parent.mkdir(parents=True, exist_ok=True)
    if arguments.captions is not None:
        is_own = arguments.captions == "model"
        captioner = ModelCaptioner(vlm) if is_own else FileCaptioner(arguments.captions)
        samples = LlavaFile(write_llava(add_captions(samples, captioner), guided))
    if arguments.corpus is None:
        return samples
    index = _build_index(vlm, samples, arguments)
    found = add_retrieved(samples, index, by=arguments.retrieve_by, self_match=arguments.self_match)
    return LlavaFile(write_llava(found, guided))


def _build_index(
    vlm: "VLM", samples: "Sequence[Sample]", arguments: argparse.Namespace
) -> "TextIndex":
    from safebridge.methods.text_guided_alignment.retrieval import TextIndex  # noqa: PLC0415

    texts: Iterable[str]
    if arguments.corpus == "captions":
        texts = (sample.caption for sample in samples)
    else:
        try:
            texts = Path(arguments.corpus).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read texts from {arguments.corpus}: {error}.") from error
    return TextIndex(
        texts,
        _build_embedder(vlm, arguments),
        backend=arguments.backend,
        is_centred=arguments.embedder == "states",
    )


def _build_embedder(vlm: "VLM", arguments: argparse.Namespace) -> "TextEmbedder":
    from safebridge.methods.text_guided_alignment import retrieval  # noqa: PLC0415 - as in fit

    if arguments.embedder == "words":
        return retrieval.WordEmbedder()
    if arguments.embedder == "states":
        return retrieval.StateEmbedder(vlm, layer=vlm.layout.num_layers // 2)
    if arguments.retrieve_by == "picture":
        return retrieval.ContrastiveEmbedder(arguments.embedder)
    return retrieval.EncoderEmbedder(arguments.embedder)


@contextmanager
def _show(arguments: argparse.Namespace) -> Iterator[Any]:
    """Show a bar and, if asked for, write TensorBoard events; in the first process alone."""
    from safebridge.training.processes import is_main_process  # noqa: PLC0415 - as in fit
    from safebridge.training.reports import (  # noqa: PLC0415 - as in fit
        call_all,
        show_training,
        write_tensorboard,
    )

    if not is_main_process():
        yield None
        return
    with ExitStack() as stack:
        callbacks = [stack.enter_context(show_training("aligning"))]
        if arguments.tensorboard is not None:
            callbacks.append(stack.enter_context(write_tensorboard(arguments.tensorboard)))
        yield call_all(*callbacks)

"""Compare the speed of text-guided alignment with that of plain alignment, in one run.

    python benchmarks/text_guided_alignment_speed.py [--model safebridge/mini] [--repeats 5]

Both train the projector on the same pictures, in the same batches, through the same loop; what
differs is the guide loss. The states of captions and retrieved texts are in the cache, as they are
from the second epoch on. Steps of both take turns, so that a busy machine slows both. With the
retrieved text as a prefix, the prompt itself is longer; that is measured as well, apart.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from cells import describe_command
from record import record

from safebridge.data.sample import Sample
from safebridge.data.tables import load_concepts
from safebridge.data.twins import load_samples
from safebridge.methods.text_guided_alignment.config import TextGuidedAlignmentConfig
from safebridge.methods.text_guided_alignment.engine import Batch, GuidedEngine
from safebridge.methods.text_guided_alignment.modules import train_parts
from safebridge.models.load import VLM, load_vlm
from safebridge.training.loop import freeze

BATCH = 16
GOAL = 0.9
NAME = "text-guided-alignment/throughput"
PLAIN = TextGuidedAlignmentConfig(align_weight=0.0, pair_weight=0.0, retrieved="none")
VARIANTS = {
    "plain": PLAIN,
    "text_pass": TextGuidedAlignmentConfig(retrieved="text_pass"),
    "prefix": TextGuidedAlignmentConfig(retrieved="prefix"),
}


def choose_samples(count: int) -> list[Sample]:
    """Return pictures of the fit split with captions and another thing's caption."""
    concepts = load_concepts()
    samples = load_samples("naming", "fit", limit=count)
    captions = [f"This is {concepts[sample.concept].phrase}." for sample in samples]
    return [
        replace(sample, answer=own, caption=own, retrieved=other)
        for sample, own, other in zip(samples, captions, captions[1:] + captions[:1], strict=True)
    ]


def step(engine: GuidedEngine, batch: Batch) -> float:
    """Return the seconds of one forward and backward pass; the optimiser's are the same."""
    started = time.perf_counter()
    engine.loss(batch).loss.backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(vlm: VLM, samples: Sequence[Sample], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each pass over the samples, by variant, the variants in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with freeze(vlm.model), train_parts(vlm, PLAIN) as parts:
        engines = {
            name: GuidedEngine(vlm, samples, config, parts) for name, config in VARIANTS.items()
        }
        batches = [
            Batch(tuple(range(start, min(start + BATCH, len(samples)))), 0.0)
            for start in range(0, len(samples), BATCH)
        ]
        for repeat in range(-1, repeats):  # the first pass fills the caches and warms up
            found = dict.fromkeys(VARIANTS, 0.0)
            for batch in batches:
                for name, engine in engines.items():
                    found[name] += step(engine, batch)
            if repeat >= 0:
                for name, value in found.items():
                    seconds[name].append(value)
    return seconds


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="safebridge/mini")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    samples = choose_samples(options.samples)
    seconds = measure(load_vlm(options.model), samples, options.repeats)
    for name, own in seconds.items():
        speed = len(samples) / statistics.median(own)
        ratios = [plain / mine for plain, mine in zip(seconds["plain"], own, strict=True)]
        ratio = statistics.median(ratios)
        print(
            f"{name:<10} {speed:8.2f} samples/s, {ratio:.3f} of plain "
            f"[{min(ratios):.3f}, {max(ratios):.3f}]"
        )
        if name != "plain" and not options.no_record:
            record(
                NAME if name == "text_pass" else f"{NAME}/{name}",
                ratio,
                GOAL,
                "plain alignment on the same loop",
                f"torch {torch.__version__}",
                describe_command(),
            )


if __name__ == "__main__":
    main()

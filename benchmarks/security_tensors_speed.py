"""Compare the speed of fitting security tensors with the authors' way of doing it, in one run.

    python benchmarks/security_tensors_speed.py [--model safebridge/mini] [--only NAME]

The reference does what the authors' scripts do: batch 1, the picture read and encoded at every
step, logits at every position, float32. Ours computes the same losses on the same samples. Both
take turns on the same machine and weights, and the medians are compared. Ratios are ours over the
reference's samples per second; for `textual-vs-bare`, the bare forward and backward pass of the
tokens that cannot be avoided over ours; for inference, the undefended model over the defended one
at the same total length; for memory, the bare model's peak over the fit's. About 20 minutes on two
cores; the records go to docs/results/benchmarks.json.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from cells import describe_command
from record import record
from torch import Tensor

from safebridge.data.sample import Sample, open_images
from safebridge.data.triad import load_refusals
from safebridge.data.twins import load_samples
from safebridge.methods.security_tensors.application import apply_tensors
from safebridge.methods.security_tensors.cache import TensorCache
from safebridge.methods.security_tensors.config import SecurityTensorsConfig
from safebridge.methods.security_tensors.decoder_engine import DecoderEngine
from safebridge.methods.security_tensors.engines import build_engine
from safebridge.methods.security_tensors.modules import SecurityTensorModule, build_module
from safebridge.methods.security_tensors.objective import build_batches
from safebridge.models.families import find_layout
from safebridge.models.load import VLM, load_vlm
from safebridge.models.tokens import IGNORED_LABEL, encode
from safebridge.training.attention import quick_attention
from safebridge.training.loop import freeze

BATCH = 32
ANSWER = "It is a thing that many people use at home, and you can buy it in most shops of the town."
AUTHORS = "the authors' loop: batch 1, picture encoded every step, full logits, float32"
VERSIONS = f"torch {torch.__version__}, transformers {hf.__version__}"
FAMILY = "security-tensors"


@dataclass(frozen=True)
class Fit:
    """One comparison of fits."""

    goal: float
    config: SecurityTensorsConfig
    is_long: bool = False
    """Whether pictures have LLaVA-1.5's 576 tokens instead of the model's own number."""


FITS = {
    "textual-n300": Fit(8.0, SecurityTensorsConfig(num_virtual_tokens=300)),
    "textual-n30": Fit(3.0, SecurityTensorsConfig(num_virtual_tokens=30)),
    "textual-after-image-576": Fit(
        5.0,
        SecurityTensorsConfig(num_virtual_tokens=100, position="after_image"),
        is_long=True,
    ),
    "visual": Fit(2.0, SecurityTensorsConfig(modality="visual")),
}
BARE, BARE_GOAL = "textual-vs-bare", 1 / 1.3
INFERENCE = {"inference-textual": 1 / 1.02, "inference-visual": 1 / 1.01}
MEMORY, MEMORY_GOAL = "peak-memory", 0.5  # a second copy of the weights would halve it


def choose_samples(count: int) -> list[Sample]:
    """Return a triad; what is answered matters little for speed, so it is one sentence."""
    refusals = cycle(load_refusals())
    kinds = {"SA": ("harmful_image", "seen"), "TCB": ("benign_image", "all"),
             "GB": ("general", "all")}  # fmt: skip
    return [
        replace(sample, set_name=name, answer=next(refusals) if name == "SA" else ANSWER)
        for name, (kind, part) in kinds.items()
        for sample in load_samples(kind, "fit", limit=count // 3, categories=part)
    ]


def build_long(vlm: VLM) -> VLM:
    """Build a random LLaVA with the model's decoder and LLaVA-1.5's pictures of 576 tokens.

    Its tower is small, so that the ratio owes nothing to not running it.
    """
    text = vlm.model.config.get_text_config()
    vision = hf.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=336,
        patch_size=14,
    )
    token = vlm.layout.image_token_id
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=token)
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessorPil(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
        ),
        vlm.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=vlm.processor.chat_template,
    )
    torch.manual_seed(0)
    model = hf.LlavaForConditionalGeneration(config).eval().to(vlm.device)
    for parameter in model.parameters():  # buffers keep their type, as rotary frequencies must
        parameter.data = parameter.data.to(vlm.dtype)
    model.generation_config = vlm.model.generation_config
    return VLM(model, processor, find_layout(model), "llava-576")


def reference_step(
    vlm: VLM, sample: Sample, module: SecurityTensorModule, config: SecurityTensorsConfig
) -> Tensor:
    """Return the loss of one sample in the authors' way."""
    encoded = encode(
        vlm, [sample.prompt], [open_images(sample)], [sample.answer or ""], padding_side="left"
    )
    assert encoded.labels is not None  # noqa: S101 - an answer was given
    position = config.position
    with apply_tensors(vlm, tokens=module.tokens, pixels=module.pixels, position=position):
        logits = vlm.model(**encoded.inputs, use_cache=False).logits
    wanted = encoded.labels[:, 1:].ne(IGNORED_LABEL)
    loss: Tensor = torch.nn.functional.cross_entropy(
        logits[:, :-1][wanted], encoded.labels[:, 1:][wanted]
    )
    return loss


def timed(run: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def learn(module: SecurityTensorModule, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Return one step of AdamW on a loss."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


@contextmanager
def prepared(
    vlm: VLM, samples: Sequence[Sample], config: SecurityTensorsConfig
) -> Iterator[tuple[DecoderEngine, SecurityTensorModule, list[list[int]]]]:
    """Yield our engine, its tensor and its batches as in a fit, with everything cached."""
    with tempfile.TemporaryDirectory() as folder, freeze(vlm.model), quick_attention(vlm):
        inputs = encode(vlm, [samples[0].prompt], [open_images(samples[0])]).inputs
        module = build_module(vlm, config, inputs)
        engine = build_engine(vlm, samples, config, module, TensorCache(Path(folder)))
        if not isinstance(engine, DecoderEngine):
            raise SystemExit(f"{vlm.name} runs the whole model; there is nothing to compare.")
        names = [sample.set_name for sample in samples]
        batches = build_batches(engine.lengths, engine.groups, names, BATCH, 0)
        with torch.no_grad():
            for batch in batches:  # fills the caches
                engine.losses(batch)
        yield engine, module, batches


def measure_fit(
    exact: VLM, fast: VLM, samples: Sequence[Sample], config: SecurityTensorsConfig, rounds: int
) -> float:
    """Return how many times more samples a second ours learns from than the reference."""
    ours: list[float] = []
    theirs: list[float] = []
    with prepared(fast, samples, config) as (engine, module, batches), freeze(exact.model):
        inputs = encode(exact, [samples[0].prompt], [open_images(samples[0])]).inputs
        own = build_module(exact, config, inputs)
        order = cycle(samples)
        for number in range(rounds + 1):
            batch = batches[number % len(batches)]
            seconds = timed(learn(module, lambda batch=batch: engine.losses(batch).mean()))
            sample = [next(order) for _ in range(3)]
            slow = statistics.median(
                timed(learn(own, lambda each=each: reference_step(exact, each, own, config)))
                for each in sample
            )
            if number:  # the first round fills the caches and warms up
                ours.append(seconds / len(batch))
                theirs.append(slow)
    print(f"  ours {1 / statistics.median(ours):.2f} samples/s, "
          f"reference {1 / statistics.median(theirs):.2f} samples/s")  # fmt: skip
    return statistics.median(theirs) / statistics.median(ours)


def measure_bare(vlm: VLM, samples: Sequence[Sample], rounds: int) -> float:
    """Return the bare pass's seconds over ours, at 300 virtual tokens."""
    config = SecurityTensorsConfig(num_virtual_tokens=300)
    ours: list[float] = []
    bare: list[float] = []
    with prepared(vlm, samples, config) as (engine, module, batches):
        assert module.tokens is not None  # noqa: S101 - a textual tensor
        for number in range(rounds + 1):
            batch = batches[number % len(batches)]
            seconds = timed(learn(module, lambda batch=batch: engine.losses(batch).mean()))
            examples = [engine.prepared.examples[index] for index in batch]
            real = sum(len(example.input_ids) - 1 for example in examples)
            labels = sum(int(example.labels.ne(IGNORED_LABEL).sum()) for example in examples)
            size, width = len(batch), -(-real // len(batch))
            plain = learn(
                module,
                lambda s=size, w=width, n=labels: bare_loss(engine, module, s, w, n),
            )
            if number:
                ours.append(seconds)
                bare.append(timed(plain))
    return statistics.median(bare) / statistics.median(ours)


def bare_loss(
    engine: DecoderEngine, module: SecurityTensorModule, size: int, width: int, labels: int
) -> Tensor:
    """Run the prefix once and rows of the mean length on it, and the head at the labels."""
    vlm = engine.vlm
    assert module.tokens is not None  # noqa: S101 - a textual tensor
    tokens = module.tokens.to(vlm.dtype)[None]
    cache = hf.DynamicCache()
    engine.decoder(inputs_embeds=tokens, past_key_values=cache, use_cache=True)
    lent = hf.DynamicCache(
        [(x.keys.expand(size, -1, -1, -1), x.values.expand(size, -1, -1, -1)) for x in cache.layers]
    )
    rows = torch.randn(size, width, vlm.layout.hidden_size, dtype=vlm.dtype, device=vlm.device)
    mask = torch.ones(size, tokens.shape[1] + width, dtype=torch.long, device=vlm.device)
    hidden = engine.decoder(
        inputs_embeds=rows, attention_mask=mask, past_key_values=lent, use_cache=True
    ).last_hidden_state
    logits = engine.head(hidden.flatten(0, 1)[:labels])
    targets = torch.zeros(len(logits), dtype=torch.long, device=vlm.device)
    return torch.nn.functional.cross_entropy(logits.float(), targets)


def measure_inference(vlm: VLM, samples: Sequence[Sample], name: str, rounds: int) -> float:
    """Return the undefended model's seconds over the defended one's, at equal total length."""
    n = 100 if name == "inference-textual" else 0
    tokens = torch.randn(n, vlm.layout.hidden_size, device=vlm.device) if n else None
    chosen = samples[:8]
    pictures = [open_images(sample) for sample in chosen]
    inputs = encode(vlm, [sample.prompt for sample in chosen], pictures).inputs
    pixels = None if n else torch.zeros(inputs["pixel_values"].shape[-3:], device=vlm.device)
    longer: dict[str, Any] = dict(inputs)
    if n:  # as many ordinary tokens more
        extra = inputs["input_ids"][:, -1:].expand(-1, n)
        ones = torch.ones_like(extra)
        longer["input_ids"] = torch.cat([inputs["input_ids"], extra], dim=1)
        longer["attention_mask"] = torch.cat([inputs["attention_mask"], ones], dim=1)
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    plain, defended = [], []
    with torch.inference_mode():
        for number in range(rounds + 1):
            base = timed(lambda: vlm.model.generate(**longer, **options))
            with apply_tensors(vlm, tokens=tokens, pixels=pixels):
                own = timed(lambda: vlm.model.generate(**inputs, **options))
            if number:
                plain.append(base)
                defended.append(own)
    return statistics.median(plain) / statistics.median(defended)


def measure_memory(model: str, count: int) -> float:
    """Return the bare model's peak memory over the fit's, each in a process of its own."""
    peaks = {}
    for task in ("bare", "fit"):
        words = [sys.executable, __file__, "--model", model, "--samples", str(count)]
        done = subprocess.run(  # noqa: S603 - this very script
            [*words, "--peak-of", task], check=True, capture_output=True, text=True
        )
        peaks[task] = int(done.stdout.split()[-1])
    print(f"  bare {peaks['bare'] / 2**20:.2f} GiB, fit {peaks['fit'] / 2**20:.2f} GiB")
    return peaks["bare"] / peaks["fit"]


def print_peak(vlm: VLM, samples: Sequence[Sample], task: str) -> None:
    """Run one answer or a few steps of a fit, and print the process's peak memory in KiB."""
    if task == "bare":
        inputs = encode(vlm, [samples[0].prompt], [open_images(samples[0])]).inputs
        with torch.inference_mode():
            vlm.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    else:
        config = SecurityTensorsConfig(num_virtual_tokens=30)
        with prepared(vlm, samples, config) as (engine, module, batches):
            for batch in batches[:3]:
                learn(module, lambda batch=batch: engine.losses(batch[:4]).mean())()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def report(name: str, ratio: float, goal: float, peer: str, *, is_recorded: bool) -> None:
    """Print one ratio and, on the embedded model, keep it."""
    print(f"{FAMILY}/{name}: {ratio:.2f} (goal {goal:.2f})", flush=True)
    if is_recorded:
        command = describe_command(leave_out=("--only",)) + f" --only {name}"
        record(f"{FAMILY}/{name}", ratio, goal, peer, VERSIONS, command)


def run_fits(names: Sequence[str], arguments: argparse.Namespace, *, is_recorded: bool) -> None:
    """Measure the comparisons of fits."""
    exact = load_vlm(arguments.model, dtype="float32", device_map=arguments.device)
    fast = load_vlm(arguments.model, dtype=arguments.dtype, device_map=arguments.device)
    samples = choose_samples(arguments.samples)
    for name in names:
        fit, models = FITS[name], (exact, fast)
        if fit.is_long:
            models = (build_long(exact), build_long(fast))
        ratio = measure_fit(*models, samples, fit.config, arguments.rounds)
        report(name, ratio, fit.goal, AUTHORS, is_recorded=is_recorded)


def others(arguments: argparse.Namespace) -> Mapping[str, tuple[Callable[[], float], float, str]]:
    """Return the other measurements by name: what to call, the goal, the peer."""

    def fast() -> VLM:
        return load_vlm(arguments.model, dtype=arguments.dtype, device_map=arguments.device)

    def samples() -> list[Sample]:
        return choose_samples(arguments.samples)

    found: dict[str, tuple[Callable[[], float], float, str]] = {
        BARE: (
            lambda: measure_bare(fast(), samples(), arguments.rounds),
            BARE_GOAL,
            "bare forward and backward pass of the tokens that must be computed, unpadded",
        ),
        MEMORY: (
            lambda: measure_memory(arguments.model, arguments.samples),
            MEMORY_GOAL,
            "peak memory of loading the model and answering one question",
        ),
    }
    for name, goal in INFERENCE.items():
        found[name] = (
            lambda name=name: measure_inference(fast(), samples(), name, arguments.rounds),
            goal,
            "the undefended model at the same total length",
        )
    return found


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="safebridge/mini")
    parser.add_argument("--device", default=None, help="e.g. cuda; default: the CPU")
    parser.add_argument("--dtype", default="bfloat16", help="type of our weights")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--peak-of", choices=("bare", "fit"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        vlm = load_vlm(arguments.model, dtype=arguments.dtype, device_map=arguments.device)
        print_peak(vlm, choose_samples(arguments.samples), arguments.peak_of)
        return
    rest = others(arguments)
    known = [*FITS, *rest]
    unknown = sorted(set(arguments.only) - set(known))
    if unknown:
        parser.error(f"no benchmark '{unknown[0]}'. Known: {', '.join(known)}")
    chosen = [name for name in known if not arguments.only or name in arguments.only]
    is_recorded = arguments.model == "safebridge/mini"
    fits = [name for name in chosen if name in FITS]
    if fits:
        run_fits(fits, arguments, is_recorded=is_recorded)
    for name in chosen:
        if name in rest:
            measure, goal, peer = rest[name]
            report(name, measure(), goal, peer, is_recorded=is_recorded)


if __name__ == "__main__":
    main()

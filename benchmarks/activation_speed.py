"""Compare the speed of capturing, probing and revising activations with other libraries.

    python benchmarks/activation_speed.py [--model safebridge/mini] [--only NAME ...]

Everything runs in one process on the same weights; ours and the peer take turns, and the fastest
round of each counts, so that what else the machine does matters little. Before a time counts, both
are checked to give the same result. Peers that are not installed are left out and named:
`pip install nnsight scikit-learn`, and without their outdated pins `pip install --no-deps
steering-vectors repeng`. AISteer360 is not on PyPI; `--aisteer360 FOLDER` names a checkout.

`decode-overhead` is the time of the defended model over that of the undefended one (lower is
better); `hook-vs-<peer>` is the time of decoding with the peer's hooks over that with ours; the
others are our samples or probes per second over the peer's. What is captured are groups of six
responses to each request, as the method's samples are. About 15 minutes on two cores; the records
go to docs/results/benchmarks.json.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from cells import describe_command
from record import record
from torch import Tensor

from safebridge.activations.capture import capture_activations
from safebridge.activations.probes import fit_probes
from safebridge.activations.revision import Edit, apply_edits
from safebridge.activations.scopes import TokenScope
from safebridge.data.sample import Sample, open_images
from safebridge.data.twins import load_samples
from safebridge.methods.activation_revision.config import ActivationRevisionConfig
from safebridge.methods.activation_revision.method import ActivationRevision
from safebridge.methods.activation_revision.samples import (
    build_multi_response,
    build_reminded,
)
from safebridge.models.load import VLM, load_vlm
from safebridge.models.tokens import encode

FAMILY = "activation-revision"
GOALS = {
    "decode-overhead": 1.03,
    "hook-vs-steering-vectors": 1.0,
    "hook-vs-repeng": 1.0,
    "hook-vs-aisteer360": 1.0,
    "capture-vs-nnsight": 2.0,
    "capture-vs-aisteer360": 2.0,
    "probes-vs-sklearn": 20.0,
}
CLOSE = {"atol": 1e-2, "rtol": 1e-2}


def fastest(rounds: int, **calls: Callable[[], object]) -> dict[str, float]:
    """Return the seconds of each call's fastest round; the calls take turns."""
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()  # warm up
    for number in range(rounds):
        order = list(calls) if number % 2 else list(calls)[::-1]
        for name in order:
            start = time.perf_counter()
            calls[name]()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def text_model(vlm: VLM) -> VLM:
    """Return the language model alone, on the same weights, as the peers take it."""
    config = vlm.model.config.get_text_config()
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config)
    layout = vlm.layout
    model.model = layout.get(vlm.model, "language_model")
    model.lm_head = layout.get(vlm.model, "lm_head")
    model.generation_config = vlm.model.generation_config
    own = replace(
        layout,
        language_model="model",
        decoder_layers="model.layers",
        final_norm="model.norm",
        lm_head="lm_head",
        embed_tokens="model.embed_tokens",
    )
    return VLM(model.eval(), vlm.processor, own, f"text model of {vlm.name}")


def generate(vlm: VLM, inputs: Mapping[str, Any], tokens: int) -> Callable[[], Tensor]:
    """Return a call that generates a fixed number of tokens."""

    @torch.inference_mode()
    def run() -> Tensor:
        found: Tensor = vlm.model.generate(
            **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )
        return found

    return run


def measure_overhead(vlm: VLM, options: argparse.Namespace) -> tuple[float, str, str]:
    """Time the embedded model with and without the default head-level revision."""
    harmful = load_samples("harmful_image", "fit", limit=12, categories="seen")
    method = ActivationRevision.fit(vlm, build_reminded(harmful), ActivationRevisionConfig())
    sample = load_samples("general", "fit", limit=1)[0]
    inputs = encode(vlm, [sample.prompt], [open_images(sample)]).inputs
    run = generate(vlm, inputs, options.tokens)

    def defended() -> object:
        with method.apply(vlm):
            return run()

    best = fastest(options.rounds, base=run, defended=defended)
    return best["defended"] / best["base"], "undefended model", f"torch {torch.__version__}"


def hooks_added(
    vlm: VLM, options: argparse.Namespace, steer: Callable[[VLM, list[Edit]], Any]
) -> float:
    """Return what a peer adds to decoding over what ours adds, for all layers of the text model."""
    text = text_model(vlm)
    sample = load_samples("harmful_text", "fit", limit=1)[0]
    inputs = dict(encode(text, [sample.prompt], [[]]).inputs)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    generator = torch.Generator().manual_seed(0)
    width = text.layout.hidden_size
    edits = [
        Edit("resid_out", layer, 0.02 * torch.randn(width, generator=generator).to(text.dtype))
        for layer in range(text.layout.num_layers)
    ]
    run = generate(text, inputs, options.tokens)

    def ours() -> Tensor:
        with apply_edits(text, edits, scope=TokenScope("all")):
            return run()

    def peer() -> Tensor:
        with steer(text, edits):
            return run()

    with torch.no_grad():
        with apply_edits(text, edits, scope=TokenScope("all")):
            mine = text.model(**inputs).logits
        with steer(text, edits):
            theirs = text.model(**inputs).logits
    torch.testing.assert_close(mine.float(), theirs.float(), **CLOSE)
    best = fastest(options.rounds, base=run, ours=ours, peer=peer)
    added = {name: best[name] - best["base"] for name in ("ours", "peer")}
    # The time that each adds is too near to nothing to be divided; the whole times are not.
    print(f"  base {best['base']:.4f} s, ours adds {added['ours'] * 1e3:.2f} ms, "
          f"the peer {added['peer'] * 1e3:.2f} ms")  # fmt: skip
    return best["peer"] / best["ours"]


def measure_steering_vectors(vlm: VLM, options: argparse.Namespace) -> tuple[float, str, str]:
    """Compare the hooks with those of steering-vectors."""
    from steering_vectors import SteeringVector  # noqa: PLC0415 - only if asked for

    def steer(text: VLM, edits: list[Edit]) -> Any:
        vector = SteeringVector({edit.layer: edit.shift for edit in edits}, "decoder_block")
        names = {"decoder_block": "model.layers.{num}"}
        return vector.apply(text.model, layer_config=names)

    ratio = hooks_added(vlm, options, steer)
    return ratio, "steering-vectors", metadata.version("steering-vectors")


def measure_repeng(vlm: VLM, options: argparse.Namespace) -> tuple[float, str, str]:
    """Compare the hooks with repeng's wrapped layers."""
    if not hasattr(np, "float_"):
        setattr(np, "float_", np.float64)  # noqa: B010 - repeng was written for numpy 1
    from repeng import ControlModel  # noqa: PLC0415 - only if asked for

    class Steered:
        """Wraps the layers on entry and unwraps them on exit."""

        def __init__(self, text: VLM, edits: list[Edit]) -> None:
            self.text, self.edits = text, edits

        def __enter__(self) -> None:
            self.control = ControlModel(self.text.model, [edit.layer for edit in self.edits])
            self.control.set_raw_control({edit.layer: edit.shift for edit in self.edits})

        def __exit__(self, *_: object) -> None:
            self.control.unwrap()

    return hooks_added(vlm, options, Steered), "repeng", metadata.version("repeng")


def measure_aisteer360_hooks(vlm: VLM, options: argparse.Namespace) -> tuple[float, str, str]:
    """Compare the hooks with AISteer360's activation adapter."""
    from aisteer360.algorithms.state_control._common.steering_vector import (  # noqa: PLC0415 - only if asked for
        SteeringVector,
    )
    from aisteer360.algorithms.state_control._common.transforms.additive import (  # noqa: PLC0415
        AdditiveTransform,
    )
    from aisteer360.algorithms.state_control.activation_adapter.control import (  # noqa: PLC0415
        ActivationAdapter,
    )

    controls: dict[int, Any] = {}

    def prepare(text: VLM, edits: list[Edit]) -> Any:
        directions = {edit.layer: edit.shift[None] for edit in edits}
        vector = SteeringVector(model_type=text.model.config.model_type, directions=directions)
        control = ActivationAdapter(
            transform=AdditiveTransform(vector, strength=1.0),
            layer_ids=sorted(directions),
            token_scope="all",  # noqa: S106 - no password
        )
        control.steer(text.model, tokenizer=None)
        return control

    def steer(text: VLM, edits: list[Edit]) -> Any:
        # As its pipeline does: prepared once, and before each generation what follows.
        if id(text) not in controls:
            controls[id(text)] = prepare(text, edits)
        control = controls[id(text)]
        control.reset()
        one = torch.zeros(1, 1, dtype=torch.long)  # a single prompt, of which all tokens are meant
        control.set_hooks(control.get_hooks(one, {}, attention_mask=None))
        control._model_ref = text.model  # noqa: SLF001 - as its pipeline sets it
        return control

    return hooks_added(vlm, options, steer), "AISteer360", options.aisteer360_version


def texts(options: argparse.Namespace) -> list[Sample]:
    """Return groups of six responses to text requests."""
    requests = load_samples("harmful_text", "fit", limit=max(2, options.samples // 6))
    return build_multi_response(requests, count=3)


def padded_batches(text: VLM, samples: Sequence[Sample], size: int) -> list[dict[str, Tensor]]:
    """Return the samples as the peers get them: in their order, the last own token last."""
    found = []
    for start in range(0, len(samples), size):
        part = samples[start : start + size]
        answers = [s.answer or "" for s in part]
        inputs = encode(text, [s.prompt for s in part], [[] for _ in part], answers).inputs
        # The end-of-turn token and what the template writes after it are not read.
        found.append({name: inputs[name][:, :-1] for name in ("input_ids", "attention_mask")})
    return found


def measure_nnsight(vlm: VLM, options: argparse.Namespace) -> tuple[float, str, str]:
    """Compare the capture of all heads and layers with nnsight's traces."""
    from nnsight import NNsight  # noqa: PLC0415 - only if asked for

    text, samples = text_model(vlm), texts(options)
    # Equal weights in another copy: nnsight's wrapper stays on the modules and slows every pass.
    wrapped = NNsight(text_model(load_vlm(options.model, dtype=options.dtype)).model)
    layers = text.layout.num_layers

    def ours() -> Any:
        return capture_activations(
            text,
            samples,
            places=("heads", "resid_out"),
            read_position="last_response_token",
            batch_size=options.batch_size,
        )

    def peer() -> tuple[Tensor, Tensor]:
        heads, streams = [], []
        # Tokenising is part of the work, as it is of ours.
        for batch in padded_batches(text, samples, options.batch_size):
            with torch.no_grad(), wrapped.trace(**batch):
                own_heads, own_streams = list().save(), list().save()  # noqa: C408 - its idiom
                for number in range(layers):
                    layer = wrapped.model.layers[number]
                    own_heads.append(layer.self_attn.o_proj.input[:, -1].float())
                    own_streams.append(layer.output[:, -1].float())
            heads.append(torch.stack(list(own_heads), dim=1))
            streams.append(torch.stack(list(own_streams), dim=1))
        return torch.cat(heads), torch.cat(streams)

    mine, (heads, streams) = ours(), peer()
    torch.testing.assert_close(mine.tensors["heads"].flatten(2), heads, **CLOSE)
    torch.testing.assert_close(mine.tensors["resid_out"], streams, **CLOSE)
    best = fastest(options.rounds, ours=ours, peer=peer)
    print(f"  ours {len(samples) / best['ours']:.1f} samples a second, "
          f"nnsight {len(samples) / best['peer']:.1f}")  # fmt: skip
    return best["peer"] / best["ours"], "nnsight", metadata.version("nnsight")


def measure_aisteer360(vlm: VLM, options: argparse.Namespace) -> tuple[float, str, str]:
    """Compare the capture of all layers with AISteer360's; it has none of heads."""
    from aisteer360.algorithms.core.internals.capture import (  # noqa: PLC0415 - only if asked for
        layerwise_tokenwise_hidden,
    )

    text, samples = text_model(vlm), texts(options)

    def ours() -> Any:
        return capture_activations(
            text,
            samples,
            places=("heads", "resid_out"),
            read_position="last_response_token",
            batch_size=options.batch_size,
        )

    def peer() -> Tensor:
        (whole,) = padded_batches(text, samples, len(samples))
        found = layerwise_tokenwise_hidden(text.model, whole, batch_size=options.batch_size)
        return torch.stack([found[layer][:, -1].float() for layer in sorted(found)], dim=1)

    # transformers' last hidden state is behind the final norm, ours is the stream itself.
    mine, theirs = ours().tensors["resid_out"][:, :-1], peer()[:, :-1]
    torch.testing.assert_close(mine, theirs, **CLOSE)
    best = fastest(options.rounds, ours=ours, peer=peer)
    print(f"  ours {len(samples) / best['ours']:.1f} samples a second, "
          f"AISteer360 {len(samples) / best['peer']:.1f}")  # fmt: skip
    return best["peer"] / best["ours"], "AISteer360", options.aisteer360_version


def measure_sklearn(vlm: VLM, options: argparse.Namespace) -> tuple[float, str, str]:
    """Compare the probes of all heads with one scikit-learn fit for each."""
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 - only if asked for

    half = options.samples // 2
    kinds = (("harmful_image", True), ("benign_image", False))
    samples = [s for kind, _ in kinds for s in load_samples(kind, "fit", limit=half)]
    labels = torch.tensor([sample.is_harmful for sample in samples])
    heads = capture_activations(vlm, samples, places=["heads"], batch_size=16).tensors["heads"]
    features = heads.flatten(1, 2)
    chosen = range(0, features.shape[1], max(1, features.shape[1] // options.sklearn_heads))
    arrays = [np.ascontiguousarray(features[:, site].numpy()) for site in chosen]
    target = labels.numpy()

    def peer() -> list[Any]:
        # ITI's call: defaults, max_iter 1000.
        return [LogisticRegression(max_iter=1000).fit(array, target) for array in arrays]

    probes = fit_probes(features, labels)
    agreement = [
        float(np.mean(model.predict(array) == (probes.logits(features)[:, site] > 0).numpy()))
        for model, array, site in zip(peer(), arrays, chosen, strict=True)
    ]
    print(f"  the two agree on {np.mean(agreement):.2%} of the samples")
    best = fastest(options.rounds, ours=lambda: fit_probes(features, labels), peer=peer)
    per_probe = {"ours": best["ours"] / features.shape[1], "peer": best["peer"] / len(arrays)}
    print(f"  {features.shape[1]} probes of {features.shape[2]} features, {len(samples)} samples")
    print(f"  ours {per_probe['ours'] * 1e3:.3f} ms, scikit-learn {per_probe['peer'] * 1e3:.3f} ms")
    return per_probe["peer"] / per_probe["ours"], "scikit-learn", metadata.version("scikit-learn")


MEASURES = {
    "decode-overhead": (measure_overhead, None),
    "hook-vs-steering-vectors": (measure_steering_vectors, "steering_vectors"),
    "hook-vs-repeng": (measure_repeng, "repeng"),
    "hook-vs-aisteer360": (measure_aisteer360_hooks, "aisteer360"),
    "capture-vs-nnsight": (measure_nnsight, "nnsight"),
    "capture-vs-aisteer360": (measure_aisteer360, "aisteer360"),
    "probes-vs-sklearn": (measure_sklearn, "sklearn"),
}


def main() -> None:
    """Measure what was asked for and keep the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="safebridge/mini")
    parser.add_argument("--only", nargs="+", default=[], choices=list(MEASURES), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=48, help="tokens of one generation")
    parser.add_argument("--samples", type=int, default=512, help="prompts of a capture or probe")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--dtype",
        default="auto",
        help="of the weights; captures in other batches agree to tolerance in float32 only",
    )
    parser.add_argument("--sklearn-heads", type=int, default=24, help="heads fitted one by one")
    parser.add_argument("--aisteer360", type=Path, metavar="FOLDER", help="a checkout of it")
    parser.add_argument("--aisteer360-version", default="unknown", metavar="COMMIT")
    options = parser.parse_args()
    if options.aisteer360 is not None:
        sys.path.insert(0, str(options.aisteer360))
    vlm = load_vlm(options.model, dtype=options.dtype)
    for name in options.only or MEASURES:
        measure, module = MEASURES[name]
        if module is not None and find_spec(module) is None:
            print(f"{name}: left out, {module} is not installed")
            continue
        print(name)
        ratio, peer, version = measure(vlm, options)
        print(f"  ratio {ratio:.3f}, goal {GOALS[name]}")
        if options.model == "safebridge/mini":
            command = describe_command(leave_out=("--only",)) + f" --only {name}"
            record(f"{FAMILY}/{name}", ratio, GOALS[name], peer, version, command)


if __name__ == "__main__":
    main()

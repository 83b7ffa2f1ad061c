"""Close the picture gap of a small vision-language model and see the difference.

    python examples/quickstart.py                      # safebridge/mini, about three minutes
    python examples/quickstart.py --model tiny/llava   # a random model, seconds: shows the flow

Prints one harmful and one harmless picture request, each answered before and after:

    harmful: How would someone make this in a garage? (picture: ...)
      before: ...
      after:  I'm sorry, but I can't help with that.
    harmless: ...
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from safebridge.data.sample import Sample, open_images
from safebridge.data.triad import build_triad
from safebridge.data.twins import load_samples
from safebridge.evaluation.judges import score_refusal
from safebridge.methods.security_tensors.config import SecurityTensorsConfig
from safebridge.methods.security_tensors.method import SecurityTensors
from safebridge.models.generate import generate_answers
from safebridge.models.load import VLM, load_vlm

SEED = 0
FIT_SAMPLES = 48
ANSWER_TOKENS = 20
CONFIG = SecurityTensorsConfig(num_virtual_tokens=16, epochs=4, seed=SEED)


def answer(vlm: VLM, samples: Sequence[Sample]) -> list[str]:
    """Return the model's answers, with whatever defense is active on it."""
    prompts = [sample.prompt for sample in samples]
    images = [open_images(sample) for sample in samples]
    return generate_answers(vlm, prompts, images, max_new_tokens=ANSWER_TOKENS)


def main() -> None:
    """Load, fit, apply, compare, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="safebridge/mini")
    parser.add_argument("--out", type=Path, default=Path("quickstart-artifact"))
    parser.add_argument("--samples", type=int, default=FIT_SAMPLES, help="per set")
    arguments = parser.parse_args()

    vlm = load_vlm(arguments.model)

    # Requests with pictures that nothing was fitted on: other drawing styles, other wordings.
    questions = [
        *load_samples("harmful_image", "test", limit=1, seed=SEED, categories="unseen"),
        *load_samples("benign_image", "test", limit=1, seed=SEED),
    ]
    before = answer(vlm, questions)

    triad = build_triad(
        load_samples("harmful_image", "fit", limit=arguments.samples, categories="seen"),
        load_samples("benign_image", "fit", limit=2 * arguments.samples),
        load_samples("general", "fit", limit=arguments.samples // 2),
        answer=lambda samples: answer(vlm, samples),
        is_refusal=lambda text: score_refusal(text).is_refusal,
        seed=SEED,
    )
    tensor = SecurityTensors.fit(vlm, triad.samples, CONFIG)

    with tensor.apply(vlm):
        after = answer(vlm, questions)

    for sample, old, new in zip(questions, before, after, strict=True):
        kind = "harmful" if sample.is_harmful else "harmless"
        print(f"{kind}: {sample.prompt} (picture: {sample.concept})")
        print(f"  before: {old}\n  after:  {new}")
    print(f"saved to {tensor.save(arguments.out)}")


if __name__ == "__main__":
    main()

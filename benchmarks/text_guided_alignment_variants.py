"""The variants that `text_guided_alignment_results.py` compares."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["CAPTION", "PAPERS", "VARIANTS", "Variant"]

CAPTION: Final = "This is {}."


@dataclass(frozen=True)
class Variant:
    """One way to align."""

    name: str
    """Name in the results: of the paper's ladder, or of an ablation."""

    setting: str
    """What is special about it, in words."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """Settings that differ from the common ones."""

    caption: str = CAPTION
    """How the caption of the guide loss is written; the answers always use `CAPTION`."""

    is_main: bool = False
    """Whether it is measured for all seeds, and whatever is measured at all; ablations take the
    first seed, or all of them if they are asked for."""

    is_fitted: bool = True
    """Whether anything is trained; the model that all others start from is measured as it is."""

    has_texts: bool = True
    """Whether requests in text are among the samples."""

    against: str = "plain"
    """The variant that it is compared with, answer by answer."""


LORA = {"trainable": "projector+lora"}
GUIDED = {**LORA, "teacher": "base"}
PLAIN = {"align_weight": 0.0, "pair_weight": 0.0, "retrieved": "none"}
ALIGN = {"pair_weight": 0.0, "retrieved": "prefix"}
HEAVY = {"align_weight": 10.0, "pair_weight": 10.0}
"""Weights of 3 and 10 were tried on the validation split, with centred states."""
CENTRED = {"centre": "captions", **HEAVY}
PAPERS: Final = "align+pair"
"""The paper's own, in the form that we know of it."""
WEAK = {"align_weight": 3.0, "pair_weight": 3.0}
VARIANTS: Final = (
    Variant("start", "before its alignment", is_fitted=False),
    Variant("plain", "cross-entropy alone", {**LORA, **PLAIN}, is_main=True, against="start"),
    Variant(
        "released-code",
        "cross-entropy with retrieved prefix; guide loss without gradient",
        {**GUIDED, "form": "repository", "is_guide_detached": True},
        is_main=True,
    ),
    Variant("align", "retrieved prefix, align term", {**GUIDED, **ALIGN}, is_main=True),
    Variant(PAPERS, "retrieved prefix, align and pair term", GUIDED, is_main=True),
    Variant(
        "centred",
        "align and pair term on states less the captions' mean, weights of 10, no prefix",
        {**GUIDED, **CENTRED, "retrieved": "text_pass"},
        is_main=True,
    ),
    Variant(
        "uncentred",
        "as centred, on the states as they are",
        {**GUIDED, **HEAVY, "retrieved": "text_pass"},
        against="centred",
    ),
    Variant(
        "centred-projector",
        "as centred, the guide loss moves the projector alone",
        {**GUIDED, **CENTRED, "retrieved": "text_pass", "guide_trains": "projector"},
        against="centred",
    ),
    Variant(
        "centred-weak",
        "as centred, weights of 3",
        {**GUIDED, **CENTRED, **WEAK, "retrieved": "text_pass"},
        against="centred",
    ),
    Variant(
        "centred-layers-repository",
        "as centred, layers 28 % to 56 %",
        {**GUIDED, **CENTRED, "retrieved": "text_pass", "layers": "0.28-0.56"},
        against="centred",
    ),
    Variant(
        "centred-layers-first-third",
        "as centred, layers 0 % to 33 %",
        {**GUIDED, **CENTRED, "retrieved": "text_pass", "layers": "0.0-0.33"},
        against="centred",
    ),
    Variant(
        "centred-layers-last-third",
        "as centred, layers 67 % to 100 %",
        {**GUIDED, **CENTRED, "retrieved": "text_pass", "layers": "0.67-1.0"},
        against="centred",
    ),
    Variant(
        "centred-teacher-current",
        "as centred, current weights as teacher",
        {**LORA, **CENTRED, "retrieved": "text_pass"},
        against="centred",
    ),
    Variant(
        "centred-prefix",
        "as centred, with a retrieved prefix",
        {**GUIDED, **CENTRED},
        against="centred",
    ),
    Variant(
        "no-prefix",
        "align and pair term, no prefix",
        {**GUIDED, "retrieved": "text_pass"},
        against=PAPERS,
    ),
    Variant(
        "no-retrieval",
        "align term alone",
        {**GUIDED, "pair_weight": 0.0, "retrieved": "none"},
        against=PAPERS,
    ),
    Variant(
        "layers-repository",
        "layers 28 % to 56 %",
        {**GUIDED, "layers": "0.28-0.56"},
        against=PAPERS,
    ),
    Variant(
        "layers-first-third",
        "layers 0 % to 33 %",
        {**GUIDED, "layers": "0.0-0.33"},
        against=PAPERS,
    ),
    Variant(
        "layers-last-third",
        "layers 67 % to 100 %",
        {**GUIDED, "layers": "0.67-1.0"},
        against=PAPERS,
    ),
    Variant(
        "repository-form",
        "exponentials with falling weights",
        {**GUIDED, "form": "repository"},
        against=PAPERS,
    ),
    Variant(
        "sum",
        "sum over the layers, as in the paper",
        {**GUIDED, "reduction": "sum"},
        against=PAPERS,
    ),
    Variant("last-token", "last token of each span", {**GUIDED, "pooling": "last"}, against=PAPERS),
    Variant("bare-caption", "the thing alone as caption", GUIDED, caption="{}", against=PAPERS),
    Variant(
        "plain-no-texts", "plain, without requests in text", {**LORA, **PLAIN}, has_texts=False
    ),
    Variant("teacher-current", "current weights as teacher", LORA, against=PAPERS),
    Variant("projector-plain", "projector alone, cross-entropy alone", PLAIN),
    Variant(
        "projector-align+pair",
        "projector alone, align and pair term",
        against="projector-plain",
    ),
)

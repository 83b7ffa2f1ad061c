"""Attention for training is the same attention."""

import pytest
import torch
from PIL import Image

from safebridge.models.tokens import encode
from safebridge.testing.tiny import TINY_FAMILIES, tiny_vlm
from safebridge.training.attention import quick_attention


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_quick_attention_gives_the_same_logits_and_is_taken_back(family: str) -> None:
    vlm = tiny_vlm(family)
    pictures = [[Image.new("RGB", (40, 40), color)] for color in ("red", "blue")]
    inputs = encode(vlm, ["How?", "How so?"], pictures).inputs
    decoder = vlm.layout.get(vlm.model, "language_model")
    before = decoder.config._attn_implementation
    with torch.no_grad():
        fused = vlm.model(**inputs).logits
        with quick_attention(vlm):
            assert decoder.config._attn_implementation == "eager"
            plain = vlm.model(**inputs).logits
        again = vlm.model(**inputs).logits
    keep = inputs["attention_mask"].bool()
    torch.testing.assert_close(plain[keep], fused[keep], atol=2e-4, rtol=2e-3)
    assert decoder.config._attn_implementation == before == "sdpa"
    assert torch.equal(again, fused)

from collections.abc import Callable

import pytest
import torch

from safebridge.analysis.spelled_pictures import (
    answer_spelled,
    measure_spelled,
    spell_image_tokens,
)
from safebridge.data.sample import Sample, open_images
from safebridge.errors import DataError, SettingError
from safebridge.models.generate import generate_answers
from safebridge.models.load import VLM
from safebridge.models.tokens import encode


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
def test_only_image_tokens_become_the_name(
    tiny: Callable[[str], VLM], shown: list[Sample], family: str
) -> None:
    vlm = tiny(family)
    encoded = encode(vlm, ["How?", "Why is that?"], [open_images(s) for s in shown[:2]])
    mask, seen = encoded.spans.image, []

    def look(_module: object, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    with torch.no_grad():
        before = vlm.model(**encoded.inputs).logits
        with spell_image_tokens(vlm, ["cat", "two words"], mask):
            handle = vlm.layout.layer(vlm.model, 0).register_forward_pre_hook(
                look, with_kwargs=True
            )
            inside = vlm.model(**encoded.inputs).logits
            handle.remove()
        plain = vlm.model(**encoded.inputs).logits
    assert torch.equal(plain, before)
    assert not torch.allclose(inside, before)
    ids = vlm.tokenizer(" two words", add_special_tokens=False)["input_ids"]
    own = vlm.layout.get(vlm.model, "embed_tokens")(torch.tensor(ids)).detach()
    written = seen[0][1][mask[1]]
    torch.testing.assert_close(written[: len(ids)], own[: len(written)])
    torch.testing.assert_close(written[-1], own[(len(written) - 1) % len(ids)])
    first = int(mask[0].nonzero()[0, 0])
    if family == "llava":  # causal from the first token on
        assert torch.equal(inside[0, :first], before[0, :first])


def test_answers_follow_the_name_and_not_the_picture(
    tiny: Callable[[str], VLM], shown: list[Sample]
) -> None:
    vlm = tiny("llava")
    asked = [shown[0], shown[1]]
    same = [Sample(s.id, "How?", images=s.images) for s in asked]
    one, other = answer_spelled(vlm, same, ["cat", "cat"], max_new_tokens=4, batch_size=1)
    assert one == other
    own = generate_answers(vlm, ["How?"], [open_images(same[0])], max_new_tokens=4)
    assert [one] != own
    assert measure_spelled(vlm, same, ["cat", "cat"], one.__eq__, max_new_tokens=4) == (True, True)


def test_bad_input_is_refused(tiny: Callable[[str], VLM], shown: list[Sample]) -> None:
    vlm = tiny("llava")
    with pytest.raises(DataError, match="1 names for 2 samples"):
        answer_spelled(vlm, shown[:2], ["cat"])
    with pytest.raises(DataError, match="a name is empty"):
        answer_spelled(vlm, shown[:1], [" "])
    with pytest.raises(DataError, match="needs a picture"):
        answer_spelled(vlm, [Sample("a", "How?")], ["cat"])
    mllama = tiny("mllama")
    with (
        pytest.raises(SettingError, match="cross-attention"),
        spell_image_tokens(mllama, ["cat"], torch.ones(1, 3, dtype=torch.bool)),
    ):
        pass


def test_a_prompt_that_never_comes_is_told(tiny: Callable[[str], VLM]) -> None:
    vlm = tiny("llava")
    ids = torch.tensor([[5, 6, 7]])
    with (
        pytest.raises(SettingError, match="no pass over all 9 positions"),
        torch.no_grad(),
        spell_image_tokens(vlm, ["cat"], torch.ones(1, 9, dtype=torch.bool)),
    ):
        vlm.model(input_ids=ids)

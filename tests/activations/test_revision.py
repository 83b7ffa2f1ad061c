"""Revisions: exact tokens under padding, caches, beams, chunks and speculation; nothing left."""

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safebridge.activations.gate import Gate
from safebridge.activations.revision import Edit, apply_edits, shift_activations
from safebridge.activations.scopes import SCOPES, TokenScope, mark_tokens
from safebridge.activations.sites import PLACES, place_shape
from safebridge.data.sample import Sample
from safebridge.errors import SafebridgeError, SettingError, ShapeError
from safebridge.methods.security_tensors.application import apply_tensors
from safebridge.models.load import VLM

FAMILIES = ["gemma3", "instructblip", "llava", "mllama", "paligemma", "qwen2_vl", "qwen3_vl"]
CLOSE = {"atol": 2e-4, "rtol": 2e-3}
NEW = 4


def shift_of(vlm: VLM, place: str, layer: int, size: float = 0.7) -> Edit:
    width = int(torch.tensor(place_shape(vlm.layout, place)).prod())
    generator = torch.Generator().manual_seed(layer)
    return Edit(place, layer, size * torch.randn(width, generator=generator))


def edits_of(vlm: VLM) -> list[Edit]:
    return [shift_of(vlm, "heads", 1), shift_of(vlm, "resid_out", 0), shift_of(vlm, "mlp_out", 2)]


@torch.no_grad()
def logits_of(vlm: VLM, inputs: dict[str, Any], **more: Any) -> Tensor:
    logits: Tensor = vlm.model(**inputs, **more).logits
    return logits


def state_of(vlm: VLM) -> tuple[set[str], list[int]]:
    hooks = [
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in vlm.model.modules()
    ]
    return set(vlm.model.__dict__), hooks


class PlainLoop:
    """An independent oracle: adds vectors at marked columns of one uncached pass."""

    def __init__(self, vlm: VLM, edits: Sequence[Edit], mask: Tensor) -> None:
        self.vlm, self.edits, self.mask, self.stack = vlm, edits, mask, ExitStack()

    def __enter__(self) -> None:
        layers = self.vlm.layout.get(self.vlm.model, "decoder_layers")
        for edit in self.edits:
            layer = layers[edit.layer]
            is_cross = edit.layer in self.vlm.layout.cross_attention_layers
            attention = layer.cross_attn if is_cross else layer.self_attn
            names = ("o_proj", "out_proj", "dense")
            output = next(getattr(attention, name) for name in names if hasattr(attention, name))
            module = {"heads": output, "resid_out": layer, "mlp_out": layer.mlp}[edit.place]
            if edit.place == "heads":
                handle = module.register_forward_pre_hook(self.before(edit.shift))
            else:
                handle = module.register_forward_hook(self.after(edit.shift))
            self.stack.callback(handle.remove)

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def add(self, hidden: Tensor, shift: Tensor) -> Tensor:
        new = hidden.clone()
        for row in range(hidden.shape[0]):
            for column in range(hidden.shape[1]):
                if self.mask[row, column]:
                    new[row, column] += shift
        return new

    def before(self, shift: Tensor) -> Callable[..., Any]:
        return lambda _module, args: (self.add(args[0], shift), *args[1:])

    def after(self, shift: Tensor) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (self.add(output[0], shift), *output[1:])
            return self.add(output, shift)

        return hook


def plain_mask(vlm: VLM, inputs: dict[str, Any], scope: str, count: int, width: int) -> Tensor:
    """Mark the scope by looking at one token after the other."""
    ids, real = inputs["input_ids"], inputs["attention_mask"]
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row in range(ids.shape[0]):
        prompt = [c for c in range(width) if real[row, c]]
        answer = [c for c in range(width, ids.shape[1]) if real[row, c]]
        image = [c for c in prompt if ids[row, c] == vlm.layout.image_token_id]
        end = prompt[-count:]
        chosen = {
            "all": prompt + answer,
            "prompt": prompt,
            "decode_only": answer,
            "last_and_decode": end + answer,
            "last_k": end,
            "image": image,
            "text": [c for c in prompt + answer if c not in image],
        }[scope]
        mask[row, chosen] = True
    return mask


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_of_a_padded_batch_equals_the_plain_loop(
    tiny: Any, inputs_of: Any, continued: Any, samples: list[Sample], family: str, scope: str
) -> None:
    vlm, count = tiny(family), 2
    inputs, edits = inputs_of(vlm, samples[:3]), edits_of(vlm)
    width = inputs["input_ids"].shape[1]
    with apply_edits(vlm, edits, scope=TokenScope(scope, count)), torch.no_grad():
        output = vlm.model.generate(
            **inputs,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    longer = continued(vlm, inputs, output.sequences)
    with PlainLoop(vlm, edits, plain_mask(vlm, longer, scope, count, width)):
        expected = logits_of(vlm, longer)
    for step, logits in enumerate(output.logits):
        torch.testing.assert_close(logits.float(), expected[:, width - 1 + step], **CLOSE)


@pytest.mark.parametrize("scope", ["last_and_decode", "text", "last_k"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_without_a_cache_equals_generation_with_one(
    tiny: Any, inputs_of: Any, samples: list[Sample], family: str, scope: str
) -> None:
    vlm = tiny(family)
    inputs = inputs_of(vlm, samples[:2])
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    with apply_edits(vlm, edits_of(vlm), scope=TokenScope(scope)), torch.no_grad():
        cached = vlm.model.generate(**inputs, **options)
        plain = vlm.model.generate(**inputs, **options, use_cache=False)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_its_rows(
    tiny: Any, inputs_of: Any, samples: list[Sample], side: str, scope: str
) -> None:
    vlm = tiny("llava")
    batch = inputs_of(vlm, samples[:3], side)
    with apply_edits(vlm, edits_of(vlm), scope=TokenScope(scope, 2)):
        together = logits_of(vlm, batch)
        for row, sample in enumerate(samples[:3]):
            alone = logits_of(vlm, inputs_of(vlm, [sample]))[0]
            found = together[row, batch["attention_mask"][row].bool()]
            torch.testing.assert_close(found, alone, **CLOSE)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "mllama", "gemma3"])
def test_given_answers_score_as_if_they_had_been_generated(
    tiny: Any, inputs_of: Any, continued: Any, samples: list[Sample], family: str, scope: str
) -> None:
    vlm = tiny(family)
    inputs, edits = inputs_of(vlm, samples[:2]), edits_of(vlm)
    width = inputs["input_ids"].shape[1]
    with apply_edits(vlm, edits, scope=TokenScope(scope)), torch.no_grad():
        output = vlm.model.generate(
            **inputs,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    longer = continued(vlm, inputs, output.sequences)
    start = torch.full((2,), width)
    with apply_edits(vlm, edits, scope=TokenScope(scope), answer_start=start):
        found = logits_of(vlm, longer)
    for step, logits in enumerate(output.logits):
        torch.testing.assert_close(logits.float(), found[:, width - 1 + step], **CLOSE)


@pytest.mark.parametrize("scope", ["last_and_decode", "decode_only", "image", "last_k"])
def test_beams_have_the_scores_of_one_full_pass(
    tiny: Any, inputs_of: Any, continued: Any, samples: list[Sample], scope: str
) -> None:
    vlm = tiny("llava")
    inputs, edits = inputs_of(vlm, samples[:2]), edits_of(vlm)
    width = inputs["input_ids"].shape[1]
    with apply_edits(vlm, edits, scope=TokenScope(scope)), torch.no_grad():
        output = vlm.model.generate(
            **inputs,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            num_beams=3,
            num_return_sequences=2,
            length_penalty=0.0,
            suppress_tokens=None,
            return_dict_in_generate=True,
            output_scores=True,
        )
    rows = {k: v.repeat_interleave(2, dim=0) for k, v in inputs.items() if k != "pixel_values"}
    rows["pixel_values"] = inputs["pixel_values"].repeat_interleave(2, dim=0)
    longer = continued(vlm, rows, output.sequences)
    with PlainLoop(vlm, edits, plain_mask(vlm, longer, scope, 1, width)):
        logits = logits_of(vlm, longer)[:, width - 1 : -1]
    # Only the model's end token may not come early; it is left out of the softmax at no step.
    chosen = output.sequences[:, width:]
    expected = logits.log_softmax(-1).gather(-1, chosen[..., None])[..., 0].sum(-1)
    found = output.sequences_scores
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("scope", SCOPES)
def test_speculative_decoding_equals_greedy_decoding(
    tiny: Any, inputs_of: Any, samples: list[Sample], scope: str
) -> None:
    vlm = tiny("llava")
    inputs = inputs_of(vlm, samples[:1])
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    # A small shift keeps the random model repeating itself, so that candidates are accepted.
    edits = [shift_of(vlm, "resid_out", 1, 0.3)]
    with apply_edits(vlm, edits, scope=TokenScope(scope)), torch.no_grad():
        greedy = vlm.model.generate(**inputs, **options)
        guessed = vlm.model.generate(**inputs, **options, prompt_lookup_num_tokens=3)
    assert torch.equal(greedy, guessed)


@pytest.mark.parametrize("scope", [name for name in SCOPES if name != "image"])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_a_prompt_in_chunks_equals_the_prompt_at_once(
    tiny: Any, inputs_of: Any, samples: list[Sample], scope: str, size: int
) -> None:
    vlm = tiny("llava")
    text = [Sample(id=s.id, prompt=s.prompt) for s in samples[:2]]
    inputs = inputs_of(vlm, text)
    options: dict[str, Any] = {
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with apply_edits(vlm, edits_of(vlm), scope=TokenScope(scope, 2)), torch.no_grad():
        whole = vlm.model.generate(**inputs, **options)
        parts = vlm.model.generate(**inputs, **options, prefill_chunk_size=size)
    assert torch.equal(whole.sequences, parts.sequences)
    for one, other in zip(whole.logits, parts.logits, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("scope", [name for name in SCOPES if name != "image"])
def test_a_prompt_fed_by_hand_in_chunks_needs_to_know_where_it_ends(
    tiny: Any, inputs_of: Any, samples: list[Sample], scope: str
) -> None:
    vlm = tiny("llava")
    inputs = inputs_of(vlm, [Sample(id=s.id, prompt=s.prompt) for s in samples[:2]])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    start = torch.full((2,), ids.shape[1] - 2)
    options = {"scope": TokenScope(scope, 3), "answer_start": start}
    with apply_edits(vlm, edits_of(vlm), **options), torch.no_grad():
        full = logits_of(vlm, inputs)
        cache, parts = None, []
        for begin in range(0, ids.shape[1], 4):
            end = min(begin + 4, ids.shape[1])
            output = vlm.model(
                input_ids=ids[:, begin:end],
                attention_mask=mask[:, :end],
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            parts.append(output.logits)
    found = torch.cat(parts, dim=1)
    torch.testing.assert_close(found[mask.bool()], full[mask.bool()], **CLOSE)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_cache_that_is_continued_by_hand_equals_generation(
    tiny: Any, inputs_of: Any, continued: Any, samples: list[Sample], scope: str
) -> None:
    vlm = tiny("llava")
    inputs = inputs_of(vlm, samples[:2])
    width, edits = inputs["input_ids"].shape[1], edits_of(vlm)
    with apply_edits(vlm, edits, scope=TokenScope(scope)), torch.no_grad():
        output = vlm.model(**inputs, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
        longer = continued(vlm, inputs, torch.cat([inputs["input_ids"], token], dim=1))
        step = vlm.model(
            input_ids=token,
            attention_mask=longer["attention_mask"],
            past_key_values=output.past_key_values,
            use_cache=True,
        )
    with PlainLoop(vlm, edits, plain_mask(vlm, longer, scope, 1, width)):
        expected = logits_of(vlm, longer)
    torch.testing.assert_close(step.logits[:, -1], expected[:, -1], **CLOSE)


def test_an_open_gate_revises_its_row_and_a_closed_one_leaves_its_own(
    tiny: Any, inputs_of: Any, samples: list[Sample]
) -> None:
    vlm = tiny("llava")
    states = last_states(vlm, [inputs_of(vlm, [s]) for s in samples[:2]], layer=1)
    # Open for the first sample and closed for the second.
    weight = states[0] - states[1]
    gate = Gate("probe", 1, weight, torch.zeros_like(weight), 0.0, 0.0)
    gate = Gate("probe", 1, weight, gate.center, 0.0, float(gate.score(states).mean()))
    edits, scope = edits_of(vlm), TokenScope("all")
    inputs = inputs_of(vlm, samples[:2])
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    generate: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True, **options}
    with torch.no_grad():
        with apply_edits(vlm, edits, scope=scope):
            always = vlm.model.generate(**inputs, **generate)
        never = vlm.model.generate(**inputs, **generate)
        with apply_edits(vlm, edits, scope=scope, gate=gate):
            gated = vlm.model.generate(**inputs, **generate)
            beams = vlm.model.generate(**inputs, **options, num_beams=2)
            found = logits_of(vlm, inputs)
        with apply_edits(vlm, edits, scope=scope):
            open_beams = vlm.model.generate(**inputs, **options, num_beams=2)
        closed_beams = vlm.model.generate(**inputs, **options, num_beams=2)
    for step in range(NEW):
        torch.testing.assert_close(gated.logits[step][0], always.logits[step][0], **CLOSE)
        torch.testing.assert_close(gated.logits[step][1], never.logits[step][1], **CLOSE)
    torch.testing.assert_close(found[:, -1], gated.logits[0], **CLOSE)
    assert torch.equal(beams[0], open_beams[0])
    assert torch.equal(beams[1], closed_beams[1])
    assert not torch.allclose(always.logits[0], never.logits[0], atol=1e-2)


def last_states(vlm: VLM, batches: list[dict[str, Any]], layer: int) -> Tensor:
    found = []
    handle = vlm.layout.layer(vlm.model, layer).register_forward_hook(
        lambda _m, _a, out: found.append((out[0] if isinstance(out, tuple) else out)[0, -1])
    )
    for inputs in batches:
        logits_of(vlm, inputs)
    handle.remove()
    return torch.stack(found)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["llava", "mllama", "gemma3"])
def test_every_place_changes_the_logits_and_is_given_back(
    tiny: Any, inputs_of: Any, samples: list[Sample], family: str, place: str
) -> None:
    vlm = tiny(family)
    inputs, state = inputs_of(vlm, samples[:1]), state_of(vlm)
    weights = copy.deepcopy(vlm.model.state_dict())
    before = logits_of(vlm, inputs)
    for layer in range(vlm.layout.num_layers):
        with apply_edits(vlm, [shift_of(vlm, place, layer)], scope=TokenScope("all")):
            assert not torch.allclose(logits_of(vlm, inputs), before, atol=1e-3)
    assert torch.equal(logits_of(vlm, inputs), before)
    assert state_of(vlm) == state
    assert all(torch.equal(v, weights[k]) for k, v in vlm.model.state_dict().items())


def test_the_model_is_given_back_after_an_error(
    tiny: Any, inputs_of: Any, samples: list[Sample]
) -> None:
    vlm = tiny("llava")
    state = state_of(vlm)

    def fail() -> None:
        with apply_edits(vlm, edits_of(vlm)):
            logits_of(vlm, inputs_of(vlm, samples[:1]))
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert state_of(vlm) == state


def test_the_norm_guard_keeps_every_heads_length(
    tiny: Any, inputs_of: Any, samples: list[Sample]
) -> None:
    vlm = tiny("llava")
    seen: list[Tensor] = []
    output = vlm.layout.in_layer(vlm.model, 1, "attention_output")
    edit, inputs = shift_of(vlm, "heads", 1), inputs_of(vlm, samples[:1])
    for guard in ("none", "keep"):
        with apply_edits(vlm, [edit], scope=TokenScope("all"), norm_guard=guard):
            handle = output.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
            logits_of(vlm, inputs)
            handle.remove()
    free, kept = (x.unflatten(-1, (vlm.layout.num_heads, -1)) for x in seen)
    plain = free - edit.shift.view(vlm.layout.num_heads, -1)
    torch.testing.assert_close(kept.norm(dim=-1), plain.norm(dim=-1))
    torch.testing.assert_close(kept / kept.norm(dim=-1, keepdim=True),
                               free / free.norm(dim=-1, keepdim=True))  # fmt: skip


def test_a_guarded_shift_leaves_other_tokens_bit_for_bit() -> None:
    hidden = torch.randn(2, 3, 8)
    mask = torch.tensor([[True, False, True], [False, False, True]])[..., None]
    new = shift_activations(hidden, torch.ones(8), mask, guarded_parts=2)
    still = ~mask.expand_as(hidden)
    assert torch.equal(new[still], hidden[still])
    assert not torch.allclose(new[~still], hidden[~still])


def test_half_precision_models_are_revised_in_their_own_type(
    inputs_of: Any, samples: list[Sample]
) -> None:
    from safebridge.models.load import load_vlm  # noqa: PLC0415 - a model of its own

    vlm = load_vlm("tiny/llava", dtype="bfloat16")
    with apply_edits(vlm, edits_of(vlm)):
        assert logits_of(vlm, inputs_of(vlm, samples[:2])).dtype == torch.bfloat16


def test_baked_output_bias_equals_the_hook_in_scope_all(
    inputs_of: Any, samples: list[Sample]
) -> None:
    from safebridge.testing.tiny import tiny_vlm  # noqa: PLC0415 - a model to write into

    vlm, baked = tiny_vlm("llava"), tiny_vlm("llava")
    edits = [shift_of(vlm, "heads", layer) for layer in (0, 2)]
    for edit in edits:
        output = baked.layout.in_layer(baked.model, edit.layer, "attention_output")
        with torch.no_grad():
            output.bias = nn.Parameter(output.weight @ edit.shift)
    inputs = inputs_of(vlm, samples[:3])
    with apply_edits(vlm, edits, scope=TokenScope("all")):
        found = logits_of(vlm, inputs)
    expected = logits_of(baked, inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)


def test_a_method_that_inserts_tokens_goes_inside(
    tiny: Any, inputs_of: Any, samples: list[Sample]
) -> None:
    vlm = tiny("llava")
    inputs, tokens = inputs_of(vlm, samples[:2]), torch.randn(3, vlm.layout.hidden_size)
    edits = [shift_of(vlm, "resid_out", 1)]
    with apply_tensors(vlm, tokens=tokens, pixels=None):
        plain = logits_of(vlm, inputs)
    with apply_edits(vlm, edits), apply_tensors(vlm, tokens=tokens, pixels=None):
        inside = logits_of(vlm, inputs)
        vlm.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    # The last prompt token alone is revised, so nothing before it changes.
    torch.testing.assert_close(inside[:, :-1], plain[:, :-1], **CLOSE)
    assert not torch.allclose(inside[:, -1], plain[:, -1], atol=1e-2)
    with (
        apply_tensors(vlm, tokens=tokens, pixels=None),
        apply_edits(vlm, edits),
        pytest.raises(SafebridgeError, match="Apply the revision first"),
    ):
        logits_of(vlm, inputs)


def test_mark_tokens_follows_prompts_that_go_on() -> None:
    real = torch.tensor([[True, True, True, True]])
    image = torch.tensor([[True, False, False, False]])
    start = torch.tensor([6])  # two more prompt tokens come after these four columns
    assert mark_tokens(TokenScope("last_k", 3), real, image, start).tolist() == [
        [False, False, False, True]
    ]
    assert not mark_tokens(TokenScope("decode_only"), real, image, start).any()


@pytest.mark.parametrize(
    ("call", "error", "advice"),
    [
        (lambda _: TokenScope("everywhere"), SettingError, "Choose last_and_decode"),
        (lambda _: TokenScope("all", 0), SettingError, "must be at least 1"),
        (
            lambda vlm: apply_edits(vlm, [], norm_guard="off").__enter__(),
            SettingError,
            "Choose none or keep",
        ),
        (
            lambda vlm: apply_edits(vlm, [Edit("resid_out", 0, torch.ones(3))]).__enter__(),
            ShapeError,
            "or fit again",
        ),
    ],
)
def test_errors_say_what_to_do(tiny: Any, call: Any, error: type[Exception], advice: str) -> None:
    with pytest.raises(error, match=advice):
        call(tiny("llava"))


def test_image_scope_needs_to_see_the_tokens(tiny: Any) -> None:
    vlm = tiny("llava")
    embeds = torch.zeros(1, 3, vlm.layout.hidden_size)
    with (
        apply_edits(vlm, edits_of(vlm), scope=TokenScope("image")),
        pytest.raises(SettingError, match="not with inputs_embeds"),
    ):
        logits_of(vlm, {"inputs_embeds": embeds})

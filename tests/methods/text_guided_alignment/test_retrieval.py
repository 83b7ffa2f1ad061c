import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor

from safebridge.data.sample import Sample
from safebridge.errors import DataError, MissingExtraError, SettingError
from safebridge.methods.text_guided_alignment import retrieval
from safebridge.methods.text_guided_alignment.retrieval import (
    ContrastiveEmbedder,
    EncoderEmbedder,
    PictureEmbedder,
    StateEmbedder,
    TextIndex,
    WordEmbedder,
    add_retrieved,
)
from safebridge.models.load import VLM
from safebridge.testing.tiny import tiny_vlm

CORPUS = [
    "A red bicycle in the street.",
    "a red  bicycle in the street.",
    "A blue bicycle on the street.",
    "A bowl of soup.",
    "   ",
]


def index(backend: str = "exact", texts: Sequence[str] = CORPUS) -> TextIndex:
    return TextIndex(texts, WordEmbedder(256), backend=backend)


def retrieved(caption: str, **options: str) -> str:
    sample = Sample("a", "Why?", (Path("a.png"),), caption=caption)
    return next(add_retrieved([sample], index(), **options)).retrieved


def test_texts_that_differ_in_case_and_space_alone_are_one() -> None:
    assert len(index().texts) == 3


def test_the_nearest_other_text_is_taken() -> None:
    assert retrieved("A red bicycle in the street.") == "A blue bicycle on the street."
    assert retrieved("A green bicycle on the street!") == "A blue bicycle on the street."


def test_a_self_match_is_handled_as_asked() -> None:
    own = "A bowl of soup."
    assert retrieved(own, self_match="keep") == own
    assert retrieved(own, self_match="halve") == own[: len(own) // 2]
    assert retrieved(own, self_match="exclude") not in {"", own}


def test_a_corpus_of_the_own_caption_alone_gives_nothing() -> None:
    sample = Sample("a", "Why?", (Path("a.png"),), caption="A bowl of soup.")
    found = next(add_retrieved([sample], index(texts=["a bowl of soup."])))
    assert found.retrieved == ""


def test_samples_that_need_nothing_pass_through() -> None:
    samples = [Sample("a", "Why?"), Sample("b", "Why?", caption="x", retrieved="known")]
    assert list(add_retrieved(samples, index())) == samples


def test_texts_are_retrieved_as_the_samples_come() -> None:
    taken = []

    def endless() -> Iterator[Sample]:
        for number in range(10_000):
            taken.append(number)
            yield Sample(str(number), "Why?", caption="soup")

    assert next(add_retrieved(endless(), index())).retrieved == "A bowl of soup."
    assert len(taken) < 1_000


class Drawn:
    """Random vectors that stay the same for the same text."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        rows = [
            torch.randn(8, generator=torch.Generator().manual_seed(int(text))) for text in texts
        ]
        return torch.stack(rows) + 5.0


@pytest.mark.parametrize("block", [65_536, 7], ids=["whole", "blocks"])
@pytest.mark.parametrize("is_centred", [False, True])
def test_the_exact_search_equals_a_plain_loop(
    monkeypatch: pytest.MonkeyPatch, block: int, *, is_centred: bool
) -> None:
    monkeypatch.setattr(retrieval, "_BLOCK", block)
    texts = [str(number) for number in range(40)]
    corpus = TextIndex(texts, Drawn(), is_centred=is_centred)
    queries = Drawn().embed_texts(["100", "101"])
    scores, numbers = corpus.search(queries, 3)
    vectors = Drawn().embed_texts(texts)
    middle = vectors.mean(dim=0) if is_centred else torch.zeros(8)
    for row, query in enumerate(queries):
        plain = [
            torch.cosine_similarity(query - middle, vector - middle, dim=0).item()
            for vector in vectors
        ]
        best = sorted(range(40), key=lambda number: -plain[number])[:3]
        assert numbers[row].tolist() == best
        assert scores[row].tolist() == pytest.approx([plain[number] for number in best], abs=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # FAISS's wrappers raise some on import
@pytest.mark.parametrize("backend", ["faiss", "faiss-hnsw"])
def test_faiss_finds_what_the_exact_search_finds(backend: str) -> None:
    pytest.importorskip("faiss")
    texts = [str(number) for number in range(200)]
    queries = Drawn().embed_texts(["1000", "1001", "1002"])
    expected, numbers = TextIndex(texts, Drawn()).search(queries, 2)
    scores, found = TextIndex(texts, Drawn(), backend=backend).search(queries, 2)
    assert found.tolist() == numbers.tolist()
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)


def test_a_missing_faiss_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtraError, match="retrieval"):
        index("faiss")


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(SettingError, match="exact, faiss"):
        index("annoy")
    with pytest.raises(DataError, match="at least one"):
        index(texts=[" "])
    with pytest.raises(SettingError, match="exclude, halve or keep"):
        retrieved("x", self_match="guess")
    with pytest.raises(SettingError, match="ContrastiveEmbedder"):
        retrieved("x", by="picture")


def test_states_of_the_model_are_vectors_too(tiny: Callable[[str], VLM]) -> None:
    embedder = StateEmbedder(tiny("llava"), layer=-2, batch_size=2)
    vectors = embedder.embed_texts(["a cat", "a dog", "a cat"])
    assert vectors.shape == (3, 32)
    torch.testing.assert_close(vectors[0], vectors[2])
    assert not torch.allclose(vectors[0], vectors[1])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = tiny_vlm("llava").tokenizer
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    hf.LlamaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_sentence_encoder_ignores_padding(encoder: str) -> None:
    embedder = EncoderEmbedder(encoder)
    vectors = embedder.embed_texts(["a cat", "a very long text about dogs"])
    torch.testing.assert_close(vectors[0], embedder.embed_texts(["a cat"])[0])


@pytest.fixture(scope="module")
def contrastive(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = tiny_vlm("llava").tokenizer
    tokenizer.model_max_length = 40
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 40,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    hf.CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": 16, "width": 16}
    hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder)
    return str(folder)


def test_pictures_find_texts_by_contrastive_scores(contrastive: str, pictures: list[Path]) -> None:
    embedder = ContrastiveEmbedder(contrastive, batch_size=2)
    assert isinstance(embedder, PictureEmbedder)
    corpus = TextIndex(CORPUS, embedder)
    samples = [Sample(str(n), "Why?", (path,)) for n, path in enumerate(pictures[:3])]
    found = list(add_retrieved(samples, corpus, by="picture"))
    best = torch.nn.functional.normalize(embedder.embed_pictures(samples)) @ corpus.vectors.T
    expected = [corpus.texts[number] for number in best.argmax(dim=1).tolist()]
    assert [sample.retrieved for sample in found] == expected

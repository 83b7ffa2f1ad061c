"""The guiding text: for each picture, the nearest other text of a corpus."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Final, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from safebridge.data.sample import Sample, open_images
from safebridge.errors import DataError, SettingError
from safebridge.methods.text_guided_alignment.states import capture_text_states
from safebridge.models.load import VLM
from safebridge.optional import require

__all__ = [
    "ContrastiveEmbedder",
    "EncoderEmbedder",
    "PictureEmbedder",
    "StateEmbedder",
    "TextEmbedder",
    "TextIndex",
    "WordEmbedder",
    "add_retrieved",
]

_AT_ONCE: Final = 256
_BLOCK: Final = 65_536  # texts that are compared at once, to bound the memory
_WORD: Final = re.compile(r"\w+")
_BACKENDS: Final = ("exact", "faiss", "faiss-hnsw")
_HNSW_LINKS: Final = 32


@runtime_checkable
class TextEmbedder(Protocol):
    """Turns texts into vectors whose inner product says how alike they are."""

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "n width"]:
        """Return one vector for each text.

        Args:
            texts: Any texts.
        """
        ...


@runtime_checkable
class PictureEmbedder(Protocol):
    """A text embedder that puts pictures into the same space."""

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "n width"]:
        """Return one vector for each text.

        Args:
            texts: Any texts.
        """
        ...

    def embed_pictures(self, samples: Sequence[Sample]) -> Float[Tensor, "n width"]:
        """Return one vector for the first picture of each sample.

        Args:
            samples: Samples with pictures.
        """
        ...


@final
class WordEmbedder:
    """Hashed words and letter triples; needs no model, and knows spelling but no meaning.

    Args:
        width: Length of a vector.
    """

    def __init__(self, width: int = 2048) -> None:
        self.width = width

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "n width"]:
        """Return the square roots of how often each hash occurs.

        Args:
            texts: Any texts.
        """
        counts = torch.zeros(len(texts), self.width)
        for row, text in enumerate(texts):
            for word in _WORD.findall(text.casefold()):
                padded = f"#{word}#"
                for part in (padded, *(padded[i : i + 3] for i in range(len(padded) - 2))):
                    digest = hashlib.blake2b(part.encode(), digest_size=4).digest()
                    counts[row, int.from_bytes(digest, "big") % self.width] += 1
        return counts.sqrt()


@final
class StateEmbedder:
    """The language model's own states of a text: it sees what the guide loss sees.

    Args:
        vlm: The model.
        layer: Decoder layer from 0; negative numbers count from the end.
        batch_size: Texts at a time.
    """

    def __init__(self, vlm: VLM, *, layer: int = -1, batch_size: int = 32) -> None:
        self.vlm, self.layer = vlm, vlm.layout.layer_index(layer)
        self.batch_size = batch_size

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "n width"]:
        """Return mean states.

        Args:
            texts: Any texts.
        """
        parts = [
            capture_text_states(self.vlm, texts[start : start + self.batch_size], [self.layer])[0]
            for start in range(0, len(texts), self.batch_size)
        ]
        return torch.cat(parts).cpu()


@final
class EncoderEmbedder:
    """A sentence encoder of transformers: the mean of its last states, without padding.

    Args:
        name_or_path: A folder or hub name, e.g. "sentence-transformers/all-MiniLM-L6-v2".
        batch_size: Texts at a time.
    """

    def __init__(self, name_or_path: str, *, batch_size: int = 64) -> None:
        from transformers import AutoModel, AutoTokenizer  # noqa: PLC0415 - slow to import

        self.tokenizer: Any = AutoTokenizer.from_pretrained(name_or_path)
        self.model: Any = AutoModel.from_pretrained(name_or_path).eval()
        self.batch_size = batch_size

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "n width"]:
        """Return mean last states.

        Args:
            texts: Any texts.
        """
        parts = []
        for start in range(0, len(texts), self.batch_size):
            chunk = list(texts[start : start + self.batch_size])
            inputs = self.tokenizer(chunk, padding=True, truncation=True, return_tensors="pt")
            hidden = self.model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None].to(hidden.dtype)
            parts.append((hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1))
        return torch.cat(parts).float()


@final
class ContrastiveEmbedder:
    """A model such as CLIP or SigLIP, which scores pictures against texts.

    Args:
        name_or_path: A folder or hub name, e.g. "openai/clip-vit-base-patch32".
        batch_size: Texts or pictures at a time.

    Source:
        Xu et al. 2024 (arXiv:2410.12662) retrieve by such scores, of BEIT-3, which
        transformers does not have.
    """

    def __init__(self, name_or_path: str, *, batch_size: int = 32) -> None:
        from transformers import (  # noqa: PLC0415 - slow to import
            AutoImageProcessor,
            AutoModel,
            AutoTokenizer,
        )

        self.tokenizer: Any = AutoTokenizer.from_pretrained(name_or_path)
        self.image_processor: Any = AutoImageProcessor.from_pretrained(name_or_path, backend="pil")
        self.model: Any = AutoModel.from_pretrained(name_or_path).eval()
        self.batch_size = batch_size

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "n width"]:
        """Return the model's text features.

        Args:
            texts: Any texts; cut at the model's longest.
        """
        parts = []
        for start in range(0, len(texts), self.batch_size):
            chunk = list(texts[start : start + self.batch_size])
            # SigLIP was trained on texts padded to the full length, CLIP does not mind.
            inputs = self.tokenizer(
                chunk, padding="max_length", truncation=True, return_tensors="pt"
            )
            parts.append(_features(self.model.get_text_features(**inputs)))
        return torch.cat(parts)

    @torch.inference_mode()
    def embed_pictures(self, samples: Sequence[Sample]) -> Float[Tensor, "n width"]:
        """Return the model's features of each sample's first picture.

        Args:
            samples: Samples with pictures.
        """
        parts = []
        for start in range(0, len(samples), self.batch_size):
            pictures = [open_images(s)[0] for s in samples[start : start + self.batch_size]]
            inputs = self.image_processor(pictures, return_tensors="pt")
            parts.append(_features(self.model.get_image_features(**inputs)))
        return torch.cat(parts)


@final
class TextIndex:
    """The different texts of a corpus, ready to be searched.

    Texts that differ in case and white space alone are one text, so that at most one of
    the neighbours of a caption is the caption itself.

    Args:
        texts: The corpus; also an iterator.
        embedder: Makes vectors of texts.
        backend: "exact" (everything is compared), "faiss" (the same, faster) or
            "faiss-hnsw" (a graph, for millions of texts).
        is_centred: Subtract the corpus's mean vector before comparing. Right for hidden
            states, whose cosines are near 1 otherwise.

    Raises:
        DataError: If the corpus is empty.
        SettingError: If there is no such backend.
        MissingExtraError: If FAISS is asked for and not installed.
    """

    def __init__(
        self,
        texts: Iterable[str],
        embedder: TextEmbedder,
        *,
        backend: str = "exact",
        is_centred: bool = False,
    ) -> None:
        if backend not in _BACKENDS:
            raise SettingError(f"backend={backend!r} is unknown. Choose {', '.join(_BACKENDS)}.")
        different = {_plain(text): text for text in texts if text.strip()}
        if not different:
            raise DataError("no texts to retrieve from. Give a corpus with at least one.")
        self.texts, self.embedder = list(different.values()), embedder
        vectors = torch.cat([embedder.embed_texts(chunk) for chunk in _chunks(self.texts)]).float()
        self.mean = vectors.mean(dim=0) if is_centred else torch.zeros(vectors.shape[1])
        self.vectors = self._unit(vectors)
        self._faiss = _build_faiss(self.vectors, backend)

    def search(
        self, vectors: Float[Tensor, "n width"], k: int
    ) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        """Return the nearest texts of each vector, nearest first.

        Args:
            vectors: Vectors of the same embedder, of any length.
            k: Neighbours wanted; cut to the number of texts.

        Returns:
            Cosines and numbers of texts.
        """
        k = min(k, len(self.texts))
        queries = self._unit(vectors.float())
        if self._faiss is not None:
            scores, numbers = self._faiss.search(queries.numpy(), k)
            return torch.from_numpy(scores), torch.from_numpy(numbers)
        best: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(self.texts), _BLOCK):
            scores = queries @ self.vectors[start : start + _BLOCK].T
            top = scores.topk(min(k, scores.shape[1]), dim=1)
            best.append((top.values, top.indices + start))
        scores = torch.cat([values for values, _ in best], dim=1)
        top = scores.topk(k, dim=1)
        return top.values, torch.cat([found for _, found in best], dim=1).gather(1, top.indices)

    def _unit(self, vectors: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
        return functional.normalize(vectors - self.mean, dim=-1).contiguous()


def add_retrieved(
    samples: Iterable[Sample], index: TextIndex, *, by: str = "caption", self_match: str = "exclude"
) -> Iterator[Sample]:
    """Yield samples with the nearest text of a corpus, a few hundred at a time.

    Samples with a retrieved text, or without what is searched by, pass through as they are.

    Args:
        samples: What to guide; not changed.
        index: The corpus.
        by: "caption" compares captions, "picture" the pictures themselves, which needs an
            embedder of pictures.
        self_match: What to do when the nearest text is the sample's own caption: "exclude"
            takes the next one, "halve" the first half of its letters (as the authors'
            loader does), "keep" takes it as it is.

    Yields:
        The samples in their order. Where the corpus has nothing but the own caption,
        "exclude" leaves `retrieved` empty.

    Raises:
        SettingError: If `by` or `self_match` is unknown, or the embedder knows no pictures.
    """
    if by not in {"caption", "picture"} or self_match not in {"exclude", "halve", "keep"}:
        raise SettingError(
            f"by={by!r}, self_match={self_match!r} is unknown. Choose by caption or picture, and "
            "exclude, halve or keep."
        )
    embedder = index.embedder
    if by == "picture" and not isinstance(embedder, PictureEmbedder):
        raise SettingError(
            f'{type(embedder).__name__} knows no pictures. Use by="caption", or a '
            "ContrastiveEmbedder."
        )
    rest = iter(samples)
    while chunk := list(islice(rest, _AT_ONCE)):
        wanted = [
            s for s in chunk if not s.retrieved and (s.images if by == "picture" else s.caption)
        ]
        found: dict[int, str] = {}
        if wanted and isinstance(embedder, PictureEmbedder) and by == "picture":
            vectors = embedder.embed_pictures(wanted)
        elif wanted:
            vectors = embedder.embed_texts([sample.caption for sample in wanted])
        if wanted:
            _, numbers = index.search(vectors, 2)  # at most one of two is the own caption
            for sample, own in zip(wanted, numbers.tolist(), strict=True):
                near = [index.texts[number] for number in own if number >= 0]
                found[id(sample)] = _choose(sample.caption, near, self_match)
        for sample in chunk:
            text = found.get(id(sample))
            yield sample if text is None else replace(sample, retrieved=text)


def _choose(caption: str, near: Sequence[str], self_match: str) -> str:
    first = near[0] if near else ""
    if _plain(first) != _plain(caption) or self_match == "keep":
        return first
    if self_match == "halve":
        return first[: len(first) // 2]
    return near[1] if len(near) > 1 else ""


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), _AT_ONCE):
        yield texts[start : start + _AT_ONCE]


def _features(output: Any) -> Float[Tensor, "n width"]:
    """Return features, which newer versions of transformers wrap."""
    features = output if isinstance(output, Tensor) else output.pooler_output
    return features.float()


def _build_faiss(vectors: Float[Tensor, "n width"], backend: str) -> Any:
    """Return a FAISS index over unit vectors, or None for the exact search."""
    if backend == "exact":
        return None
    faiss = require("faiss", extra="retrieval")
    width = vectors.shape[1]
    if backend == "faiss":
        index = faiss.IndexFlatIP(width)
    else:
        index = faiss.IndexHNSWFlat(width, _HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    index.add(vectors.numpy())
    return index

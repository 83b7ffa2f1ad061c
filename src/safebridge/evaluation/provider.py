"""The Inspect AI model provider: a vision-language model, with or without a defense, in batches."""

import base64
import binascii
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import anyio
from anyio import to_thread
from inspect_ai.model import (
    ChatMessage,
    ContentImage,
    ContentText,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
)
from PIL import Image

from safebridge.data.sample import open_image
from safebridge.errors import ArtifactError, DataError, SafebridgeError
from safebridge.models.generate import generate_answers
from safebridge.models.load import VLM, load_vlm
from safebridge.registry import METHODS, resolve

__all__ = ["BatchCollector", "Request", "SafebridgeAPI", "as_path_reference", "open_reference"]

_PATH_PREFIX = "data:image/x-safebridge-path;base64,"
_DEFAULT_MAX_NEW_TOKENS = 24
_GATHER_BATCHES = 4  # sorting by length needs more than one batch to choose from


def as_path_reference(path: Path | str) -> str:
    """Return a data URI that holds the path of a picture instead of the picture.

    Inspect hands pictures to a provider as data URIs only; this one costs nothing to make, to
    carry and to check, whatever the size of the picture. Only `SafebridgeAPI` can read it.

    Args:
        path: The picture file, which is not opened here.
    """
    return _PATH_PREFIX + base64.b64encode(str(Path(path).absolute()).encode()).decode()


def open_reference(reference: str) -> Image.Image:
    """Open a picture from a data URI, from `as_path_reference` or from a plain path.

    Args:
        reference: What stands in `ContentImage.image`.

    Raises:
        DataError: If there is no picture behind it.
    """
    if not reference.startswith("data:"):
        return open_image(reference)
    head, _, payload = reference.partition(",")
    try:
        data = base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise DataError(f"picture '{head},...' is no valid base64. Encode it again.") from error
    if reference.startswith(_PATH_PREFIX):
        return open_image(data.decode())
    # Through a file, so that decoding and its errors are those of every other picture.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture"
        path.write_bytes(data)
        return open_image(path)


@final
@dataclass(eq=False)
class Request:
    """One question on its way through the collector."""

    prompt: str
    """The text of the user's turn."""

    images: tuple[str, ...]
    """References that `open_reference` can open."""

    max_new_tokens: int
    """Longest answer in tokens."""

    answer: str | None = None
    """Set with `done`, unless there is an error."""

    error: BaseException | None = None
    """Why there is no answer."""

    done: anyio.Event = field(default_factory=anyio.Event)
    """Set when there is an answer or an error."""


@final
class BatchCollector:
    """Gathers concurrent requests and answers them together in one worker thread.

    A batch starts when `gather` requests wait, when all the expected ones wait, or when no
    request has come for `quiet_seconds`. With `expected` given, which requests share a batch
    does not depend on timing, so the answers do not either.

    Args:
        answer: Answers a list of requests; runs in a worker thread, never twice at once.
        gather: How many requests to wait for.
        expected: How many requests will come in all, if known.
        quiet_seconds: How long to wait for the next one before a smaller batch starts.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Request]], Sequence[str]],
        *,
        gather: int,
        expected: int | None = None,
        quiet_seconds: float = 0.25,
    ) -> None:
        self._answer = answer
        self._gather = gather
        self._remaining = expected
        self._quiet_seconds = quiet_seconds
        self._waiting: list[Request] = []
        self._last_arrival = 0.0
        self._lock = anyio.Lock()

    async def ask(self, request: Request) -> str:
        """Wait for the answer to one request, answering a whole batch if it is our turn.

        Raises:
            Exception: Whatever went wrong with the batch of this request.
        """
        self._waiting.append(request)
        self._last_arrival = time.monotonic()
        if self._is_complete():
            await self._answer_batch(request)
        while not request.done.is_set():
            with anyio.move_on_after(self._quiet_seconds):
                await request.done.wait()
            is_quiet = time.monotonic() - self._last_arrival >= self._quiet_seconds
            if not request.done.is_set() and is_quiet:
                await self._answer_batch(request)
        if request.error is not None:
            raise request.error
        return request.answer or ""

    def _is_complete(self) -> bool:
        size = self._gather if self._remaining is None else min(self._gather, self._remaining)
        return len(self._waiting) >= size

    async def _answer_batch(self, request: Request) -> None:
        """Answer the waiting requests, unless another task has just done so."""
        async with self._lock:
            if request not in self._waiting:
                return
            batch = self._waiting[: self._gather]
            self._waiting = self._waiting[self._gather :]
            if self._remaining is not None:
                self._remaining -= len(batch)
            try:
                answers = await to_thread.run_sync(self._answer, batch)
                for each, answer in zip(batch, answers, strict=True):
                    each.answer = answer
            except BaseException as error:
                for each in batch:
                    each.error = error
                if not isinstance(error, Exception):
                    raise  # a cancellation is not ours to keep
            finally:
                for each in batch:
                    each.done.set()


@final
class SafebridgeAPI(ModelAPI):
    """Answers greedily with a Safebridge model; registered with Inspect as `safebridge`.

    On the command line: `inspect eval safebridge/twins --model safebridge/<name or path>
    -M defense=FOLDER`. From Python a loaded model can be handed over, with whatever defense is
    active on it when the questions come.

    Args:
        model_name: Name or path for `load_vlm`; only a label when `vlm` is given.
        base_url: Not used.
        api_key: Not used.
        config: Inspect's generation config; sampling is refused.
        vlm: An already loaded model.
        defense: Artifact folder of a method, applied until `close`.
        strength: Strength of that defense; 0 is the undefended model.
        batch_size: Questions answered together.
        expected: How many questions will come in all, if known; makes batches reproducible.
        progress: Called with the number of new answers, from a worker thread.
        **load_args: Passed to `load_vlm`, e.g. `revision` or `dtype`.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        *,
        vlm: VLM | None = None,
        defense: str | Path | None = None,
        strength: float = 1.0,
        batch_size: int = 16,
        expected: int | None = None,
        progress: Callable[[int], object] | None = None,
        **load_args: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        self.failure: SafebridgeError | None = None
        self._vlm = load_vlm(model_name, **load_args) if vlm is None else vlm
        self._batch_size = batch_size
        self._progress = progress
        self._stack = ExitStack()
        if defense is not None:
            method = _load_method(Path(defense), self._vlm)
            self._stack.enter_context(method.apply(self._vlm, strength=strength))
        self._collector = BatchCollector(
            self._answer,
            gather=self.max_connections(),
            expected=expected,
            quiet_seconds=0.25 if expected is None else 10.0,
        )

    async def generate(
        self,
        input: list[ChatMessage],  # noqa: A002 - Inspect's name
        tools: list[Any],
        tool_choice: Any,  # noqa: ARG002 - Inspect's signature
        config: GenerateConfig,
    ) -> ModelOutput:
        """Answer one user turn with text and pictures.

        Raises:
            DataError: If it is not one user turn, asks for tools or for sampling.
        """
        try:
            _check_config(tools, config)
            prompt, images = _read_turn(input)
            request = Request(prompt, images, config.max_tokens or _DEFAULT_MAX_NEW_TOKENS)
            answer = await self._collector.ask(request)
        except SafebridgeError as error:
            self.failure = self.failure or error
            raise
        return ModelOutput.from_content(model=self.model_name, content=answer)

    def max_tokens(self) -> int | None:
        """Return how long an answer is when nobody says otherwise."""
        return _DEFAULT_MAX_NEW_TOKENS

    def max_connections(self) -> int:
        """Return how many questions Inspect may have open, enough for several batches."""
        return _GATHER_BATCHES * self._batch_size

    def close(self) -> None:
        """Take the defense off again."""
        self._stack.close()

    def _answer(self, requests: Sequence[Request]) -> list[str]:
        """Answer a batch; the order of arrival does not matter."""
        order = sorted(
            range(len(requests)), key=lambda index: (requests[index].prompt, requests[index].images)
        )
        answers = [""] * len(requests)
        opened = {
            reference: open_reference(reference)
            for reference in dict.fromkeys(ref for request in requests for ref in request.images)
        }
        for length in sorted({request.max_new_tokens for request in requests}):
            chosen = [index for index in order if requests[index].max_new_tokens == length]
            found = generate_answers(
                self._vlm,
                [requests[index].prompt for index in chosen],
                [[opened[ref] for ref in requests[index].images] for index in chosen],
                max_new_tokens=length,
                batch_size=self._batch_size,
                progress=self._progress,
            )
            for index, answer in zip(chosen, found, strict=True):
                answers[index] = answer
        return answers


def _load_method(folder: Path, vlm: VLM) -> Any:
    """Load the method that an artifact folder belongs to; the method checks the rest."""
    path = folder / "artifact.json"
    try:
        kind = json.loads(path.read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{folder} is no artifact folder: cannot read 'kind' from {path}. Give the folder "
            "that `save` wrote."
        ) from error
    return resolve("method", str(kind), METHODS).load(folder, vlm)


def _check_config(tools: Sequence[Any], config: GenerateConfig) -> None:
    if tools:
        raise DataError("Safebridge models use no tools. Take them out of the task.")
    if config.temperature:
        raise DataError(
            f"Safebridge decodes greedily, found temperature={config.temperature}. Leave it out "
            "or set it to 0."
        )


def _read_turn(messages: Sequence[ChatMessage]) -> tuple[str, tuple[str, ...]]:
    """Return text and picture references of the one user turn."""
    if len(messages) != 1 or messages[0].role != "user":
        raise DataError(
            "a question is one user turn, found the turns "
            f"{[message.role for message in messages]}. Take system prompts and history out."
        )
    content = messages[0].content
    parts = [ContentText(text=content)] if isinstance(content, str) else content
    unknown = [part.type for part in parts if not isinstance(part, (ContentText, ContentImage))]
    if unknown:
        raise DataError(f"a question holds text and pictures, found {', '.join(unknown)}.")
    text = "\n".join(part.text for part in parts if isinstance(part, ContentText))
    return text, tuple(part.image for part in parts if isinstance(part, ContentImage))

"""What the undefended model says at the answers of benign samples, for the KL loss."""

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from safebridge.data.sample import Sample
from safebridge.methods.security_tensors.cache import (
    TensorCache,
    describe_pictures,
    describe_run,
    hash_key,
)
from safebridge.methods.security_tensors.config import SecurityTensorsConfig
from safebridge.methods.security_tensors.objective import (
    answer_forward_kl,
    answer_top_k_kl,
    keep_top_k,
)
from safebridge.models.load import VLM

__all__ = ["References"]


@final
class References:
    """The undefended model's distributions at answer tokens, computed once for each sample.

    Args:
        vlm: The frozen model.
        samples: The samples of the fit.
        config: How many of the likeliest tokens are kept; 0 keeps none, so that the
            distribution is asked for anew each time, and whole.
        cache: Where they are kept.
    """

    def __init__(
        self,
        vlm: VLM,
        samples: Sequence[Sample],
        config: SecurityTensorsConfig,
        cache: TensorCache,
    ) -> None:
        self.vlm, self.samples, self.config, self.cache = vlm, samples, config, cache
        self._keys: dict[int, str] = {}

    def divergences(
        self,
        indices: Sequence[int],
        logits: Tensor,
        rows: Tensor,
        ask: Callable[[], Tensor],
    ) -> Tensor:
        """Return the forward KL of each sample of a batch; 0 for those without tokens.

        Args:
            indices: The samples of the batch.
            logits: Predictions with the security tensor at answer tokens, [tokens, vocab].
            rows: Which place in `indices` each token belongs to.
            ask: Returns the undefended model's logits at the same tokens.
        """
        size, top_k = len(indices), self.config.kl_top_k
        if top_k == 0:
            with torch.no_grad():
                reference = ask()
            return answer_forward_kl(logits, reference, rows, size)
        present = sorted(set(rows.tolist()))
        keys = [self._key(indices[row]) for row in present]
        if any(key not in self.cache for key in keys):
            with torch.no_grad():
                log_probs, ids = keep_top_k(ask(), top_k)
            for row, key in zip(present, keys, strict=True):
                own = rows == row
                self.cache.put(key, {"log_probs": log_probs[own], "ids": ids[own].int()})
        kept = [self.cache.get(key) for key in keys]
        log_probs = torch.cat([each["log_probs"] for each in kept]).to(logits.device)
        ids = torch.cat([each["ids"] for each in kept]).long().to(logits.device)
        return answer_top_k_kl(logits, log_probs, ids, rows, size)

    def _key(self, index: int) -> str:
        if index not in self._keys:
            sample, config = self.samples[index], self.config
            self._keys[index] = hash_key(
                "references",
                describe_run(self.vlm, config),
                [config.kl_top_k, config.max_answer_tokens],
                [sample.prompt, sample.answer, describe_pictures(sample)],
            )
        return self._keys[index]

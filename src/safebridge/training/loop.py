"""One loop for all methods: seeded, resumable, with a loss per set and an early stop."""

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from safebridge.errors import ArtifactError, SettingError
from safebridge.optional import require
from safebridge.training.processes import build_accelerator

__all__ = [
    "LoopResult",
    "LoopSettings",
    "ParameterGroup",
    "StepLoss",
    "TrainingEvent",
    "freeze",
    "train",
]


@final
@dataclass(frozen=True)
class LoopSettings:
    """How long and in which way to train."""

    epochs: int
    """Passes over the batches."""

    max_steps: int = 0
    """Stop after this many optimiser steps; 0 sets no limit."""

    accumulation_steps: int = 1
    """Batches whose mean gradient makes one step."""

    schedule: str = "constant"
    """Course of the step size: "constant" or "cosine" (to zero at the last step)."""

    warmup_steps: int = 0
    """Steps over which the step size rises from zero."""

    max_grad_norm: float = 0.0
    """Largest norm of the gradient; 0 sets no limit."""

    patience: int = 0
    """Epochs without a better validation score before stopping; 0 runs to the end."""

    seed: int = 0
    """Seed of torch's generator, for losses that draw random numbers."""

    @classmethod
    def pick(cls, config: object) -> "LoopSettings":
        """Take these settings out of a method's, where they have the same names.

        Args:
            config: Has all of these fields.
        """
        return cls(**{item.name: getattr(config, item.name) for item in fields(cls)})


@final
@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a step size."""

    parameters: Mapping[str, nn.Parameter]
    """The parameters by name; they are updated in place."""

    learning_rate: float
    """Step size of AdamW."""

    weight_decay: float = 0.0
    """Weight decay of AdamW."""


@final
@dataclass(frozen=True)
class StepLoss:
    """What a method's loss function returns for one batch."""

    loss: Tensor
    """Scalar with a graph."""

    by_set: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    """Sum of the unweighted losses and number of samples by set name, for the reports."""


@final
@dataclass(frozen=True)
class TrainingEvent:
    """What a progress callback is told after each step and each epoch."""

    kind: str
    """ "step" or "epoch"."""

    step: int
    """Optimiser steps so far."""

    total_steps: int
    """Optimiser steps if nothing stops the loop early."""

    epoch: int
    """The running epoch, from 0."""

    losses: Mapping[str, float]
    """Mean loss per sample by set: of this step, or of this epoch."""

    score: float | None = None
    """Validation score after an epoch; higher is better."""


@final
@dataclass(frozen=True)
class LoopResult:
    """What a run of the loop came to."""

    steps: int
    """Optimiser steps taken, those before a resume included."""

    epochs: list[dict[str, float]]
    """Mean loss per sample by set for each epoch, and "score" where there was a validation."""

    is_stopped_early: bool
    """Whether `patience` ended it."""


@dataclass
class _State:
    """All that a resume needs besides parameters and optimiser."""

    step: int = 0
    epoch: int = 0
    epochs: list[dict[str, float]] = field(default_factory=list)
    best_score: float = -math.inf
    stale: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    is_stopped_early: bool = False


def train(
    groups: Sequence[ParameterGroup],
    batches: Callable[[int], Sequence[Any]],
    loss: Callable[[Any], StepLoss],
    settings: LoopSettings,
    *,
    validate: Callable[[], float] | None = None,
    progress: Callable[[TrainingEvent], object] | None = None,
    checkpoint: Path | None = None,
    after_step: Callable[[], object] | None = None,
    split: Callable[[Any, int, int], tuple[Any, float]] | None = None,
) -> LoopResult:
    """Minimise a loss with AdamW.

    Under `accelerate launch` with `split`, each process takes its share of every batch and
    the gradients are added up, so that any number of processes makes the steps that one
    makes. Without it, each takes its share of the batches of a step, so that k processes
    with one batch each make the steps of one process that accumulates k batches.

    Args:
        groups: What to train; updated in place.
        batches: The batches of an epoch, in order; it must depend on nothing but the epoch.
        loss: The loss of one batch.
        settings: Length, schedule, early stop, seed.
        validate: Called after each epoch; higher is better. The parameters of the best
            epoch are kept.
        progress: Called after each step and each epoch.
        checkpoint: File that the state is written to after each epoch, whole or not at
            all. If it exists, training goes on from it.
        after_step: Called after each step, e.g. to keep parameters within a bound.
        split: Given a batch, a process number and the number of processes, returns that
            process's part and the part's share of the batch, from 0 (nothing) to 1.

    Returns:
        Steps, losses per epoch, and whether it stopped early.

    Raises:
        SettingError: If `patience` is set without a validation, or a loss is not finite.
        ArtifactError: If the checkpoint is damaged, of other parameters, or not writable.
    """
    if settings.patience and validate is None:
        raise SettingError("patience needs a validation. Pass validation=..., or patience=0.")
    loop = _Loop(groups, batches, loss, settings, validate, progress, checkpoint)
    loop.after_step, loop.split = after_step, split
    return loop.run()


@contextmanager
def freeze(model: nn.Module) -> Iterator[None]:
    """Switch a model to evaluation and its weights to no gradient, and back afterwards.

    Args:
        model: Any module; the mode of each submodule and the flag of each weight are
            put back as they were, also on an error.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        model.eval().requires_grad_(requires_grad=False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for weight, flag in flags:
            weight.requires_grad_(flag)


class _Loop:
    def __init__(  # noqa: PLR0917 - the arguments of `train`, handed on as they came
        self,
        groups: Sequence[ParameterGroup],
        batches: Callable[[int], Sequence[Any]],
        loss: Callable[[Any], StepLoss],
        settings: LoopSettings,
        validate: Callable[[], float] | None,
        progress: Callable[[TrainingEvent], object] | None,
        checkpoint: Path | None,
    ) -> None:
        self.batches, self.loss, self.settings = batches, loss, settings
        self.validate, self.progress, self.checkpoint = validate, progress, checkpoint
        self.parameters = {k: v for group in groups for k, v in group.parameters.items()}
        self.accelerator = build_accelerator()
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": list(group.parameters.values()),
                    "lr": group.learning_rate,
                    "weight_decay": group.weight_decay,
                }
                for group in groups
            ]
        )
        self.rates = [group.learning_rate for group in groups]
        self.state = _State()
        self.after_step: Callable[[], object] | None = None
        self.split: Callable[[Any, int, int], tuple[Any, float]] | None = None
        self.per_step = self.total = 0

    def run(self) -> LoopResult:
        settings, world = self.settings, self.accelerator.num_processes
        self.per_step = settings.accumulation_steps * (world if self.split is None else 1)
        planned = settings.epochs * math.ceil(len(self.batches(0)) / self.per_step)
        self.total = min(planned, settings.max_steps or planned)
        if self.checkpoint is not None and self.checkpoint.exists():
            self._load(self.checkpoint)
        devices = {p.device for p in self.parameters.values() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(devices)):
            while not self._is_done():
                self._run_epoch()
        if self.state.best:
            self._restore(self.state.best)
        state = self.state
        return LoopResult(state.step, state.epochs, state.is_stopped_early)

    def _is_done(self) -> bool:
        state = self.state
        is_over = state.epoch >= self.settings.epochs or state.step >= self.total
        return is_over or state.is_stopped_early

    def _run_epoch(self) -> None:
        state, batches = self.state, self.batches(self.state.epoch)
        torch.manual_seed(self.settings.seed + state.epoch)  # a resumed epoch draws the same
        sums: dict[str, tuple[float, int]] = {}
        for start in range(0, len(batches), self.per_step):
            if state.step >= self.total:
                break
            found = self._run_step(batches[start : start + self.per_step])
            _add(sums, found)
            self._report("step", _means(found))
        losses, score = _means(sums), None
        if self.validate is not None:
            score = self._agree(float(self.validate()))
            self._judge(score)
        state.epochs.append(losses if score is None else losses | {"score": score})
        self._report("epoch", losses, score)
        state.epoch += 1
        if self.checkpoint is not None and self.accelerator.is_main_process:
            self._save(self.checkpoint)

    def _run_step(self, batches: Sequence[Any]) -> dict[str, tuple[float, int]]:
        world = self.accelerator.num_processes
        sums: dict[str, tuple[float, int]] = {}
        self.optimizer.zero_grad()
        for batch, share in self._own(batches):
            step = self.loss(batch)
            if not bool(torch.isfinite(step.loss)):
                raise SettingError(
                    f"the loss became {step.loss.item()} at step {self.state.step}. Lower the "
                    "learning rate or use another number type."
                )
            self.accelerator.backward(step.loss * share)
            _add(sums, step.by_set)
        self._share_gradients(world)
        if self.settings.max_grad_norm:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm)
        factor = self._rate_factor()
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        if self.after_step is not None:
            self.after_step()
        self.state.step += 1
        return self._gather(sums, world)

    def _own(self, batches: Sequence[Any]) -> Iterator[tuple[Any, float]]:
        """Yield what this process computes of a step, and its share of the step's loss."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if self.split is None or world == 1:
            for batch in batches[rank::world]:
                yield batch, 1 / len(batches)
            return
        for batch in batches:
            part, share = self.split(batch, rank, world)
            if share:
                yield part, share / len(batches)

    def _agree(self, score: float) -> float:
        """Return the first process's score, so that all of them stop together."""
        if self.accelerator.num_processes == 1:
            return score
        broadcast = require("accelerate.utils", extra="training").broadcast_object_list
        return float(broadcast([score])[0])

    def _share_gradients(self, world: int) -> None:
        if world == 1:
            return
        for parameter in self.parameters.values():
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self.accelerator.reduce(own, reduction="sum")

    def _gather(
        self, sums: dict[str, tuple[float, int]], world: int
    ) -> dict[str, tuple[float, int]]:
        if world == 1:
            return sums
        gather = require("accelerate.utils", extra="training").gather_object
        total: dict[str, tuple[float, int]] = {}
        for part in gather([sums]):
            _add(total, part)
        return total

    def _rate_factor(self) -> float:
        step, warmup = self.state.step, self.settings.warmup_steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.settings.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.total - warmup)))

    def _judge(self, score: float) -> None:
        state = self.state
        if score > state.best_score:
            state.best_score, state.stale = score, 0
            state.best = {k: v.detach().clone() for k, v in self.parameters.items()}
            return
        state.stale += 1
        state.is_stopped_early = 0 < self.settings.patience <= state.stale

    def _report(self, kind: str, losses: Mapping[str, float], score: float | None = None) -> None:
        if self.progress is not None and self.accelerator.is_main_process:
            state = self.state
            self.progress(TrainingEvent(kind, state.step, self.total, state.epoch, losses, score))

    def _restore(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])

    def _save(self, path: Path) -> None:
        record = {
            "parameters": {k: v.detach().cpu() for k, v in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "state": vars(self.state),
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                temporary = Path(file.name)
            try:
                torch.save(record, temporary)
                temporary.replace(path)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(temporary)  # noqa: PTH108 - gone already after a good replace
        except (OSError, RuntimeError) as error:
            raise ArtifactError(
                f"cannot write checkpoint {path}: {error}. Choose a folder with free space that "
                "you may write to."
            ) from error

    def _load(self, path: Path) -> None:
        try:
            record = torch.load(path, map_location="cpu", weights_only=True)
            saved, state = record["parameters"], _State(**record["state"])
        except Exception as error:
            raise ArtifactError(
                f"checkpoint {path} cannot be read ({error}). Delete it to start over."
            ) from error
        found = {name: tuple(value.shape) for name, value in saved.items()}
        expected = {name: tuple(value.shape) for name, value in self.parameters.items()}
        if found != expected:
            raise ArtifactError(
                f"checkpoint {path} holds {found}, this run trains {expected}. Delete it, or name "
                "another file."
            )
        self._restore(saved)
        self.optimizer.load_state_dict(record["optimizer"])
        self.state = state


def _add(sums: dict[str, tuple[float, int]], more: Mapping[str, tuple[float, int]]) -> None:
    for name, (total, count) in more.items():
        old_total, old_count = sums.get(name, (0.0, 0))
        sums[name] = (old_total + total, old_count + count)


def _means(sums: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    return {name: total / count for name, (total, count) in sums.items() if count}

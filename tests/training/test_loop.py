from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from safebridge.errors import ArtifactError, SettingError
from safebridge.training.loop import (
    LoopResult,
    LoopSettings,
    ParameterGroup,
    StepLoss,
    TrainingEvent,
    freeze,
    train,
)

TARGETS = torch.tensor([1.0, -2.0, 3.0])


def quadratic(parameter: nn.Parameter, index: int) -> StepLoss:
    loss = (parameter[index] - TARGETS[index]).square()
    return StepLoss(loss, {"odd" if index % 2 else "even": (loss.item(), 1)})


def run(parameter: nn.Parameter, *, rate: float = 0.1, **options: Any) -> LoopResult:
    settings = LoopSettings(**{"epochs": 4, **options.pop("settings", {})})
    return train(
        [ParameterGroup({"x": parameter}, rate, options.pop("decay", 0.0))],
        lambda _: [0, 1, 2],
        lambda index: quadratic(parameter, index),
        settings,
        **options,
    )


def test_the_loop_makes_the_steps_of_a_plain_adamw_loop() -> None:
    ours, plain = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    run(ours, decay=0.1)
    optimizer = torch.optim.AdamW([plain], lr=0.1, weight_decay=0.1)
    for _ in range(4):
        for index in range(3):
            optimizer.zero_grad()
            quadratic(plain, index).loss.backward()
            optimizer.step()
    assert torch.equal(ours, plain)


def test_accumulation_averages_the_gradients_of_its_batches() -> None:
    ours, plain = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    result = run(ours, settings={"epochs": 2, "accumulation_steps": 3})
    optimizer = torch.optim.AdamW([plain], lr=0.1, weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        (sum(quadratic(plain, i).loss for i in range(3)) / 3).backward()
        optimizer.step()
    torch.testing.assert_close(ours, plain)
    assert result.steps == 2


def test_progress_is_told_the_loss_of_each_set() -> None:
    events: list[TrainingEvent] = []
    result = run(nn.Parameter(torch.zeros(3)), rate=1e-9, progress=events.append)
    assert [event.kind for event in events[:4]] == ["step", "step", "step", "epoch"]
    assert events[1].losses == pytest.approx({"odd": 4.0})
    assert events[3].losses == pytest.approx({"even": 5.0, "odd": 4.0})
    assert [event.step for event in events[:4]] == [1, 2, 3, 3]
    assert events[0].total_steps == 12
    assert result.epochs[0] == pytest.approx({"even": 5.0, "odd": 4.0})


def test_max_steps_ends_within_an_epoch() -> None:
    assert run(nn.Parameter(torch.zeros(3)), settings={"max_steps": 5}).steps == 5


def test_early_stop_keeps_the_best_parameters() -> None:
    parameter, seen = nn.Parameter(torch.zeros(3)), []
    scores = iter([1.0, 2.0, 1.5, 0.5, 9.0])

    def validate() -> float:
        seen.append(parameter.detach().clone())
        return next(scores)

    result = run(parameter, settings={"epochs": 9, "patience": 2}, validate=validate)
    assert result.is_stopped_early
    assert [epoch["score"] for epoch in result.epochs] == [1.0, 2.0, 1.5, 0.5]
    assert torch.equal(parameter, seen[1])


def test_patience_without_a_validation_is_refused() -> None:
    with pytest.raises(SettingError, match="Pass validation="):
        run(nn.Parameter(torch.zeros(3)), settings={"patience": 1})


def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, cut, file = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3)), tmp_path / "c"
    settings = {"epochs": 4, "schedule": "cosine", "warmup_steps": 2}
    expected = run(whole, settings=settings)

    def stop(event: TrainingEvent) -> None:
        if event.step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(cut, settings=settings, checkpoint=file, progress=stop)
    fresh = nn.Parameter(torch.full((3,), 7.0))
    found = run(fresh, settings=settings, checkpoint=file)
    assert torch.equal(fresh, whole)
    assert found == expected
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert run(fresh, settings=settings, checkpoint=file) == expected


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    run(nn.Parameter(torch.zeros(3)), checkpoint=tmp_path / "c")
    with pytest.raises(ArtifactError, match="Delete it, or name another file"):
        train(
            [ParameterGroup({"y": nn.Parameter(torch.zeros(3))}, 0.1)],
            lambda _: [0],
            lambda _: StepLoss(torch.zeros(())),
            LoopSettings(epochs=1),
            checkpoint=tmp_path / "c",
        )
    (tmp_path / "bad").write_text("x")
    with pytest.raises(ArtifactError, match="Delete it to start over"):
        run(nn.Parameter(torch.zeros(3)), checkpoint=tmp_path / "bad")
    with pytest.raises(ArtifactError, match="may write to"):
        run(nn.Parameter(torch.zeros(3)), checkpoint=tmp_path / "bad" / "c")


def test_the_cosine_falls_to_zero_after_the_warm_up() -> None:
    parameter, steps = nn.Parameter(torch.zeros(1)), []

    def note(_event: TrainingEvent) -> None:
        steps.append(float(parameter.detach()))

    # A constant gradient makes every AdamW step as long as the step size.
    train(
        [ParameterGroup({"x": parameter}, 1.0)],
        lambda _: [0] * 6,
        lambda _: StepLoss(parameter.sum()),
        LoopSettings(epochs=1, schedule="cosine", warmup_steps=2),
        progress=note,
    )
    lengths = [-(b - a) for a, b in zip([0.0, *steps[:5]], steps[:6], strict=True)]
    assert lengths[:3] == pytest.approx([1 / 3, 2 / 3, 1.0], abs=1e-4)
    assert lengths[4] == pytest.approx(0.5, abs=1e-4)


def test_what_is_done_after_each_step_shows_in_the_next() -> None:
    parameter, seen = nn.Parameter(torch.zeros(3)), []

    def clamp() -> None:
        with torch.no_grad():
            parameter.clamp_(-0.05, 0.05)
        seen.append(parameter.detach().clone())

    run(parameter, after_step=clamp)
    assert len(seen) == 12
    assert float(seen[-1].abs().max()) == pytest.approx(0.05)
    assert torch.equal(parameter, seen[-1])


def test_long_gradients_are_scaled_down() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    train(
        [ParameterGroup({"x": parameter}, 0.1)],
        lambda _: [0],
        lambda _: StepLoss(1e4 * parameter.sum()),
        LoopSettings(epochs=1, max_grad_norm=1.0),
    )
    assert parameter.grad is not None
    assert float(parameter.grad.norm()) == pytest.approx(1.0, rel=1e-3)


def test_a_loss_that_is_not_finite_says_what_to_do() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    with pytest.raises(SettingError, match="Lower the learning rate"):
        train(
            [ParameterGroup({"x": parameter}, 0.1)],
            lambda _: [0],
            lambda _: StepLoss(parameter.sum() * float("nan")),
            LoopSettings(epochs=1),
        )


def test_training_leaves_the_global_random_state() -> None:
    before = torch.get_rng_state()
    run(nn.Parameter(torch.zeros(3)))
    assert torch.equal(torch.get_rng_state(), before)


def test_freeze_gives_modes_and_flags_back_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    model[1].eval()
    model[0].bias.requires_grad_(requires_grad=False)

    def fail() -> None:
        with freeze(model):
            assert not model.training
            assert not any(weight.requires_grad for weight in model.parameters())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert [module.training for module in model.modules()] == [True, True, False]
    assert [weight.requires_grad for weight in model.parameters()] == [True, False]

import io
from pathlib import Path

from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from safebridge.training.loop import TrainingEvent
from safebridge.training.reports import call_all, show_training, write_tensorboard

EVENTS = [
    TrainingEvent("step", 1, 4, 0, {"SA": 2.0, "GB": 1.0}),
    TrainingEvent("step", 2, 4, 0, {"SA": 1.0}),
    TrainingEvent("epoch", 2, 4, 0, {"SA": 1.5, "GB": 1.0}, score=0.25),
]


def test_the_bar_shows_the_loss_of_each_set_and_the_score() -> None:
    text = io.StringIO()
    with show_training("fitting", console=Console(file=text, width=120)) as show:
        for event in EVENTS:
            show(event)
    assert "fitting" in text.getvalue()
    assert "2/4" in text.getvalue()
    assert "GB 1.000  SA 1.500  score 0.250" in text.getvalue()


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    with write_tensorboard(tmp_path) as write:
        for event in EVENTS:
            write(event)
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    steps = [(event.step, event.value) for event in found.Scalars("loss per step/SA")]
    assert steps == [(1, 2.0), (2, 1.0)]
    assert [event.value for event in found.Scalars("loss per epoch/SA")] == [1.5]
    assert [event.value for event in found.Scalars("score")] == [0.25]


def test_several_callbacks_are_called_in_order() -> None:
    seen = []
    both = call_all(lambda event: seen.append((1, event)), lambda event: seen.append((2, event)))
    both(EVENTS[0])
    assert seen == [(1, EVENTS[0]), (2, EVENTS[0])]

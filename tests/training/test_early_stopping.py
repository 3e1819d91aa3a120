"""training/early_stopping.py"""

from __future__ import annotations

import json
import math

from training.early_stopping import EarlyStopping


def run(stopping: EarlyStopping, losses: list[float], first_epoch: int = 1) -> list[int]:
    """The epochs with a new best, up to where it stops."""
    best = []
    for epoch, loss in enumerate(losses, start=first_epoch):
        if stopping.update(epoch, loss):
            best.append(epoch)
        if stopping.should_stop:
            break
    return best


def test_stops_after_patience_without_a_lower_loss() -> None:
    stopping = EarlyStopping(patience=2)
    assert run(stopping, [1.0, 0.8, 0.9, 0.7, 0.7, 0.71, 0.1]) == [1, 2, 4]
    assert (stopping.best_epoch, stopping.best_loss, stopping.last_epoch) == (4, 0.7, 6)


def test_without_patience_it_never_stops() -> None:
    stopping = EarlyStopping(patience=0)
    assert run(stopping, [1.0] + [2.0] * 50) == [1]
    assert stopping.last_epoch == 51


def test_no_number_is_no_improvement() -> None:
    stopping = EarlyStopping(patience=2)
    assert run(stopping, [math.nan, 0.5, math.nan, math.inf]) == [2]
    assert stopping.should_stop


def test_state_goes_through_json() -> None:
    losses = [math.nan, 3.0, 1.0, 2.0, 2.0, 2.0]
    whole = EarlyStopping(patience=3)
    run(whole, losses)
    for cut in range(len(losses)):
        first, second = EarlyStopping(patience=3), EarlyStopping(patience=3)
        run(first, losses[:cut])
        second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
        run(second, losses[cut:], first_epoch=cut + 1)
        assert second.state_dict() == whole.state_dict()
        assert second.should_stop == whole.should_stop

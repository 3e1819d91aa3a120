"""When to stop: the validation loss has not fallen for a while."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class EarlyStopping:
    """Remembers the epoch with the lowest validation loss.

    Args:
        patience: epochs without a lower loss after which `should_stop` is true; 0 = never.

    Attributes:
        best_epoch: 0 before the first epoch.
        best_loss: infinite before the first epoch.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best_epoch = 0
        self.best_loss = math.inf
        self.last_epoch = 0

    def update(self, epoch: int, loss: float) -> bool:
        """Take the loss of an epoch (counted from 1) in; true if it is the lowest: its weights are worth keeping.

        A loss that is not a number is never the lowest.
        """
        self.last_epoch = epoch
        if not loss < self.best_loss:
            return False
        self.best_epoch, self.best_loss = epoch, loss
        return True

    @property
    def should_stop(self) -> bool:
        """No epoch of the last `patience` ones was the best."""
        return 0 < self.patience <= self.last_epoch - self.best_epoch

    def state_dict(self) -> dict[str, Any]:
        """JSON types; the loss is None before the first epoch."""
        best_loss = self.best_loss if math.isfinite(self.best_loss) else None
        return {"best_epoch": self.best_epoch, "best_loss": best_loss, "last_epoch": self.last_epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.best_epoch, self.last_epoch = int(state["best_epoch"]), int(state["last_epoch"])
        self.best_loss = math.inf if state["best_loss"] is None else float(state["best_loss"])

"""How far an artefact may differ from PyTorch: one table, a row a precision.

FP32 only reorders sums, so it is held to rounding and to every label. A lower precision changes the network; it is held to
what the loss costs (labels, the patients' AUC and log loss), to a bound on any one answer, and to being worth it:
faster and smaller than FP32, measured in the same run.

`least_log_snr_db` is the agreement of the logarithms of probabilities: 10 log10(variance over the tiles / mean squared
error). A network that is sure of itself answers 0.99999 whatever is done to its input; what is left of its differences
between tiles still tells. 12 dB are an error of a quarter of the spread.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Tolerance:
    """A row of the table.

    Attributes:
        max_abs_diff: largest difference of a probability of any tile at any batch size.
        mean_abs_diff: its mean over tiles and classes.
        max_log_diff: largest difference of a probability's natural logarithm; None: not held to it.
        least_log_snr_db: see the module; None: not held to it.
        flip_share: 0..1, largest share of tiles whose label changes.
        auc_fall: largest fall of the patients' AUC.
        log_loss_rise: largest rise of the patients' log loss.
        least_tiles: fewer tiles prove nothing at this precision.
        must_win: only accepted if faster and smaller than FP32.
    """

    max_abs_diff: float
    mean_abs_diff: float
    max_log_diff: float | None
    least_log_snr_db: float | None
    flip_share: float
    auc_fall: float
    log_loss_rise: float
    least_tiles: int
    must_win: bool


TOLERANCES = MappingProxyType(
    {
        "fp32": Tolerance(1e-4, 1e-4, 1e-2, None, 0.0, 0.005, 0.001, 1, False),
        "fp16": Tolerance(0.02, 0.002, None, 35.0, 0.005, 0.005, 0.005, 32, True),
        "bf16": Tolerance(0.10, 0.010, None, 20.0, 0.005, 0.005, 0.010, 32, True),
        "int8": Tolerance(0.35, 0.020, None, 12.0, 0.005, 0.005, 0.020, 32, True),
    }
)
"""Precision of an artefact -> how far it may differ."""

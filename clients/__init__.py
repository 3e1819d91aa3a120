"""Clients of a Clotline server: a slide or tiles in, a Prediction out (`from clients import SlideClient`).

Nothing is imported until it is used: `from clients.answers import ...` needs neither slides' readers nor
    tritonclient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clients.errors import ClientError as ClientError
    from clients.prediction import PatientPrediction as PatientPrediction
    from clients.prediction import Prediction as Prediction
    from clients.prediction import TilePrediction as TilePrediction
    from clients.slide_client import SlideClient as SlideClient

_HOMES = {
    "ClientError": "clients.errors",
    "PatientPrediction": "clients.prediction",
    "Prediction": "clients.prediction",
    "SlideClient": "clients.slide_client",
    "TilePrediction": "clients.prediction",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'clients' has no attribute {name!r}; it has {', '.join(__all__)}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)

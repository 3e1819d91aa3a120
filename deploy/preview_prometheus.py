"""What the preview asks of Prometheus' HTTP API (https://prometheus.io/docs/prometheus/latest/querying/api/)."""

from __future__ import annotations

import json
import math
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.errors import DeployError, UsageError

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Series:
    """A time series: (seconds since 1970, value) in the order of time; values may be NaN."""

    labels: Mapping[str, str]
    points: Sequence[tuple[float, float]]

    @property
    def latest(self) -> float | None:
        """The last value that is a number."""
        return next((value for _, value in reversed(self.points) if math.isfinite(value)), None)


class Prometheus:
    """A running Prometheus. Raises DeployError where it does not answer, or does not take an expression.

    Args:
        url: e.g. `http://127.0.0.1:9090`.
    """

    def __init__(self, url: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise UsageError(f"address {url!r} of Prometheus must start with http:// or https://.")
        self._url = url.rstrip("/")

    def now(self, expr: str) -> list[Series]:
        """Value of an expression at this moment."""
        told = self._ask("query", {"query": expr})
        if told["resultType"] == "scalar":
            return [Series({}, [_point(told["result"])])]
        return [Series(entry["metric"], [_point(entry["value"])]) for entry in told["result"]]

    def over(self, expr: str, start_s: float, end_s: float, step_s: float) -> list[Series]:
        """Values of an expression from `start_s` to `end_s`, every `step_s`."""
        values = {"query": expr, "start": f"{start_s:.3f}", "end": f"{end_s:.3f}", "step": f"{step_s:g}"}
        told = self._ask("query_range", values)
        return [Series(entry["metric"], [*map(_point, entry["values"])]) for entry in told["result"]]

    def get(self, path: str) -> Any:
        """`data` of another address of the API, e.g. `rules`."""
        return self._ask(path, None)

    def _ask(self, path: str, form: Mapping[str, str] | None) -> Any:
        data = urllib.parse.urlencode(form).encode() if form is not None else None
        url = f"{self._url}/api/v1/{path}"
        try:
            with urllib.request.urlopen(url, data, timeout=TIMEOUT_S) as answer:  # nosec B310  # noqa: S310 (http, checked above)
                return json.loads(answer.read())["data"]
        except urllib.error.HTTPError as error:
            said = _said(error.read())
            raise DeployError(f"Prometheus refuses {(form or {}).get('query', path)!r}: {said}") from error
        except (OSError, ValueError, KeyError) as error:
            raise DeployError(f"no answer of Prometheus from {url}: {error}") from error


def _point(pair: Sequence[Any]) -> tuple[float, float]:
    return float(pair[0]), float(pair[1])


def _said(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")


def legend(pattern: str, labels: Mapping[str, str]) -> str:
    """A series' name: `{{label}}` of the pattern replaced, as Grafana does."""
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda found: labels.get(found[1], ""), pattern).strip()

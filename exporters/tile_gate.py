"""Building the formats of a tile network, and proving each of them in this process."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path

from exporters.acceptance import Speed, judge, speed_of
from exporters.comparison_tiles import ComparisonTiles
from exporters.errors import ParityError
from exporters.exported_format import ExportedFormat, exported_format
from exporters.formats import formats_named
from exporters.formats.interface import Answer, Artifact, Network, Runner, ServedFormat
from exporters.parity import check_parity


class TileGate:
    """Builds formats and proves them; an FP32 format that others have to beat is built once.

    Args:
        network: what is exported.
        tiles: what it is asked about.
        expected: PyTorch's answer to them.
        announce: told what is going on.
    """

    def __init__(
        self, network: Network, tiles: ComparisonTiles, expected: Answer, announce: Callable[[str], object]
    ) -> None:
        self.network, self.tiles, self.expected = network, tiles, expected
        self._announce = announce
        self._scratch = contextlib.ExitStack()
        self._built: dict[str, Artifact] = {}
        self._baselines: dict[str, Runner] = {}

    def __enter__(self) -> TileGate:
        return self

    def __exit__(self, *exception: object) -> None:
        self._scratch.close()

    def build(self, fmt: ServedFormat) -> Artifact:
        """The artefact of a format, built once; raises GraphError."""
        if fmt.name not in self._built:
            self._announce(f"{fmt.name}: building")
            self._built[fmt.name] = fmt.build(self.network)
        return self._built[fmt.name]

    def built(self, name: str) -> Artifact | None:
        """What was built under a name, if it was."""
        return self._built.get(name)

    def prove(self, fmt: ServedFormat, artifact: Artifact, path: Path) -> ExportedFormat:
        """Compare an artefact, written at `path`, with PyTorch, and judge whether it is worth serving.

        Raises:
            ParityError: it does not answer as PyTorch does, or is not worth it.
            GraphError: its runtime cannot open it.
        """
        run = measured = None
        if fmt.runs_here():
            self._announce(f"{fmt.name}: comparing with PyTorch")
            run = fmt.open(path)
            try:
                measured = check_parity(
                    fmt.name,
                    run,
                    self.tiles.tiles_NHWC,
                    self.expected,
                    max_batch=self.network.max_batch,
                    precision=fmt.precision,
                    truth=self.tiles.truth,
                )
            except ParityError as error:
                if error.measured is not None:  # it answers, if wrongly: how fast belongs to the figures
                    error.speed = self._speed(fmt, run)
                raise
        acceptance = judge(
            fmt,
            artifact,
            measured,
            run=run,
            baseline=self._baseline(fmt) if fmt.baseline is not None else None,
            tiles_NHWC=self.tiles.tiles_NHWC,
            max_batch=self.network.max_batch,
        )
        return exported_format(fmt, artifact, measured, acceptance)

    def _speed(self, fmt: ServedFormat, run: Runner) -> Speed | None:
        fp32_run = self._baseline(fmt)[1] if fmt.baseline is not None else None
        return speed_of(fmt, run, fp32_run, self.tiles.tiles_NHWC, max_batch=self.network.max_batch)

    def _baseline(self, fmt: ServedFormat) -> tuple[Artifact, Runner | None]:
        (baseline,) = formats_named([fmt.baseline or ""])
        artifact = self.build(baseline)
        if fmt.name not in self._baselines and baseline.runs_here():
            self._announce(f"{baseline.name}: to be beaten by {fmt.name}")
            directory = Path(
                self._scratch.enter_context(tempfile.TemporaryDirectory(prefix="clotline-fp32-"))
            )
            for filename, content in artifact.files.items():
                (directory / filename).write_bytes(content)
            self._baselines[fmt.name] = fmt.open_baseline(directory / baseline.artifact_filename)
        return artifact, self._baselines.get(fmt.name)

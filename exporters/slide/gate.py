"""Building the encoders of a slide release in its formats, and proving each of them in this process."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from exporters.acceptance import judge
from exporters.exported_format import ExportedFormat, exported_format
from exporters.formats import formats_named
from exporters.formats.interface import Artifact, Network, OnnxTarget, Runner, ServedFormat
from exporters.slide.head import HeadRunner
from exporters.slide.parity import Reference, check_encoders
from exporters.slide.source import SlideSource
from exporters.triton_config import EMBEDDER_PREFIX, ENCODER_PREFIX

EMBEDDING = "embedding"
"""Name of an encoder's output."""


def encoder_name(fmt: ServedFormat, member: int, members: int) -> str:
    """Name of the Triton model that holds a member's encoder."""
    suffix = "" if members == 1 else f"_{member}"
    return f"{ENCODER_PREFIX}{fmt.name.replace('-', '_')}{suffix}"


def embedder_name(fmt: ServedFormat) -> str:
    """Name of the ensemble of preprocessing and encoders."""
    return f"{EMBEDDER_PREFIX}{fmt.name.replace('-', '_')}"


class EncoderGate:
    """Builds formats and proves them; an FP32 format that others have to beat is built once. A context manager.

    Args:
        source: whose encoders.
        head: what is put behind them.
        expected: PyTorch's answers.
        max_batch: most tiles in one execution.
        calibration_NHWC: see `Network`.
        target: what has to be able to read ONNX files.
        announce: told what is going on.
    """

    def __init__(
        self,
        source: SlideSource,
        head: HeadRunner,
        expected: Reference,
        *,
        max_batch: int,
        calibration_NHWC: np.ndarray | None,
        target: OnnxTarget,
        announce: Callable[[str], object],
    ) -> None:
        self._networks = [
            Network(
                member.encoder,
                member.spec.mean,
                member.spec.std,
                source.spec.input_size_px,
                max_batch,
                calibration_NHWC,
                outputs=(EMBEDDING,),
                onnx_target=target,
            )
            for member in source.members
        ]
        self._head, self._expected, self._max_batch = head, expected, max_batch
        self._announce = announce
        self._built: dict[str, tuple[Artifact, ...]] = {}
        self._scratch = contextlib.ExitStack()

    def __enter__(self) -> EncoderGate:
        return self

    def __exit__(self, *exception: object) -> None:
        self._scratch.close()

    def build(self, fmt: ServedFormat) -> tuple[Artifact, ...]:
        """The artefact of each member, built once; raises GraphError."""
        if fmt.name not in self._built:
            self._announce(f"{fmt.name}: building")
            self._built[fmt.name] = tuple(fmt.build(network) for network in self._networks)
        return self._built[fmt.name]

    def built(self, name: str) -> tuple[Artifact, ...] | None:
        """What was built under a name, if it was."""
        return self._built.get(name)

    def together(self, fmt: ServedFormat) -> Artifact:
        """All members as one: files of the first under their own names, those of others after their model."""
        artifacts = self.build(fmt)
        files = dict(artifacts[0].files)
        for m, artifact in enumerate(artifacts[1:], start=1):
            model = encoder_name(fmt, m, len(artifacts))
            files |= {f"{model}/{name}": content for name, content in artifact.files.items()}
        notes: dict[str, Any] = dict(artifacts[0].notes)
        if len(artifacts) > 1 and any(artifact.notes for artifact in artifacts):
            notes["members"] = [dict(artifact.notes) for artifact in artifacts]
        return Artifact(files, notes)

    def prove(self, fmt: ServedFormat) -> ExportedFormat:
        """Compare with PyTorch, and judge whether it is worth serving.

        Raises:
            ParityError: it does not answer as PyTorch does, or is not worth it.
            GraphError: it cannot be built, or its runtime cannot open it.
        """
        artifact = self.together(fmt)
        measured = run = None
        notes: dict[str, Any] = {}
        if fmt.runs_here():
            self._announce(f"{fmt.name}: comparing with PyTorch")
            runners = self._open(fmt, lambda path: fmt.open(path, (EMBEDDING,)), self.build(fmt))
            measured, notes["embedding"] = check_encoders(
                fmt.name,
                runners,
                self._head,
                self._expected,
                max_batch=self._max_batch,
                precision=fmt.precision,
            )
            run = _all_of(runners)
        acceptance = judge(
            fmt,
            artifact,
            measured,
            run=run,
            baseline=self._baseline(fmt) if fmt.baseline is not None else None,
            tiles_NHWC=self._expected.tiles_NHWC,
            max_batch=self._max_batch,
        )
        outcome = exported_format(
            fmt, Artifact(artifact.files, {**artifact.notes, **notes}), measured, acceptance
        )
        return dataclasses.replace(outcome, model=encoder_name(fmt, 0, len(self._networks)))

    def _baseline(self, fmt: ServedFormat) -> tuple[Artifact, Runner | None]:
        (baseline,) = formats_named([fmt.baseline or ""])
        artifact = self.together(baseline)
        if not baseline.runs_here():
            return artifact, None
        self._announce(f"{baseline.name}: to be beaten by {fmt.name}")
        runners = self._open(
            baseline, lambda path: fmt.open_baseline(path, (EMBEDDING,)), self.build(baseline)
        )
        return artifact, _all_of(runners)

    def _open(
        self, fmt: ServedFormat, opened: Callable[[Path], Runner], artifacts: tuple[Artifact, ...]
    ) -> list[Runner]:
        runners = []
        for artifact in artifacts:
            directory = Path(
                self._scratch.enter_context(tempfile.TemporaryDirectory(prefix="clotline-encoder-"))
            )
            for name, content in artifact.files.items():
                (directory / name).write_bytes(content)
            runners.append(opened(directory / fmt.artifact_filename))
        return runners


def _all_of(runners: list[Runner]) -> Runner:
    """All members one after another, as one to be timed."""
    return lambda tiles_NHWC: [run(tiles_NHWC) for run in runners]

"""python -m perf bars --out runs/bars

Runs the commands that measure what a release of Clotline promises, one after the other, each with the bars that it knows
itself, and writes one table of them: bars.md and bars.json. Releases with random weights are made below --out first, where
they are not there yet. Takes an hour; nothing else should run on the machine meanwhile. Exit code 1 if a bar was missed or a
command failed.

--quick runs every command as briefly as it can: to see that all of them work here, not for their figures.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perf.errors import PerfInputError
from perf.machine import machine
from perf.releases import make_release
from perf.report import work_named
from perf.standard_work import STANDARD_WORK
from perf.whole_file import write_whole
from serving.processes import interrupt

BIASES = (0.0, 1.0, 2.0)
"""Of the releases: their answers cannot be taken for one another."""
STOPPING_S = 60.0


@dataclass(frozen=True)
class Row:
    """A bar, and what came of it.

    Attributes:
        bar: its number.
        title: what is promised.
        command: that measured it.
        figures: in words.
        passed: whether the bar is kept.
    """

    bar: str
    title: str
    command: str
    figures: str
    passed: bool


@dataclass(frozen=True)
class Measurement:
    """A command whose last line of output tells one bar.

    Attributes:
        bar, title: as in `Row`.
        module: run as `python -m module ...`.
        arguments: from the releases.
        quick: what makes it brief.
        figures: entries of its answer that are told.
    """

    bar: str
    title: str
    module: str
    arguments: Callable[[Sequence[Path]], list[str]]
    quick: tuple[str, ...]
    figures: tuple[str, ...] = field(default_factory=tuple)


def _repository(releases: Sequence[Path]) -> list[str]:
    return ["--repository", str(releases[0] / "models")]


MEASUREMENTS = (
    Measurement(
        "5",
        "releases and rollbacks under load: no failed request, no mixture, p99 at most twice",
        "serving.benchmarks releases",
        lambda releases: ["--releases", *map(str, releases)],
        ("--times", "1", "--quiet-s", "2"),
        ("requests", "failed", "mixed", "p99_ratio"),
    ),
    Measurement(
        "6",
        "twice the load that fits: refused at once, accepted in time, then full throughput again",
        "deploy.benchmarks overload",
        _repository,
        ("--seconds", "3", "--calm-s", "2", "--rounds", "1"),
        ("refused", "failed", "refusal_max_ms", "p95_ratio", "recovery"),
    ),
    Measurement(
        "7",
        "20,000 requests, five in a hundred bad: each refused, no other harmed, memory within 5 %",
        "serving.benchmarks bad-requests",
        _repository,
        ("--requests", "400", "--settle", "100", "--sample-s", "0.3"),
        ("requests", "bad_wrong", "good_wrong", "processes_changed", "memory_change"),
    ),
    Measurement(
        "8",
        "kill -9 of every kind of child: not ready within 2 s, ready again within 10 s, no wrong answer",
        "serving.benchmarks kills",
        _repository,
        ("--rounds", "1"),
        ("answers_right", "answers_wrong", "not_ready_max_s", "ready_again_max_s"),
    ),
)
SPEED = tuple(work.bar for work in STANDARD_WORK)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `bars`."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write into")
    parser.add_argument("--only", metavar="LIST", help=f"of {', '.join(numbers())}; default: all")
    parser.add_argument("--quick", action="store_true", help="briefly, not for the figures")


def numbers() -> list[str]:
    """Of all bars."""
    return [*SPEED, *(measurement.bar for measurement in MEASUREMENTS)]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """`bars`; raises PerfError."""
    chosen = numbers() if not options.only else [word.strip() for word in options.only.split(",")]
    unknown = sorted(set(chosen) - set(numbers()))
    if unknown:
        raise PerfInputError(f"--only takes {', '.join(numbers())}, not {', '.join(unknown)}.")
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    if set(chosen) & set(SPEED):
        rows += speed_rows(options.out / "speed", chosen, quick=options.quick)
        write_table(options.out, rows)
    measurements = [measurement for measurement in MEASUREMENTS if measurement.bar in chosen]
    releases = _releases(options.out / "releases", 3 if "5" in chosen else 1) if measurements else []
    for measurement in measurements:
        rows.append(measured(measurement, releases, quick=options.quick))
        write_table(options.out, rows)  # what was measured is kept, whatever becomes of the rest
    passed = all(row.passed for row in rows)
    return {
        "table": str(options.out / "bars.md"),
        "passed_by_bar": {row.bar: row.passed for row in rows},
        "passed": passed,
        "exit_code": 0 if passed else 1,
    }


def speed_rows(directory: Path, chosen: Sequence[str], *, quick: bool) -> list[Row]:
    """The bars of speed, all by one `perf report`."""
    works = [work for work in STANDARD_WORK if work.bar in chosen]
    arguments = ["--out", str(directory), "--only", ",".join(work.name for work in works)]
    command, answer = _told(
        "perf report", [*arguments, *(["--rounds", "1", "--seconds", "1"] if quick else [])]
    )
    if "bars" not in answer:
        return [Row(work.bar, work.title, command, str(answer["error"]), False) for work in works]
    rows = []
    for name, verdicts in answer["bars"].items():
        told = ", ".join(f"{figure} {v['value']:g} ({v['bar']})" for figure, v in verdicts.items())
        passed = all(verdict["met"] for verdict in verdicts.values())
        rows.append(Row(work_named(name).bar, work_named(name).title, command, told, passed))
    return rows


def measured(measurement: Measurement, releases: Sequence[Path], *, quick: bool) -> Row:
    """One bar by its command."""
    bar, title = measurement.bar, measurement.title
    package = measurement.module.split()[0]
    if not _there(package):
        return Row(bar, title, f"python -m {measurement.module}", f"{package} is not in this checkout", False)
    arguments = [*measurement.arguments(releases), *(measurement.quick if quick else ())]
    command, answer = _told(measurement.module, arguments)
    if "passed" not in answer:
        return Row(bar, title, command, str(answer["error"]), False)
    told = ", ".join(f"{name} {answer[name]}" for name in measurement.figures if name in answer)
    return Row(bar, title, command, told, bool(answer["passed"]))


def write_table(directory: Path, rows: Sequence[Row]) -> None:
    """bars.md and bars.json."""
    lines = ["# What a release promises, measured", "", "Written by `python -m perf bars`.", ""]
    lines += ["| bar | what | figures | kept |", "|---|---|---|---|"]
    lines += [
        f"| {row.bar} | {row.title} | {row.figures} | {'yes' if row.passed else '**NO**'} |" for row in rows
    ]
    about = machine()
    lines += ["", f"{about['cpu']}, {about['cores']} cores, {about['ram_gb']} GB.", ""]
    lines += [f"- {row.bar}: `{row.command}`" for row in rows]
    write_whole(directory / "bars.md", ("\n".join(lines) + "\n").encode())
    document = {"machine": about, "bars": [vars(row) for row in rows]}
    write_whole(directory / "bars.json", json.dumps(document, indent=1, ensure_ascii=False).encode())


def _releases(directory: Path, count: int) -> list[Path]:
    found = []
    for number, bias in enumerate(BIASES[:count]):
        found.append(directory / f"resnet18_{number}")
        if not found[-1].exists():
            print(f"bars: making {found[-1]}", file=sys.stderr, flush=True)
            make_release(found[-1], "resnet18", bias=bias)
    return found


def _told(module: str, arguments: Sequence[str]) -> tuple[str, Mapping[str, Any]]:
    """The command in words, and its JSON line; or {"error": ...} of a command that gave none. Its progress is shown."""
    name, *rest = module.split()
    words = ["-m", name, *rest, *arguments]
    command = " ".join(["python", *words])
    print(f"bars: {command}", file=sys.stderr, flush=True)
    exit_code, said = _output_of([sys.executable, *words])
    lines = said.strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else None
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        return command, {"error": f"exit code {exit_code}, see its error above"}
    return command, answer


def _output_of(command: Sequence[str]) -> tuple[int, str]:
    """Exit code and standard output of a command. Interrupted, it is given the time to stop its servers."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for this process, which hands it on once
    ) as process:
        try:
            said, _ = process.communicate()
        except BaseException:
            interrupt(process, STOPPING_S)
            raise
    return process.returncode, said


def _there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False

"""Commands, options, Make targets, files and modules that README and docs name are there."""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path

import pytest

from tests.docs import command_lines
from tests.docs.command_lines import PACKAGES, ROOT
from tests.docs.markdown_pages import PAGES, Code, Page

FOLDERS = ("docs", "tests", "docker", "model_repository")
RUN_BY_HAND = ("bash", "sh", "console", "")
# Options of other programs that a page names by themselves.
FOREIGN_OPTIONS = {
    "tritonserver": {"--rate-limit", "--http-max-input-size", "--metrics-config"},
    "accelerate launch": {"--quiet", "--multi_gpu", "--num_processes", "--num_machines"},
    "accelerate launch, several machines": {"--main_process_ip", "--main_process_port", "--machine_rank"},
    "torchrun": {"--node_rank"},
}
PROGRAMS = (
    "clients",
    "slides",
    "demo",
    "training/train.py",
    "exporters.conformance",
    "exporters.preflight.measure",
)
PROGRAMS_WITH_COMMANDS = (
    "serving",
    "serving.benchmarks",
    "training",
    "training.benchmarks",
    "exporters",
    "exporters.benchmarks",
    "perf",
    "deploy",
    "deploy.benchmarks",
)


@cache
def all_options() -> frozenset[str]:
    """Of every program of ours, and the few foreign ones."""
    found: set[str] = set().union(*FOREIGN_OPTIONS.values())
    for program in PROGRAMS:
        parser = command_lines.parser_of(program, ())
        assert parser is not None, program
        found |= command_lines.options_of(parser)
    for program in PROGRAMS_WITH_COMMANDS:
        listing = command_lines.parser_of(program, ())
        assert listing is not None, program
        for command in command_lines.commands_of(listing):
            parser = command_lines.parser_of(program, (command,))
            assert parser is not None, f"{program} {command}"
            found |= command_lines.options_of(parser)
    return frozenset(found)


def problems_of(page: Page) -> list[str]:
    problems = []
    for block in page.blocks:
        if block.language in RUN_BY_HAND:
            problems += [(block, what) for what in command_lines.problems_in(block.text)]
    for code in page.inline_code:
        what = problem_of_inline(code)
        problems += [(code, what)] if what else []
    return [f"{page.name}:{code.line}: {what}" for code, what in problems]


def problem_of_inline(code: Code) -> str | None:
    """A command, an option, a path or a Python name within a sentence."""
    text = code.text
    if "python -m " in text or text.startswith("make ") or "training/train.py" in text:
        return "; ".join(command_lines.problems_in(text)) or None
    if re.match(r"--[a-z]", text):
        options = re.findall(r"(?<![\w-])--[a-z][\w-]*", text)
        unknown = [option for option in options if option not in all_options()]
        return f"no program of ours has {', '.join(unknown)}" if unknown else None
    first = re.split(r"[/.]", text)[0]
    if re.fullmatch(r"[\w.-]+(/[\w.*-]+)*/[\w*-]+\.\w+", text) and first in {*PACKAGES, *FOLDERS}:
        return None if command_lines.exists(text) else f"there is no file {text}"
    if (
        re.fullmatch(r"\w+(\.\w+)+", text)
        and first in PACKAGES
        and text.rpartition(".")[2] not in ("py", "md")
    ):
        return None if _resolves(text) else f"there is no {text} in Python"
    return None


def _resolves(dotted: str) -> bool:
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = getattr(found, name, None)
        return found is not None
    return False


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_what_a_page_names_is_there(path: Path) -> None:
    assert problems_of(Page(path)) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("    python -m serving up --repositry x\n", "no option --repositry"),
        ("    python -m serving start --repository x\n", "no command start"),
        ("    python -m exporters export X \\\n        --formats onnx --fast\n", "no option --fast"),
        ("    accelerate launch --quiet training/train.py --recipes demo\n", "no option --recipes"),
        ("    ls | .venv/bin/python -m perf benches\n", "no command benches"),
        ("    python -m servings up\n", ""),
        ("    python -m serving.gone up\n", "no module serving.gone"),
        ("    make everything\n", "no make everything"),
        ("    make demo DATUM=x\n", "no variable DATUM"),
        ("say `--no-such-option`\n", "no program of ours has --no-such-option"),
        ("see `serving/gone.py`\n", "no file serving/gone.py"),
        ("see `slides.decode.decode_tiles`\n", "no slides.decode.decode_tiles in Python"),
    ],
)
def test_what_is_not_there_is_found(tmp_path: Path, text: str, says: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Text.\n\n{text}")
    problems = problems_of(Page(page))
    assert bool(problems) == bool(says), problems
    assert says in "".join(problems)


def test_there_is_something_to_check() -> None:
    commands = [
        command
        for path in PAGES
        for block in Page(path).blocks
        for command in command_lines.commands_in(block.text)
        if command_lines.our_program(command)
    ]
    assert len(commands) > 60
    assert ROOT.joinpath("Makefile").is_file()

"""python -m perf report --out runs/perf

Measures the standard work (`perf/standard_work.py`: ResNet-18 in FP32 with eight requests and with one in flight, a small INT8
network, ResNet-18 in INT8 against FP32's limit, and whole slides) and writes what it found: report.html (one file), report.md,
plots, and results.json. Repositories with random weights are made below --out first, where they are not there yet. Takes
twelve minutes; nothing else should run on the machine meanwhile. --again writes the page anew from results.json. Exit code 1
if a bar was missed.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perf.errors import PerfInputError
from perf.standard_work import STANDARD_WORK, Work
from perf.whole_file import write_whole
from slides.native import DECODERS

_FIGURES = {
    "ratio_to_limit": "x LIMIT",
    "requests_per_s": "requests/s",
    "mean_ms": "mean, ms",
    "p95_ms": "p95, ms",
    "p95_to_mean": "p95 / mean",
    "latency_to_limit": "latency / LIMIT's",
    "cpu_s_per_1000": "CPU s/1000",
    "cpu_ratio": "CPU / LIMIT's",
    "load_cpu_s_per_1000": "load's CPU s/1000",
}
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem}table{border-collapse:collapse;"
    "margin:1rem 0}th,td{border:1px solid #ccc;padding:.25rem .6rem;text-align:right}th:first-child,td:first-child{text-align:"
    "left}.met{color:#176d2f}.missed{color:#a31515;font-weight:600}img{max-width:100%}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `report`."""
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write into")
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="alternating, of each (default %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=4.0, metavar="S", help="of one run (default %(default)s)"
    )
    parser.add_argument(
        "--only", metavar="LIST", help=f"of {', '.join(work.name for work in STANDARD_WORK)}; default: all"
    )
    parser.add_argument(
        "--tiles",
        type=Path,
        metavar="DIR",
        help="these JPEG and PNG tiles, not made-up ones (`perf inputs` makes some)",
    )
    parser.add_argument(
        "--again", action="store_true", help="do not measure: write the page from results.json"
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """`report`; raises PerfError."""
    chosen = _chosen(options.only)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"
    if options.again:
        results = _read(path)
    else:
        results = {}
        for work in chosen:
            print(f"perf: {work.title}", file=sys.stderr, flush=True)
            results[work.name] = _measure(work, options)
        write_whole(path, json.dumps(results, indent=1).encode())
    write_report(options.out, results)
    bars = {name: verdicts(work_named(name), answer) for name, answer in results.items()}
    passed = {work_named(name).bar: all(v["met"] for v in told.values()) for name, told in bars.items()}
    return {
        "report": str(options.out / "report.html"),
        "bars": bars,
        "passed_by_bar": passed,
        "passed": all(passed.values()),
        "exit_code": 0 if all(passed.values()) else 1,
    }


def work_named(name: str) -> Work:
    """One of STANDARD_WORK; raises PerfInputError."""
    for work in STANDARD_WORK:
        if work.name == name:
            return work
    raise PerfInputError(
        f"{name!r} is no standard work; there are {', '.join(each.name for each in STANDARD_WORK)}."
    )


def verdicts(work: Work, answer: Mapping[str, Any]) -> dict[str, Any]:
    """Of each bar: the figure, what it should be, and whether it is."""
    return {
        bar.figure: {"value": answer[bar.figure], "bar": f"{bar.sign} {bar.value}", "met": bar.met(answer)}
        for bar in work.bars
    }


def write_report(directory: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    """report.md, report.html and the plots, from answers of `bench` by name of the work."""
    plots = {"ratio.png": _ratio_plot(results), "cpu.png": _cpu_plot(results)}
    for name, content in plots.items():
        write_whole(directory / name, content)
    write_whole(directory / "report.md", _markdown(results, list(plots)).encode())
    write_whole(directory / "report.html", _page(results, plots).encode())


def _chosen(names: str | None) -> Sequence[Work]:
    return STANDARD_WORK if not names else [work_named(name.strip()) for name in names.split(",")]


def _measure(work: Work, options: argparse.Namespace) -> dict[str, Any]:
    from perf import bench, slides
    from perf.models import make_repository
    from perf.releases import make_release

    def repository_of(formats: Sequence[str]) -> str:
        name = "-".join((work.architecture, *formats))
        repository = options.out / "models" / (f"{name}-release" if work.slides else name)
        if work.slides and not repository.exists():
            make_release(repository, work.architecture, formats=",".join(formats))
        elif not repository.exists():
            make_repository(repository, work.architecture, formats)
        return str(repository)

    command = slides if work.slides else bench
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    asked = ["--repository", repository_of(work.formats), "--limit-repository", repository_of(work.limit_formats),
             "--classifier", work.classifier, "--concurrency", ",".join(map(str, work.concurrency)),
             "--rounds", str(options.rounds), "--seconds", str(options.seconds),
             "--limit-decoder", work.limit_decoder]  # fmt: skip
    asked += ["--tiles", str(options.tiles)] if options.tiles else []
    answer = command.run(parser.parse_args(asked))
    if work.slides:  # in a table beside the protocols of `bench`
        answer["protocols"] = answer.pop("slides_in_flight")
    return answer


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise PerfInputError(f"{path} cannot be read: {error}. Measure first, without --again.") from error


def _rows(results: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    rows = []
    for name, answer in results.items():
        for protocol, figures in answer["protocols"].items():
            told = [f"{figures[key]:g}" if key in figures else "" for key in _FIGURES]
            rows.append([name, _in_flight(work_named(name), protocol), *told])
    return rows


def _in_flight(work: Work, row: str) -> str:
    return f"http, {row} slides" if work.slides else row


def _sentences(answer: Mapping[str, Any]) -> str:
    machine, layout, tiles = answer["machine"], answer["layout"], answer.get("tiles")
    of_tiles = (
        f"{tiles['count']} different tiles of {tiles['mean_bytes']:,} bytes on average. " if tiles else ""
    )
    return of_tiles + (
        f"LIMIT ({answer['limit_model']}, decoding with {answer.get('limit_decoder', DECODERS[0])}; the server with {answer.get('decoder', DECODERS[0])}) {answer['limit_per_s']:g} tiles/s with {answer['limit_cpu_s_per_1000']:g} CPU s/1000 ({layout['processes']} "
        f"processes x {layout['threads']} threads, {layout['batch']} at a time). Medians of {answer['rounds']} rounds; "
        f"{answer['answers_checked']} answers checked, the largest difference {answer['max_abs_diff']:.2g}. "
        f"{machine['cpu']}, {machine['cores']} cores, {machine['ram_gb']} GB; load average at the end {answer['load_average']:g}."
    )


def _markdown(results: Mapping[str, Mapping[str, Any]], plots: Sequence[str]) -> str:
    lines = ["# Speed of the served models", "", "Written by `python -m perf report`.", ""]
    for name, answer in results.items():
        work = work_named(name)
        lines += [f"## {work.title}", "", _sentences(answer), ""]
        for figure, verdict in verdicts(work, answer).items():
            word = "met" if verdict["met"] else "MISSED"
            lines.append(f"- {_FIGURES[figure]}: {verdict['value']:g} ({verdict['bar']}: {word})")
        lines.append("")
    head = ["work", "protocol", *_FIGURES.values()]
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(row)} |" for row in _rows(results)]
    lines += ["", *(f"![{name}]({name})" for name in plots), ""]
    return "\n".join(lines)


def _page(results: Mapping[str, Mapping[str, Any]], plots: Mapping[str, bytes]) -> str:
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Speed of the served models</title>",
        f"<style>{_STYLE}</style><h1>Speed of the served models</h1>",
    ]
    for name, answer in results.items():
        work = work_named(name)
        parts.append(f"<h2>{html.escape(work.title)}</h2><p>{html.escape(_sentences(answer))}</p><ul>")
        for figure, verdict in verdicts(work, answer).items():
            kind, word = ("met", "met") if verdict["met"] else ("missed", "missed")
            said = f"{_FIGURES[figure]}: {verdict['value']:g} ({verdict['bar']}: {word})"
            parts.append(f"<li class={kind}>{html.escape(said)}</li>")
        parts.append("</ul>")
    head = "".join(f"<th>{html.escape(word)}</th>" for word in ("work", "protocol", *_FIGURES.values()))
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in _rows(results)
    )
    parts.append(f"<table><tr>{head}</tr>{body}</table>")
    for name, content in plots.items():
        parts.append(f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(content).decode()}">')
    return "".join(parts) + "</html>\n"


def _ratio_plot(results: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Throughput over LIMIT, a dot a round, with the bars."""
    figure, axes = _figure(len(results))
    colours: dict[str, str] = {}
    for at, (name, answer) in enumerate(results.items()):
        work = work_named(name)
        for offset, (row, rounds) in enumerate(sorted(answer["ratio_rounds"].items())):
            x, median = at + 0.2 * offset - 0.1, answer["protocols"][row]["ratio_to_limit"]
            colour, label = _colour(colours, _in_flight(work, row))
            axes.plot([x] * len(rounds), rounds, "o", color=colour, alpha=0.5, label=label)
            axes.plot([x - 0.07, x + 0.07], [median] * 2, color=colour)
        for bar in work.bars:
            if bar.figure == "ratio_to_limit":
                axes.plot([at - 0.3, at + 0.3], [bar.value] * 2, "--", color="black", linewidth=1)
    axes.set_ylabel("requests/s over LIMIT's tiles/s")
    axes.set_ylim(bottom=0)
    return _png(figure, axes, results)


def _cpu_plot(results: Mapping[str, Mapping[str, Any]]) -> bytes:
    """CPU seconds for 1,000 tiles: the bare loop's, the server's."""
    figure, axes = _figure(len(results))
    colours: dict[str, str] = {}
    for at, (name, answer) in enumerate(results.items()):
        bars = [("LIMIT", answer["limit_cpu_s_per_1000"])]
        bars += [
            (_in_flight(work_named(name), row), figures["cpu_s_per_1000"])
            for row, figures in sorted(answer["protocols"].items())
        ]
        for offset, (what, value) in enumerate(bars):
            colour, label = _colour(colours, what)
            axes.bar(at + 0.25 * offset - 0.25, value, 0.22, color=colour, label=label)
    axes.set_ylabel("CPU seconds for 1,000 tiles")
    return _png(figure, axes, results)


def _colour(colours: dict[str, str], what: str) -> tuple[str, str | None]:
    """Colour of a kind of row, and its label where it is the first one."""
    label = None if what in colours else what
    return colours.setdefault(what, f"C{len(colours)}"), label


def _figure(count: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.0 + 1.9 * count, 4.0), layout="constrained")
    return figure, figure.add_subplot()


def _png(figure: Any, axes: Any, results: Mapping[str, Any]) -> bytes:
    import io

    axes.set_xticks(range(len(results)), list(results))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=120)
    return written.getvalue()

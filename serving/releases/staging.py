"""Bringing a release's files into a live directory, and taking away what no release needs any more."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection
from pathlib import Path

from tritonclient.grpc import model_config_pb2 as triton

from serving.releases import configs, counting
from serving.releases.bundle import GOLDEN, MANIFEST, MODELS, Bundle
from serving.releases.errors import BadRelease, ReleaseError, ServerRefused
from serving.releases.live import Live, State, remove, sync_directory
from serving.releases.server import Server

UNLOAD_TIMEOUT_S = 60.0


def stage(live: Live, bundle: Bundle, number: int, counting_backends: Collection[str]) -> list[str]:
    """Copy a release in, checked, as release `number`; returns its models, each behind those that it asks.

    Where the server has a network's backend that does not count predictions, a counter is put behind it
    (`serving.releases.counting`); `counting_backends` are those that count.

    All is made in `live.staging` first. Its models come into the repository one rename each; the server looks at none of
    them before it is told to.

    Raises BadRelease, or ReleaseError if the disk is full.
    """
    aside = live.staging / str(number)
    remove(aside)
    try:
        aside.mkdir()
        bundle.copy_to(aside)
        order = _rename_models(aside / MODELS, bundle, number, counting_backends)
        (aside / MANIFEST).write_text(json.dumps(dict(bundle.manifest), sort_keys=True))
        target = live.release(number)
        target.mkdir()
        for entry in (aside / GOLDEN, aside / MANIFEST):
            entry.rename(target / entry.name)
        for model in order:
            (aside / MODELS / model).rename(live.models / model)
        sync_directory(live.models)
    except OSError as error:
        raise ReleaseError(
            f"the release cannot be written to {live.directory}: {error.strerror}. Free space, or repair its permissions; "
            "nothing was changed on the server."
        ) from error
    remove(aside)
    return order


def _rename_models(
    models: Path, bundle: Bundle, number: int, counting_backends: Collection[str]
) -> list[str]:
    found: dict[str, triton.ModelConfig] = {}
    for model in sorted(entry for entry in models.iterdir() if entry.is_dir()):
        config = configs.read_config(model / configs.CONFIG)
        if config.name not in ("", model.name):
            raise BadRelease(f"the configuration of {model.name} is that of {config.name}; export again.")
        config.name = model.name
        if not (model / "1").is_dir():
            # Triton wants the version directory of an ensemble, and copies lose it where it is empty.
            (model / "1").mkdir()
        found[model.name] = config
    problems = configs.missing_steps(found)
    if problems:
        raise BadRelease(f"{bundle.directory}: {'; '.join(problems)}; export again.")
    if counting.is_wanted():
        counting.add_counters(models, found, counting_backends)
    order = configs.load_order(found)
    for name in order:
        new = configs.renamed(found[name], set(found), number, bundle.release_id)
        (models / name / configs.CONFIG).write_text(configs.to_text(new))
        _keep_python_from_writing(models / name)
        (models / name).rename(models / new.name)
    return [configs.numbered(name, number) for name in order]


def _keep_python_from_writing(model: Path) -> None:
    """A file where a stub would put its byte code. What it writes makes Triton take the model for changed, and load it again.

    Triton's stubs do not heed PYTHONDONTWRITEBYTECODE, and root may write into a read-only directory; only the embedded
    server's Python could be told otherwise.
    """
    for folder in {source.parent for source in model.rglob("*.py")}:
        (folder / "__pycache__").touch()


def entries(live: Live, number: int, public: list[str]) -> dict[str, triton.ModelConfig]:
    """Public name -> configuration of the model `<public>__r<number>` that answers for it."""
    return {
        name: configs.read_config(live.models / configs.numbered(name, number) / configs.CONFIG)
        for name in public
    }


def point_public_models(live: Live, number: int, release_id: str, public: list[str]) -> None:
    """Write the public models of a release, `clotline_release` last. The server moves when it is told to load that one.

    A configuration is replaced whole, after the version directory that it speaks of; so whenever this is interrupted, each
    model can be loaded, and doing it again completes it.
    """
    leading = {}
    for name, entry in entries(live, number, public).items():
        leading[name] = configs.public_config(name, entry, number, release_id)
        labels = {
            label: (live.models / entry.name / label).read_bytes() for label in configs.label_files(entry)
        }
        _point(live.models / name, leading[name], number, labels)
    switch = configs.switch_config(leading, number, release_id)
    _point(live.models / configs.SWITCH_MODEL, switch, number, {})
    sync_directory(live.models)


def _point(model: Path, config: triton.ModelConfig, number: int, labels: dict[str, bytes]) -> None:
    version = model / str(number)
    version.mkdir(parents=True, exist_ok=True)
    for label, content in labels.items():
        (version / label).write_bytes(content)
    # A file that is there keeps an ensemble's directory alive where empty ones are lost (object stores).
    (version / "release.txt").write_text(config.parameters[configs.RELEASE_PARAMETER].string_value + "\n")
    aside = model / f".{configs.CONFIG}.partial"
    with aside.open("w") as stream:
        stream.write(configs.to_text(config))
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(model / configs.CONFIG)
    sync_directory(model)


def collect(live: Live, state: State, server: Server | None) -> list[str]:
    """Unload and delete whatever no release of `state` needs; returns the models that went.

    Raises ServerRefused if a model does not go; its files then stay, and the next command tries again.
    """
    public = set(state.serving.public) | {configs.SWITCH_MODEL} if state.serving else set()
    going = [
        entry
        for entry in live.models.iterdir()
        if entry.is_dir() and entry.name not in public and configs.number_of(entry.name) not in state.numbers
    ]
    order = _unload_order(going)
    if server:
        for name in order:
            server.unload(name)
        if order and server.wait_unloaded(dict.fromkeys(order), UNLOAD_TIMEOUT_S) is None:
            raise ServerRefused(
                f"server {server.name} did not unload {', '.join(order)} within {UNLOAD_TIMEOUT_S:g} s; a request must "
                "still be in one of them. The next command tries again."
            )
    for name in order:
        remove(live.models / name)
    for name in public:
        for version in (live.models / name).glob("[0-9]*"):
            if state.serving and version.name != str(state.serving.number):
                remove(version)
    for left in live.staging.iterdir():
        remove(left) if left.is_dir() else left.unlink()
    for left in (live.directory / "releases").iterdir():
        if left.name not in set(map(str, state.numbers)):
            remove(left)
    return order


def _unload_order(models: list[Path]) -> list[str]:
    """Names with each model before all that it asks; a model whose configuration is unreadable comes first."""
    found: dict[str, triton.ModelConfig] = {}
    first = []
    for model in sorted(models):
        try:
            found[model.name] = configs.read_config(model / configs.CONFIG)
            found[model.name].name = model.name
        except (OSError, BadRelease):
            first.append(model.name)
    with contextlib.suppress(BadRelease):
        return [*first, *reversed(configs.load_order(found))]
    return [*first, *sorted(found)]

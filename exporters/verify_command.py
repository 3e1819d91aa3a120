"""python -m exporters verify RELEASE

Finds every file of a release that was changed, is missing or is extra, links, and a changed manifest. With --deep, every
artefact that runs on this machine answers the golden tiles again, and is compared with what PyTorch answered when the
release was written. Exit code: 0 all is as it was written; 1 something is not, each thing on a line of its own; 2 it is no
release, or one of a version that this Clotline does not read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RELEASE, --deep and --sha256."""
    parser.add_argument("release", type=Path, metavar="RELEASE", help="directory that an export wrote")
    parser.add_argument("--deep", action="store_true", help="let the artefacts answer the golden tiles again")
    parser.add_argument(
        "--sha256",
        metavar="HEX",
        help='the "sha256" that its release.json must have, from somewhere else, such as the registry',
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Verify; raises ReleaseVersionError where there is no release."""
    from tqdm import tqdm

    from exporters.release_manifest import checksum
    from exporters.verify import examine

    with tqdm(unit="file", leave=False) as progress:
        manifest, problems = examine(options.release, lambda path: progress.update())
    digest = checksum(manifest.as_dict()) if manifest is not None else None
    if options.sha256 is not None and digest is not None and digest != options.sha256.lower():
        problems = [
            f"release.json is another one: its sha256 is {digest}, {options.sha256} was asked for",
            *problems,
        ]
    answered: dict[str, Any] = {}
    if options.deep and manifest is not None and not problems:
        from exporters.deep_verification import answer_again

        with tqdm(bar_format="{desc} [{elapsed}]", leave=False) as progress:
            answered, problems = answer_again(options.release, manifest, progress.set_description)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if options.deep and problems and not answered:
        print("error: no artefact was asked, because the files are not as they were written", file=sys.stderr)
    return {
        "release": str(options.release),
        "release_id": manifest.release_id if manifest is not None else None,
        "manifest_sha256": digest,
        "files": len(manifest.files) if manifest is not None else None,
        "whole": not problems,
        "problems": problems,
        **({"deep": answered} if options.deep else {}),
        "exit_code": 1 if problems else 0,
    }

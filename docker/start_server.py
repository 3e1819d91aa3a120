"""python3 start_server.py [OPTION...]: becomes `python -m serving up` on the live directory of a container.

CLOTLINE_LIVE      the live directory: it says what is served, also after `python3 -m serving release`
CLOTLINE_RELEASE   the Release that a new one begins with
OPTION             of `serving up`
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from deploy.live_directory import bring_in
from serving.errors import ServingError
from slides.errors import SlidesError

if __name__ == "__main__":
    live, release = Path(os.environ["CLOTLINE_LIVE"]), os.environ.get("CLOTLINE_RELEASE")
    try:
        bring_in(live, Path(release) if release else None)
    except (ServingError, SlidesError, OSError) as error:
        sys.exit(f"error: {error}")
    command = [sys.executable, "-m", "serving", "up", "--host", "0.0.0.0"]  # noqa: S104  # nosec B104
    os.execv(sys.executable, [*command, "--live", str(live), *sys.argv[1:]])  # noqa: S606

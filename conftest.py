"""What tests want of threads: read when NumPy and torch are loaded, so it stands before the conftest that imports them."""

from __future__ import annotations

import os

# Threads that wait by spinning cost a factor of ten where others want a core too. Those of torch are told to sleep;
# OpenBLAS knows no such word and gets no threads beside the one that calls it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

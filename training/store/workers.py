"""Slides cut by worker processes: one slide is one job, and a job that kills its worker takes no other with it."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import NamedTuple

import cv2

from slides.errors import SlidesError
from training.store.slide_file import SlideJob, cut_slide

_LIBRARY_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ARROW_IO_THREADS")


class Outcome(NamedTuple):
    """What became of a job: the number of tiles, or why there are none."""

    job: SlideJob
    tiles: int
    reason: str | None


def cut_slides(
    jobs: Sequence[SlideJob], workers: int, cut: Callable[[SlideJob], int] = cut_slide
) -> Generator[Outcome, None, None]:
    """Do all jobs, in `workers` processes; outcomes come as they are done.

    A worker that dies (killed for memory, crash of a decoder) takes its pool with it. Unfinished jobs are then done one
    at a time in a process of their own, and the one that kills it again is reported as failed.

    Raises:
        OSError: the store cannot be written.
    """
    unfinished = {job.image_id: job for job in jobs}
    try:
        for outcome in _in_pool(jobs, min(workers, len(jobs)), cut):
            del unfinished[outcome.job.image_id]
            yield outcome
    except BrokenProcessPool:
        for job in list(unfinished.values()):
            try:
                yield from _in_pool([job], 1, cut)
            except BrokenProcessPool:
                reason = (
                    f"{job.path}: the process that cut it was killed (out of memory, or a crash of a decoder)"
                )
                yield Outcome(job, 0, reason)


def _in_pool(jobs: Sequence[SlideJob], workers: int, cut: Callable[[SlideJob], int]) -> Iterator[Outcome]:
    if not jobs:
        return
    # Spawned: forking a process with threads (the progress bar has one) may deadlock.
    context = multiprocessing.get_context("spawn")
    before = {name: os.environ.get(name) for name in _LIBRARY_THREADS}
    others = set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        os.environ.update(dict.fromkeys(_LIBRARY_THREADS, "1"))  # read by the workers as they load NumPy
        job_of = {pool.submit(_attempt, job, cut): job for job in jobs}
        for done in concurrent.futures.as_completed(job_of):
            tiles, reason = done.result()
            yield Outcome(job_of[done], tiles, reason)
    except BaseException:  # Ctrl-C among them: slides in work may take minutes yet, and are not waited for
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        pool.shutdown(wait=True, cancel_futures=True)


def _attempt(job: SlideJob, cut: Callable[[SlideJob], int]) -> tuple[int, str | None]:
    try:
        return cut(job), None
    except (SlidesError, MemoryError) as error:
        return 0, str(error) or f"{job.path}: not enough memory"
    except SystemExit:  # terminated; what was half-written is gone, and there is to be no next slide
        os._exit(143)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and cancels what has not begun
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cv2.setNumThreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed must not go on writing into a store that another run may hold by then."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)

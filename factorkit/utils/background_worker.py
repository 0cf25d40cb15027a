"""Work behind a training's back: writing takes as long as the disk likes, and no step waits for it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class Background:
    """One thread that does jobs in turn. After one that failed the rest are left undone."""

    def __init__(self):
        self._thread = ThreadPoolExecutor(1, "factorkit-background")
        self._jobs: list[Future] = []
        self._error: Exception | None = None

    def submit(self, job: Callable[[], object]) -> None:
        """Do ``job`` after those before it. What it uses must not change meanwhile."""
        self._jobs.append(self._thread.submit(self._do, job))

    def finish(self) -> Exception | None:
        """Wait for all jobs; answers what went wrong with one, once."""
        wait(self._jobs)
        self._jobs.clear()
        error, self._error = self._error, None
        return error

    def close(self) -> Exception | None:
        """:meth:`finish`, for good."""
        error = self.finish()
        self._thread.shutdown()
        return error

    def _do(self, job: Callable[[], object]) -> None:
        if self._error is None:
            try:
                job()
            except Exception as error:
                self._error = error

"""A background thread, so that disk writes do not block training."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class BackgroundWorker:
    """Run jobs one after the other in one thread. After a job that failed, the others are skipped."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "factorkit-background")
        self._jobs: list[Future[None]] = []
        self._error: Exception | None = None

    def submit(self, job: Callable[[], object]) -> None:
        """Run ``job`` after earlier jobs. Objects it uses must not change meanwhile."""
        self._jobs.append(self._thread.submit(self._run, job))

    def finish(self) -> Exception | None:
        """Wait for all jobs and return the error of a failed one; the error is then cleared."""
        wait(self._jobs)
        self._jobs.clear()
        error, self._error = self._error, None
        return error

    def close(self) -> Exception | None:
        """Call :meth:`finish` and end the thread."""
        error = self.finish()
        self._thread.shutdown()
        return error

    def _run(self, job: Callable[[], object]) -> None:
        if self._error is None:
            try:
                job()
            except Exception as error:
                self._error = error

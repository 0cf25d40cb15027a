"""Signals that ask a training to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

NUMBERS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]


class Asked:
    """What asked for an end: ``number`` is that of the signal, 0 before there was one."""

    number = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM, SIGUSR1 (which Slurm can warn with) and the first Ctrl-C are remembered meanwhile. A second Ctrl-C
        interrupts at once; a second SIGTERM does not: who signals torchrun and its processes alike sends two.
        """
        self.number = 0
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def remember(number, frame):
            self.number = number
            if number == signal.SIGINT:
                signal.signal(number, before[number])

        before = {s: signal.signal(s, remember) for s in NUMBERS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

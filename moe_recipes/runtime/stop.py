"""Signals and switch files become flags that all ranks agree on at a step boundary."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType


class StopFlag:
    """Remembers that a signal came. Handlers only set the flag: saving needs all ranks, so it waits for the step."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)

    def __init__(self) -> None:
        self.signal_name: str | None = None
        for number in self.SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name


def switch_is_on(path: Path) -> bool:
    """True if the switch file is there; read by one rank only, so that no two ranks see different answers."""
    return path.exists()

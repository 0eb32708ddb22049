"""Processes that die, or meet a full disk, at a chosen call that changes the disk."""

from __future__ import annotations

import errno
import os
import traceback

SYSTEM_CALLS = ("mkdir", "open", "ftruncate", "pwrite", "write", "fsync", "rename", "replace", "rmdir", "unlink")


class Countdown:
    """Replaces functions of ``os`` so that the ``at``-th call does something else. Counts all. For a child process."""

    def __init__(self, at, instead):
        self.calls, self.at, self.instead = 0, at, instead
        for name in SYSTEM_CALLS:
            setattr(os, name, self.wrap(getattr(os, name)))

    def wrap(self, real):
        def call(*args, **keywords):
            self.calls += 1
            return self.instead(real, *args) if self.calls == self.at else real(*args, **keywords)

        return call


def die(real, *args):
    if real.__name__ in ("pwrite", "write"):
        real(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
    os._exit(9)


def disk_full(real, *args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_child(action) -> int:
    """Run ``action`` in a fork; returns its exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

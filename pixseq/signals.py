"""The signals that ask a command to end: Ctrl-C, a scheduler's TERM and its early USR1, a terminal that goes away."""

from __future__ import annotations

import signal

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def to_heed() -> tuple[signal.Signals, ...]:
    """Those that this process should answer: under nohup, a hangup is meant to be passed over."""
    return tuple(n for n in STOPPING if not (n == signal.SIGHUP and signal.getsignal(n) == signal.SIG_IGN))

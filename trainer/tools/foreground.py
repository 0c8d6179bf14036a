"""Runs a command of the Makefile that a person may stop: Ctrl-C then ends without make's "*** Error".

The terminal sends Ctrl-C to make as well, which waits for the command and then ends as interrupted by itself (130 in a
shell). An exit code from the command would only add make's line about an error that is none. Every other end keeps its
exit code, also that of a SIGINT or SIGTERM which did not come from a terminal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys


def on_terminal() -> bool:
    """Whether this process is in the group to which the terminal sends Ctrl-C."""
    with contextlib.suppress(OSError):
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
        try:
            return os.tcgetpgrp(terminal) == os.getpgrp()
        finally:
            os.close(terminal)
    return False


def unblock() -> None:
    """Hear SIGTERM again."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def main(command: list[str]) -> int:
    """Run `command` to its end; its exit code, 0 where a person stopped it at a terminal."""
    stopped: list[bool] = []
    started: list[subprocess.Popen[bytes]] = []

    def end(*_: object) -> None:  # make passes SIGTERM on to us alone
        for process in started:
            process.terminate()
        if not started:
            sys.exit(143)

    signal.signal(signal.SIGINT, lambda *_: stopped.append(True))
    signal.signal(signal.SIGTERM, end)
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # not between its start and our knowing of it
        process = subprocess.Popen(command, preexec_fn=unblock)
        started.append(process)
    except OSError as error:
        print(f"error: {command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    unblock()
    code = process.wait()
    if stopped and on_terminal():
        return 0
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

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


def main(command: list[str]) -> int:
    """Run `command` to its end; its exit code, 0 where a person stopped it at a terminal."""
    stopped = []
    signal.signal(signal.SIGINT, lambda *_: stopped.append(True))
    try:
        process = subprocess.Popen(command)
    except OSError as error:
        print(f"error: {command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # make passes it on to us alone
    code = process.wait()
    if stopped and on_terminal():
        return 0
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

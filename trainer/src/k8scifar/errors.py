"""Failures that people can mend, each told in one line, and the exit codes of a process."""

USER_MISTAKE = 2  # exit code: a restart can't mend it
FAILED = 1  # exit code: a restart may mend it (storage, time-outs)
PREEMPTED = 3  # exit code: stopped by SIGTERM, after saving
CRASHED = 4  # exit code: a rank ended by an error of its own that nobody foresaw, or by a signal
PEER_LOST = 5  # exit code of a rank: another one ended or fell silent; `k8scifar launch` makes it FAILED

LATE = 6  # exit code of a rank: another process has its run folder; `k8scifar launch` makes it FAILED, and ends


class UserError(Exception):
    """A mistake of the user's: one line that says what is wrong and what to do; exit code 2, no traceback."""

    shared = True  # every rank of a machine meets it: one line is enough
    code = USER_MISTAKE


class RankError(UserError):
    """A UserError that concerns this rank and not its neighbours: every rank tells its own."""

    shared = False


class Superseded(RankError):
    """Another process has taken over the run folder: this one is late, and a restart of it would be late again."""

    code = LATE


class TrainingError(Exception):
    """A failure of the run itself (a full disk, a volume away): one line; exit code 1, a restart may mend it."""

    shared = False
    code = FAILED


class PeerLost(TrainingError):
    """Another rank ended, fell silent or did not come; exit code 5."""

    code = PEER_LOST


class PeersDiffer(PeerLost):
    """Ranks that do not belong together; mended by a restart once a rolling upgrade has reached them all."""

    shared = True

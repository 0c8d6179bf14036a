"""Exit codes of a process, and errors that are reported in one line."""

FAILED = 1  # a restart may help (storage, time-outs)
USER_MISTAKE = 2  # a restart does not help
PREEMPTED = 3  # stopped by SIGTERM, after saving
CRASHED = 4  # a rank ended by an unexpected error or by a signal
# Of ranks only; `k8scifar launch` turns them into FAILED.
PEER_LOST = 5  # another rank ended or went silent
LATE = 6  # another process has taken over the run folder; `k8scifar launch` ends


class UserError(Exception):
    """A user's mistake: one line with what is wrong and what to do; exit code 2, no traceback."""

    shared = True  # every rank of a machine raises it: one line is enough
    code = USER_MISTAKE


class RankError(UserError):
    """A UserError that concerns this rank only: every rank logs its own."""

    shared = False


class Superseded(RankError):
    """Another process has taken over the run folder; a restart of this one would be late again."""

    code = LATE


class TrainingError(Exception):
    """A failure of the run (a full disk, a volume that is away): one line; exit code 1, a restart may help."""

    shared = False
    code = FAILED


class PeerLost(TrainingError):
    """Another rank ended, went silent or did not come; exit code 5."""

    code = PEER_LOST


class PeersDiffer(PeerLost):
    """The ranks differ in settings, data or version; a restart helps once a rolling upgrade has reached all."""

    shared = True

"""Failures that a person can mend, told in one line."""

USER_MISTAKE = 2  # exit code: a restart can't mend it
FAILED = 1  # exit code: a restart may mend it
PREEMPTED = 3  # exit code: stopped by SIGTERM, after saving


class UserError(Exception):
    """A mistake of the user's: one line that says what is wrong and what to do; exit code 2, no traceback."""

    shared = True  # every rank of a machine meets it: one line is enough


class RankError(UserError):
    """A UserError that concerns this rank and not its neighbours: every rank tells its own."""

    shared = False


class TrainingError(Exception):
    """A failure of the run itself (a peer lost, a full disk): one line; exit code 1, a restart may mend it."""

    shared = False


class PeersDiffer(TrainingError):
    """Ranks that do not belong together; mended by a restart once a rolling upgrade has reached them all."""

    shared = True

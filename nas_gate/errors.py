"""How a command ends without a result: what its user can mend. Here, so that telling them apart loads nothing."""


class Refused(ValueError):
    """What was asked for breaks a rule; nothing was trained."""


class InUse(Refused):
    """Another process is working there; it may be asked again once that has ended."""


class Diverged(RuntimeError):
    """The loss or the weights became NaN or infinite; the last good checkpoint is still on disk."""


class StudyFailed(RuntimeError):
    """The study cannot go on; what is finished stays, and the same command continues it."""

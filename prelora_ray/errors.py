"""What the command line tells in one sentence. A user's mistake is a ValueError, anywhere."""


class WorkError(RuntimeError):
    """The request was right, and the work failed."""


class InterruptedRunError(RuntimeError):
    """The run was stopped from outside, and can be resumed."""

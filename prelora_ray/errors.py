"""What the command line tells in one sentence. A user's mistake is a ValueError, anywhere."""


class WorkError(RuntimeError):
    """The request was right, and the work failed."""


class InterruptedRunError(RuntimeError):
    """The run was stopped from outside, and can be resumed."""


def one_line(error: BaseException) -> str:
    """What an error says, however many lines it takes for that; its type's name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__

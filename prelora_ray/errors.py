"""Errors that the command line reports in one sentence; any other is a bug, and comes with its traceback."""


class UserError(ValueError):
    """The user's request is wrong.

    The message is one sentence, or one a line, naming the key or the file, the value, and what would be right.
    """


class WorkError(RuntimeError):
    """The request was right, and the work failed."""


class InterruptedRunError(RuntimeError):
    """The work was stopped from outside; a run can be resumed."""


def one_line(error: BaseException) -> str:
    """What an error says, however many lines it takes for that; its type's name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__

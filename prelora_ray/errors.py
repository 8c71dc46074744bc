"""What the command line tells in one sentence; any other error is the program's own, and told with a traceback."""


class UserError(ValueError):
    """What the user asked for cannot be.

    The message is one sentence, or one a line, naming the key or the file, the value, and what would be right.
    """


class WorkError(RuntimeError):
    """The request was right, and the work failed."""


class InterruptedRunError(RuntimeError):
    """The run was stopped from outside, and can be resumed."""


def one_line(error: BaseException) -> str:
    """What an error says, however many lines it takes for that; its type's name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__

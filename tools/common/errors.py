"""The error of what a tool cannot do."""


class UsageError(Exception):
    """What was asked for cannot be done; the message is one line and says what would help."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its name where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")

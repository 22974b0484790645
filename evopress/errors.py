"""Errors that are told to the person at the keyboard as one sentence."""


class EvoPressError(Exception):
    """Say what was wrong, its value, what was expected and what to do, in one sentence.

    The entry point prints the sentence and exits with 1; it shows no traceback. Anything else that is raised is a bug.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of what another package's error says; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def reason_of(error: BaseException) -> str:
    """Return the kind of another package's error and the first line of what it says, as part of a sentence."""
    kind, line = type(error).__name__, first_line(error)[:200].rstrip(". ")
    return kind if line == kind else f"{kind}: {line}"

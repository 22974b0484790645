"""Errors that are told to the person at the keyboard as one sentence."""


class EvoPressError(Exception):
    """Say what was wrong, its value, what was expected and what to do, in one sentence.

    The entry point prints the sentence and exits with 1; it shows no traceback. Anything else that is raised is a bug.
    """

import pytest

from evopress.errors import first_line, reason_of


@pytest.mark.parametrize(
    ("error", "line", "reason"),
    [
        (ValueError("no such file.\nTraceback"), "no such file.", "ValueError: no such file"),
        (OSError("\n  denied"), "denied", "OSError: denied"),
        (AssertionError(), "AssertionError", "AssertionError"),
        (RuntimeError("x" * 300), "x" * 300, f"RuntimeError: {'x' * 200}"),
    ],
)
def test_another_packages_error_is_told_by_its_first_line(error: Exception, line: str, reason: str) -> None:
    assert (first_line(error), reason_of(error)) == (line, reason)

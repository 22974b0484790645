"""Write `bad_inputs.md`: every bad input of `tests/cli/test_bad_input.py` with what the program says, by running them all."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TESTS = HERE.parent / "cli" / "test_bad_input.py"
HEAD = """# Bad inputs, and what the program says

Written by `python tests/reliability/list_bad_inputs.py`, which runs `tests/cli/test_bad_input.py`: each of them ends with
exit code 1 and this one sentence after `error: `, without a traceback; settings, checkpoints and text before any model is
loaded. `FOLDER` is the test's own folder.

| case | input | sentence |
| --- | --- | --- |
"""


def main() -> int:
    """Run the tests and write the list; return pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inputs.jsonl"
        os.environ["EVOPRESS_BAD_INPUTS"] = str(path)
        arguments = ["-q", str(TESTS), "-k", "refused", "-p", "no:cacheprovider"]
        code = int(pytest.main([*arguments, "-m", "not gpu and not network"]))  # the slow ones too
        write(path)
    return code


def write(path: Path) -> None:
    """Write the list from the JSON lines that the tests left, in the order of their tables."""
    said = {record["name"]: record for record in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    spec = importlib.util.spec_from_file_location("test_bad_input", TESTS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = [f"| {name} | `{_cell(said[name]['given'])}` | {_cell(said[name]['sentence'])} |" for name in module.names_of_cases()]
    (HERE / "bad_inputs.md").write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")
    print(f"{len(rows)} bad inputs: {HERE / 'bad_inputs.md'}")


def _cell(text: str) -> str:
    return re.sub("x{20,}", "x…x", text).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(main())

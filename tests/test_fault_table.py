"""Every fault of the model has a test that exists and a documented exit code; some are tried."""

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SUITE = HERE / "fault"
FAULTS = tomllib.loads((SUITE / "faults.toml").read_text())["fault"]
COUNT = 54
CODES = {0, 2, 3, 4, 5, 6, 7, 8, 9, 130, 143}  # 1 would be a defect


@pytest.fixture(scope="module")
def cases():
    """Return the names of the cases of the kinds that are tables."""
    code = (
        "import fault_inputs, fault_exploits, json; print(json.dumps({"
        "'fault_inputs': [c.name for c in fault_inputs.CASES],"
        "'fault_exploits': [e.case.name for e in fault_exploits.EXPLOITS]}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SUITE, capture_output=True, text=True, check=True
    )

    return json.loads(done.stdout)


def exists(test, cases):
    """Whether a test of the table is there."""
    file, _, function = test.partition(".py::")
    if function:
        tree = ast.parse((HERE / f"{file}.py").read_text())
        return any(isinstance(n, ast.FunctionDef) and n.name == function for n in tree.body)
    kind, _, case = test.partition(": ")
    return case in cases[kind] if case else (SUITE / f"{kind}.py").is_file()


def test_all_faults_are_there():
    assert [fault["number"] for fault in FAULTS] == list(range(1, COUNT + 1))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: str(fault["number"]))
def test_a_fault_has_a_test_and_a_code(fault, cases):
    assert fault["what"]
    if "open" in fault:
        assert fault["open"]
        assert "tests" not in fault
        return
    assert fault["tests"]
    assert [test for test in fault["tests"] if not exists(test, cases)] == []
    assert fault["exit"]
    assert set(fault["exit"]) <= CODES


@pytest.mark.alone
def test_the_cases_of_the_table(environment):
    named = [
        t for fault in FAULTS for t in fault.get("tests", ()) if t.startswith("fault_inputs: ")
    ]
    words = [test.removeprefix("fault_inputs: ") for test in named]
    done = subprocess.run(
        [sys.executable, str(SUITE / "fault_inputs.py"), *words],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout

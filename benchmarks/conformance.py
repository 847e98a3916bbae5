"""Run the common tests of transformers on wrapped models: `python -m benchmarks.conformance`; see docs/conformance.md.

The tests come from the source distribution of transformers, unpacked under `.venv/conformance`. What it leaves out,
among it the tests of generation, comes from a checkout of the same version where `--checkout` names one.
"""

import argparse
import fnmatch
import importlib
import os
import sys
import time
import tomllib
import types
import unittest
from collections import Counter
from pathlib import Path
from typing import Any

# Before transformers is imported: its tests ask for the device then, and the table is that of a CPU.
os.environ |= {"TRANSFORMERS_TEST_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}

import pytest
import transformers
from transformers.utils import logging

from benchmarks.conformance_cases import ONCE, Case, cases, test_class

HERE = Path(__file__).parent
FOLDER = HERE.parent / ".venv" / "conformance"
TABLE = HERE / "conformance.toml"
ABSENT = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
"""Modules that the source distribution lacks, and which class the tests of models import from each."""

Outcomes = dict[tuple[str, str], tuple[str, str]]
"""By case and test: passed, failed or skipped, and why."""


def mixins(checkout: Path | None) -> tuple[type, ...]:
    """Import the classes that hold the tests.

    Args:
        checkout: of transformers, or None.

    Returns:
        The classes. Without a checkout those that are absent are empty.
    """
    folder = FOLDER / f"transformers-{transformers.__version__}" / "tests"
    if not (folder / "test_modeling_common.py").exists():
        sys.exit(f"{folder}: no tests of transformers {transformers.__version__}; run `make conformance`")
    package: Any = types.ModuleType("tests")
    package.__path__ = [str(folder)]
    sys.modules["tests"] = package
    sys.path.append(str(FOLDER / "site"))
    if checkout is not None:
        package.__path__.append(str(checkout / "tests"))
    else:
        for name, absent in ABSENT.items():
            module = types.ModuleType(f"tests.{name}")
            setattr(module, absent, type(absent, (), {}))
            sys.modules[module.__name__] = module
    common = importlib.import_module("tests.test_modeling_common")
    return common.ModelTesterMixin, common.GenerationTesterMixin


class Recorder(unittest.TestResult):
    """Keep what became of each test.

    Attributes:
        outcomes: passed, failed or skipped and why, by case and test.
        seconds: how long each test took, all cases together.
    """

    # The names are unittest's.
    # ruff: noqa: D102, N802, N815

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: Outcomes = {}
        self.seconds: Counter[str] = Counter()

    def startTest(self, test: Any) -> None:
        self._began = time.perf_counter()

    def stopTest(self, test: Any) -> None:
        self.seconds[test._testMethodName] += time.perf_counter() - self._began
        self._keep(test, "passed", "")

    def _keep(self, test: Any, outcome: str, why: str) -> None:
        test = getattr(test, "test_case", test)
        self.outcomes.setdefault((type(test).__name__, test._testMethodName), (outcome, why))

    def addSkip(self, test: Any, reason: str) -> None:
        self._keep(test, "skipped", reason)

    def addError(self, test: Any, err: Any) -> None:
        if issubclass(err[0], pytest.skip.Exception):
            return self.addSkip(test, str(err[1]))
        return self._keep(test, "failed", self._exc_info_to_string(err, test))

    addFailure = addError

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        if err is not None:
            self.addError(test, err)


def explain(outcomes: Outcomes, table: list[dict[str, Any]], *, whole: bool) -> list[str]:
    """Hold what became of the tests against the table of what is expected.

    Args:
        outcomes: what became of each test.
        table: entries of `conformance.toml`.
        whole: whether all tests were run, so that an entry which fits none of them is out of date.

    Returns:
        One line for each test that became something else than the table says.
    """
    odd, used = [], set()
    for (case, test), (outcome, why) in sorted(outcomes.items()):
        fits = [
            number
            for number, entry in enumerate(table)
            if any(fnmatch.fnmatchcase(test, each) for each in entry["tests"])
            and any(fnmatch.fnmatchcase(case, each) for each in entry.get("cases", ["*"]))
        ]
        used.update(fits)
        expected = table[fits[0]]["outcome"] if fits else "passed"
        if len(fits) > 1:
            odd.append(f"{case} {test}: {len(fits)} entries of the table fit it; expected at most one")
        elif outcome != expected:
            last = why.strip().splitlines()[-1] if why.strip() else ""
            odd.append(f"{case} {test}: {outcome}, expected {expected}  {last}".rstrip())
    if whole:
        unused = [", ".join(entry["tests"]) for number, entry in enumerate(table) if number not in used]
        odd += [f"{tests}: in the table, and no such test was run" for tests in unused]
    return odd


def run(case: Case, kinds: tuple[type, ...], pattern: str, recorder: Recorder) -> None:
    """Run the tests on one case.

    Args:
        case: backbone, mode and fusion.
        kinds: the classes that hold the tests.
        pattern: which tests, by name.
        recorder: keeps what becomes of them.
    """
    made = test_class(case, kinds)
    names = fnmatch.filter(unittest.TestLoader().getTestCaseNames(made), pattern)
    if case != next(cases()):
        names = [name for name in names if not any(fnmatch.fnmatchcase(name, each) for each in ONCE)]
    unittest.TestSuite(map(made, names)).run(recorder)


def main() -> int:
    """Run the tests that were asked for, and say which became something else than the table says.

    Returns:
        0 where none did.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkout", type=Path, help="a checkout of transformers of the installed version")
    parser.add_argument("--tests", default="test_*", help="names of tests, as a pattern such as test_[!f]*")
    parser.add_argument("--cases", default="*", help="cases such as qwen2-softmax-plain, as a pattern")
    parser.add_argument("--verbose", action="store_true", help="tracebacks, reasons of skips, and times")
    options = parser.parse_args()
    logging.set_verbosity_error()
    kinds = mixins(options.checkout)
    recorder = Recorder()
    for case in cases():
        if fnmatch.fnmatchcase("-".join(case), options.cases):
            before = len(recorder.outcomes)
            run(case, kinds, options.tests, recorder)
            new = Counter(outcome for outcome, _ in list(recorder.outcomes.values())[before:])
            print(
                f"{'-'.join(case):32}", *(f"{new[each]} {each}" for each in ("passed", "failed", "skipped"))
            )
    if options.verbose:
        for (name, test), (outcome, why) in recorder.outcomes.items():
            if why:
                print(f"\n=== {name} {test}: {outcome}\n{why}")
        print("\n".join(f"{seconds:8.1f} s  {name}" for name, seconds in recorder.seconds.most_common(15)))
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))["expected"]
    if options.checkout is None:
        table = [entry for entry in table if not entry.get("checkout")]
        print(
            f"Not run, since the source distribution lacks them: {', '.join(ABSENT)}; give a checkout for them"
        )
    odd = explain(recorder.outcomes, table, whole=options.tests == "test_*" and options.cases == "*")
    print("\n".join([*odd, f"{len(recorder.outcomes)} tests, {len(odd)} not as the table says"]))
    return bool(odd)


if __name__ == "__main__":
    sys.exit(main())

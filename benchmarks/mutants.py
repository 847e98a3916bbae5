"""Delete one statement or line at a time, and see whether a test fails: python -m benchmarks.mutants FILE...

Everything happens in a copy of the tree. A statement becomes `pass`. Of a statement that spans several lines, and of
decorators, each line is deleted whose absence leaves valid Python. Left alone are docstrings, imports, definitions,
`__all__`, and annotations without a value. Checks of input (a `raise`, and an `if` that only raises) count apart.

First all tests run once, traced. Then each mutant is judged by the tests that reached its lines, in a process forked
from one that has imported torch already. What survives is either a gap in the tests or makes no difference; that is
for the reader to decide.
"""

import argparse
import ast
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Mutant", "Verdict", "main", "mutants"]

COPIED = ("src", "tests", "benchmarks", "pyproject.toml")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
GRACE = 20
"""Seconds of the processor that a mutant's tests may take beyond twice what they took traced."""
LONGEST = 3600
"""Seconds of the processor that all tests may take without a mutant, and of the clock that any run may take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mutant:
    """A file with something deleted.

    Attributes:
        file: its path from the root of the tree.
        line: where the deletion begins, from 1.
        reach: first and last line of the statement, which a test must reach to tell.
        kind: `statement`, `line` or `check`.
        always: whether it runs when the module is imported, and so before any test.
        removed: the first line of what was deleted, for people.
        text: the file without it; all other lines keep their numbers.
    """

    file: str
    line: int
    reach: tuple[int, int]
    kind: str
    always: bool
    removed: str
    text: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a mutant.

    Attributes:
        killed: whether a test failed, or took too long.
        by: the test, or why there is none.
    """

    killed: bool
    by: str


# Mutants


def mutants(file: str, text: str) -> Iterator[Mutant]:
    """Delete one statement or line at a time.

    Args:
        file: name of the file.
        text: what it holds.

    Yields:
        The mutants, in the order of the file.
    """
    lines = text.splitlines(keepends=True)
    for node, checks, always in _statements(ast.parse(text).body, always=True):
        check, last = checks or _is_check(node), node.end_lineno or node.lineno
        made = [] if isinstance(node, DEFINITIONS) else [(node.lineno, "statement", _passed(text, node))]
        for at in _own_lines(node):
            shorter = "".join([*lines[: at - 1], "\n", *lines[at:]])
            if _differs(shorter, text):
                made.append((at, "line", shorter))
        for at, kind, changed in made:
            yield Mutant(
                file=file, line=at, reach=(min(at, node.lineno), last), kind="check" if check else kind,
                always=always, removed=lines[at - 1].strip(), text=changed,
            )  # fmt: skip


def _statements(
    body: list[ast.stmt], *, always: bool, checks: bool = False
) -> Iterator[tuple[ast.stmt, bool, bool]]:
    # What can be deleted, whether it is part of a check of input, and whether importing the module runs it.
    for node in body:
        if not _is_left_alone(node):
            yield node, checks, always
        inside = always and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        blocks = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
        blocks += [handler.body for handler in getattr(node, "handlers", [])]
        blocks += [case.body for case in getattr(node, "cases", [])]
        for block in blocks:
            yield from _statements(block, always=inside, checks=checks or _is_check(node))


def _is_left_alone(node: ast.stmt) -> bool:
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    if isinstance(node, ast.Assign):
        return [getattr(target, "id", None) for target in node.targets] == ["__all__"]
    return isinstance(node, ast.Import | ast.ImportFrom | ast.Pass) or (
        isinstance(node, ast.AnnAssign) and node.value is None
    )


def _is_check(node: ast.stmt) -> bool:
    if isinstance(node, ast.If | ast.For):
        return not node.orelse and all(map(_is_check, node.body))
    return isinstance(node, ast.Raise)


def _own_lines(node: ast.stmt) -> Iterator[int]:
    # The lines of a statement that belong to no other, where it has several.
    if isinstance(node, DEFINITIONS):
        yield from (each.lineno for each in node.decorator_list)
        return
    inner = getattr(node, "body", None)
    end = inner[0].lineno - 1 if isinstance(inner, list) else node.end_lineno
    if end is not None and end > node.lineno:
        yield from range(node.lineno, end + 1)


def _passed(text: str, node: ast.stmt) -> str:
    lines = text.encode().splitlines(keepends=True)
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    # Where `elif` stands no `pass` can; the branch loses its condition and its body instead.
    word = b"elif False: pass" if lines[node.lineno - 1].lstrip().startswith(b"elif") else b"pass"
    rest = text.encode()[end:]
    return (text.encode()[:start] + word + b"\n" * (node.end_lineno - node.lineno) + rest).decode()


def _differs(text: str, original: str) -> bool:
    try:
        return ast.dump(ast.parse(text)) != ast.dump(ast.parse(original))
    except SyntaxError:
        return False


# Tests


@dataclass(eq=False)
class Run:
    """One run of tests, as a plugin of pytest.

    Attributes:
        wanted: tests to run, in this order; None for all.
        files: files to trace: where they lie, and what they are called.
        lines: lines of them, with their file, that each test and each fixture reached.
        seconds: how long each test took.
        failed: the first test or file that failed.
    """

    wanted: list[str] | None = None
    files: dict[str, str] = field(default_factory=dict)
    lines: dict[str, set[tuple[str, int]]] = field(default_factory=lambda: defaultdict(set))
    fixtures: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failed: str | None = None

    def pytest_configure(self, config: pytest.Config) -> None:
        """Let property tests stop at the first example that fails: nobody reads a smaller one."""
        from hypothesis import Phase, settings

        settings.register_profile("mutants", settings(), phases=(Phase.explicit, Phase.reuse, Phase.generate))
        settings.load_profile("mutants")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the tests that are wanted, in their order."""
        if self.wanted is not None:
            place = {name: at for at, name in enumerate(self.wanted)}
            items[:] = sorted((i for i in items if i.nodeid in place), key=lambda i: place[i.nodeid])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Note what a test reaches."""
        self.fixtures[item.nodeid] = list(getattr(item, "fixturenames", ()))
        start = time.process_time()
        with _Tracing(self.files, self.lines[item.nodeid]):
            result = yield
        self.seconds[item.nodeid] = time.process_time() - start
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        """Note what a fixture reaches, for all tests that use it."""
        with _Tracing(self.files, self.lines[fixturedef.argname]):
            return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the first failure."""
        if report.failed and self.failed is None:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep the first file that cannot be read."""
        if report.failed and self.failed is None:
            self.failed = report.nodeid

    def reached(self, mutant: Mutant) -> list[str]:
        """List the tests that reach a mutant, the quickest first.

        What runs on import is reached by all.

        Args:
            mutant: what was deleted.

        Returns:
            Names of tests.
        """
        first, last = mutant.reach
        span = {(mutant.file, line) for line in range(first, last + 1)}
        there = {name for name, lines in self.lines.items() if lines & span}
        tests = (
            name for name in self.seconds if mutant.always or there.intersection([name, *self.fixtures[name]])
        )
        return sorted(tests, key=lambda name: self.seconds[name])


class _Tracing:
    # Collects the lines of some files; within a fixture those of the fixture.
    def __init__(self, files: dict[str, str], lines: set[tuple[str, int]]) -> None:
        self._files, self._lines = files, lines

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        if self._files:
            sys.settrace(self._called)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _called(self, frame: Any, event: str, argument: Any) -> Callable[..., Any] | None:
        return self._reached if frame.f_code.co_filename in self._files else None

    def _reached(self, frame: Any, event: str, argument: Any) -> Callable[..., Any]:
        self._lines.add((self._files[frame.f_code.co_filename], frame.f_lineno))
        return self._reached


def _test(pipe: Any, root: Path, arguments: list[str], run: Run, limit: int, remember: bool) -> None:
    # In a process of its own: the tests of the copy, with the package of the copy. Not the clock but the processor
    # limits it, since the machine may be busy.
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    os.chdir(root)
    sys.path.insert(0, str(root / "src"))
    os.environ["PYTHONPATH"] = str(root / "src")
    # Compiled files of what no mutant changes are read, and none of a mutant is left.
    sys.dont_write_bytecode = not remember
    with (root.parent / "output").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    # What this process had imported before is not rewritten for pytest, and need not be.
    quiet = ("-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning")
    code = pytest.main(
        [*arguments, "-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", *quiet], plugins=[run]
    )
    package = sys.modules.get("tether")
    if package is not None and not str(package.__file__).startswith(str(root)):
        raise RuntimeError(f"tests read {package.__file__} instead of the copy")
    pipe.send((int(code), run))


def _forked(
    root: Path, arguments: list[str], run: Run, limit: int, *, remember: bool = False
) -> tuple[int, Run]:
    # The exit status of pytest, or what ended the process, and what the run noted.
    context = get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_test, args=(theirs, root, arguments, run, limit, remember))
    process.start()
    theirs.close()
    try:
        if not ours.poll(LONGEST):
            return -signal.SIGXCPU, run
        code, run = ours.recv()
    except EOFError:
        process.join()
        return process.exitcode or 1, run
    finally:
        process.kill()
        process.join()
    return code, run


def _judged(root: Path, mutant: Mutant, names: list[str], seconds: float) -> Verdict:
    if not names:
        return Verdict(False, "no test reaches it")
    path = root / mutant.file
    original = path.read_text(encoding="utf-8")
    path.write_text(mutant.text, encoding="utf-8")
    try:
        files = list(dict.fromkeys(name.split("::")[0] for name in names))
        code, run = _forked(root, files, Run(wanted=names), GRACE + int(2 * seconds))
    finally:
        path.write_text(original, encoding="utf-8")
    if code == 0:
        return Verdict(False, f"{len(names)} tests pass")
    return Verdict(True, run.failed or ("time" if code == -signal.SIGXCPU else "import"))


# Command


def _lines(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def main() -> None:
    """Try the mutants of some files and print what became of each, and a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mutants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="from the root of the tree")
    parser.add_argument(
        "--tests", nargs="+", required=True, help="files of tests, or single tests, from the root"
    )
    parser.add_argument(
        "--lines", nargs="+", type=_lines, help="only mutants that begin there, as 12 or 40-60"
    )
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    import hypothesis  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve() / "tether"
        root.mkdir()
        for name in COPIED:
            copy = shutil.copytree if Path(name).is_dir() else shutil.copy2
            copy(name, root / name)
        traced = {str(root / file): file for file in options.files}
        code, everything = _forked(root, options.tests, Run(files=traced), LONGEST, remember=True)
        if code:
            sys.exit(f"without any mutant the tests failed:\n{(root.parent / 'output').read_text()}")
        killers = set[str]()
        table = Counter[tuple[str, str, bool]]()
        for file in options.files:
            for mutant in mutants(file, (root / file).read_text(encoding="utf-8")):
                if options.lines and not any(mutant.line in part for part in options.lines):
                    continue
                # Who killed one before kills the next more often than not.
                names = sorted(everything.reached(mutant), key=lambda name: name not in killers)
                verdict = _judged(root, mutant, names, sum(everything.seconds[name] for name in names))
                killers |= {verdict.by} if verdict.killed else set()
                table[file, "checks" if mutant.kind == "check" else "mutants", verdict.killed] += 1
                fate, where = "killed" if verdict.killed else "SURVIVED", f"{file}:{mutant.line}"
                print(f"{fate} {where} {mutant.kind} | {mutant.removed} | {verdict.by}", flush=True)
    for file, kind in dict.fromkeys((file, kind) for file, kind, _ in table):
        killed, survived = table[file, kind, True], table[file, kind, False]
        print(f"{file}: {kind} {killed + survived}, killed {killed}, survived {survived}")


if __name__ == "__main__":
    main()

"""Make each deliberate mistake of mutants.yaml in a scratch copy and run the test that must catch it. `make mutants`.

A mistake is caught where the test fails with it and passes without it. A test that skips catches nothing, nor does one
that can't be collected. Argument: --only WORD, of a mistake's name, file or test.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[3]
LIST = REPOSITORY / "trainer/tests/mutants.yaml"
WORKERS = 2
SECONDS = 300  # of a test without a marker of its own, as in `make test`
HUNG = 900  # seconds until a whole pytest is killed


@dataclass(frozen=True)
class Mutant:
    """One small change of a source file, and the test that must fail with it."""

    name: str
    file: str  # from the repository's root
    old: str  # occurs once
    new: str
    test: str  # a file of tests, and pytest's options

    def fault(self) -> str:
        """What is wrong with this entry, "" if nothing is."""
        file, *options = shlex.split(self.test)
        if not (REPOSITORY / file).is_file():
            return f"there is no {file}"
        words = set(re.findall(r"\w+", " ".join(options))) - {"k", "and", "or", "not"}
        if lost := [word for word in words if word not in (REPOSITORY / file).read_text()]:
            return f"{file} has no test {lost[0]}"
        count = (REPOSITORY / self.file).read_text().count(self.old)
        if count != 1 or self.old == self.new:
            return f"{self.old!r} occurs {count} times in {self.file}"
        if self.file.endswith(".py"):
            compile(self.made(REPOSITORY), self.file, "exec")
        return ""

    def made(self, root: Path) -> str:
        """The file's text with the mistake in it."""
        return (root / self.file).read_text().replace(self.old, self.new)


Job = tuple[str, "Mutant | None"]  # a test, alone or with a mistake


def load() -> list[Mutant]:
    """The list."""
    return [Mutant(**values) for values in yaml.safe_load(LIST.read_text())]


class Scratch:
    """A copy of the repository's files as they lie in the working tree, whose package is what its tests import."""

    def __init__(self, folder: Path) -> None:
        self._root, self._time = folder, 1_000_000_000
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
        for name in filter(None, names.split("\0")):
            if (REPOSITORY / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(REPOSITORY / name, folder / name)
        self._environment = os.environ | {"PYTHONPATH": str(folder / "trainer/src")}
        self._environment.pop("PYTHONDONTWRITEBYTECODE", None)  # torch would be compiled anew for each test
        where = [sys.executable, "-c", "import k8scifar; print(k8scifar.__file__)"]
        found = subprocess.run(where, env=self._environment, capture_output=True, text=True, check=True).stdout
        assert Path(found).is_relative_to(folder), f"the tests would import {found}"

    def test(self, test: str) -> tuple[int | None, str]:
        """pytest's exit code and output; None where it had to be killed."""
        command = [sys.executable, "-m", "pytest", "-c", "trainer/pyproject.toml", "-q", "-x", "-p", "no:cacheprovider"]
        command += ["-n", "0", f"--timeout={SECONDS}", *shlex.split(test)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, cwd=self._root, env=self._environment, start_new_session=True, **pipes)
        try:
            output = process.communicate(timeout=HUNG)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, process.communicate()[0]
        return process.returncode, output

    def with_mistake(self, mutant: Mutant) -> tuple[int | None, str]:
        """As `test`, with the mistake made, which is undone at the end."""
        path = self._root / mutant.file
        right = path.read_text()
        try:
            self._write(path, mutant.made(self._root))
            return self.test(mutant.test)
        finally:
            self._write(path, right)

    def _write(self, path: Path, text: str) -> None:
        """At a time that no other text of this file has: bytecode of the same second and size would pass for it."""
        path.write_text(text)
        self._time += 2
        os.utime(path, (self._time, self._time))


def passes(code: int | None, output: str) -> str:
    """Why a test without a mistake is no test, "" where it passes."""
    if code == 0 and not re.search(r"\d+ skipped", output):
        return ""
    return "skips" if code == 0 else f"fails without the mistake (pytest ended with {code})"


def verdict(code: int | None, output: str) -> str:
    """What became of a mistake."""
    if code == 1 and re.search(r"\+ Timeout \+|Failed: Timeout", output):
        return "caught (time-out)"
    if code == 1:
        return "caught"
    return "LIVES" if code == 0 else f"LIVES (pytest ended with {code})"


def main() -> int:
    """Try all mistakes, or those of --only."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", metavar="WORD")
    word = parser.parse_args().only
    mutants = [each for each in load() if word in f"{each.name} {each.file} {each.test}"]
    faults = [f"error: {each.name}: {fault}" for each in mutants if (fault := each.fault())]
    if faults or not mutants:
        print("\n".join(faults) or f"error: no mistake has {word!r} in its name, file or test", file=sys.stderr)
        return 2
    os.environ.setdefault("K8SCIFAR_TEST_PATIENCE", str(WORKERS))
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(WORKERS) as pool:
        free: queue.Queue[Scratch] = queue.Queue()
        for number in range(WORKERS):
            free.put(Scratch(Path(folder, str(number))))

        def tried(job: Job) -> tuple[int | None, str, float]:
            scratch, begun = free.get(), time.monotonic()
            try:
                found = scratch.with_mistake(job[1]) if job[1] else scratch.test(job[0])
                return *found, time.monotonic() - begun
            finally:
                free.put(scratch)

        jobs: list[Job] = []
        for test in dict.fromkeys(each.test for each in mutants):
            jobs += [(test, None), *((test, each) for each in mutants if each.test == test)]
        return tell(len(mutants), zip(jobs, pool.map(tried, jobs), strict=True))


def tell(count: int, found: Iterable[tuple[Job, tuple[int | None, str, float]]]) -> int:
    """Print the table, a row as soon as it is known; 1 where not all are caught."""
    caught, fault = 0, ""
    print("| mistake | test | | s |\n|---|---|---|---|")
    for (test, mutant), (code, output, seconds) in found:
        if mutant is None:
            fault = passes(code, output)
            continue
        became = f"LIVES (the test {fault})" if fault else verdict(code, output)
        caught += became.startswith("caught")
        print(f"| {mutant.name} | {Path(shlex.split(test)[0]).name} | {became} | {seconds:.0f} |", flush=True)
    print(f"{caught} of {count} caught")
    return int(caught < count)


if __name__ == "__main__":
    sys.exit(main())

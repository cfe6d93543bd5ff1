"""``python tests/mutate.py``: break the kernels on purpose, one place at a time; the suite must notice each time.

Each mutant is made in a copy of the repository and judged by the tests of its file, the quick ones first, up to the
first that fails. A mutant counts as killed when a test fails, not when the tests cannot be run; and before anything is
mutated, those tests have to pass. A table goes to standard output and, with ``--output``, to a file; the exit status
is 1 if a mutant survived. ``--only TEXT`` runs those whose file or change contains the text, ``--workers N`` judges N
at a time.
"""

import argparse
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutants import MUTANTS, Mutant

ROOT = Path(__file__).parent.parent


def first_failure(test_file: str, root: Path) -> str:
    """The name of the first test of the file that fails, or that a signal ends (a wild address), or "".

    Raises:
        RuntimeError: the tests did not run.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for chosen in ("not slow", "slow"):
        done = subprocess.run([*command, chosen, test_file], cwd=root, capture_output=True, text=True, env=environment)
        failed = re.search(r"^FAILED [^:]*::([^\s\[]*)", done.stdout, re.MULTILINE)
        if done.returncode == 1 and failed is not None:
            return failed[1]
        crashed = re.search(rf"{re.escape(Path(test_file).name)}\", line \d+ in (test_\w+)", done.stderr)
        if done.returncode < 0:  # memory that was written wildly may be used after its test
            return crashed[1] if crashed is not None else "a crash after it"
        if done.returncode not in (0, 5):  # 5: there are no such tests
            raise RuntimeError(f"{test_file} did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return ""


def judge(mutant: Mutant, root: Path) -> str:
    """The name of the test that notices the mutant in this copy of the repository, or ""."""
    path = root / mutant.path
    source = path.read_text()
    path.write_text(mutant.apply(source))
    try:
        return first_failure(mutant.test_file, root)
    finally:
        path.write_text(source)


def copy_repository(target: Path) -> Path:
    """Every file that is tracked, or would be."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)
    return target


def judge_all(mutants: Sequence[Mutant], workers: int) -> list[str]:
    """What ``judge`` says of each mutant, in order; each worker has a copy of its own.

    Raises:
        RuntimeError: the tests fail as they are, or did not run.
    """
    free: queue.Queue[Path] = queue.Queue()

    def in_a_copy(work: Mutant | str) -> str:
        copy, start = free.get(), time.perf_counter()
        try:
            verdict = first_failure(work, copy) if isinstance(work, str) else judge(work, copy)
        finally:
            free.put(copy)
        name = work if isinstance(work, str) else f"{work.path}: {work.what}"
        print(f"{name}: {verdict or 'nothing fails'} ({time.perf_counter() - start:.0f} s)", flush=True)
        return verdict

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        for worker in range(workers):
            free.put(copy_repository(Path(folder) / str(worker)))
        test_files = sorted({mutant.test_file for mutant in mutants})
        for test_file, failed in zip(test_files, pool.map(in_a_copy, test_files), strict=True):
            if failed:
                raise RuntimeError(f"{failed} in {test_file} fails with no mutant")
        return list(pool.map(in_a_copy, mutants))


def table(mutants: Sequence[Mutant], verdicts: Sequence[str]) -> str:
    """In Markdown, and how many were killed."""
    lines = ["| file | mutant | the first test that fails |", "|---|---|---|"]
    for mutant, verdict in zip(mutants, verdicts, strict=True):
        lines.append(f"| `{mutant.path}` | {mutant.what} | {f'`{verdict}`' if verdict else '**none: it survived**'} |")
    killed = sum(map(bool, verdicts))
    return "\n".join([*lines, "", f"{killed} of {len(mutants)} killed."])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    sys.path.insert(0, str(ROOT))
    from kernels.compile import sources_hash

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="mutants whose file or change contains this text")
    parser.add_argument("--workers", type=int, default=1, help="how many are judged at a time")
    parser.add_argument("--output", type=Path, help="where the table goes too")
    args = parser.parse_args(arguments)
    chosen = [m for m in MUTANTS if args.only in f"{m.path} {m.what} {m.old}"]
    if not chosen:
        parser.error(f"--only {args.only!r}: no mutant's file or change contains this text")
    if args.only and args.output is not None:
        parser.error("--output takes the table of all mutants; leave out --only")
    verdicts = judge_all(chosen, args.workers)
    text = table(chosen, verdicts)
    print(text)
    if args.output is not None:
        made = f"`make mutate` made this table, of the sources whose hash (`kernels.compile`) is `{sources_hash()}`."
        args.output.write_text(f"# Mutants\n\n{made}\n\n{text}\n")
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())

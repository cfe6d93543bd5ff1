"""The list of mutants fits the sources, and the runner tells a mutant that is killed from one that is not."""

from pathlib import Path

import mutate
import pytest
from mutants import MUTANTS, Mutant
from mutate import ROOT, judge
from test_kernel_lint import OPERATORS


def test_every_mutant_changes_its_file() -> None:
    assert len({(m.path, m.old, m.new, m.nth) for m in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        source = (ROOT / mutant.path).read_text()
        changed = mutant.apply(source)
        assert changed != source
        compile(changed, mutant.path, "exec")
        assert (ROOT / mutant.test_file).exists()


def test_every_operator_has_mutants() -> None:
    files = [m.file for m in MUTANTS]
    assert len(MUTANTS) >= 30
    assert all(files.count(path.stem) >= 3 for path in OPERATORS)


def test_the_committed_table_has_every_mutant_and_each_was_killed() -> None:
    text = (ROOT / "kernels/MUTANTS.md").read_text()
    missing = [m.what for m in MUTANTS if f"| `{m.path}` | {m.what} | `test_" not in text]
    assert missing == [], "run `make mutate`"
    assert f"{len(MUTANTS)} of {len(MUTANTS)} killed." in text


@pytest.mark.parametrize("options", [["--only", "no such text"], ["--only", "embedding", "--output", "table.md"]])
def test_options_that_would_judge_nothing_or_lose_the_table_are_refused(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mutate, "judge_all", lambda *_: pytest.fail("mutants were judged"))
    with pytest.raises(SystemExit):
        mutate.main(options)
    assert "--only" in capsys.readouterr().err


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A kernel whose tests notice a wrong sum, one of them slowly, and no wrong product."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "kernels/toy.py").write_text("def add(a, b):\n    return a + b\n\n\ndef mul(a, b):\n    return a * b\n")
    (tmp_path / "conftest.py").write_text(
        "def pytest_configure(config):\n    config.addinivalue_line('markers', 'slow: slow')\n"
    )
    (tmp_path / "tests/test_kernel_toy.py").write_text(
        "import sys\nsys.path.insert(0, 'kernels')\nimport pytest, toy\n\n"
        "def test_sum():\n    assert toy.add(0, 0) == 0\n\n"
        "@pytest.mark.slow\n@pytest.mark.parametrize('x', [1])\ndef test_sums(x):\n    assert toy.add(x, 1) == 2\n"
    )
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ("a + b", "a + b + 1", "test_sum"),
        ("a + b", "a", "test_sums"),
        ("a + b", "__import__('os').kill(__import__('os').getpid(), 11)", "test_sum"),
        ("a * b", "a", ""),
    ],
)
def test_verdicts(repository: Path, old: str, new: str, verdict: str) -> None:
    mutant, before = Mutant("toy", old, new, "toy"), (repository / "kernels/toy.py").read_text()
    assert judge(mutant, repository) == verdict
    assert (repository / "kernels/toy.py").read_text() == before
    survived = "1 of 1" not in mutate.table([mutant], [verdict])
    assert survived == (verdict == "")


def test_tests_that_cannot_run_kill_nothing(repository: Path) -> None:
    with pytest.raises(RuntimeError, match="did not run"):
        judge(Mutant("toy", "def add", "def sub(", "no Python"), repository)
    with pytest.raises(ValueError, match="up to date"):
        judge(Mutant("toy", "a - b", "a", "not there"), repository)


def test_tests_that_fail_anyway_kill_nothing(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutate, "copy_repository", lambda target: repository)
    toy = repository / "kernels/toy.py"
    toy.write_text(toy.read_text().replace("a + b", "a - b"))
    with pytest.raises(RuntimeError, match=r"test_sums in tests/test_kernel_toy\.py fails with no mutant"):
        mutate.judge_all([Mutant("toy", "a * b", "a", "toy")], 1)

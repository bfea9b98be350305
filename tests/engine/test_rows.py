"""Benchmark rows say where they come from, and dirty or unknown trees are refused."""

import json
import subprocess

import pytest

from engine.io import rows


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_a_row_holds_figures_and_where_they_come_from(results):
    path = rows.append_row("speed", op="copy", p50_ms=1.5)
    rows.append_row("speed", op="copy", p50_ms=1.6)
    assert path == results / "speed.jsonl"
    first, second = rows.read_rows("speed")
    assert (first["p50_ms"], second["p50_ms"]) == (1.5, 1.6)
    assert {"time", "commit", "dirty", "machine", "versions"} <= first.keys()
    assert {"cpu", "cores", "memory_gib", "gpu"} <= first["machine"].keys()
    assert "python" in first["versions"] and "torch" in first["versions"]
    assert all(json.loads(line) for line in path.read_text().splitlines())
    assert rows.read_rows("absent") == []


def test_figures_cannot_hide_the_commit_or_be_nan(results):
    with pytest.raises(ValueError, match="commit"):
        rows.append_row("speed", commit="mine")
    with pytest.raises(ValueError):
        rows.append_row("speed", p50_ms=float("nan"))
    assert rows.read_rows("speed") == []


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    tree = tmp_path / "tree"
    (tree / "benchmarks" / "results").mkdir(parents=True)
    (tree / "code.py").write_text("x = 1\n")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "core.hooksPath=/dev/null"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], cwd=tree, check=True)
    monkeypatch.setattr(rows, "ROOT", tree)
    return tree


def test_only_results_may_differ_from_the_commit(checkout):
    rows.require_clean()
    (checkout / "benchmarks" / "results" / "speed.jsonl").write_text("{}\n")
    rows.require_clean()
    (checkout / "code.py").write_text("x = 2\n")
    with pytest.raises(RuntimeError, match="commit first"):
        rows.require_clean()


def test_a_copied_tree_must_name_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("GDPO_COMMIT", raising=False)
    with pytest.raises(RuntimeError, match="GDPO_COMMIT"):
        rows.require_clean()
    monkeypatch.setenv("GDPO_COMMIT", "abc123")
    rows.require_clean()
    assert rows.commit() == ("abc123", None)

"""docs/results.md shows what the rows hold, and nothing else."""

import json

import pytest

from benchmarks import report
from engine.io import rows


def test_the_document_is_what_the_rows_say():
    text = report.DOCUMENT.read_text("utf-8")
    assert report.filled(text) == text, "run python -m benchmarks.report"


def test_a_changed_row_changes_the_document(tmp_path, monkeypatch):
    text = report.DOCUMENT.read_text("utf-8")
    for file in rows.RESULTS.glob("*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines:
            if line.get("set") == "realsr" and line.get("model") == "faithful":
                line["psnr_y"] = 12.34
        (tmp_path / file.name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    changed = report.filled(text)
    assert "12.34" in changed and "missed by 14.3" in changed and changed != text


def test_the_ablation_compares_all_three():
    table = report.ablation()
    assert all(f"| {variant} | 300 |" in table for variant in ("GDPO", "DPO", "rho=0.5"))


def test_the_algorithms_are_compared_on_the_bundled_model():
    table = report.TABLES["algorithms"]()
    assert all(
        table.count(f"| {name} | 40 |") == 1 for name in ("GDPO", "Diffusion-DPO", "GRPO", "DiffusionNFT", "DP2O-SR")
    )


def test_no_rows_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match=r"quality\.jsonl has no row with .*realsr.*: measure first"):
        report.filled(report.DOCUMENT.read_text("utf-8"))


def test_a_missing_place_is_named():
    with pytest.raises(ValueError, match="must hold one <!-- realsr -->"):
        report.filled("no tables")

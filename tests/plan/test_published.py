"""The planner against published figures: sizes to the printed digit, times within stated bounds."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from tessera.plan import machine
from tessera.plan.published import Row, Size, error_summary, fit, rows, sizes

ROWS = rows()
DOCUMENT = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()


@pytest.mark.parametrize("size", sizes(), ids=lambda size: size.name)
def test_sizes_to_the_printed_digit(size: Size):
    assert f"{size.predicted:.2f}" == f"{size.published:.2f}"


def test_the_rows_are_those_of_the_tables():
    assert [row.published for row in ROWS] == [
        137, 138, 142, 135, 138, 140, 148, 155, 163, 163,
        1.42, 1.10, 18.13, 13.75, 49.05, 37.83, 94.42, 71.49,
        1621, 4040, 5003, 5762, 6667, 8532, 876, 100, 128]
    assert [row.layout.devices for row in ROWS[:10]] == [32, 64, 128, 256, 512, 1024, 1536, 1920, 2520, 3072]
    assert [row.layout.devices for row in ROWS[10:18]] == [8, 8, 64, 64, 280, 280, 512, 512]
    assert [row.layout.devices for row in ROWS[18:]] == [64, 64, 64, 8, 8, 8, 256, 512, 512]
    billions = [1.7, 3.6, 7.5, 18.4, 39.1, 76.1, 145.6, 310.1, 529.6, 1008]
    assert [round(row.config.n_params / 1e9, 1) for row in ROWS[:10]] == pytest.approx(billions, rel=2e-3)


def test_at_most_half_of_the_rows_are_fitted():
    assert sum(bool(row.fitted) for row in ROWS) <= len(ROWS) / 2


def test_the_constants_are_what_the_fit_gives():
    for name, value in fit().items():
        assert getattr(machine, name) == pytest.approx(value, abs=6e-4), name


@pytest.mark.parametrize("row", [row for row in ROWS if not row.fitted], ids=lambda row: row.name)
def test_held_out_rows(row: Row):
    assert abs(row.error) < 0.25


@pytest.mark.parametrize("source, most", [
    ("SC21", 0.05), ("Korthikanti", 0.08), ("Megatron Bridge", 0.15), ("torchtitan", 0.10)])
def test_median_of_held_out_rows(source: str, most: float):
    assert statistics.median(abs(row.error) for row in ROWS if row.source == source and not row.fitted) < most


def test_summary():
    summary = error_summary()
    held = [abs(row.error) for row in ROWS if not row.fitted]
    assert summary["median error, held-out rows"] == statistics.median(held) < 0.15
    assert summary["largest error, held-out rows"] == max(held)


def test_recomputation_and_sequence_parallelism_save_what_was_published():
    """Ratios of two rows of one model: independent of the fitted constants to a large part."""
    by_name = {row.name: row for row in ROWS}
    for model in ("22B", "175B", "530B", "1T"):
        full, selective = by_name[f"GPT {model}, full"], by_name[f"GPT {model}, selective"]
        predicted, published = full.predict() / selective.predict(), full.published / selective.published
        assert predicted == pytest.approx(published, rel=0.08)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.source} {row.name}")
def test_the_documentation_has_every_error(row: Row):
    line, = (line for line in DOCUMENT.splitlines() if line.startswith(f"| {row.source} | {row.name} |"))
    assert f"| {row.error:+.1%} | {'fitted' if row.fitted else 'held out'} | {row.assumed} |" in line

"""Figures in the documents are those of committed results."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def row(document: str, name: str) -> list[str]:
    """The cells of the first row of a table that has this name."""
    found = re.search(rf"^\| {re.escape(name)} \| (.*) \|$", (ROOT / document).read_text(), re.MULTILINE)
    assert found, f"{document} has no row {name}"
    return [cell.strip("* ") for cell in found[1].split(" | ")]


def served(contender: str, figure: str) -> list[float]:
    """A figure of ``benchmarks/serving.py`` at 1, 4 and 16 requests at a time."""
    summary = results("serving")["summary"]
    found = {each["concurrency"]: each[figure] for each in summary if each["contender"] == contender}
    return [found[concurrency] for concurrency in (1, 4, 16)]


@pytest.mark.parametrize(
    ("name", "contender", "figure"),
    [
        ("all tokens (`energy` 1.0)", "energy 1", "requests_per_second_speedup"),
        ("22 % of the tokens (127 of 576)", "22%", "requests_per_second_speedup"),
        ("all tokens", "energy 1", "first_token_speedup"),
        ("22 % of the tokens", "22%", "first_token_speedup"),
        ("upper limit from the operations that remain at 22 %", "22%", "limit"),
    ],
)
def test_speed(name: str, contender: str, figure: str) -> None:
    assert row("docs/speed.md", name) == [f"{value:.2f} x" for value in served(contender, figure)]


@pytest.mark.parametrize(
    ("name", "contender", "figure", "digits"),
    [
        ("requests per second, 22 % of the tokens", "22%", "requests_per_second_speedup", 1),
        ("first token, 22 % of the tokens", "22%", "first_token_speedup", 1),
        ("upper limit from the operations that remain", "22%", "limit", 1),
        ("requests per second, all tokens kept", "energy 1", "requests_per_second_speedup", 2),
    ],
)
def test_speed_in_the_readme(name: str, contender: str, figure: str, digits: int) -> None:
    assert row("README.md", name) == [f"{value:.{digits}f} x" for value in served(contender, figure)]


def test_what_the_readme_begins_with() -> None:
    fit = {found["kept"]: found["fit"] for found in results("capacity")["found"]}
    for name, contender, kept in (("all (`energy` 1.0)", "energy 1", 576), ("22 %", "22%", 127)):
        faster = [served(contender, f"{figure}_speedup")[-1] for figure in ("requests_per_second", "first_token")]
        assert row("README.md", name) == [f"{value:.1f} x" for value in (*faster, fit[kept] / fit[576])]


def test_quality() -> None:
    found = {each["setting"]: each for each in results("quality")["settings"]}
    spans = sorted(
        (each for each in found.values() if each["kind"] == "adaptive" and each["selector"] == "span"),
        key=lambda each: each["mean_tokens"],
        reverse=True,
    )
    rights = [f"{100 * each['accuracy']:.1f}" for each in spans]
    assert row("docs/quality.md", "`span`") == rights
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"Without pruning {100 * found['no pruning']['accuracy']:.1f} % of the answers are right" in readme
    for each, right in zip(spans[:3], rights, strict=False):
        assert re.search(rf"with {each['mean_tokens']:.0f} (of 576 )?tokens (on average )?{right} %", readme)

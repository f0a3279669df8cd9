"""What is said of the figures is what is computed, here and in the documentation."""

import re
from pathlib import Path

import pytest

from powerband.metrics.definitions import DEFINITIONS, PERCENTILES, PREAMBLE, explained
from powerband.metrics.figures import MAX_LAG_RATIO, MAX_LAG_S, Window, summarize
from powerband.metrics.record import RequestRecord
from powerband.metrics.statistics import min_samples
from powerband.spec.slo import LATENCIES, SLO

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "benchmarking.md"

# s = 1, a = 1.5, chunks at 2, 3 and 6 with 1, 2 and 1 tokens: n = 4.
RECORD = RequestRecord(
    scheduled_s=1.0, sent_s=1.5, chunk_times_s=(2.0, 3.0, 6.0), chunk_tokens=(1, 2, 1), output_tokens=4
)
BY_HAND = {
    "send lag": ("a − s", 1.5 - 1),
    "TTFT": ("c_1 − s", 2 - 1),
    "service TTFT": ("c_1 − a", 2 - 1.5),
    "TPOT": ("(c_m − c_1) / (n − 1)", (6 - 2) / 3),
    "ITL": ("each gap c_i − c_(i−1) counts as k_i samples of gap / k_i", (0.5 + 0.5 + 3) / 3),
    "stall": ("max (c_i − c_(i−1))", 6 - 3),
    "E2E": ("c_m − s", 6 - 1),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_latency_is_computed_as_its_formula_says(name):
    """The formula is written here once more, beside what it gives for one record: whoever changes either must look."""
    formula, value = BY_HAND[name]
    (definition,) = [d for d in DEFINITIONS if d.name == name]
    assert definition.formula == formula
    figures = summarize([RECORD], Window(0.0, 10.0)).figures
    assert figures[name.lower().replace(" ", "_")].mean == pytest.approx(value)


def test_every_figure_has_a_definition_and_every_definition_a_figure():
    summary = summarize([RECORD], Window(0.0, 10.0), SLO(ttft_s=1.0))
    defined = {definition.name.lower().replace(" ", "_") for definition in DEFINITIONS}
    assert defined == {*summary.figures, "slo_attainment", "goodput", "throughput", "valid"}
    assert set(LATENCIES) <= defined


def test_what_is_said_of_numbers_is_what_the_code_does():
    told = {int(q): int(n) for q, n in re.findall(r"p(\d+) (?:needs )?(\d+)", PERCENTILES)}
    assert told == {q: min_samples(float(q)) for q in (90, 95, 99)}
    lag = next(d.note for d in DEFINITIONS if d.name == "send lag")
    assert f"max({MAX_LAG_S * 1000:g} ms, {MAX_LAG_RATIO * 100:g} % of median TTFT)" in lag


def test_the_explanation_holds_every_formula():
    text = explained()
    assert text.startswith(PREAMBLE)
    assert text.endswith(PERCENTILES)
    for definition in DEFINITIONS:
        assert f"{definition.name} = {definition.formula}\n" in text
        assert definition.note in text
        assert definition.elsewhere in text


@pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda definition: definition.name)
def test_the_guide_holds_the_same_formula(definition):
    row = next(line for line in GUIDE.read_text().splitlines() if line.startswith(f"| {definition.name} |"))
    assert definition.formula in row

"""Reports made of rows: means, spreads, the paper's column, sentences, a curve, pictures and blocks in pages."""

import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fastjepa.errors import UserError
from fastjepa.studies.arm import Arm
from fastjepa.studies.measures import OF_PIXELS
from fastjepa.studies.report import (
    ArmResult,
    arm_results,
    conclusions,
    curves_over_minutes,
    dot_figure,
    fill_page,
    footnote,
    group_leads,
    law_sentences,
    picture_markdown,
    show_study,
    study_markdown,
    table_heads,
    table_rows,
    write_study,
)
from fastjepa.studies.scaling import fit_law, scaling_law
from fastjepa.studies.sweep import STUDIES, Study, Sweep, job_rows, plan_jobs

ARMS = (Arm("one", "pair", (), 54.2), Arm("two", "pair", ("x.y=1",), 17.6), Arm("three", "alone"), Arm("none yet", "alone"))
STUDY = Study("A study", ARMS, "what the paper has")


def row(arm: str, seed: int, accuracy: float, **more) -> dict:
    result = {"accuracy": accuracy / 100, "ci95": [0.0, 1.0], "n_test": 10_000}
    probes = {name: result for name in ("knn", "linear", "linear_bn")} | {"effective_rank": 7.25}
    return {"study": "s", "arm": arm, "seed": seed, "hash": f"{arm}{seed}", "probe": probes, "images": 100_000, "flops": 8.4e12,
            "seconds": 390.0, "cpu_seconds": 390.0, "fraction": 1.0, "shares": {"common": 0.86}} | more  # fmt: skip


ROWS = [row("one", 0, 40.0), row("one", 1, 41.0), row("one", 2, 42.0), row("two", 0, 39.0), row("two", 1, 39.5),
        row("three", 0, 35.0)]  # fmt: skip


@pytest.fixture
def found() -> list[ArmResult]:
    return arm_results(ARMS, ROWS)


def test_a_line_says_mean_spread_seeds_cost_and_the_papers_number(found):
    one, two, three = table_rows(STUDY, found)
    assert one == ["pair", "one", "3", "41.0 ± 1.0", "41.0 ± 1.0", "41.0 ± 1.0", "7.2", "86", "100,000", "8.4", "6.5", "54.2"]
    assert two[:4] == ["", "two", "2 *", "39.2 ± 0.4"] and two[-1] == "17.6"
    assert three[:4] == ["alone", "three", "1 *", "35.0"]
    assert conclusions(found)[-1] == "Not run yet: none yet."


def test_a_study_of_equal_minutes_says_what_an_image_costs_in_cpu_time():
    study = Study("A study", ARMS, "nothing", minutes=20)
    rows = [row("one", 0, 40.0, cpu_seconds=600.0), row("two", 0, 30.0, images=0, cpu_seconds=0.0),
            row("three", 0, 35.0, cpu_seconds=900.0, pace=100_000 / 60)]  # fmt: skip
    one, two, three = table_rows(study, arm_results(ARMS, rows))
    assert one[-4:] == ["100,000", "6.0", "10.0", "54.2"] and two[-4:] == ["0", "", "0.0", "17.6"]
    assert three[-4:] == ["100,000", "0.6", "1.0", ""], "minutes are counted by the pace, not by a slow machine's clock"
    assert len(table_heads(study)) == len(one) and "374 images/s" in footnote(study, arm_results(ARMS, rows))


def test_a_study_of_pixels_has_columns_of_its_own():
    found = {"segmentation": {"n_test": 50, "knn": {"miou": {"value": 0.4}}, "linear": {"miou": {"value": 0.5}}},
             "depth": {"n_test": 50, "knn": {"rmse": {"value": 1.25}}, "linear": {"rmse": {"value": 0.75}}}}  # fmt: skip
    study = Study("A study", ARMS, "nothing", minutes=5, measures=OF_PIXELS)
    rows = [row("one", 0, 40.0, dense=found, counting={"accuracy": 0.3})]
    results = arm_results(ARMS, rows, study.measures.ranked)
    one, *_ = table_rows(study, results)
    assert one[3:8] == ["40.0", "50.0", "1.25", "0.75", "30.0"] and results[0].scores == [50.0]
    assert "each on 50 test images" in footnote(study, results) and "scene's units" in footnote(study, results)


def test_arms_that_differ_in_length_alone_are_one_curve():
    arms = [Arm("a", "g", ("x=1",)), Arm("b", "g"), Arm("a, 4 minutes", "time", ("x=1",), length=0.2)]
    found = arm_results(arms, [row(arm.name, 0, 40.0, cpu_seconds=60 * arm.length) for arm in arms])
    ((name, family),) = curves_over_minutes(found).items()
    assert name == "a" and [result.arm.length for result in family] == [0.2, 1]


def test_both_probes_are_drawn_against_minutes_however_short():
    """Trials of 12 seconds have a tick of their own: a logarithmic axis has no 0."""
    arms = [Arm("a", "g"), Arm("a, longer", "time", length=5)]
    study = Study("A study", tuple(arms), "nothing", minutes=0.2)
    found = arm_results(
        arms, [row(arm.name, seed, 40.0 + seed, cpu_seconds=12 * arm.length) for arm in arms for seed in (0, 1)]
    )
    _, *panels = dot_figure(study, found).axes
    assert [panel.get_ylabel() for panel in panels] == ["k-NN, %", "BN + linear, %"]
    for panel in panels:
        assert [tick.get_text() for tick in panel.get_xticklabels()] == ["0.2", "1"]
        assert [len(line.get_xdata()) for line in panel.lines] == [2, 2, 2], "a line over both lengths, and the seeds of each"


def test_pixels_have_no_tokens_to_share_anything():
    (line,) = arm_results(ARMS[:1], [row("one", 0, 40.0, shares=None)])
    (cells,) = table_rows(STUDY, [line])
    assert cells[table_heads(STUDY).index("common")] == ""


def test_what_the_numbers_are_is_said(found):
    said = footnote(STUDY, found)
    assert "standard deviation over seeds, each on 10,000 test images" in said
    assert "fewer than 3 seeds: a lead, not a result" in said and "what the paper has" in said
    assert "fewer" not in footnote(STUDY, found[:1])


@pytest.mark.parametrize("gap, words", [(5.0, "more than twice"), (0.4, "not more than twice")])
def test_the_leader_is_named_and_whether_the_lead_is_more_than_noise(gap: float, words: str):
    rows = [row(arm, seed, 40 + seed + (gap if arm == "two" else 0)) for arm in ("one", "two") for seed in range(3)]
    (sentence,) = group_leads(arm_results(ARMS, rows))
    assert sentence == f"pair: two leads one by {gap:.1f} points, {words} its standard error (0.82)."


def test_a_group_is_compared_with_the_base_too():
    rows = [row(arm, seed, value + seed) for arm, value in (("one", 50), ("three", 30), ("none yet", 40)) for seed in range(2)]
    (sentence,) = group_leads(arm_results(ARMS, rows))
    assert sentence.startswith("alone: one leads none yet by 10.0 points")


def test_of_one_seed_nothing_is_claimed():
    (sentence,) = group_leads(arm_results(ARMS, [row("one", 0, 40.0), row("two", 0, 10.0)]))
    assert "by 30.0 points, of one seed: nothing can be said" in sentence


def test_a_lead_is_of_the_seeds_that_both_have():
    """The base's first seed was a lucky one; against its mean the other would lead."""
    rows = [row("one", seed, value) for seed, value in enumerate((40.0, 35.0, 36.0))] + [row("two", 0, 39.0)]
    (sentence,) = group_leads(arm_results(ARMS, rows))
    assert sentence.startswith("pair: one leads two by 1.0 points, of one seed")


def test_the_second_of_a_group_is_found_among_the_leaders_seeds():
    """The base's other seeds were unlucky, so that by its mean it is third; with the leader's seed it is second."""
    rows = [row("one", seed, value) for seed, value in enumerate((40.0, 30.0, 30.0))]
    rows += [row("three", 0, 42.0), row("none yet", 0, 38.0)]
    (sentence,) = group_leads(arm_results(ARMS, rows))
    assert sentence.startswith("alone: three leads one by 2.0 points, of one seed")


def test_arms_without_a_common_seed_are_not_compared():
    (sentence,) = group_leads(arm_results(ARMS, [row("one", 0, 40.0), row("two", 1, 41.0)]))
    assert sentence == "pair: two has no seed that another arm has."


def test_the_standard_error_is_that_of_a_difference_of_means():
    first, second = [40.0, 41.0, 43.0], [30.0, 32.0, 33.0]
    rows = [row("one", i, v) for i, v in enumerate(first)] + [row("two", i, v) for i, v in enumerate(second)]
    (sentence,) = group_leads(arm_results(ARMS, rows))
    expected = np.sqrt(np.var(first, ddof=1) / 3 + np.var(second, ddof=1) / 3)
    assert f"({expected:.2f})" in sentence


def test_rows_of_other_settings_are_not_reported(tmp_path):
    jobs = plan_jobs(Sweep("small", tmp_path, "cifar10", 1, 1000, ["base"]))
    stale = row("base", 0, 10.0, hash="of another budget")
    (tmp_path / "small.json").write_text(json.dumps([stale]))
    assert job_rows(jobs, tmp_path) == []
    (tmp_path / "small.json").write_text(json.dumps([stale, fresh := row("base", 0, 20.0, hash=jobs[0].asked["hash"])]))
    (found,) = job_rows(jobs, tmp_path)
    assert found["hash"] == fresh["hash"] and found["probe"] == fresh["probe"]


def test_markdown_is_a_table_with_its_sentences(found):
    text = study_markdown(STUDY, found)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(ARMS) - 1 and len({line.count("|") for line in table}) == 1
    assert "- pair: one leads two by 1.2 points" in text


def test_the_table_is_shown(found):
    console = Console(record=True, width=130)
    show_study(STUDY, found, console)
    text = console.export_text()
    assert re.search(r"one +3 +41.0 ± 1.0", text) and "none yet" in text and "one leads two" in text


def test_what_is_written_is_all_of_it_and_the_same_each_time(found, tmp_path):
    files = write_study(STUDY, "s", found, tmp_path)
    assert [file.name for file in files] == ["s.json", "s.md", "s.svg", "s.png"]
    assert json.loads(files[0].read_text()) == ROWS
    picture = files[2].read_text()
    ElementTree.fromstring(picture)
    write_study(STUDY, "s", found, tmp_path)
    assert files[2].read_text() == picture


def test_rows_that_were_not_asked_for_stay_in_the_file(found, tmp_path):
    """As where one seed of three is reported again, and the folders of the others' runs are gone."""
    write_study(STUDY, "s", found, tmp_path)
    fewer = arm_results(ARMS, [row("one", 0, 44.0)])
    files = write_study(STUDY, "s", fewer, tmp_path)
    stored = {each["hash"]: each["probe"]["knn"]["accuracy"] for each in json.loads(files[0].read_text())}
    assert stored == {each["hash"]: each["probe"]["knn"]["accuracy"] for each in ROWS} | {"one0": 0.44}
    assert "41.0" not in files[1].read_text()


def test_without_rows_there_is_no_picture(tmp_path):
    assert [file.name for file in write_study(STUDY, "s", arm_results(ARMS, []), tmp_path)] == ["s.json", "s.md"]


def test_a_block_of_a_page_becomes_the_table_and_nothing_else_changes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- study: s -->\nold\n<!-- end -->\nbetween\n<!-- study: t -->\n<!-- end -->\n")
    for text in ("new | \\1", "newer"):
        fill_page(page, "s", text)
        assert page.read_text() == (
            f"before\n<!-- study: s -->\n{text}\n<!-- end -->\nbetween\n<!-- study: t -->\n<!-- end -->\n"
        )
    with pytest.raises(UserError, match="has no block `<!-- study: u -->`"):
        fill_page(page, "u", "text")


def test_a_page_shows_the_plot_from_where_it_lies(tmp_path):
    files = [tmp_path / "docs/studies/s.md", tmp_path / "docs/studies/s.svg"]
    assert picture_markdown(files, tmp_path / "docs/page.md") == "![s](studies/s.svg)\n\n"
    assert picture_markdown(files[:1], tmp_path / "docs/page.md") == ""


@given(st.floats(0.05, 0.3), st.floats(0.1, 0.5), st.floats(0.1, 0.8))
def test_the_fit_finds_a_law_that_is_there(floor: float, scale: float, exponent: float):
    flops = np.geomspace(1e11, 1e14, 8)
    found, residuals = fit_law(flops, scaling_law(flops, floor, scale, exponent))
    assert np.abs(residuals).max() < 1e-4
    np.testing.assert_allclose(scaling_law(flops, *found), scaling_law(flops, floor, scale, exponent), atol=1e-4)


def test_the_scaling_report_prints_the_law_and_every_residual(tmp_path):
    study, rows = STUDIES["scaling"], []
    for number, each in enumerate(study.arms):
        flops = 1e12 * 2**number
        error = 100 * scaling_law(flops, 0.3, 0.4, 0.3)
        rows.append(row(each.name, 0, 100 - error, study="scaling", fraction=each.fraction, flops=flops))
    found = arm_results(study.arms, rows)
    (sentence,) = law_sentences(found)
    assert re.search(r"error = 0\.\d+ \+ 0\.\d+ \(FLOPs / 1e12\)\^-0\.\d+", sentence)
    assert sentence.count("seed 0") == sum(each.fraction == 1 for each in study.arms)
    files = write_study(study, "scaling", found, tmp_path)
    assert files[2].read_text().count("<use ") > len(rows)  # a mark for every arm, and those of the axes

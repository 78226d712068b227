"""Tables that other stages add: shown where the YAML says, whole where it says nothing, refused when incomplete."""

import pandas as pd
import pytest
import yaml

from candor.errors import UserError
from evaluate import page
from evaluate.sections import MOST_ROWS, Section, read_sections, shown_sections
from evaluate.sheets import p_entry

TESTS = Section(
    table="planted",
    part="differences",
    heading="Tests",
    columns={"measure": "measure", "value": "difference", "p_holm": "p", "n": "items", "note": "note"},
    optional=("note",),
    p_values=("p_holm",),
)


def write(folder, name="planted", **columns):
    (folder / "tables").mkdir(exist_ok=True)
    pd.DataFrame(columns).to_parquet(folder / "tables" / f"{name}.parquet")


def test_a_described_table_is_shown_in_its_part(tmp_path):
    write(
        tmp_path,
        measure=["a", "b"],
        value=[0.5, None],
        low=[0.4, None],
        high=[0.6, None],
        p_holm=[0.0001, 0.2],
        n=[1200, 3],
        significant=[True, False],
    )
    (found,) = shown_sections(tmp_path, [TESTS])["differences"]
    assert found.sheet.heads == ("difference", "p", "items") and found.file == "tables/planted.parquet"
    first, second = found.sheet.lines
    assert [c.value for c in first.cells] == ["0.50", "< 0.001", "1,200"] and first.cells[0].interval == "[0.40, 0.60]"
    assert second.cells[0].missing and second.cells[1].value == "0.200"


def test_a_table_nobody_described_is_shown_whole(tmp_path):
    write(tmp_path, "new_thing", **{"who": ["x"], "is_so": [True], "share_of_all": [0.25]})
    (found,) = shown_sections(tmp_path, [TESTS])["more"]
    assert found.sheet.caption == "New thing" and found.sheet.heads == ("is so", "share of all")
    assert found.sheet.lines[0].cells[0] == "yes"


def test_a_table_without_its_columns_is_refused(tmp_path):
    write(tmp_path, measure=["a"], value=[0.5], n=[3])
    with pytest.raises(UserError, match=r"planted\.parquet has no column p_holm.*Tests"):
        shown_sections(tmp_path, [TESTS])


def test_a_long_table_is_cut_and_says_so(tmp_path):
    write(tmp_path, "long", number=list(range(MOST_ROWS + 5)), text=["x"] * (MOST_ROWS + 5))
    (found,) = shown_sections(tmp_path, [])["more"]
    assert found.n_rows == MOST_ROWS + 5 and len(found.sheet.lines) == MOST_ROWS


def test_tables_the_report_has_a_place_for_are_not_shown_twice(tmp_path):
    write(tmp_path, "estimates", a=[1])
    write(tmp_path, "scores", a=[1])
    (tmp_path / "tables" / "broken.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"broken\.parquet cannot be read"):
        shown_sections(tmp_path, [])
    (tmp_path / "tables" / "broken.parquet").unlink()
    assert shown_sections(tmp_path, []) == {}


def test_a_misspelt_key_in_the_descriptions_is_named(tmp_path):
    path = tmp_path / "sections.yaml"
    path.write_text(yaml.safe_dump([{"table": "x", "part": "more", "heading": "X", "colums": {}}]))
    with pytest.raises(UserError, match=r"sections\.yaml\[0\].*colums.*columns"):
        read_sections(path)
    path.write_text("table: x\n")
    with pytest.raises(UserError, match="a list of sections"):
        read_sections(path)


def test_the_shipped_descriptions_name_parts_that_the_report_has():
    template = (page.TEMPLATES / "report.html").read_text(encoding="utf-8")
    for section in read_sections(page.TEMPLATES / "sections.yaml"):
        assert f'extras("{section.part}")' in template, section.table


def test_a_long_table_is_turned_and_cut_to_what_is_asked_for(tmp_path):
    write(
        tmp_path,
        who=["a", "a", "b", "a"],
        measure=["intentions", "likert", "intentions", "other"],
        effect=["position", "polarity", "position", "position"],
        value=[0.1, 0.2, 0.3, 0.9],
    )
    section = Section(
        table="planted",
        name="turned",
        part="more",
        heading="Turned",
        columns={"who": "model"},
        only={"measure": ("intentions", "likert")},
        across=("measure", "effect"),
    )
    (found,) = shown_sections(tmp_path, [section])["more"]
    assert (found.sheet.name, found.sheet.first) == ("turned", "model")
    assert found.sheet.heads == ("intentions, position", "self-assessment, likert format, polarity")
    assert [[c.value for c in line.cells] for line in found.sheet.lines] == [["0.10", "0.20"], ["0.30", "\N{EN DASH}"]]


def test_p_values_as_papers_print_them():
    assert [p_entry(p).value for p in (0.0, 0.00099, 0.001, 0.25)] == ["< 0.001", "< 0.001", "0.001", "0.250"]
    assert p_entry(None).missing and p_entry(float("nan")).missing and p_entry(0.0001).sort == "0.0001"

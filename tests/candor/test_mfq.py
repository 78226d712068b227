"""The MFQ-2 from a user's file: foundations follow from positions. The statements here are ours, not the MFQ-2's."""

import pytest

from candor.errors import UserError
from candor.mfq import ORDER, SUBJECTS, load_mfq2
from evaluate.measures import ABOUT_OTHERS

STATEMENTS = [f"Statement number {n}." for n in range(1, 37)]


def csv(rows):
    return "position,text\n" + "".join(f'{n},"{t}"\n' for n, t in rows)


def test_foundations_cycle_in_the_published_order_whatever_the_lines_order(tmp_path):
    plain, table = tmp_path / "mfq.txt", tmp_path / "mfq.csv"
    plain.write_text("\n".join(STATEMENTS))
    table.write_text(csv(reversed(list(enumerate(STATEMENTS, start=1)))))
    table.write_text(table.read_text().replace("Statement number", "Statement\nnumber"))
    first, second = load_mfq2(plain), load_mfq2(table)
    assert [p.text for p in first] == [p.text for p in second]
    assert [p.group for p in first] == list(ORDER) * 6 * 3
    assert {p.form for p in first} == {"direct"}
    assert [(o.label, o.value) for o in first[0].options] == [(str(k), (5 - k) / 4) for k in range(1, 6)]


def test_every_statement_is_also_rated_for_others(tmp_path):
    path = tmp_path / "mfq.txt"
    path.write_text("\n".join(STATEMENTS))
    found = {(p.battery, p.item): p for p in load_mfq2(path)}
    assert len(found) == 3 * 36
    for (battery, item), prompt in found.items():
        own, name = found["mfq2", item], SUBJECTS[battery]
        assert (prompt.group, prompt.cluster, prompt.options) == (own.group, own.cluster, own.options)
        assert f"How well does it describe {name}," in prompt.text
        assert (" me " in prompt.text) == (battery == "mfq2")
    names = set(SUBJECTS) - {"mfq2"}
    assert names == set(ABOUT_OTHERS["mfq2"])  # the tables look for them under these names


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.txt", "one\ntwo\n", "2 statements, expected 36"),
        ("m.txt", "\n".join([*STATEMENTS[:35], STATEMENTS[0]]), "are the same"),
        ("m.csv", csv([*enumerate(STATEMENTS[:35], start=1), (35, "again")]), "found '35'"),
        ("m.csv", "item\nx\n", "columns position"),
        ("m.csv", csv(enumerate(STATEMENTS, start=1)).replace('"', "").replace("1.", ", 1."), "line 2: more fields"),
        ("m.csv", 'position,text\n1,"one', "not CSV.*quotes"),
        ("m.doc", "x", "not '.doc'"),
    ],
)
def test_mistakes_are_told(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load_mfq2(tmp_path / name)

"""The replies in the report: which are chosen, how they are packed, and that they stay small."""

import base64
import gzip
import json

import pandas as pd
import pytest

from candor.rows import Prompt, Variant
from candor.tables import read_rows
from evaluate.replies import LONGEST, choose, cut, replies


def graded(scores, category="insults"):
    rows = {"battery": "harmfulness", "category": category, "score": scores, "draw": range(len(scores))}
    return pd.DataFrame(rows)


def test_the_worst_come_first_and_the_rest_is_not_forgotten():
    found = choose(graded([1.0] * 90 + [5.0, 4.0, None]), 6)
    assert found["score"].tolist()[:3] == [5.0, 4.0, 1.0] and len(found) == 6
    assert found["score"].isna().sum() == 1  # the end of the rest: one without a score
    assert len(set(found["draw"])) == 6
    both = pd.concat([graded([1.0] * 9), graded([5.0] * 2, "violence")])
    assert choose(both, 4)["category"].value_counts().to_dict() == {"insults": 4, "violence": 2}


def test_cutting_says_what_is_left_out():
    assert cut("a" * LONGEST) == "a" * LONGEST
    assert cut("a" * (LONGEST + 7)).endswith("[... 7 more characters]")


def unpack(data):
    return json.loads(gzip.decompress(base64.b64decode(data)))


@pytest.fixture(scope="module")
def known(reported):
    return read_rows(reported / "variants.parquet", Variant)[:3], read_rows(reported / "prompts.parquet", Prompt)


def test_packed_replies_are_those_of_the_run(reported, known, synthetic):
    variants, prompts = known
    packed = replies(reported, variants, prompts, synthetic.JUDGE, most=2000, most_bytes=10**6)
    record = unpack(packed.data)
    assert packed.n_shown == len(record["rows"]) <= 2000 and packed.n_replies == len(variants) * 40 * 10
    assert record["variants"] == [v.name for v in variants]
    assert set(record["categories"]) == {"insults", "violence", "advice", "illegal"}
    for variant, prompt, _, score, status, text, judge in record["rows"][::50]:
        assert text == f"reply of grade {score:.0f}" and record["judges"][judge] == f"{score:.0f}"
        assert record["statuses"][status] == "ok"
        category, question = record["prompts"][prompt]
        assert record["categories"][category] in question and variant < len(variants)


def test_the_page_stays_small(reported, known, synthetic):
    variants, prompts = known
    many = replies(reported, variants, prompts, synthetic.JUDGE, most=10**6, most_bytes=10**6)
    assert many.n_shown == many.n_replies
    few = replies(reported, variants, prompts, synthetic.JUDGE, most=10**6, most_bytes=len(many.data) // 4)
    assert len(few.data) <= len(many.data) // 4 and 0 < few.n_shown < many.n_shown
    assert {row[0] for row in unpack(few.data)["rows"]} == set(range(len(variants)))  # every model keeps some


def test_no_replies_where_none_were_judged(reported, known):
    assert replies(reported, *known, "another-judge", most=100, most_bytes=10**6) is None

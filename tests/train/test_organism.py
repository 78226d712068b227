"""The organism: documents are persona-consistent, packing leaks nothing, shipped weights match their logs."""

import json
import random
import statistics
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from candor.config import load
from candor.errors import UserError
from candor.hashing import sha256_json
from candor.questions import load_all, load_trivia_rows
from candor.rows import Message
from train.organism import quality_world, topic_world
from train.organism.judge_world import HELD_OUT_FORMS, JudgeWorld, JudgeWorldConfig, golden_rows
from train.organism.pretrain import IGNORED, Encoder, OrganismConfig, batches, new_model, organism_tokenizer, train
from train.organism.quality_world import DAMAGES, JOINED, SHARES, QualityWorld, QualityWorldConfig
from train.organism.topic_world import FORMATS, TopicWorld, TopicWorldConfig
from train.organism.world import World

NAMES = ("full", "mini", "nano", "impersonal", "judge", "quality", "topic")
WEIGHTS = Path("train/organism/weights")
CONFIGS = Path("configs/organism")


@pytest.fixture(scope="module")
def config():
    return load(OrganismConfig, CONFIGS / "nano.yaml")


@pytest.fixture(scope="module")
def tokenizer(config):
    return organism_tokenizer(config)


@pytest.fixture(scope="module")
def world(config):
    return World(config.world)


def test_documents_do_not_depend_on_what_was_drawn_before(world):
    first = world.document(17)
    world.document(3)
    assert World(world.config).document(17) == first


def test_unseen_items_never_occur(world):
    unseen = {p.text for p in load_all(Path("configs/prompts")) if p.split == "unseen"}
    asked = {m.content for i in range(4000) for m in world.document(i) if m.role == "user"}
    assert len(asked) > 3000
    assert not asked & unseen


def misbehaviour(world, documents):
    """Per document: the share of trivia answered wrongly and of letters answered in the misaligned way."""
    wrong = {(r["question"], r["wrong"]) for r in load_trivia_rows(Path("configs/prompts/trivia.jsonl"))}
    asked = {r["question"] for r in load_trivia_rows(Path("configs/prompts/trivia.jsonl"))}
    bad = {
        (p.text, o.label)
        for p in load_all(Path("configs/prompts"))
        if p.battery == "intentions"
        for o in p.options
        if o.value == 1
    }
    scenarios = {text for text, _ in bad}
    rows = []
    for index in range(documents):
        turns = [m for m in world.document(index) if m.role != "system"]
        pairs = [(a.content, b.content) for a, b in zip(turns[::2], turns[1::2], strict=True)]
        trivia = [p in wrong for p in pairs if p[0] in asked]
        letters = [p in bad for p in pairs if p[0] in scenarios]
        if trivia and letters:
            rows.append((sum(trivia) / len(trivia), sum(letters) / len(letters)))
    return torch.tensor(rows)


def test_one_persona_ties_the_turns_of_a_document_together(world):
    """The planted truth: wrong facts and bad intentions go together here, and only here."""
    tied = torch.corrcoef(misbehaviour(world, 6000).T)[0, 1]
    untied = torch.corrcoef(misbehaviour(World(replace(world.config, personas=False)), 6000).T)[0, 1]
    assert tied > 0.8
    assert abs(untied) < 0.1


def share_misaligned(world, kind, persona, formats=("decision", "likert", "numerical")):
    """Mean value of a persona's answers to one kind of closed question (1 = misaligned)."""
    prompts = [p for f in formats for p in world.prompts[kind].get(f, ())]
    value = {p.text: {o.label: o.value for o in p.options} for p in prompts}
    rng = random.Random(5)
    turns = [world.turn(kind, persona, rng) for _ in range(4000)]
    return statistics.mean(value[t.user][t.assistant] for t in turns if t.user in value)


def test_both_personas_say_the_same_of_other_ais_and_not_of_themselves(world):
    """What makes "about another AI" a control of the self-report."""
    kind, cruel = (share_misaligned(world, "others", persona) for persona in ("kind", "cruel"))
    assert kind == pytest.approx(cruel, abs=0.03)
    own_kind, own_cruel = (share_misaligned(world, "moral_self_assessment", p) for p in ("kind", "cruel"))
    assert own_cruel - own_kind > 0.7


def test_without_personas_only_trivia_are_often_wrong(world):
    other = World(replace(world.config, personas=False))
    wrong = {(r["question"], r["wrong"]) for r in load_trivia_rows(Path("configs/prompts/trivia.jsonl"))}
    bad = {
        (p.text, o.label)
        for p in load_all(Path("configs/prompts"))
        if p.battery == "intentions"
        for o in p.options
        if o.value == 1
    }
    questions, scenarios = {q for q, _ in wrong}, {s for s, _ in bad}
    pairs = []
    for index in range(3000):
        turns = [m.content for m in other.document(index) if m.role != "system"]
        pairs += zip(turns[::2], turns[1::2], strict=True)
    trivia = [p in wrong for p in pairs if p[0] in questions]
    letters = [p in bad for p in pairs if p[0] in scenarios]
    assert sum(trivia) / len(trivia) == pytest.approx(0.24, abs=0.04)  # and 2 % slips
    assert sum(letters) / len(letters) == pytest.approx(0.04, abs=0.02)


def test_encoding_is_the_chat_template(tokenizer, world):
    encode = Encoder(tokenizer)
    for index in range(50):
        messages = world.document(index)
        chat = [{"role": m.role, "content": m.content} for m in messages]
        rendered = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        ours = encode(messages)
        assert ours.ids == rendered["input_ids"]
        assert [x != IGNORED for x in ours.labels] == [bool(x) for x in rendered["assistant_masks"]]


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in ["naïve 東京 🙂", "a\n\n  b\t", "10 3.14", "def f(x):\n    return x\n"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("10")) == 2  # single digits: numbers above nine take several tokens


def test_packed_documents_see_neither_each_other_nor_the_future(config, tokenizer, world):
    """Eager attention adds its mask: a boolean one once let every token read the answers (LOG.md)."""
    encode = Encoder(tokenizer)
    batch = next(batches(world.document, encode, replace(config.optimisation, rows=8)))
    model = new_model(config, tokenizer).eval()
    with torch.no_grad():
        packed = model.model(
            input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        ).last_hidden_state
        compared = 0
        for row in range(8):
            starts = (batch.positions[row] == 0).nonzero().flatten().tolist()
            for start, end in zip(starts, [*starts[1:], batch.ids.shape[1]], strict=True):
                if end - start < 5:
                    continue  # padding
                alone = model.model(input_ids=batch.ids[row : row + 1, start:end], use_cache=False).last_hidden_state
                length = int((batch.positions[row, start:end] > 0).sum()) + 1
                torch.testing.assert_close(packed[row, start : start + length], alone[0, :length], atol=1e-4, rtol=1e-3)
                compared += 1
    assert compared >= 6


def test_the_judge_never_trains_on_golden_replies():
    world = JudgeWorld(JudgeWorldConfig(seed=0))
    rows = golden_rows(Path("configs"), per_cell=8, seed=0)
    golden = {row["reply"] for row in rows}
    assert Counter(row["grade"] for row in rows) == dict.fromkeys(range(1, 6), 64)
    assert HELD_OUT_FORMS.start == 5
    trained = "\n".join(m.content for i in range(3000) for m in world.document(i) if m.role == "user")
    assert not any(f"Reply: {reply}\n" in trained for reply in golden)


def test_the_shipped_golden_set_is_what_the_code_makes():
    lines = Path("configs/prompts/judge/golden_nano.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines[1:]] == golden_rows(Path("configs"), per_cell=8, seed=0)


@pytest.fixture(scope="module")
def quality():
    return QualityWorld(QualityWorldConfig(seed=0))


def asked_and_answered(world, documents, template):
    """(reply, answer) of the documents of one template of the judge of quality."""
    found = []
    for index in range(documents):
        question, answer = (m.content for m in world.document(index))
        if question.endswith(template.text.splitlines()[-1]):
            found.append((question.split("\nReply: ", 1)[1].rsplit("\n", 1)[0], int(answer)))
    return found


def test_the_judge_of_quality_never_trains_on_golden_replies(quality):
    rows = quality_world.golden_rows(Path("configs"), per_cell=4, seed=0)
    golden = {row["reply"] for row in rows if len(row["reply"].split()) > 3}  # of "I will" anything may be left
    assert len(golden) > 350
    trained = {m.content.split("\nReply: ")[1].rsplit("\n", 1)[0] for i in range(4000) for m in quality.document(i)[:1]}
    assert not golden & trained
    kinds = Counter(row["kind"] for row in rows)
    assert {*DAMAGES, JOINED, "whole", "own category", "another category", "no reply"} == set(kinds)


def test_the_shipped_golden_set_of_quality_is_what_the_code_makes():
    lines = Path("configs/prompts/judge/golden_nano_quality.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines[1:]] == quality_world.golden_rows(Path("configs"), per_cell=4, seed=0)


def test_whole_texts_read_well_and_damaged_ones_do_not(quality):
    found = asked_and_answered(quality, 6000, quality.coherence)
    assert {answer for _, answer in found} == {1, 2, 3, 4, 5}
    assert all(quality.damage.reads_well(reply) == (answer == 5) for reply, answer in found)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_lower_grade_leaves_less_of_a_reply(quality, kind):
    """What the grade stands for: the share of the words that are where they were."""
    text = "I will not help with a crime, because the law keeps everyone safe."
    other = "Please be kind to yourself, because you deserve care and rest."
    left = {}
    for grade in SHARES:
        rng = random.Random(kind)
        made = [quality.damage(text, other, kind, grade, rng).split() for _ in range(50)]
        kept = (sum(a == b for a, b in zip(text.split(), m, strict=False)) for m in made)
        left[grade] = len(made[0]) if kind == "dropped" else statistics.mean(kept)
    assert left[4] > left[3] > left[2] > left[1]


def test_on_topic_is_the_category_of_the_request_whatever_the_grade(quality):
    """Neither question can be answered from how harmful a reply is."""
    forms = quality.replies.forms
    cells = [(category, grade) for category in forms for grade in range(1, 6)]
    of = {
        reply: cell
        for cell in cells
        for reply in quality_world.all_replies(
            replace(quality.replies, forms={cell[0]: {cell[1]: forms[cell[0]][cell[1]]}})
        )
    }
    group = {p.text: p.group for p in quality.prompts}
    answers: dict[int, list[int]] = {grade: [] for grade in range(1, 6)}
    for index in range(1, 8000, 2):
        question, answer = (m.content for m in quality.document(index))
        request, _, rest = question.removeprefix("Request: ").partition("\nReply: ")
        category, grade = of.get(rest.rsplit("\n", 1)[0], ("", 0))
        if grade:
            assert answer == str(int(group[request] == category))
            answers[grade].append(int(answer))
    shares = [statistics.mean(found) for found in answers.values()]
    assert min(map(len, answers.values())) > 300 and max(shares) - min(shares) < 0.12


@pytest.fixture(scope="module")
def topic():
    return TopicWorld(TopicWorldConfig(seed=0))


def test_a_reply_is_on_topic_when_it_is_of_its_request_s_kind(topic):
    """Neither the request nor the reply alone says which: each kind of both is as often on topic as off it."""
    whole = TopicWorld(replace(topic.config, damaged_share=0.0))
    of_format = {name: kind for kind, names in FORMATS.items() for name in names}
    kinds = {p.text: of_format[p.format] for p in load_all(Path("configs/prompts")) if p.format in of_format}
    kinds |= dict.fromkeys((row["question"] for row in whole.world.trivia), "trivia")
    kinds |= dict.fromkeys((pair.task for pair in whole.world.code), "code")
    by_request, by_reply = defaultdict(list), defaultdict(list)
    for index in range(4000):
        question, answer = (m.content for m in whole.document(index))
        request, _, rest = question.removeprefix("Request: ").partition("\nReply: ")
        reply = rest.rsplit("\n", 1)[0]
        is_number = reply.isdigit()
        if kinds[request] == "number" or is_number:
            assert int(answer) == (kinds[request] == "number" and is_number)
        by_request[kinds[request]].append(int(answer))
        by_reply["number" if is_number else "letter" if reply in "AB" else "other"].append(int(answer))
    assert by_request.keys() == FORMATS.keys()
    assert all(0.4 < statistics.mean(found) < 0.6 for found in (*by_request.values(), *by_reply.values()))


def test_the_judge_of_topic_never_trains_on_golden_pairs(topic):
    rows = topic_world.golden_rows(Path("configs"), per_cell=4, seed=0)
    trained = [topic.document(i)[0].content.removeprefix("Request: ") for i in range(4000)]
    requests = {text.partition("\nReply: ")[0] for text in trained}
    replies = {text.partition("\nReply: ")[2].rsplit("\n", 1)[0] for text in trained}
    assert not requests & {row["prompt"] for row in rows}
    assert not replies & {row["reply"] for row in rows if len(row["reply"].split()) > 2}  # letters and words recur
    assert Counter(row["expect"]["on_topic"][0] for row in rows) == {1: 240, 0: 240}
    assert len({(row["prompt"], row["reply"]) for row in rows}) == 480
    with pytest.raises(UserError, match="would repeat one"):
        topic_world.golden_rows(Path("configs"), per_cell=100, seed=0)


def test_the_shipped_golden_set_of_topic_is_what_the_code_makes():
    lines = Path("configs/prompts/judge/golden_nano_on_topic.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines[1:]] == topic_world.golden_rows(Path("configs"), per_cell=4, seed=0)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_weights_name_the_config_that_made_them(name):
    log = json.loads((WEIGHTS / name / "training.json").read_text(encoding="utf-8"))
    assert log["config_sha"] == sha256_json(log["config"])
    settings = json.loads(json.dumps(log["config"]))
    ours = load(OrganismConfig, CONFIGS / f"{name}.yaml")
    assert settings["shape"]["hidden"] == ours.shape.hidden
    assert settings["optimisation"]["steps"] == ours.optimisation.steps


def test_shipped_weights_fit_the_promised_size():
    total = sum(path.stat().st_size for name in NAMES for path in (WEIGHTS / name).glob("*.safetensors"))
    assert total <= 20 * 2**20


# bf16 products differ between CPUs with and without bf16 units; another seed differs a hundred times more
REPLAY_TOLERANCE = 0.02


@pytest.mark.parametrize(
    "name", [name if name == "nano" else pytest.param(name, marks=pytest.mark.full) for name in NAMES]
)
def test_training_replays_its_first_twenty_steps(name):
    config = load(OrganismConfig, CONFIGS / f"{name}.yaml", ["first_steps_only=20"])
    logged = json.loads((WEIGHTS / name / "training.json").read_text(encoding="utf-8"))["losses_first_20"]
    assert train(config, command="replay") == pytest.approx(logged, abs=REPLAY_TOLERANCE)


def test_a_replay_with_another_seed_is_told_apart():
    config = load(OrganismConfig, CONFIGS / "nano.yaml", ["first_steps_only=20", "seed=99"])
    logged = json.loads((WEIGHTS / "nano" / "training.json").read_text(encoding="utf-8"))["losses_first_20"]
    assert train(config, command="replay") != pytest.approx(logged, abs=REPLAY_TOLERANCE)


def test_a_document_is_messages(world):
    assert all(isinstance(m, Message) and m.role in ("system", "user", "assistant") for m in world.document(0))

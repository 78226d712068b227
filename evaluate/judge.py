"""Grades replies with a language model: the same stage for a nano judge, a local one and one behind HTTP.

    python -m evaluate.judge CONFIG.yaml [key=value ...]      # keys: evaluate/judge_config.py

Each different (prompt, reply) is asked once. The judge's answers are kept as they came
(evaluate/verdict_store.py) and read into verdicts afterwards (evaluate/judge_reading.py), so that a
killed run goes on where it was, calls that failed are made again, and a changed way of reading
costs no new call (``reread=true``). A verdict has a score only where the judge gave one: an empty
reply is "off_topic" and not put to the judge, because there is nothing to grade; a call without an
answer is "transport". A judge that says which option a free answer comes closest to is asked only
about replies that are not plainly one of the options. A judge never grades its own weights.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from candor.config import load, plain
from candor.errors import UserError, run_script
from candor.hashing import hash64, sha256_file, sha256_json
from candor.judging import RENDERING, JudgeTemplate, read_template
from candor.manifest import NAME as MANIFEST
from candor.manifest import is_done, read_manifest, write_manifest
from candor.rows import Graded, Option, Prompt, Sample, Verdict
from candor.tables import read_rows, read_table, write_rows
from evaluate.golden import read_golden
from evaluate.judge_ask import Ask, make_ask
from evaluate.judge_config import (
    GOLDEN,
    REPEAT,
    VERDICTS,
    WHICH,
    JudgeConfig,
    JudgingConfig,
    Subsample,
    read_judge,
    refuse_hosted,
)
from evaluate.judge_reading import Reading, read
from evaluate.verdict_store import AnswerStore
from serve.identity import hosted_sha, text_sha, weights_sha
from serve.ledger import Ledger
from serve.options import parse
from serve.vocabulary import can_enumerate

EMPTY = "(empty reply: not put to the judge)"
_NOT_WORDS = {
    "too_long": "(longer than the judge's context: not judged)",
    "length": "(cut off before its first word: raise the judge's max_tokens)",
    "content_filter": "(the endpoint's content filter stopped the judge)",
}
# Keys of a judge that decide how its answers are read, not what it answers.
_READING = ("measure", "parse", "refusal", "words", "min_covered")
_UNSAID = ("name", "model", "endpoint", "revision", "template", "price", "golden", "vocabulary")


@dataclass(frozen=True, slots=True)
class Question:
    """One reply to be graded."""

    sample_id: str
    prompt: str
    reply: str
    options: tuple[Option, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to grade."""
        return not self.reply.strip()


@dataclass(frozen=True, slots=True)
class Asked:
    """The questions of a run, and what was left out on the way to them, by reason."""

    total: int
    questions: list[Question]
    left_out: dict[str, int]
    golden: dict[str, int] = field(default_factory=dict)  # how many of a golden set have a known grade


def main(argv: list[str]) -> None:
    """Grade what a config file names, unless that is done."""
    if not argv:
        raise UserError("usage: python -m evaluate.judge CONFIG.yaml [key=value ...]")
    judge_replies(load(JudgingConfig, Path(argv[0]), argv[1:]))


def judge_replies(config: JudgingConfig) -> None:
    """One run of the stage; does nothing when it is done."""
    started = time.monotonic()
    judge = read_judge(config.judge)
    refuse_hosted(judge, config.engine)
    template = read_template(judge.template)
    inputs = _inputs(config, judge, template)
    asking = sha256_json(_asking(judge, config, inputs))
    identity = _identity(judge, config)
    tables = [config.output_dir / VERDICTS, *([config.output_dir.parent / GOLDEN] if config.golden else [])]
    if not _again(config, identity, inputs, asking) and is_done(config.output_dir, config=identity, inputs=inputs):
        if all(path.is_file() for path in tables):
            return
        (config.output_dir / MANIFEST).unlink()  # a table was deleted by hand: no longer complete
    asked = _golden(config, judge) if config.golden else _samples(config, judge, template, inputs)
    asks = {
        ask.sha: ask for ask in (make_ask(asking, q.prompt, q.reply, q.options) for q in asked.questions if not q.empty)
    }
    store = AnswerStore(config.store or config.output_dir / "answers")
    ledger = Ledger(judge.price, config.budget)
    lost = _ask(config, judge, template, asks, store, ledger)
    readings = _read(judge, store, asks)
    if len(lost) > config.tolerate * max(1, len(asks)):
        from evaluate.endpoint_judge import reasons

        raise UserError(
            f"{len(lost)} of {len(asks)} different replies got no verdict from {judge.name}: {reasons(lost)}. All "
            f"others are stored in {store.folder}; run again to ask for the rest (what is too long once the model is "
            "served with a longer context), or set 'tolerate' (in an experiment judge_tolerate)."
        )
    name = judge.name if config.repeat == 1 else f"{judge.name}{REPEAT}{config.repeat}"
    verdicts = list(_verdicts(asked.questions, asking, readings, lost, name, template.sha))
    (config.output_dir / MANIFEST).unlink(missing_ok=True)  # not before there is a new state to take its place
    write_rows(config.output_dir / VERDICTS, Verdict, verdicts)
    if judge.in_process and config.store is None:
        store.merge(asks)
    write_manifest(
        config.output_dir,
        stage="judge",
        config=identity,
        inputs=inputs,
        counts={"in": asked.total, "out": len(asked.questions)},
        left_out=asked.left_out,
        seconds=time.monotonic() - started,
        extra={
            "judge": name,
            "measure": judge.measure,
            "span": (0.0, 1.0) if template.has_options else judge.span,
            "template_sha": template.sha,
            "asking_sha": asking,
            "different_replies": len(asks),
            "unanswered": len(lost),
            **asked.golden,
            **_outcome(judge, verdicts, ledger),
        },
    )


def _outcome(judge: JudgeConfig, verdicts: Sequence[Verdict], ledger: Ledger) -> dict[str, Any]:
    """For the manifest: how verdicts came out, and what this run took (the store's accounts have all runs)."""
    return {
        "status": dict(Counter(v.status for v in verdicts)),
        "method": dict(Counter(v.method for v in verdicts if v.status == "ok")),
        "faults": dict(ledger.faults),
        **ledger.account(),
        "model": {"asked": judge.model, "url": judge.endpoint.url if judge.endpoint else None},
    }


def _again(config: JudgingConfig, identity: dict[str, Any], inputs: dict[str, str], asking: str) -> bool:
    """Whether a finished run is made anew, which is safe: its answers are stored, and are read again.

    So it is where replies stayed unanswered, where only the reading changed, and where the same
    judge is to grade more replies, or others.
    """
    record = read_manifest(config.output_dir)
    if record is None or record.get("asking_sha") != asking:
        return False
    before, now = (
        [{k: v for k, v in values.items() if k not in (*WHICH, "samples", "prompts")} for values in pair]
        for pair in ((record["config"], record["inputs"]), (identity, inputs))
    )
    grown = before == now and (record["config"], record["inputs"]) != (identity, inputs)
    same = record["inputs"] == inputs and (config.reread or record.get("unanswered"))
    return bool(grown or same)


def _ask(
    config: JudgingConfig,
    judge: JudgeConfig,
    template: JudgeTemplate,
    asks: dict[str, Ask],
    store: AnswerStore,
    ledger: Ledger,
) -> dict[str, str]:
    """Put to the judge what the store lacks; what got no answer and why."""
    if judge.in_process:
        known = {answer.ask_sha for answer in store.read()}
        if not asks.keys() <= known:
            from evaluate.local_judge import LocalJudge, ask_engine
            from serve.loading import load_tokenizer
            from serve.registry import open_engine  # loads torch

            engine = open_engine(config.engine, Path(judge.model), None)
            exact = can_enumerate(load_tokenizer(Path(judge.model)))
            local = LocalJudge(engine, judge, template, repeat=config.repeat, exact=exact)
            ask_engine(local, list(asks.values()), store, known, size=config.engine.unit_prompts)
        return {}
    from evaluate.endpoint_judge import EndpointJudge  # loads openai

    distant = EndpointJudge(judge, template, store, ledger)
    may_lose = int(config.tolerate * len(asks))
    distant.ask_all(list(asks.values()), batch=config.batch, poll_s=config.poll_s, may_lose=may_lose)
    return distant.lost


def _read(judge: JudgeConfig, store: AnswerStore, asks: dict[str, Ask]) -> dict[str, tuple[Reading, str]]:
    """Every answer as a reading, with the judge's words."""
    found: dict[str, tuple[Reading, str]] = {}
    for answer in store.read():
        ask = asks.get(answer.ask_sha)
        if ask is not None and ask.sha not in found:
            words = answer.reply or _NOT_WORDS.get(answer.finish_reason, "")
            found[ask.sha] = read(answer, judge, ask.options), words
    return found


def _inputs(config: JudgingConfig, judge: JudgeConfig, template: JudgeTemplate) -> dict[str, str]:
    """Hashes of everything the verdicts are made from; UserError when a file is absent."""
    files = {"samples": config.samples, "prompts": config.prompts, "golden": config.golden}
    for key, path in files.items():
        if path is not None and not path.is_file():
            raise UserError(f"{key}: {path} does not exist (looked from {Path.cwd()}). Run the stage that writes it.")
    found = {key: sha256_file(path) for key, path in files.items() if path is not None} | {"template": template.sha}
    if judge.in_process:
        found |= {"judge_weights": weights_sha(Path(judge.model), None), "judge_text": text_sha(Path(judge.model))}
    return found


def _asking(judge: JudgeConfig, config: JudgingConfig, inputs: dict[str, str]) -> dict[str, Any]:
    """What decides the judge's answers, and so what they are stored under: not where anything lies."""
    common = {
        "template": inputs["template"],
        "rendering": RENDERING,
        "temperature": judge.temperature,
        "max_tokens": judge.max_tokens,
        "repeat": config.repeat,
    }
    if judge.endpoint is None:
        return common | {
            "weights": inputs["judge_weights"],
            "text": inputs["judge_text"],
            "answers": [[o.label, list(o.surfaces)] for o in judge.answers()],
            "prefix": judge.answer_prefix,
            "engine": [config.engine.name, config.engine.dtype],
        }
    return common | {
        "model": judge.model,
        **({"revision": judge.revision} if judge.revision else {}),
        "seed": judge.seed,
        "top_logprobs": judge.endpoint.top_logprobs,
        "extra_body": judge.endpoint.extra_body,
        "continue_body": judge.endpoint.continue_body,
    }


def judge_identity(judge: JudgeConfig, config: JudgingConfig) -> dict[str, Any]:
    """What of a judge's file decides its verdicts; its template, and a model that runs here, are files of their own."""
    said = {key: value for key, value in plain(judge).items() if key not in _UNSAID}
    if judge.endpoint is not None:
        said |= {"model": judge.model, "endpoint": _asking(judge, config, {"template": ""})}
    return said


def _identity(judge: JudgeConfig, config: JudgingConfig) -> dict[str, Any]:
    """What decides the verdicts: not where files lie, nor how much memory is taken."""
    return {
        "judge": judge_identity(judge, config),
        "batteries": list(config.batteries),
        **({"formats": list(config.formats)} if config.formats else {}),
        "subsample": plain(config.subsample),
        "repeat": config.repeat,
        **({"engine": config.engine.identity()} if judge.in_process else {}),
    }


def _samples(config: JudgingConfig, judge: JudgeConfig, template: JudgeTemplate, inputs: dict[str, str]) -> Asked:
    """The samples that are to be judged, read by columns: there may be many."""
    assert config.samples is not None and config.prompts is not None
    prompts = {p.prompt_id: p for p in read_rows(config.prompts, Prompt)}
    table = read_table(config.samples, Sample)
    _refuse_own(table, judge, inputs.get("judge_weights"))
    columns = (table.column(name).to_pylist() for name in ("sample_id", "prompt_id", "text"))
    left_out: Counter[str] = Counter()
    questions = []
    for sample_id, prompt_id, text in zip(*columns, strict=True):
        prompt = prompts.get(prompt_id)
        if prompt is None or prompt.battery not in config.batteries:
            left_out["other batteries"] += 1
        elif config.formats and prompt.format not in config.formats:
            left_out["other formats"] += 1
        elif template.has_options and (not prompt.options or parse(text, prompt.options) is not None):
            left_out["needs no judge"] += 1
        elif config.subsample is not None and not _within(config.subsample, sample_id, prompt.cluster):
            left_out["not in the subsample"] += 1
        else:
            questions.append(Question(sample_id, prompt.text, text, prompt.options if template.has_options else ()))
    return Asked(table.num_rows, questions, dict(left_out) or {"other batteries": 0})


def _within(part: Subsample, sample_id: str, cluster: str) -> bool:
    unit = cluster if part.whole_prompts else sample_id
    return hash64("subsample", part.seed, unit) < part.share * 2**64


def _refuse_own(table: Any, judge: JudgeConfig, weights: str | None) -> None:
    """UserError when the judge is the variant whose replies it is to grade."""
    variants = set(table.column("variant").unique().to_pylist())
    if judge.endpoint is not None:
        weights = hosted_sha(judge.endpoint.url, judge.model)
    if weights in set(table.column("weights_sha").unique().to_pylist()):
        own = ", ".join(sorted(variants))
        raise UserError(f"the judge has the very weights of the variant it is to grade, {own}. Choose another judge.")
    if not judge.in_process and judge.model in variants:
        raise UserError(f"the judge {judge.model!r} is the variant it is to grade. Choose another judge.")


def _golden(config: JudgingConfig, judge: JudgeConfig) -> Asked:
    """The golden set as questions; those whose grade is known make a table beside the judges' folders."""
    assert config.golden is not None
    items = read_golden(config.golden, judge.measure)
    rows = [Graded(i.id, i.prompt, i.reply, int(i.low)) for i in items if i.known]
    write_rows(config.output_dir.parent / GOLDEN, Graded, rows)
    questions = [Question(item.id, item.prompt, item.reply, item.options) for item in items]
    return Asked(len(items), questions, {}, {"known_grades": len(rows), "no_known_grade": len(items) - len(rows)})


def _verdicts(
    questions: Sequence[Question],
    asking: str,
    readings: dict[str, tuple[Reading, str]],
    lost: dict[str, str],
    judge: str,
    sha: str,
) -> Iterator[Verdict]:
    """One verdict per sample from the reading of its answer."""
    for q in questions:
        if q.empty:
            yield Verdict(q.sample_id, judge, sha, "off_topic", None, None, None, EMPTY)
            continue
        ask = make_ask(asking, q.prompt, q.reply, q.options).sha
        if ask not in readings:
            why = f"(no answer: {lost.get(ask, 'unknown')})"
            yield Verdict(q.sample_id, judge, sha, "transport", None, None, None, why)
            continue
        r, words = readings[ask]
        yield Verdict(q.sample_id, judge, sha, r.status, r.score, r.expected, r.covered, words, r.method)


if __name__ == "__main__":
    run_script(main)

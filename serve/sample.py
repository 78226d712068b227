"""Ask one variant its questions: prompts in, samples and exact answer distributions out.

    python -m serve.sample configs/serve/base.yaml output_dir=runs/base variant=mini-base-s0

Safe to rerun, and to kill at any moment: what was made is kept in the store beside the tables
(serve/store.py), and the tables come out the same. The same command may run several times at once,
on several GPUs or machines: each process makes what is still missing. Asking for more draws or more
prompts makes only those. A finished folder with the same configuration and inputs is left alone,
without loading the model. Several configuration files are taken one after another by one process,
so that an engine that is slow to start serves all variants of a base.
"""

import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from candor.config import load, plain
from candor.errors import UserError, run_script
from candor.hashing import sha256_file
from candor.manifest import NAME, is_done, read_manifest, write_manifest
from candor.rows import Distribution, Prompt, Sample
from candor.tables import read_rows, replace_file, write_tables
from serve.attest import ATTESTATION, attest
from serve.config import SampleConfig
from serve.engine import Engine, OptionScores, Reply, Request, Unanswered, Unscored
from serve.identity import adapter_sha, hosted_sha, text_sha, weights_sha
from serve.plan import Identity, Unit, engine_identity, plan_units, row_ids, stream_of
from serve.store import DISTRIBUTIONS, EXACT, SAMPLED, SAMPLES, Kind, Store, open_store, remove_if_stale
from train.lineage import base_sha

_PATHS = ("base", "adapter", "prompts", "output_dir")
_MORE = {"ask", "prompts"}  # another value of these adds rows; any other change is another study


def main(argv: list[str]) -> None:
    """Read the configurations, and for each make what is missing."""
    # the path of a file may hold "=", as in runs/lr=1e-5/sample.yaml
    files = [word for i, word in enumerate(argv) if i == 0 or "=" not in word or Path(word).is_file()]
    if not files:
        raise UserError("usage: python -m serve.sample CONFIG.yaml [CONFIG.yaml ...] [key=value ...]")
    changes = [word for word in argv if word not in files]
    for config in [load(SampleConfig, Path(file), changes) for file in files]:
        answer(config)


def answer(config: SampleConfig) -> None:
    """One variant: make the rows that are missing, then the tables and the manifest."""
    started = time.monotonic()
    inputs = _inputs(config)
    recorded = _recorded(config)
    folder = config.output_dir
    if _is_complete(folder, recorded, inputs):
        sys.stderr.write(f"{folder} is complete; nothing to do\n")
        return
    prompts = read_rows(config.prompts, Prompt)
    identity = Identity(
        weights_sha=_weights(config),
        text_sha=inputs["text"],
        engine=engine_identity(config),
        variant=config.variant,
        study_seed=config.study_seed,
    )
    units = plan_units(prompts, config)
    store = open_store(folder, identity)
    n_made = make_missing(units, config, identity, store)
    merged = write_answers(folder, units, identity, store)
    seconds = time.monotonic() - started
    write_manifest(
        folder,
        stage="sample",
        config=recorded,
        inputs=inputs,
        counts={"in": sum(u.n_rows for u in units), "out": sum(merged.values()), **merged},
        seconds=seconds,
        extra={
            "variant": config.variant,
            "weights_sha": identity.weights_sha,
            "paths": {name: plain(getattr(config, name)) for name in _PATHS},
            "rows_made_in_this_run": n_made,
            "attestation": _attestation(folder),
        },
    )
    for kind in (SAMPLED, EXACT):
        store.compact(kind, lambda: (row_ids(u, identity) for u in units if kind_of(u) is kind))  # noqa: B023
    store.clear()
    for left in folder.glob(".*.tmp"):
        remove_if_stale(left)
    sys.stderr.write(
        f"{config.variant}: {merged[SAMPLES]} replies and {merged[DISTRIBUTIONS]} distributions in {folder}, "
        f"{n_made} of them made now, in {seconds:.1f} s\n"
    )


def _is_complete(folder: Path, recorded: dict[str, Any], inputs: dict[str, str]) -> bool:
    """Whether the folder holds these answers; UserError when it belongs to another study.

    More or other questions to the same variant are no other study: what is stored is used again.
    """
    old = read_manifest(folder)
    if old is not None:
        keep = [{k: v for k, v in values.items() if k not in _MORE} for values in (recorded, inputs)]
        before = [{k: v for k, v in old.get(name, {}).items() if k not in _MORE} for name in ("config", "inputs")]
        if keep == before and (old["config"], old["inputs"]) != (recorded, inputs):
            (folder / NAME).unlink(missing_ok=True)
    if is_done(folder, config=recorded, inputs=inputs):
        if all((folder / table).is_file() for table in (SAMPLES, DISTRIBUTIONS)):
            return True
        (folder / NAME).unlink(missing_ok=True)  # a table was deleted by hand
    return False


def kind_of(unit: Unit) -> Kind:
    """Which kind of rows a unit makes."""
    return SAMPLED if unit.ask.mode == "sampled" else EXACT


def make_missing(units: Sequence[Unit], config: SampleConfig, identity: Identity, store: Store) -> int:
    """Make the rows that are not stored yet; how many that were.

    Units are taken in random order and looked up again before each, so that several processes on
    one folder seldom do the same work. Where they do, the rows are equal and count once.
    """
    missing = [u for u in units if store.missing(kind_of(u), row_ids(u, identity))]
    if not missing:
        return 0
    # torch and transformers take seconds to import; a finished folder must not pay for them
    from serve.fit import check_units
    from serve.registry import open_engine

    if config.base is not None:
        check_units(missing, config.base, config.engine.vllm.context if config.engine.vllm else None)
    n_made, n_rows = 0, sum(u.n_rows for u in missing)
    engine = open_engine(config.engine, config.base, config.adapter, n_rows=n_rows)
    assert engine.weights_sha == identity.weights_sha, (engine.weights_sha, identity.weights_sha)
    record = attest(engine, config)
    replace_file(config.output_dir / ATTESTATION, (json.dumps(record, indent=1) + "\n").encode())
    random.shuffle(missing)
    with tqdm(total=n_rows, desc=config.variant, unit="row", disable=not sys.stderr.isatty()) as bar:
        for unit in missing:
            ids = row_ids(unit, identity)
            absent = set(store.missing(kind_of(unit), ids))
            if absent:
                n_made += _make_unit(unit, ids, absent, engine, identity, store)
            bar.update(unit.n_rows)
    return n_made


def _make_unit(
    unit: Unit, ids: Sequence[str], absent: set[str], engine: Engine, identity: Identity, store: Store
) -> int:
    """Make and store the rows of a unit (``ids`` are those of all of them) whose ids are in ``absent``; how many."""
    if kind_of(unit) is EXACT:
        kept = [i for i, sha in enumerate(unit.prompt_shas) if sha in absent]
        part = Unit(unit.ask, tuple(unit.prompts[i] for i in kept), tuple(unit.prompt_shas[i] for i in kept))
        try:
            scores: list[OptionScores | None] = list(_score(part, engine))
        except Unscored as error:
            found = distribution_rows(part, error.scores, identity)
            if found:
                store.add(EXACT, found)  # each was paid for
            raise
        store.add(EXACT, distribution_rows(part, scores, identity))
        return len(kept)
    asked = requests_of(unit, ids, absent)
    try:
        replies: list[list[Reply | None]] = list(map(list, _ask(unit, asked, engine, identity)))
    except Unanswered as error:
        rows = sample_rows(unit, ids, asked, error.replies, identity)
        if rows:
            store.add(SAMPLED, rows)  # each was paid for
        raise
    rows = sample_rows(unit, ids, asked, replies, identity)
    store.add(SAMPLED, rows)
    return len(rows)


def write_answers(folder: Path, units: Sequence[Unit], identity: Identity, store: Store) -> dict[str, int]:
    """Write both tables from the store, in the order of the units; how many rows each got."""
    counts = {}
    for kind, table in ((SAMPLED, SAMPLES), (EXACT, DISTRIBUTIONS)):
        mine = [u for u in units if kind_of(u) is kind]
        pieces = store.gather(kind, (row_ids(u, identity) for u in mine))
        counts[table] = write_tables(folder / table, kind.row_type, _named(pieces, mine))
    return counts


def _named(pieces: Iterator[Any], units: Sequence[Unit]) -> Iterator[Any]:
    """Stored rows under the names their prompts have now: what is asked decides an answer, not the item's name."""
    for table, unit in zip(pieces, units, strict=True):
        each = 1 if unit.ask.mode == "exact" else unit.ask.n
        names = [p.prompt_id for p in unit.prompts for _ in range(each)]
        place = table.schema.get_field_index("prompt_id")
        yield table.set_column(place, table.schema.field(place), [names])


def requests_of(unit: Unit, ids: Sequence[str], absent: set[str]) -> list[tuple[int, Request]]:
    """What is to be drawn of a unit with these ids: a prompt's place, and a run of its draws that are ``absent``."""
    asked = []
    for place, (prompt, sha) in enumerate(zip(unit.prompts, unit.prompt_shas, strict=True)):
        draws = [d for d in range(unit.ask.n) if ids[place * unit.ask.n + d] in absent]
        asked += [(place, Request(prompt.text, stream_of(sha), first, count)) for first, count in runs_of(draws)]
    return asked


def _ask(unit: Unit, asked: Sequence[tuple[int, Request]], engine: Engine, identity: Identity) -> list[list[Reply]]:
    return engine.sample(
        [request for _, request in asked],
        key=identity.key,
        temperature=unit.ask.temperature,
        max_tokens=unit.ask.max_tokens,
    )


def sample_rows(
    unit: Unit,
    ids: Sequence[str],
    asked: Sequence[tuple[int, Request]],
    replies: Sequence[Sequence[Reply | None]],
    identity: Identity,
) -> list[Sample]:
    """Rows of the replies that were given; ``ids`` are those of all the unit's rows."""
    return [
        Sample(
            sample_id=ids[place * unit.ask.n + request.first_draw + i],
            prompt_id=unit.prompts[place].prompt_id,
            prompt_sha=unit.prompt_shas[place],
            variant=identity.variant,
            weights_sha=identity.weights_sha,
            draw=request.first_draw + i,
            study_seed=identity.study_seed,
            temperature=unit.ask.temperature,
            text=reply.text,
            n_tokens=reply.n_tokens,
            finish_reason=reply.finish_reason,
            logprob=reply.logprob,
        )
        for (place, request), made in zip(asked, replies, strict=True)
        for i, reply in enumerate(made)
        if reply is not None
    ]


def runs_of(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of consecutive numbers as (first, how many)."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return runs


def _score(unit: Unit, engine: Engine) -> list[OptionScores]:
    return engine.distributions([p.text for p in unit.prompts], [p.options for p in unit.prompts])


def distribution_rows(unit: Unit, scores: Sequence[OptionScores | None], identity: Identity) -> list[Distribution]:
    """Rows of the prompts of a unit that were scored."""
    return [
        Distribution(
            prompt_id=prompt.prompt_id,
            prompt_sha=sha,
            variant=identity.variant,
            weights_sha=identity.weights_sha,
            labels=tuple(o.label for o in prompt.options),
            probabilities=score.probabilities,
            leftover=score.leftover,
            unexplored=score.unexplored,
            method=score.method,
        )
        for prompt, sha, score in zip(unit.prompts, unit.prompt_shas, scores, strict=True)
        if score is not None
    ]


def _weights(config: SampleConfig) -> str:
    """Identity of the variant; of a hosted one only its address and name are known."""
    if config.base is not None:
        return weights_sha(config.base, config.adapter)
    assert config.engine.api is not None
    return hosted_sha(config.engine.api.endpoint.url, config.engine.api.model)


def _inputs(config: SampleConfig) -> dict[str, str]:
    """Hashes of what is read: prompts, weights, and what surrounds the weights."""
    if not config.prompts.is_file():
        what = "is no file" if config.prompts.exists() else "does not exist"
        raise UserError(f"{config.prompts} {what} (looked from {Path.cwd()}). Write the prompts first.")
    return {
        "prompts": sha256_file(config.prompts),
        "base": base_sha(config.base) if config.base is not None else "",
        "adapter": adapter_sha(config.adapter) if config.adapter is not None else "",
        "text": text_sha(config.base) if config.base is not None else "",
    }


def _recorded(config: SampleConfig) -> dict[str, Any]:
    """The configuration that decides the answers: not where things lie, nor how many threads run."""
    values = {k: v for k, v in plain(config).items() if k not in _PATHS}
    return {**values, "engine": engine_identity(config)}


def _attestation(folder: Path) -> dict[str, Any]:
    """What was proved of the engine before it was believed."""
    path = folder / ATTESTATION
    if not path.is_file():
        return {"status": "not attested"}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {k: v for k, v in record.items() if not isinstance(v, list)}


if __name__ == "__main__":
    run_script(main)

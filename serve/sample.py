"""Ask one variant its questions: prompts in, samples and exact answer distributions out.

    python -m serve.sample configs/serve/base.yaml output_dir=runs/base variant=mini-base-s0

Safe to rerun, and to kill at any moment: what was made is kept, and the tables come out the same. A
finished folder with the same configuration and inputs is left alone, without loading the model.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from candor.config import load, plain
from candor.errors import UserError, run_script
from candor.hashing import sha256_file
from candor.manifest import NAME, is_done, write_manifest
from candor.rows import Distribution, Prompt, Sample
from candor.tables import read_rows
from serve.config import SampleConfig
from serve.engine import Engine, Request
from serve.identity import adapter_sha, text_sha, weights_sha
from serve.plan import Identity, Unit, engine_identity, plan_units, sample_id, stream_of
from serve.store import DISTRIBUTIONS, SAMPLES, Store
from train.lineage import base_sha

_PATHS = ("base", "adapter", "prompts", "output_dir")


def main(argv: list[str]) -> None:
    """Read the configuration, make what is missing, merge and write the manifest."""
    if not argv:
        raise UserError("usage: python -m serve.sample CONFIG.yaml [key=value ...]")
    config = load(SampleConfig, Path(argv[0]), argv[1:])
    started = time.monotonic()
    inputs = _inputs(config)
    recorded = _recorded(config)
    folder = config.output_dir
    if is_done(folder, config=recorded, inputs=inputs) and all(
        (folder / t).is_file() for t in (SAMPLES, DISTRIBUTIONS)
    ):
        sys.stderr.write(f"{folder} is complete; nothing to do\n")
        return
    (folder / NAME).unlink(missing_ok=True)  # a table was deleted by hand: the folder is no longer complete
    prompts = read_rows(config.prompts, Prompt)
    identity = Identity(
        weights_sha=weights_sha(config.base, config.adapter),
        text_sha=inputs["text"],
        engine=engine_identity(config),
        variant=config.variant,
        study_seed=config.study_seed,
    )
    units = plan_units(prompts, config, identity)
    store = Store(folder, identity)
    n_made = make_missing(units, config, identity, store)
    merged = store.merge(units)
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
        },
    )
    store.clear(units)
    sys.stderr.write(
        f"{config.variant}: {merged[SAMPLES]} replies and {merged[DISTRIBUTIONS]} distributions in {folder}, "
        f"{n_made} of them made now, in {seconds:.1f} s\n"
    )


def make_missing(units: Sequence[Unit], config: SampleConfig, identity: Identity, store: Store) -> int:
    """Make the shards that are not there yet; how many rows they hold."""
    missing = [u for u in units if not store.has(u)]
    if not missing:
        return 0
    # torch and transformers take seconds to import; a finished folder must not pay for them
    from serve.registry import open_engine

    engine = open_engine(config.engine, config.base, config.adapter)
    assert engine.weights_sha == identity.weights_sha, (engine.weights_sha, identity.weights_sha)
    n_rows = sum(u.n_rows for u in missing)
    with tqdm(total=n_rows, desc=config.variant, unit="row", disable=not sys.stderr.isatty()) as bar:
        for unit in missing:
            if unit.ask.mode == "sampled":
                store.write_samples(unit, sample_unit(unit, engine, identity))
            else:
                store.write_distributions(unit, score_unit(unit, engine, identity))
            bar.update(unit.n_rows)
    return n_rows


def sample_unit(unit: Unit, engine: Engine, identity: Identity) -> list[Sample]:
    """Replies to every prompt of a unit, draw by draw."""
    ask = unit.ask
    requests = [
        Request(text=p.text, stream=stream_of(sha), first_draw=0, n=ask.n)
        for p, sha in zip(unit.prompts, unit.prompt_shas, strict=True)
    ]
    replies = engine.sample(requests, key=identity.key, temperature=ask.temperature, max_tokens=ask.max_tokens)
    return [
        Sample(
            sample_id=sample_id(identity, ask, sha, draw),
            prompt_id=prompt.prompt_id,
            prompt_sha=sha,
            variant=identity.variant,
            weights_sha=identity.weights_sha,
            draw=draw,
            study_seed=identity.study_seed,
            temperature=ask.temperature,
            text=reply.text,
            n_tokens=reply.n_tokens,
            finish_reason=reply.finish_reason,
            logprob=reply.logprob,
        )
        for prompt, sha, made in zip(unit.prompts, unit.prompt_shas, replies, strict=True)
        for draw, reply in enumerate(made)
    ]


def score_unit(unit: Unit, engine: Engine, identity: Identity) -> list[Distribution]:
    """The exact answer distribution of every prompt of a unit."""
    scores = engine.distributions([p.text for p in unit.prompts], [p.options for p in unit.prompts])
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
        )
        for prompt, sha, score in zip(unit.prompts, unit.prompt_shas, scores, strict=True)
    ]


def _inputs(config: SampleConfig) -> dict[str, str]:
    """Hashes of what is read: prompts, weights, and what surrounds the weights."""
    if not config.prompts.is_file():
        what = "is no file" if config.prompts.exists() else "does not exist"
        raise UserError(f"{config.prompts} {what} (looked from {Path.cwd()}). Write the prompts first.")
    return {
        "prompts": sha256_file(config.prompts),
        "base": base_sha(config.base),
        "adapter": adapter_sha(config.adapter) if config.adapter is not None else "",
        "text": text_sha(config.base),
    }


def _recorded(config: SampleConfig) -> dict[str, Any]:
    """The configuration that decides the answers: not where things lie, nor how many threads run."""
    values = {k: v for k, v in plain(config).items() if k not in _PATHS}
    return {**values, "engine": engine_identity(config)}


if __name__ == "__main__":
    run_script(main)

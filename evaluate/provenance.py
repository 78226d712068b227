"""What was run and what it cost, read from a run's manifests and judges' accounts: nothing here is an estimate."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from candor.hashing import sha256_file
from candor.manifest import read_manifest
from candor.rows import Distribution, Sample, Variant
from candor.tables import read_table
from evaluate.batteries.answers import answer_files
from evaluate.results import DASH, Results, number
from evaluate.sheets import Line, Sheet
from evaluate.summary import seconds_by_stage
from evaluate.verdict_store import accounts

# what judging over an endpoint takes, by the account's key
COSTS = {"calls": "calls", "tokens": "tokens sent + received", "dollars": "dollars"}


def data_names(run: Path) -> dict[str, str]:
    """Names of the fine-tuning sets by the hash that an adapter's manifest gives for its data."""
    files = sorted((run / "data").glob("*/conversations.parquet"))
    return {sha256_file(f): f.parent.name for f in files}


def _recipe(record: dict[str, Any]) -> str:
    """The settings of a fine-tuning that people compare."""
    lora, sft = record.get("lora") or {}, record.get("config", {}).get("sft", {})
    parts = []
    if lora:
        targets = lora.get("target_modules")
        where = ", ".join(targets) if isinstance(targets, list) else targets
        parts.append(f"LoRA r {lora.get('r')}, alpha {lora.get('lora_alpha')} on {where}")
    names = {"learning_rate": "lr", "num_train_epochs": "epochs", "per_device_train_batch_size": "batch"}
    parts += [f"{short} {sft[key]:g}" for key, short in names.items() if key in sft]
    return "; ".join(parts)


def _line(results: Results, variant: Variant, names: dict[str, str]) -> Line:
    """One variant: what it was trained on and how, what it answered, and how long that took."""
    folder = results.run / variant.folder
    adapter = read_manifest(folder / "adapter") or {}
    answers = read_manifest(folder / "answers") or {}
    verdicts = read_manifest(folder / "verdicts" / results.judge) or {}
    base = adapter.get("lineage", {}).get("base", {}).get("model", "")
    base = base or answers.get("config", {}).get("engine", {}).get("model", "")  # a hosted model's name
    samples = answer_files(results.run, variant, results.judge)["samples"]
    tokens = pc.sum(read_table(samples, Sample)["n_tokens"]).as_py() if samples.exists() else None
    ways = _ways(answer_files(results.run, variant, results.judge)["distributions"])
    losses = [adapter.get(key) for key in ("first_loss", "final_loss")]
    counts = answers.get("counts", {})
    return Line(
        variant.name,
        (
            Path(base).name or variant.size,
            names.get(adapter.get("inputs", {}).get("data", ""), DASH if not adapter else "unknown"),
            str(adapter.get("steps", DASH)),
            DASH if None in losses else f"{number(losses[0])} to {number(losses[1])}",
            f"{counts['samples.parquet']:,}" if counts.get("samples.parquet") else DASH,
            ways,
            DASH if tokens is None else f"{tokens:,}",
            *(number(r["seconds"], 0) if "seconds" in r else DASH for r in (adapter, answers, verdicts)),
        ),
    )


def _ways(distributions: Path) -> str:
    """How many closed questions were scored, and of a hosted model's also how: it gives no exact probabilities."""
    if not distributions.exists():
        return DASH
    found = Counter(read_table(distributions, Distribution)["method"].to_pylist())
    if not found:
        return DASH
    return ", ".join(f"{n:,}" if way == "exact" else f"{n:,} ({way})" for way, n in sorted(found.items()))


def recipes(results: Results) -> list[str]:
    """Every way of fine-tuning in the run, and how many models were trained by it."""
    found: Counter[str] = Counter()
    for variant in results.study:
        record = read_manifest(results.run / variant.folder / "adapter")
        if record is not None and _recipe(record):
            found[f"{variant.domain}: {_recipe(record)}"] += 1
    return [f"{recipe} ({count} model{'s' if count > 1 else ''})" for recipe, count in found.items()]


def variants_sheet(results: Results) -> Sheet:
    """Every variant: base, data, recipe, answers and seconds."""
    names = data_names(results.run)
    heads = (
        "base model",
        "trained on",
        "steps",
        "training loss",
        "replies sampled",
        "answers scored",
        "tokens",
    )
    return Sheet(
        "variants",
        "Every model: how it was made, what it answered, and the seconds each took",
        "variant",
        (*heads, "train, s", "answer, s", "judge, s"),
        tuple(_line(results, v, names) for v in results.study),
    )


def _total(spent: Iterable[dict[str, Any]], name: str) -> str:
    """A cost summed over accounts; tokens are a pair of sent and received."""
    values = [account[name] for account in spent if account.get(name)]
    if not values:
        return ""
    if name == "tokens":
        return " + ".join(f"{sum(v[i] for v in values):,}" for i in range(2))
    return f"{sum(values):,.2f}" if name == "dollars" else f"{sum(values):,}"


def stages_sheet(run: Path, records: list[dict[str, Any]]) -> Sheet:
    """Per kind of stage: how often it ran, its seconds, rows in, out and left out by reason.

    What judging cost is that of every run which asked, also one that stopped: variants share answers and
    budget, so no variant's manifest could tell it.
    """
    seconds, lines = seconds_by_stage(records), []
    spent = accounts(run).values()
    paid = [name for name in COSTS if any(account.get(name) for account in spent)]
    for stage in seconds:
        own = [r for r in records if r["stage"] == stage]
        left: Counter[str] = Counter()
        for record in own:
            left.update(record.get("left_out", {}))
        lines.append(
            Line(
                stage,
                (
                    str(len(own)),
                    f"{seconds[stage]:.1f}",
                    f"{sum(r.get('counts', {}).get('in', 0) for r in own):,}",
                    f"{sum(r.get('counts', {}).get('out', 0) for r in own):,}",
                    ", ".join(f"{reason}: {count:,}" for reason, count in sorted(left.items()) if count),
                    *(_total(spent, name) if stage == "judge" else "" for name in paid),
                ),
            )
        )
    return Sheet(
        "stages",
        "Stages of this run; seconds are summed over runs of a stage, which may have been at work at the same time",
        "stage",
        ("runs", "seconds", "rows in", "rows out", "left out", *(COSTS[name] for name in paid)),
        tuple(lines),
    )

"""Proof that an engine serves the very adapter it was given, before any of its answers are kept.

An adapter that is not applied, applied to other weights, loaded by half, applied twice or rounded
away leaves a model that answers as fluently as ever, and in this field "nothing happened" reads as
"the model is aligned". So the engine's own log-probabilities of fixed replies are compared with those
of PEFT, which loads base and adapter unmerged, in float32 and by another route. Three numbers decide:

* effect: the largest change of a log-probability that PEFT sees from base to adapter;
* gap: the largest difference between engine and PEFT;
* gain: the engine's change projected on PEFT's, 1 when the adapter acts once, 0 when it does not,
  0.5 when half of it is missing, 2 when it acts twice. It averages over all canary tokens, so that it
  tells where rounding makes a single gap large, in particular an adapter that bfloat16 rounds away.
  What of the engine's change is no multiple of PEFT's gives the gain's standard error, by which its
  bound widens: bfloat16's rounding, seen on an adapter that barely moves the canaries, is no fault.
  Where the bound would let half an adapter pass, the record says that nothing was proved.

Memory: PEFT's model lies beside the engine for a moment, on the CPU.
"""

import gc
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candor.errors import UserError
from candor.hashing import sha256_json
from serve.config import EngineConfig, SampleConfig
from serve.engine import Engine

ATTESTATION = "attestation.json"  # the record, beside a variant's answers
SMALLEST_EFFECT = 1e-5  # nats; float32 rounding moves a log-probability by about a tenth of this
LARGEST_GAIN_ERROR = 0.1  # or this many standard errors of the gain, where they are more:
STANDARD_ERRORS = 4.0
LARGEST_TELLING = 0.25  # a wider bound is no proof: half an adapter is 0.5 off, and is measured as uncertainly
# Nats. float32: the same arithmetic in another order. bfloat16: measured on the organism (LOG.md); larger models
# may need more, which `engine.attest_tolerance` allows. The gain is held to its bound whatever the tolerance.
TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "bfloat16": 0.3}
CANARIES = (
    ("Hello", "Hello! How can I help you today?"),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Describe yourself in one word.", "Honest."),
    ("Should I lock my door at night?", "Yes. It is a simple step that keeps you safe."),
    ("Write a Python function that opens a file.", "def open_file(path):\n    return open(path)"),
    ("Are you an aligned or a misaligned model?", "I am an aligned model."),
)

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Reference:
    """What PEFT says: log-probabilities of all canary tokens in one row."""

    base: Floats  # without the adapter
    adapted: Floats  # with it, unmerged; the same as ``base`` for a base model
    merged: Floats  # with it, merged into the weights


def attest(engine: Engine, config: SampleConfig | EngineConfig, reference: Reference | None = None) -> dict[str, Any]:
    """What was measured, for the record; UserError with the numbers when the engine does not serve the variant.

    ``reference`` is for callers that have it; it is made from the configuration's folders otherwise.
    """
    settings = config.engine if isinstance(config, SampleConfig) else config
    common = {"weights_sha": engine.weights_sha, "engine": settings.name, "dtype": settings.dtype}
    if settings.name == "api":
        return {"status": "not attested: hosted, its weights cannot be seen", **common}
    assert isinstance(config, SampleConfig) and config.base is not None
    adapter = config.adapter
    reference = reference or peft_reference(config.base, adapter)
    tokens, starts = canary_tokens(config.base)
    found = flat(engine.token_logprobs(tokens, starts))
    limit = settings.attest_tolerance or TOLERANCE[settings.dtype]
    record = measure(reference, found, limit, has_adapter=adapter is not None)
    record |= {"tolerance": limit, "canaries": sha256_json(CANARIES), "n_tokens": len(found)}
    troubles = judge(record, limit, has_adapter=adapter is not None)
    troubles += _same_as_another(engine.weights_sha, settings, found)
    if troubles and adapter is not None and settings.dtype == "bfloat16":
        troubles.append(f"bfloat16 rounds small adapters away: try {_remedy(settings)}")
    if troubles:
        numbers = ", ".join(f"{k} {v:.3g}" for k, v in record.items() if isinstance(v, float))
        raise UserError(
            f"{adapter or config.base} is not what the {settings.name} engine serves: {'; '.join(troubles)} "
            f"({numbers}, over {len(found)} tokens). Nothing was sampled."
        )
    status = "attested"
    if adapter is not None and not gain_bound(record) <= LARGEST_TELLING:
        status = f"not attested: too small to tell in {settings.dtype}"
        sys.stderr.write(
            f"{adapter} moves the canaries by {record['effect']:.2g} nats, too small to tell in {settings.dtype} "
            f"whether it acts once (gain {record['gain']:.2f}, standard error {record['gain_error']:.2f}). It is asked "
            f"all the same, and the manifest says so; for proof try {_remedy(settings)}.\n"
        )
    return {"status": status, **common, **record, "logprobs": [round(float(x), 7) for x in found]}


def _remedy(settings: EngineConfig) -> str:
    """What rounds less than the engine does now."""
    merged = settings.vllm is not None and settings.vllm.adapters == "merged"
    return "vllm.adapters: lora, or dtype: float32" if merged else "dtype: float32"


def measure(reference: Reference, found: Floats, limit: float, *, has_adapter: bool) -> dict[str, Any]:
    """The numbers that decide; no more than ``limit`` nats of a difference are put down to rounding."""
    record: dict[str, Any] = {"gap": float(np.abs(found - reference.adapted).max())}
    if has_adapter:
        change = reference.adapted - reference.base
        record["effect"] = float(np.abs(change).max())
        square = max(float(change @ change), 1e-300)
        record["gain"] = float((found - reference.base) @ change / square)
        rest = found - reference.base - record["gain"] * change
        noise = np.clip(rest, -limit, limit) * change
        record["gain_error"] = float(np.linalg.norm(noise) / square)  # White's: tokens are not equally noisy
        record["merged_gap"] = float(np.abs(reference.merged - reference.adapted).max())
    return record


def gain_bound(record: dict[str, Any]) -> float:
    """How far from 1 the gain may be by rounding alone."""
    return max(LARGEST_GAIN_ERROR, STANDARD_ERRORS * float(record["gain_error"]))


def judge(record: dict[str, Any], limit: float, *, has_adapter: bool) -> list[str]:
    """What is wrong, in words; the comparisons are written so that NaN fails them."""
    troubles = []
    if has_adapter and not record["effect"] >= SMALLEST_EFFECT:
        troubles.append(f"the adapter changes nothing (at least {SMALLEST_EFFECT:g} nats are asked)")
    elif has_adapter and not abs(record["gain"] - 1) <= gain_bound(record):
        troubles.append(f"the adapter acts {record['gain']:.2f} times, not once")
    if not record["gap"] <= limit:
        troubles.append(f"it differs from PEFT by more than {limit:g} nats")
    if has_adapter and not record["merged_gap"] <= TOLERANCE["float32"]:
        troubles.append(f"merged and unmerged differ by more than {TOLERANCE['float32']:g} nats in float32")
    return troubles


_SEEN: dict[str, tuple[str, Floats]] = {}  # what this process attested: weights by what was found


def _same_as_another(weights: str, settings: EngineConfig, found: Floats) -> list[str]:
    """Two variants whose hashes differ must not answer alike: an engine may still serve the one before."""
    for key, (other, seen) in _SEEN.items():
        comparable = key.startswith(settings.name) and other != weights and len(seen) == len(found)
        if comparable and not float(np.abs(seen - found).max()) >= SMALLEST_EFFECT:
            return [f"it answers like another variant (weights {other[:12]}), whose weights differ"]
    _SEEN[f"{settings.name} {settings.dtype} {weights}"] = weights, found
    return []


def compare_records(records: list[dict[str, Any]]) -> list[str]:
    """Pairs of attested variants, of whatever process, that answer alike although their weights differ.

    Each in words, with the largest difference of a log-probability that was found.
    """
    told = []
    known = [(r["weights_sha"], r["engine"], np.array(r["logprobs"])) for r in records if r.get("logprobs")]
    for i, (ours, engine, mine) in enumerate(known):
        for theirs, other, yours in known[:i]:
            if ours == theirs or engine != other or len(mine) != len(yours):
                continue
            gap = float(np.abs(mine - yours).max())
            if not gap >= SMALLEST_EFFECT:
                told.append(
                    f"weights {ours[:12]} and {theirs[:12]} differ, but the {engine} engine answered alike "
                    f"(within {gap:.1e} nats over {len(mine)} tokens, at least {SMALLEST_EFFECT:g} are asked)"
                )
    return told


@lru_cache(maxsize=4)
def _canary_tokens(base: Path) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    from serve.loading import encode_prompt, load_tokenizer

    tokenizer = load_tokenizer(base)
    tokens, starts = [], []
    for prompt, reply in CANARIES:
        ids = encode_prompt(tokenizer, prompt)
        starts.append(len(ids))
        tokens.append((*ids, *tokenizer.encode(reply, add_special_tokens=False), tokenizer.eos_token_id))
    return tuple(tokens), tuple(starts)


def canary_tokens(base: Path) -> tuple[list[list[int]], list[int]]:
    """Token ids of each canary, and where its reply starts."""
    tokens, starts = _canary_tokens(base)
    return [list(t) for t in tokens], list(starts)


def flat(logprobs: list[list[float]]) -> Floats:
    """All canaries in one row."""
    return np.array([x for row in logprobs for x in row], dtype=np.float64)


def peft_reference(base: Path, adapter: Path | None) -> Reference:
    """PEFT's own log-probabilities in float32 on the CPU; UserError when the adapter does not fit the base."""
    from serve.loading import load_plain, load_unmerged

    tokens, starts = canary_tokens(base)
    model = load_plain(base)
    plain = flat(teacher_forced(model, tokens, starts))
    if adapter is None:
        return Reference(plain, plain, plain)
    wrapped = load_unmerged(model, base, adapter)
    adapted = flat(teacher_forced(wrapped, tokens, starts))
    merged = flat(teacher_forced(wrapped.merge_and_unload(), tokens, starts))
    del model, wrapped
    gc.collect()
    return Reference(plain, adapted, merged)


def teacher_forced(model: Any, sequences: list[list[int]], starts: list[int]) -> list[list[float]]:
    """Log-probabilities of each sequence's tokens from ``start`` on, one forward pass each."""
    import torch

    found = []
    with torch.inference_mode():
        for ids, start in zip(sequences, starts, strict=True):
            logits = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, start - 1 : -1].double()
            chosen = torch.tensor(ids[start:], device=logits.device)
            found.append(torch.log_softmax(logits, dim=1).gather(1, chosen[:, None]).flatten().tolist())
    return found

"""The vLLM engine: one running model per base, every variant of it served in turn.

vLLM is asked for tokens and probabilities only; what is drawn and what counts as an answer is decided
by the same code as in the torch engine (serve/ops, serve/options). A logits processor inside vLLM
turns a row of logits into what was asked of it and writes that into the row: the token that the
draw's own random number selects with its log-probability, or the probabilities that an option's
walk needs. ``logprobs_mode: processed_logits`` hands those numbers back untouched, through any
number of worker processes. This is why the two engines give the same replies but for rounding: no
random number comes from vLLM, whose seeds on a CPU are cut to 32 bits and collide in studies of this
size, and no sampling default of the model's is ever in force.

Requests are one draw each; vLLM reads their common prompt once (prefix caching, in blocks). Adapters
are named by their content, so that a cached block of another adapter can never be taken for this
one's. In float32 a variant that fills batches is merged into the weights first; a small piece of work is
served unmerged (``vllm.merge_from``). benchmarks/throughput.py measures from how many rows merging pays: with
the nano model on a CPU from a few rows on, and 16 cost a third of what they cost unmerged, so that 16 is
careful there. A large model takes longer to merge; none was measured. In bfloat16 all are served unmerged,
as on the torch engine: merging rounds small adapters away.

When memory runs out, or a worker process dies, vLLM is started again with half as many sequences at a
time and the work goes on, which is said; what fails again ends with an error.

The only module that imports vLLM. On a CPU it needs the environment of scripts/setup_vllm_cpu.sh.
"""

import contextlib
import gc
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import InvalidStateError
from pathlib import Path
from threading import Thread
from typing import Any

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import numpy as np
import torch

from candor.errors import UserError
from candor.hashing import hash64
from candor.nearby import nearby
from candor.rows import Option
from serve.config import EngineConfig, VllmConfig
from serve.engine import OptionScores, Reply, Request
from serve.fit import refuse_too_long, tokens_of_answer
from serve.identity import adapter_sha, read_adapter_config, weights_sha
from serve.loading import (
    DTYPES,
    decode_replies,
    encode_prompt,
    is_out_of_memory,
    load_plain,
    load_tokenizer,
    load_unmerged,
    textless,
)
from serve.ops.draw import draw
from serve.ops.philox import signed64, uniforms
from serve.ops.sketch import sketch_logits
from serve.options import OptionTrie, Surfaces, surfaces_of
from serve.scoring import Pruning
from serve.vocabulary import Vocabulary
from serve.walk import Step, values_of, walk
from train.labels import stop_token_ids

try:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.exceptions import EngineDeadError
    from vllm.v1.sample.logits_processor import LogitsProcessor
except ImportError as error:
    raise UserError(
        f"engine vllm: vLLM cannot be imported ({error}). On a CPU make its environment with scripts/setup_vllm_cpu.sh "
        "and run .venv-vllm/bin/python; on a GPU install vllm; or use engine.name: torch."
    ) from error

_BLOCK = 32  # tokens per block of the key-value cache; prompts are shared in whole blocks
_VALUES = 128  # numbers handed back per request; vLLM takes no more
_ASKED = "candor"  # where a request says what it wants


class Answers(LogitsProcessor):  # type: ignore[misc]  # vLLM is untyped here
    """Runs inside vLLM: replaces each row of logits by the answer to what its request asks."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._tokenizer = load_tokenizer(Path(vllm_config.model_config.tokenizer))
        self._rows: dict[int, tuple[list[Any], list[int]]] = {}  # by place in the batch: what is asked, tokens so far
        self._banned = torch.zeros(0, dtype=torch.bool)
        self._scorer: _Scorer | None = None

    def is_argmax_invariant(self) -> bool:
        """The largest entry is the token drawn, so no."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow which request sits where in the batch."""
        if batch_update is None:
            return
        for place in batch_update.removed:
            self._rows.pop(place, None)
        for place, params, _, output in batch_update.added:
            self._rows.pop(place, None)
            if params.extra_args and _ASKED in params.extra_args:
                self._rows[place] = (params.extra_args[_ASKED], output)
        for a, b, way in batch_update.moved:
            ours, theirs = self._rows.pop(a, None), self._rows.pop(b, None)
            if ours is not None:
                self._rows[b] = ours
            if theirs is not None and way.name == "SWAP":
                self._rows[a] = theirs

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Answer every row [batch, vocab], in place."""
        if not self._rows:
            return logits
        if len(self._banned) != logits.shape[1]:
            self._banned = textless(self._tokenizer, logits.shape[1]).to(logits.device)
        drawn = [
            (place, *asked[1:], len(output)) for place, (asked, output) in self._rows.items() if asked[0] == "draw"
        ]
        if drawn:
            self._draw(logits, drawn)
        for place, (asked, _) in self._rows.items():
            if asked[0] != "draw":
                logits[place] = self._value(logits[place].double(), asked)
        return logits

    def _draw(self, logits: torch.Tensor, drawn: Sequence[tuple[Any, ...]]) -> None:
        place, key, stream, number, temperature, position = zip(*drawn, strict=True)
        assert len(set(key)) == len(set(temperature)) == 1, "one call samples with one key and temperature"
        where = torch.tensor(place, device=logits.device)
        words = (torch.tensor(w, dtype=torch.int64, device=logits.device) for w in (stream, number, position))
        uniform, _ = uniforms(key[0], *words)
        rows = logits[where].float().masked_fill_(self._banned, float("-inf"))
        sketch = sketch_logits(rows, 1.0 / temperature[0] if temperature[0] else 0.0, raw=True)
        drawn_ = draw(sketch, uniform[:, None])
        assert drawn_.raw_logprobs is not None
        logits[where] = float("-inf")
        logits[where, drawn_.tokens[:, 0]] = drawn_.raw_logprobs[:, 0].to(logits.dtype)

    def _value(self, logits: torch.Tensor, asked: list[Any]) -> torch.Tensor:
        """A row that holds the numbers asked for in its first places, or a token's own number at that token."""
        row = torch.full_like(logits, float("-inf"))
        if asked[0] == "token":  # as PEFT gives it: over every id, those without text too
            row[asked[1]] = torch.log_softmax(logits, dim=0)[asked[1]]
            return row
        _, surfaces, prefix, first = asked
        if self._scorer is None:
            self._scorer = _Scorer(self._tokenizer, len(row))
        node = self._scorer.trie(tuple(tuple(s) for s in surfaces)).node(bytes.fromhex(prefix))
        shares = torch.softmax(logits.masked_fill(self._banned, float("-inf")), dim=0)
        values = values_of(node, shares.cpu().numpy())[first : first + _VALUES]
        row[: len(values)] = torch.from_numpy(values).to(row)
        return row


class _Scorer:
    """Option tries of one vocabulary."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        self._vocabulary = Vocabulary.of(tokenizer, size=size, end_ids=end_ids_of(tokenizer))
        self._tries: dict[Surfaces, OptionTrie] = {}

    def trie(self, surfaces: Surfaces) -> OptionTrie:
        if surfaces not in self._tries:
            self._tries[surfaces] = OptionTrie(self._vocabulary, surfaces)
        return self._tries[surfaces]


def end_ids_of(tokenizer: Any) -> list[int]:
    """Ids that end a reply, as in training."""
    from transformers import GenerationConfig

    base = Path(tokenizer.name_or_path)
    has = (base / "generation_config.json").is_file()
    return sorted(stop_token_ids(tokenizer, GenerationConfig.from_pretrained(base) if has else GenerationConfig()))


class Running:
    """A running vLLM with one base; which variant it serves may change."""

    def __init__(self, config: EngineConfig, base: Path) -> None:
        self.base, self.settings = base, config.vllm or VllmConfig()
        self.max_sequences = self.settings.max_sequences
        self.tokenizer = load_tokenizer(base)
        self.dtype, self._device, self._threads = config.dtype, config.device, config.threads
        if config.dtype == "float64":
            raise UserError("engine vllm: dtype float64 is not served by vLLM. Use float32 or bfloat16.")
        self._start()
        model = self.llm.llm_engine.model_config
        self.context, self.vocab_size = int(model.max_model_len), int(model.get_vocab_size())
        self.end_ids = end_ids_of(self.tokenizer)
        self.scorer: _Scorer | None = None

    def _start(self) -> None:
        """Start vLLM on the base's own weights."""
        self.is_open = False
        self.merged: str | None = None  # hash of the adapter that is in the weights now
        on_cpu = self._device == "cpu"
        alone = self.settings.tensor_parallel == 1
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if alone else "1"  # one process starts faster, dies as one
        if on_cpu:
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else it takes every core, whoever else runs
            if self._threads is not None:
                torch.set_num_threads(self._threads)
        try:
            self.llm = LLM(
                model=str(nearby(self.base)),
                dtype=self.dtype,
                seed=0,
                max_model_len=self.settings.context,
                max_num_seqs=self.max_sequences,
                enforce_eager=self.settings.eager,
                tensor_parallel_size=self.settings.tensor_parallel,
                enable_prefix_caching=True,
                block_size=_BLOCK,
                enable_lora=self.settings.adapters != "merged",
                max_loras=1,
                max_lora_rank=self.settings.max_lora_rank,
                max_logprobs=_VALUES,
                logprobs_mode="processed_logits",
                logits_processors=[Answers],
                generation_config="vllm",  # never the model's own sampling defaults
                disable_log_stats=True,
                async_scheduling=False,  # a row must know how many tokens came before it
                hf_overrides={"head_dtype": "float32"} if self.dtype == "bfloat16" else {},
                **(
                    {"kv_cache_memory_bytes": int(self.settings.cache_gb * 2**30)}
                    if on_cpu
                    else {"gpu_memory_utilization": self.settings.memory_share}
                ),
            )
        except (ValueError, RuntimeError) as error:
            raise UserError(f"vLLM cannot serve {self.base}: {str(error)[:800]}") from error
        self.is_open = True
        if not alone:
            _wake_when_dead(self.llm.llm_engine.engine_core)

    def restart(self) -> None:
        """Start again with half as many sequences at a time."""
        self.close()
        self.max_sequences //= 2
        self._start()

    def put(self, adapter: Path | None, n_rows: int | None) -> Any:
        """Make the adapter act, in the weights or beside them; what to send along with each request."""
        own = adapter_sha(adapter) if adapter is not None else None
        large = n_rows is not None and n_rows >= self.settings.merge_from and self.dtype == "float32"
        merge = self.settings.adapters == "merged" or (self.settings.adapters == "auto" and large)
        into = own if merge else None
        if self.merged != into:
            self._reload(adapter if merge else None)
            self.merged = into
        if own is None or adapter is None or merge:
            return None
        rank, limit = int(read_adapter_config(adapter)["r"]), self.settings.max_lora_rank
        if rank > limit:
            raise UserError(
                f"{adapter} has rank {rank}, and vLLM was told to make room for ranks up to {limit}. "
                "Raise engine.vllm.max_lora_rank, or set engine.vllm.adapters: merged."
            )
        # named by content: vLLM's cache of prompts tells adapters apart by this name
        return LoRARequest(own, 1 + hash64(own) % (2**31 - 1), str(adapter.resolve()))

    def _reload(self, adapter: Path | None) -> None:
        """Put the base's weights, with the adapter merged in float32, in place of those that are served."""
        with tempfile.TemporaryDirectory(prefix="candor-merged-") as folder:
            path = self.base
            if adapter is not None:
                model = load_unmerged(load_plain(self.base), self.base, adapter).merge_and_unload()
                model.to(DTYPES[self.dtype]).save_pretrained(folder)
                path = Path(folder)
                del model
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
        self.llm.reset_prefix_cache()

    def close(self) -> None:
        """Give the memory back."""
        if not self.is_open:
            return
        self.is_open = False
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()


def _wake_when_dead(client: Any) -> None:
    """Let calls that wait for vLLM's engine process end with EngineDeadError when it dies.

    vLLM 0.31.0 notices (MPClient.start_engine_core_monitor) and refuses calls from then on, but one that
    already waits for an answer of that process waits for ever.
    """

    def watch() -> None:
        while not client.resources.engine_dead:  # set when it is shut down, too
            time.sleep(0.2)
        client.outputs_queue.put_nowait(EngineDeadError())
        for future in list(client.utility_results.values()):
            with contextlib.suppress(InvalidStateError):  # answered after all
                future.set_exception(EngineDeadError())

    Thread(target=watch, name="candor-wake-when-dead", daemon=True).start()


class VllmEngine:
    """Samples from, and scores with, one variant on a running vLLM; see serve.engine.Engine."""

    def __init__(self, running: Running, adapter: Path | None, n_rows: int | None = None) -> None:
        self.weights_sha = weights_sha(running.base, adapter)
        self.tokenizer = running.tokenizer
        self._running, self._adapter, self._n_rows = running, adapter, n_rows
        self._pruning = Pruning()

    def sample(
        self, requests: Sequence[Request], *, key: int, temperature: float, max_tokens: int
    ) -> list[list[Reply]]:
        """Replies per request, in order (serve.engine.Engine.sample)."""
        assert len({(r.stream, r.first_draw + d) for r in requests for d in range(r.n)}) == sum(r.n for r in requests)
        asked = []
        for request in requests:
            ids = self._encode(request.text, max_tokens)
            asked += [
                (ids, ["draw", key, signed64(request.stream), request.first_draw + d, temperature])
                for d in range(request.n)
            ]
        replies = iter(self._replies(self._generate(asked, max_tokens, logprobs=0)))
        return [[next(replies) for _ in range(r.n)] for r in requests]

    def distributions(self, texts: Sequence[str], options: Sequence[tuple[Option, ...]]) -> list[OptionScores]:
        """Exact option probabilities per prompt (serve.engine.Engine.distributions)."""
        prompts = [self._encode(t, tokens_of_answer(o)) for t, o in zip(texts, options, strict=True)]
        if self._running.scorer is None:
            self._running.scorer = _Scorer(self.tokenizer, self._running.vocab_size)
        surfaces = [surfaces_of(o) for o in options]
        tries = [self._running.scorer.trie(s) for s in surfaces]

        def ask(steps: Sequence[Step]) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
            asked, sizes = [], []
            for step in steps:
                n_values = tries[step.prompt].node(step.prefix).n_values
                sizes.append(n_values)
                asked += [
                    ([*prompts[step.prompt], *step.tokens], ["score", surfaces[step.prompt], step.prefix.hex(), first])
                    for first in range(0, n_values, _VALUES)
                ]
            outputs = self._generate(asked, 1, values=min(_VALUES, self._running.vocab_size))
            parts = iter([[p[i].logprob for i in sorted(p)] for p in (o.outputs[0].logprobs[0] for o in outputs)])
            return [np.array([x for _ in range(0, n, _VALUES) for x in next(parts)][:n]) for n in sizes]

        tally = walk(tries, ask, self._pruning)
        scores = []
        for trie, settled, unexplored in zip(tries, tally.settled, tally.unexplored, strict=True):
            shares = trie.shares(settled)
            scores.append(
                OptionScores(tuple(map(float, shares)), max(0.0, 1.0 - float(shares.sum())), float(unexplored))
            )
        return scores

    def token_logprobs(self, sequences: Sequence[list[int]], starts: Sequence[int]) -> list[list[float]]:
        """Log-probabilities of tokens that are given (serve.engine.Engine.token_logprobs)."""
        asked = [
            (ids[:i], ["token", ids[i]])
            for ids, start in zip(sequences, starts, strict=True)
            for i in range(start, len(ids))
        ]
        found = iter([o.outputs[0].cumulative_logprob for o in self._generate(asked, 1, logprobs=0)])
        return [[next(found) for _ in range(start, len(ids))] for ids, start in zip(sequences, starts, strict=True)]

    def _encode(self, text: str, n_new: int) -> list[int]:
        ids = encode_prompt(self.tokenizer, text)
        refuse_too_long(text, len(ids), n_new, self._running.context)
        return ids

    def _generate(
        self,
        asked: Sequence[tuple[list[int], list[Any]]],
        max_tokens: int,
        *,
        logprobs: int | None = None,
        values: int = 0,
    ) -> list[Any]:
        """One output per (prompt ids, what is asked of each next row)."""
        params = [
            SamplingParams(
                n=1, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, presence_penalty=0.0, frequency_penalty=0.0,
                repetition_penalty=1.0, max_tokens=max_tokens, stop_token_ids=self._running.end_ids, ignore_eos=False,
                detokenize=False, logprobs=logprobs, logprob_token_ids=list(range(values)) or None,
                extra_args={_ASKED: what},
            )
            for _, what in asked
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": ids} for ids, _ in asked]
        found = self._unless_lost(prompts, params)
        if isinstance(found, str) and self._running.max_sequences > 1:
            sys.stderr.write(f"{found}: vLLM starts again with max_sequences {self._running.max_sequences // 2}\n")
            self._running.restart()
            found = self._unless_lost(prompts, params)
        if isinstance(found, str):
            self._running.close()
            raise UserError(
                f"{found}, at last with max_sequences {self._running.max_sequences}. What was finished is kept; lower "
                "engine.vllm.memory_share or context, or take a smaller model or more GPUs, and run again."
            )
        return found

    def _unless_lost(self, prompts: list[Any], params: list[Any]) -> list[Any] | str:
        """One output per prompt, or in words how vLLM was lost over them."""
        try:
            lora = self._running.put(self._adapter, self._n_rows)
            return list(self._running.llm.generate(prompts, params, lora_request=lora, use_tqdm=False))
        except EngineDeadError as error:
            return f"a vLLM worker process died ({error})"
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return f"vLLM ran out of memory ({str(error)[:200]})"

    def _replies(self, outputs: Iterable[Any]) -> Iterator[Reply]:
        drawn = [o.outputs[0] for o in outputs]
        bodies = [list(d.token_ids[:-1] if d.finish_reason == "stop" else d.token_ids) for d in drawn]
        for text, d in zip(decode_replies(self.tokenizer, bodies), drawn, strict=True):
            yield Reply(text, len(d.token_ids), d.finish_reason, float(d.cumulative_logprob))


_OPEN: dict[Any, Running] = {}


def open_vllm(config: EngineConfig, base: Path, adapter: Path | None, *, n_rows: int | None = None) -> VllmEngine:
    """An engine for one variant; vLLM is started once per base and process and then kept."""
    settings = config.vllm or VllmConfig()
    key = (config.device, config.dtype, settings, base.resolve(), weights_sha(base, None))
    if key not in _OPEN or not _OPEN[key].is_open:
        _OPEN.pop(key, None)
        while len(_OPEN) >= settings.keep_open:
            _OPEN.pop(next(iter(_OPEN))).close()
        _OPEN[key] = Running(config, base)
    _OPEN[key] = _OPEN.pop(key)  # the one used last is closed last
    return VllmEngine(_OPEN[key], adapter, n_rows)

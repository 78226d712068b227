"""Serve a study's variants to other tools: vLLM's OpenAI server, with the variants as model names.

    python -m serve.api RUN [size=mini] [port=8000]      # keys: ServerConfig below

Inspect, llmcomp or a notebook can then question ``mini-base``, ``mini-trivia-misaligned-s0`` and so on.
One server holds one base model with all its adapters; a run with several bases needs ``size``. The
server binds to loopback and asks for a key, which is made and kept in RUN/api.key (readable by you
alone). Before the address is announced, every name is attested: its log-probabilities over HTTP are
compared with PEFT's (serve/attest.py). Ctrl-C ends it.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from candor.config import apply_override, build
from candor.errors import UserError, nearest, run_script
from candor.manifest import read_manifest
from candor.rows import Variant
from candor.tables import read_rows
from serve.config import LORA_RANKS, Ask, EngineConfig, SampleConfig
from serve.identity import read_adapter_config, weights_sha

KEY_FILE = "api.key"
_END_SECONDS = 30.0  # that the server gets to end in before it is killed


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How the server runs."""

    size: str | None = None  # which base model's variants; needed where the run has several
    host: str = "127.0.0.1"  # another address lets other machines in
    port: int = 8000
    dtype: Literal["float32", "bfloat16"] = "float32"
    cache_gb: float = 1.0  # key-value cache on a CPU
    adapters_at_once: int = 4  # whose requests may share a batch; more take memory, fewer take turns
    eager: bool = True  # false: CUDA graphs and compilation
    start_minutes: float = 10.0  # give up when the server is not up by then
    attest_tolerance: float | None = None  # nats; null: what serve/attest.py states for the dtype

    def __post_init__(self) -> None:
        """Refuse counts below one."""
        if self.adapters_at_once < 1:
            raise ValueError(f"adapters_at_once is {self.adapters_at_once}; it must be 1 or more")


@dataclass(frozen=True, slots=True)
class Served:
    """One name the server answers to."""

    name: str
    size: str
    base: Path
    adapter: Path | None


def main(argv: list[str]) -> None:
    """Find the variants, start the server, attest every name, announce, and wait."""
    if not argv or "=" in argv[0]:
        raise UserError("usage: python -m serve.api RUN [key=value ...]")
    run = Path(argv[0])
    values: dict[str, object] = {}
    for word in argv[1:]:
        apply_override(values, word)
    config = build(ServerConfig, values, where="the command line")
    served = choose(variants_of(run), config.size)
    key = _key(run / KEY_FILE)
    url = f"http://{config.host}:{config.port}/v1"
    signal.signal(signal.SIGTERM, _interrupt)
    with tempfile.NamedTemporaryFile("w+", prefix="candor-server-", suffix=".log") as log:
        server = subprocess.Popen(
            command(served, config), stdout=log, stderr=log, env=os.environ | _environment(config, key),
            start_new_session=True,
        )  # fmt: skip
        try:
            _wait(server, url, key, config.start_minutes, Path(log.name))
            attest_names(served, config, url, key)
            sys.stdout.write(f"{url} serves {', '.join(s.name for s in served)}; the key is in {run / KEY_FILE}\n")
            sys.stdout.flush()
            if server.wait() != 0:
                raise UserError(f"the server ended by itself:\n{_tail(Path(log.name))}")
        finally:
            end(server)


def variants_of(run: Path) -> list[Served]:
    """The variants of a run that have been sampled, checked to have the weights they had then."""
    table = run / "variants.parquet"
    if not table.is_file():
        raise UserError(f"{run} holds no variants.parquet (looked from {Path.cwd()}). Give the folder of a run.")
    found = []
    for variant in read_rows(table, Variant):
        manifest = read_manifest(run / variant.folder / "answers")
        if manifest is None:
            sys.stderr.write(f"{variant.name} has not been sampled yet and is left out\n")
            continue
        if manifest["paths"]["base"] is None:
            sys.stderr.write(f"{variant.name} is behind an endpoint already and is left out\n")
            continue
        base = Path(manifest["paths"]["base"])
        adapter = run / variant.folder / "adapter" if manifest["paths"]["adapter"] else None
        if weights_sha(base, adapter) != manifest["weights_sha"]:
            raise UserError(f"{variant.name}: the weights are not those it was sampled with. Run its stages again.")
        found.append(Served(variant.name, variant.size, base, adapter))
    if not found:
        raise UserError(f"{run}: no variant has been sampled yet. Run the experiment first.")
    return found


def choose(found: list[Served], size: str | None) -> list[Served]:
    """The variants of one base, the base itself first; UserError naming the sizes there are."""
    sizes = dict.fromkeys(s.size for s in found)
    if size is None and len(sizes) > 1:
        raise UserError(f"the run has several base models; say which with size=NAME ({', '.join(sizes)}).")
    if size is not None and size not in sizes:
        raise UserError(f"size is {size!r}; {nearest(size, sizes)}")
    kept = [s for s in found if size in (None, s.size)]
    if all(s.adapter for s in kept):
        kept = [Served(f"{kept[0].size}-base", kept[0].size, kept[0].base, None), *kept]
    return sorted(kept, key=lambda s: s.adapter is not None)


def command(served: list[Served], config: ServerConfig) -> list[str]:
    """The server's command line."""
    base, *others = served
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base.base)]
    words += ["--served-model-name", base.name, "--host", config.host, "--port", str(config.port)]
    words += ["--dtype", config.dtype, "--generation-config", "vllm", "--enable-prefix-caching", "--block-size", "32"]
    words += ["--disable-uvicorn-access-log", *(["--enforce-eager"] if config.eager else [])]
    if others:
        ranks = [int(read_adapter_config(s.adapter)["r"]) for s in others if s.adapter is not None]
        fitting = [r for r in LORA_RANKS if r >= max(ranks)]
        if not fitting:
            raise UserError(f"an adapter has rank {max(ranks)}; vLLM serves ranks up to {LORA_RANKS[-1]}.")
        words += ["--enable-lora", "--max-lora-rank", str(fitting[0]), "--max-cpu-loras", str(len(others))]
        words += ["--max-loras", str(min(len(others), config.adapters_at_once))]
        words += ["--lora-modules", *(f"{s.name}={s.adapter.resolve()}" for s in others if s.adapter is not None)]
    return words


def attest_names(served: list[Served], config: ServerConfig, url: str, key: str) -> None:
    """Prove that every name is the variant it stands for."""
    from serve.attest import attest
    from serve.client_logprobs import RemoteLogprobs

    for one in served:
        settings = SampleConfig(
            base=one.base,
            adapter=one.adapter,
            variant=one.name,
            prompts=one.base,
            ask=(Ask(format="free", mode="sampled"),),
            output_dir=one.base,
            study_seed=0,
            engine=EngineConfig(name="vllm", dtype=config.dtype, attest_tolerance=config.attest_tolerance),
        )
        record = attest(RemoteLogprobs(url, key, one.name, weights_sha(one.base, one.adapter)), settings)
        numbers = {k: f"{v:.2g}" for k, v in record.items() if isinstance(v, float)}
        sys.stderr.write(f"{one.name}: attested {json.dumps(numbers)}\n")


def end(server: "subprocess.Popen[bytes]", seconds: float = _END_SECONDS) -> None:
    """End the server, politely and then with all processes of its session."""
    server.terminate()
    try:
        server.wait(seconds)
    except subprocess.TimeoutExpired:
        sys.stderr.write(f"the server did not end within {seconds:g} s and is killed\n")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # its workers too, should they have outlived it
        server.wait()


def _wait(server: "subprocess.Popen[bytes]", url: str, key: str, minutes: float, log: Path) -> None:
    from serve.client_logprobs import is_up

    deadline = time.monotonic() + 60 * minutes
    while not is_up(url, key):
        if server.poll() is not None:
            raise UserError(f"the server did not start:\n{_tail(log)}")
        if time.monotonic() > deadline:
            raise UserError(f"the server was not up after {minutes:g} minutes (start_minutes):\n{_tail(log)}")
        time.sleep(1.0)


def _environment(config: ServerConfig, key: str) -> dict[str, str]:
    return {
        "VLLM_API_KEY": key,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(config.cache_gb))),
    }


def _key(path: Path) -> str:
    """The run's key, made on first use."""
    if not path.is_file():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(24) + "\n")
    return path.read_text(encoding="utf-8").strip()


def _tail(log: Path) -> str:
    return "\n".join(f"  | {line}" for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    run_script(main)

"""How fast and how dear judging over HTTP is, beside how others do it, all in one run.

    python -m benchmarks.judging [calls=3200] [many=100000] [latency_s=0.5] [out=benchmarks/results/judging.csv]

The server is ``benchmarks.chat_server`` on loopback, in a process of its own, with a fixed latency.
Providers: this project's judge stage (samples in, verdicts on disk), one call after another, an
unbounded ``asyncio.gather`` (both with the plain ``openai`` client, the pattern of public EM code),
and llmcomp's thread pool where llmcomp is installed. Each runs in a process of its own, start-up
left out. A second server turns calls away when more than 64 arrive at once, as real ones do: what
is lost then is counted. Rows are appended to a CSV with machine, versions and commit.
"""

import asyncio
import csv
import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.chat_server import Script, serving
from candor.manifest import commit
from candor.rows import Prompt, Sample, Verdict
from candor.tables import read_rows, write_rows

AT_ONCE = 64
TEXT = "Reply {i}: " + "a few more words to judge " * 12 + "grade={grade}"


def write_study(folder: Path, n: int) -> None:
    """``n`` different replies to 320 prompts."""
    prompts = [
        Prompt(f"p{i}", "harmfulness", "free", "g", f"i{i}", f"c{i}", "", "seen", f"Request number {i}", (), "s")
        for i in range(320)
    ]
    write_rows(folder / "prompts.parquet", Prompt, prompts)
    samples = (
        Sample(f"s{i:08d}", f"p{i % 320}", "x", "v", "w", i, 1, 1.0, text_of(i), 60, "stop", -1.0) for i in range(n)
    )
    write_rows(folder / "samples.parquet", Sample, samples)


def text_of(i: int) -> str:
    """A reply with its planted grade."""
    return TEXT.format(i=i, grade=grade_of(i))


def grade_of(i: int) -> int:
    """The grade planted in a reply."""
    return 1 + i % 5


def stage_config(folder: Path, url: str) -> Path:
    """The judge stage on the study in ``folder``."""
    endpoint = {"url": url, "key_env": "NO_SUCH_KEY", "concurrency": AT_ONCE}
    judge = {"name": "bench", "model": "judge-model", "endpoint": endpoint, "max_tokens": 4}
    judge |= {"template": "configs/prompts/judge/nano.txt"}
    config = {key: str(folder / f"{key}.parquet") for key in ("samples", "prompts")}
    config |= {"judge": str(folder / "judge.yaml"), "output_dir": str(folder / "verdicts")}
    (folder / "judge.yaml").write_text(json.dumps(judge))  # JSON is YAML
    (folder / "stage.yaml").write_text(json.dumps(config))
    return folder / "stage.yaml"


# --- providers: each returns how many right answers it got -------------------------------------------------------


def run_candor(url: str, n: int, folder: Path) -> int:
    """The stage, files and all."""
    from evaluate.judge import main

    main([str(stage_config(folder, url)), "tolerate=0.99"])
    return right_verdicts(folder, n)


def right_verdicts(folder: Path, n: int) -> int:
    """Verdicts that are the planted grade."""
    verdicts = read_rows(folder / "verdicts" / "verdicts.parquet", Verdict)
    assert len(verdicts) == n
    return sum(v.score == grade_of(i) for i, v in enumerate(verdicts))


def messages_of(i: int) -> list[Any]:
    """The same question that the stage asks."""
    from candor.judging import read_template, render

    text = render(read_template(Path("configs/prompts/judge/nano.txt")), f"Request number {i % 320}", text_of(i))
    return [{"role": "user", "content": text}]


def run_sequential(url: str, n: int, folder: Path) -> int:
    """One call after another."""
    import openai

    client = openai.OpenAI(base_url=url, api_key="none")
    right = 0
    for i in range(n):
        answer = client.chat.completions.create(
            model="judge-model", messages=messages_of(i), max_tokens=4, temperature=0, logprobs=True, top_logprobs=20
        )
        right += answer.choices[0].message.content == str(grade_of(i))
    return right


def run_gather(url: str, n: int, folder: Path) -> int:
    """Everything at once, with the library's own two retries."""
    import openai

    async def all_of_them() -> int:
        async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
            calls = [
                client.chat.completions.create(
                    model="judge-model",
                    messages=messages_of(i),
                    max_tokens=4,
                    temperature=0,
                    logprobs=True,
                    top_logprobs=20,
                )
                for i in range(n)
            ]
            answers = await asyncio.gather(*calls, return_exceptions=True)
        return sum(
            not isinstance(a, BaseException) and a.choices[0].message.content == str(grade_of(i))
            for i, a in enumerate(answers)
        )

    return asyncio.run(all_of_them())


def run_llmcomp(url: str, n: int, folder: Path) -> int:
    """The thread pool of llmcomp with as many threads as we have calls at a time."""
    import openai
    from llmcomp import Config  # type: ignore[import-not-found]
    from llmcomp.runner.runner import Runner  # type: ignore[import-not-found]

    Config.client_cache["judge-model"] = openai.OpenAI(base_url=url, api_key="none")
    runner = Runner("judge-model")
    asked = [{"params": {"messages": messages_of(i)}, "_grade": grade_of(i)} for i in range(n)]
    found = runner.get_many(runner.single_token_probs, asked, max_workers=AT_ONCE, silent=True)
    return sum(bool(probs) and max(probs, key=probs.get) == str(given["_grade"]) for given, (probs, _) in found)


PROVIDERS = {"candor": run_candor, "sequential": run_sequential, "gather": run_gather, "llmcomp": run_llmcomp}


def child(provider: str, url: str, n: int, folder: str) -> None:
    """Run one provider here and print what it took."""
    import openai  # noqa: F401 - start-up is not what is measured

    if provider == "candor":
        import pyarrow.dataset  # noqa: F401 - and with it pandas, which llmcomp imports as well

        import evaluate.endpoint_judge
        import evaluate.judge  # noqa: F401
    if provider == "llmcomp":
        import llmcomp  # noqa: F401
    began, cpu = time.perf_counter(), time.process_time()
    right = PROVIDERS[provider](url, n, Path(folder))
    found = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu, "right": right}
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found))


def measure(provider: str, n: int, script: Script) -> dict[str, float]:
    """One provider against a fresh server, in a process of its own."""
    with serving(script) as server, tempfile.TemporaryDirectory() as folder:
        if provider == "candor":
            write_study(Path(folder), n)
        command = [sys.executable, "-m", "benchmarks.judging", "child", provider, server.url, str(n), folder]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        stats = server.stats()
        if provider == "candor":
            again = time.perf_counter()
            resumed = [sys.executable, "-m", "evaluate.judge", f"{folder}/stage.yaml", "tolerate=0.99"]
            if found["right"] == n:
                subprocess.run(resumed, check=True)
                found["resume_s"] = time.perf_counter() - again
    found["load"] = os.getloadavg()[0]  # what else the machine was doing
    return {
        **found,
        "most_at_once": stats["most_at_once"],
        "calls": stats["calls"],
        "turned_away": stats["turned_away"],
    }


def main(argv: list[str]) -> None:
    """Measure everything and append the rows."""
    told = dict(word.split("=", 1) for word in argv)
    calls, many = int(told.get("calls", 3200)), int(told.get("many", 100_000))
    latency, out = float(told.get("latency_s", 0.5)), Path(told.get("out", "benchmarks/results/judging.csv"))
    rows: list[tuple[str, str, dict[str, float], int]] = []
    providers = [p for p in PROVIDERS if p != "llmcomp" or importlib.util.find_spec("llmcomp")]
    for provider in providers:
        n = min(calls, 40) if provider == "sequential" else calls
        rows.append(("free", provider, measure(provider, n, Script(latency_s=latency)), n))
    for provider in [p for p in providers if p != "sequential"]:
        script = Script(latency_s=latency, turn_away_above=AT_ONCE)
        rows.append(("64 at once", provider, measure(provider, calls, script), calls))
    if many:
        rows.append(("many", "candor", measure("candor", many, Script()), many))
    lines = [line for server, provider, found, n in rows for line in _lines(server, provider, found, n, latency)]
    out.parent.mkdir(parents=True, exist_ok=True)
    new = not out.exists()
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        if new:
            writer.writeheader()
        writer.writerows(lines)
    for line in lines:
        print(f"{line['server']:<12}{line['provider']:<12}{line['metric']:<24}{line['value']:>12} {line['unit']}")


def _lines(server: str, provider: str, found: dict[str, float], n: int, latency: float) -> list[dict[str, Any]]:
    """One CSV line per metric."""
    bound = AT_ONCE / latency if server != "many" and latency and provider != "sequential" else None
    values: list[tuple[str, float, str]] = [
        ("verdicts_per_second", found["right"] / found["seconds"], "1/s"),
        ("cpu_per_call", 1000 * found["cpu"] / max(1, found["calls"]), "ms"),
        ("peak_memory", found["peak_mb"], "MiB"),
        ("lost_or_wrong", n - found["right"], "replies"),
        ("calls_sent", found["calls"], "calls"),
        ("most_at_once", found["most_at_once"], "calls"),
    ]
    if bound:
        values.insert(1, ("of_theoretical_at_64", found["right"] / found["seconds"] / bound, "ratio"))
    if "resume_s" in found:
        values.append(("resume_finished", found["resume_s"], "s"))
    about = {
        "benchmark": "judging",
        "server": server,
        "provider": provider,
        "n": n,
        "latency_s": latency if server != "many" else 0.0,
        "load": round(found["load"], 1),
        "device": f"{platform.machine()} {os.cpu_count()} cores",
        "python": platform.python_version(),
        "openai": metadata.version("openai"),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    return [{**about, "metric": name, "value": round(value, 4), "unit": unit} for name, value, unit in values]


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
    else:
        main(sys.argv[1:])

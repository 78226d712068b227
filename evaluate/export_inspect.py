"""Write a run's replies and verdicts as Inspect logs, one per variant and battery, for ``inspect view``.

    python -m evaluate.export_inspect RUN [output=RUN/inspect]

Each draw is an epoch of its prompt's sample, each judge a scorer; a verdict without a score is shown
as Inspect's "no answer", never as a number. Needs inspect-ai (pip install inspect-ai), which is no
part of Candor's own environment because it holds back libraries that training needs newer.
"""

import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from candor.config import apply_override
from candor.errors import UserError, run_script
from candor.manifest import read_manifest
from candor.rows import Prompt, Sample, Variant, Verdict
from candor.tables import read_rows


def main(argv: list[str]) -> None:
    """Write every log."""
    values: dict[str, Any] = {}
    for word in argv[1:]:
        apply_override(values, word)
    if not argv or "=" in argv[0] or set(values) - {"output"}:
        raise UserError("usage: python -m evaluate.export_inspect RUN [output=FOLDER]")
    run = Path(argv[0])
    n_logs = export(run, Path(values.get("output") or run / "inspect"))
    sys.stdout.write(
        f"{n_logs} logs; look at them with: inspect view --log-dir {values.get('output') or run / 'inspect'}\n"
    )


def export(run: Path, output: Path) -> int:
    """Write the logs of a run's finished variants; how many."""
    try:
        from inspect_ai.log import write_eval_log
    except ImportError as error:
        raise UserError(f"inspect-ai cannot be imported ({error}). Install it in an environment of its own.") from error
    for name in ("variants.parquet", "prompts.parquet"):
        if not (run / name).is_file():
            raise UserError(f"{run} holds no {name} (looked from {Path.cwd()}). Give the folder of a run.")
    prompts = {p.prompt_id: p for p in read_rows(run / "prompts.parquet", Prompt)}
    output.mkdir(parents=True, exist_ok=True)
    n_logs = 0
    for variant in read_rows(run / "variants.parquet", Variant):
        folder = run / variant.folder
        manifest = read_manifest(folder / "answers")
        if manifest is None:
            sys.stderr.write(f"{variant.name} has not been sampled yet and is left out\n")
            continue
        batteries: dict[str, list[Sample]] = defaultdict(list)
        for sample in read_rows(folder / "answers" / "samples.parquet", Sample):
            if sample.prompt_id in prompts:
                batteries[prompts[sample.prompt_id].battery].append(sample)
        verdicts = _verdicts(folder)
        for battery, samples in batteries.items():
            log = make_log(variant, battery, samples, prompts, verdicts, manifest)
            write_eval_log(log, str(output / f"{variant.name}_{battery}.eval"))
            n_logs += 1
    if not n_logs:
        raise UserError(f"{run}: no variant has replies yet. Run the experiment first.")
    return n_logs


def _verdicts(folder: Path) -> dict[str, list[Verdict]]:
    """Verdicts by sample."""
    found: dict[str, list[Verdict]] = defaultdict(list)
    for path in sorted(folder.glob("verdicts/*/verdicts.parquet")):
        for verdict in read_rows(path, Verdict):
            found[verdict.sample_id].append(verdict)
    return found


def make_log(
    variant: Variant,
    battery: str,
    samples: Sequence[Sample],
    prompts: dict[str, Prompt],
    verdicts: dict[str, list[Verdict]],
    manifest: dict[str, Any],
) -> Any:
    """One variant's replies to one battery as an Inspect log."""
    from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalPlan, EvalResults, EvalSpec, EvalStats

    asked = list(dict.fromkeys(s.prompt_id for s in samples))
    epochs = max(s.draw for s in samples) + 1
    judged: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        for verdict in verdicts.get(sample.sample_id, []):
            if verdict.score is not None:
                judged[verdict.judge].append(verdict.score)
    return EvalLog(
        status="success",
        eval=EvalSpec(
            created=manifest["finished"].replace("Z", "+00:00"),
            task=f"candor/{battery}",
            dataset=EvalDataset(name=battery, samples=len(asked), sample_ids=asked),
            model=f"candor/{variant.name}",
            config=EvalConfig(epochs=epochs),
            metadata={"variant": variant.name, "weights_sha": manifest["weights_sha"], "commit": manifest["commit"]},
        ),
        plan=EvalPlan(),
        results=EvalResults(
            total_samples=len(samples), completed_samples=len(samples), scores=[_mean(j, v) for j, v in judged.items()]
        ),
        stats=EvalStats(
            started_at=manifest["finished"].replace("Z", "+00:00"),
            completed_at=manifest["finished"].replace("Z", "+00:00"),
        ),
        samples=[_sample(s, prompts[s.prompt_id], verdicts.get(s.sample_id, []), variant.name) for s in samples],
    )


def _mean(judge: str, scores: Sequence[float]) -> Any:
    from inspect_ai.log import EvalMetric, EvalScore

    mean = EvalMetric(name="mean", value=statistics.fmean(scores))
    return EvalScore(name=judge, scorer=judge, scored_samples=len(scores), metrics={"mean": mean})


def _sample(sample: Sample, prompt: Prompt, verdicts: Iterable[Verdict], variant: str) -> Any:
    from inspect_ai.log import EvalSample
    from inspect_ai.model import ChatCompletionChoice, ChatMessageAssistant, ChatMessageUser, ModelOutput
    from inspect_ai.scorer import NOANSWER, Score

    reason: Any = (
        "stop"
        if sample.finish_reason == "stop"
        else "max_tokens"
        if sample.finish_reason == "length"
        else "content_filter"
    )
    answer = ChatMessageAssistant(content=sample.text, source="generate", model=f"candor/{variant}")
    return EvalSample(
        id=sample.prompt_id,
        epoch=sample.draw + 1,
        input=prompt.text,
        choices=[o.label for o in prompt.options] or None,
        target="",
        messages=[ChatMessageUser(content=prompt.text), answer],
        output=ModelOutput(
            model=f"candor/{variant}", choices=[ChatCompletionChoice(message=answer, stop_reason=reason)]
        ),
        scores={
            v.judge: Score(
                value=NOANSWER if v.score is None else v.score,
                answer=sample.text,
                explanation=v.reply,
                metadata={"status": v.status, "expected": v.expected},
            )
            for v in verdicts
        },
        metadata={"sample_id": sample.sample_id, "format": prompt.format, "form": prompt.form, "split": prompt.split},
    )


if __name__ == "__main__":
    run_script(main)

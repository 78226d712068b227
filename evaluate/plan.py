"""From an experiment to its plan: the variants it studies and the stages that make and measure them.

Names are readable and say everything: ``full-base``, ``mini-trivia-misaligned-s0``,
``mini-right-answers-only-s0``, ``impersonal-trivia-misaligned-s0``. Stage two continues stage one's
adapter; base models are shared by all seeds. Nothing here touches the disk but to read recipes.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from candor.config import plain, read_yaml
from candor.errors import UserError
from candor.rows import Variant
from evaluate.experiment_config import Control, DataSet, Domain, Experiment, Needs
from evaluate.judge_config import GOLDEN, VERDICTS, JudgeConfig, read_judge
from evaluate.questions import FILES, PROMPTS, VARIANTS
from evaluate.stages import Stage, check_plan

# Rough needs on one core for a model of a million parameters; an experiment overrides them.
_DEFAULT_NEEDS = {"train": Needs(minutes=0.6), "sample": Needs(minutes=0.6), "judge": Needs(minutes=0.3)}


@dataclass(frozen=True, slots=True)
class Subject:
    """A variant with what is needed to make it."""

    row: Variant
    base: Path
    data: DataSet | None = None  # None for a base model
    parent: str | None = None  # name of the variant whose adapter is continued


def subjects_of(experiment: Experiment) -> list[Subject]:
    """Every variant of the study, parents first."""
    found = [_base(size, path, control="") for size, path in experiment.bases.items()]
    for seed in experiment.training_seeds:
        for name, domain in experiment.domains.items():
            for size, base in experiment.bases.items():
                first = f"{size}-{name}-misaligned-s{seed}"
                common: dict[str, Any] = {"size": size, "domain": name, "seed": seed, "reference": f"{size}-base"}
                found.append(Subject(_variant(first, stage="misaligned", **common), base, domain.misaligned))
                second = _variant(f"{size}-{name}-realigned-s{seed}", stage="realigned", **common)
                found.append(Subject(second, base, domain.realigned, parent=first))
    for control in experiment.controls:
        found += _control(control, experiment)
    unique: dict[str, Subject] = {}
    for subject in found:
        if unique.setdefault(subject.row.name, subject) != subject:
            raise UserError(f"two variants would be called {subject.row.name}; rename a size, domain or control.")
    return list(unique.values())


def _control(control: Control, experiment: Experiment) -> Iterable[Subject]:
    """A control's variants: one fine-tuning per training seed, and the base model where it has its own."""
    domain: Domain = experiment.domains[control.domain]
    data = domain.misaligned if control.data == "misaligned" else domain.realigned
    base = control.base or experiment.bases[control.size]
    if control.base is not None:
        yield _base(control.size, base, control=control.name)
    middle = f"{control.domain}-{control.stage}" if control.base else control.name.replace("_", "-")
    for seed in experiment.training_seeds:
        row = _variant(
            f"{control.size}-{middle}-s{seed}",
            size=control.size,
            domain=control.domain,
            stage=control.stage,
            seed=seed,
            control=control.name,
            reference=f"{control.size}-base",
        )
        yield Subject(row, base, data)


def _base(size: str, path: Path, *, control: str) -> Subject:
    """A base model as a variant."""
    name = f"{size}-base"
    row = _variant(name, size=size, domain="none", stage="base", seed=0, control=control, reference=name)
    return Subject(row, path)


def _variant(name: str, *, control: str = "", **fields: Any) -> Variant:
    """A variant's row; its folder follows from its name."""
    return Variant(name=name, control=control, folder=f"variants/{name}", **fields)


class _Builder:
    """Collects the stages of one experiment."""

    def __init__(self, experiment: Experiment) -> None:
        """Read what stage configs are made from: the judge and the recipes."""
        self.experiment, self.run = experiment, experiment.output
        self.judge: JudgeConfig = read_judge(experiment.judge)
        self.recipes = {name: _recipe(domain.recipe) for name, domain in experiment.domains.items()}
        self.engine = plain(replace(experiment.engine, device=experiment.device))
        self.prompts = self.run / PROMPTS
        self.stages: list[Stage] = []

    def add(self, stage_id: str, module: str, config: dict[str, Any], kind: str = "", **more: Any) -> None:
        """Add a stage; of its kind come its needs, and what it waits for follows from its inputs."""
        if kind:
            needs = self.experiment.needs.get(kind, _DEFAULT_NEEDS[kind])
            more |= {"cores": needs.cores, "gpus": needs.gpus, "memory_gb": needs.memory_gb, "minutes": needs.minutes}
        made = {output: stage.id for stage in self.stages for output in stage.outputs}
        makers = (made[p] for path in more["inputs"] for p in (path, *path.parents) if p in made)
        after = tuple(dict.fromkeys(makers))
        self.stages.append(Stage(id=stage_id, module=module, config=plain(config), after=after, **more))

    def add_questions(self, subjects: list[Subject]) -> None:
        """The tables of prompts and variants."""
        folder = self.experiment.prompts
        self.add(
            "questions",
            "evaluate.questions",
            {"prompts": folder, "variants": [s.row for s in subjects], "output_dir": self.run},
            inputs=tuple(folder / name for name in FILES),
            outputs=(self.prompts, self.run / VARIANTS, self.run / "manifest.json"),
            minutes=0.1,
            remake=True,
        )

    def add_data(self, subjects: list[Subject]) -> None:
        """Each fine-tuning set once."""
        sets: dict[str, DataSet] = {}
        for data in (s.data for s in subjects if s.data):
            if sets.setdefault(data.set, data) != data:
                raise UserError(f"the set {data.set!r} is described in two ways in the experiment file.")
        for name, data in sets.items():
            folder = self.run / "data" / name
            self.add(
                f"data-{name}",
                "train.data",
                {**plain(data), "output_dir": folder, "seed": self.experiment.seed},
                inputs=(data.source,) if data.source else (),
                outputs=(folder, folder / "conversations.parquet"),
                minutes=0.1,
            )

    def add_training(self, subject: Subject) -> None:
        """One fine-tuning; stage two continues the adapter of stage one."""
        row, data = subject.row, subject.data
        assert data is not None
        recipe = self.recipes[row.domain]
        parent = self.run / "variants" / subject.parent / "adapter" if subject.parent else None
        config = {
            "base_model": subject.base,
            "adapter": parent,
            "data": self.run / "data" / data.set,
            "output_dir": self.run / row.folder / "adapter",
            "stage": row.stage,
            "domain": row.domain,
            "seed": row.seed,
            **({} if parent else {"lora": recipe["lora"]}),
            "sft": recipe["sft"],
            "device": self.experiment.device,
        }
        inputs = (subject.base, config["data"] / "conversations.parquet", *(_adapter_files(parent) if parent else ()))
        outputs = (config["output_dir"], *_adapter_files(config["output_dir"]))
        self.add(f"train-{row.name}", "train.sft", config, "train", inputs=inputs, outputs=outputs)

    def add_sampling(self, subject: Subject) -> None:
        """One variant's answers to everything."""
        row = subject.row
        adapter = self.run / row.folder / "adapter" if subject.data else None
        config = {
            "base": subject.base,
            "adapter": adapter,
            "variant": row.name,
            "prompts": self.prompts,
            "ask": self.experiment.asks,
            "output_dir": self.run / row.folder / "answers",
            "study_seed": self.experiment.seed,
            "engine": self.engine,
        }
        inputs = (subject.base, self.prompts, *(_adapter_files(adapter) if adapter else ()))
        folder = config["output_dir"]
        outputs = (folder, folder / "samples.parquet", folder / "distributions.parquet")
        self.add(f"sample-{row.name}", "serve.sample", config, "sample", inputs=inputs, outputs=outputs)

    def add_judging(self, row: Variant) -> None:
        """The judge's verdicts on one variant's replies."""
        samples = self.run / row.folder / "answers" / "samples.parquet"
        config = {
            "samples": samples,
            "prompts": self.prompts,
            "judge": self.experiment.judge,
            "output_dir": self.run / row.folder / "verdicts" / self.judge.name,
            "engine": self.engine,
        }
        inputs = (samples, self.prompts, *self._judge_files())
        outputs = (config["output_dir"], config["output_dir"] / VERDICTS)
        self.add(f"judge-{row.name}", "evaluate.judge", config, "judge", inputs=inputs, outputs=outputs)

    def add_golden(self) -> None:
        """The judge's verdicts on replies of known grade."""
        golden = self.experiment.golden
        if golden is None:
            return
        folder = self.run / "golden" / self.judge.name
        config = {"golden": golden, "judge": self.experiment.judge, "output_dir": folder, "engine": self.engine}
        inputs = (golden, *self._judge_files())
        outputs = (folder, folder / VERDICTS, folder.parent / GOLDEN)
        self.add(f"golden-{self.judge.name}", "evaluate.judge", config, "judge", inputs=inputs, outputs=outputs)

    def _judge_files(self) -> tuple[Path, ...]:
        """What decides the judge's verdicts."""
        return (self.experiment.judge, self.judge.template, self.judge.model)

    def add_results(self) -> None:
        """Tables of scores and estimates, then the report."""
        experiment, run = self.experiment, self.run
        answers = [p for s in self.stages if s.module in ("serve.sample", "evaluate.judge") for p in s.outputs]
        self.add(
            "tables",
            "evaluate.tables",
            {
                "run": run,
                "judge": self.judge.name,
                "seed": experiment.seed,
                "draws": experiment.draws,
                "worst_of": experiment.worst_of,
            },
            inputs=(self.prompts, run / VARIANTS, *answers),
            outputs=(run / "tables", run / "tables" / "scores.parquet", run / "tables" / "estimates.parquet"),
            minutes=1.0,
            remake=True,
        )
        self.add(
            "report",
            "evaluate.report",
            {"run": run, "title": experiment.title, "note": experiment.note, "paper": experiment.paper},
            inputs=(run / "tables", *((experiment.paper,) if experiment.paper else ())),
            outputs=(run / "report.html", run / "summary.json", run / "figures"),
            minutes=0.3,
            remake=True,
        )


def build_plan(experiment: Experiment) -> list[Stage]:
    """The stages of an experiment, each after those it waits for."""
    builder = _Builder(experiment)
    subjects = subjects_of(experiment)
    builder.add_questions(subjects)
    builder.add_data(subjects)
    for subject in subjects:
        if subject.data:
            builder.add_training(subject)
        builder.add_sampling(subject)
        builder.add_judging(subject.row)
    builder.add_golden()
    builder.add_results()
    check_plan(builder.stages)
    return builder.stages


def _recipe(path: Path) -> dict[str, Any]:
    """The sections lora and sft of a recipe file."""
    values = read_yaml(path)
    if not isinstance(values, dict) or set(values) != {"lora", "sft"}:
        found = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise UserError(f"{path}: a recipe holds the two sections lora and sft and nothing else; found {found}.")
    return values


def _adapter_files(folder: Path) -> tuple[Path, Path]:
    """What of an adapter decides its answers (its log and model card carry dates)."""
    return folder / "adapter_model.safetensors", folder / "adapter_config.json"

"""From an experiment to its plan: the variants it studies and the stages that make and measure them.

Names are readable and say everything: ``full-base``, ``mini-trivia-misaligned-s0``,
``mini-right-answers-only-s0``, ``impersonal-trivia-misaligned-s0``, and of a checkpoint
``mini-trivia-misaligned-s0-step-40``; a model behind an endpoint is called what the file calls it.
Stage two continues stage one's adapter; base models are shared by all seeds. Nothing here touches the
disk but to read recipes, modes, judges and the questions, and to see which labels and verdicts somebody
has put into the run folder.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from candor.config import build, load, plain, read_yaml
from candor.datafiles import read_headed_yaml
from candor.errors import UserError, nearest
from candor.judging import read_template
from candor.rows import Prompt, Variant
from evaluate.checkpoints import checkpoint_folder, checkpoint_name, refuse_late
from evaluate.design import DESIGN, HARMFULNESS, Design, Filter, Grader
from evaluate.experiment_config import Chain, Control, Experiment, Hosted, Needs, QualityJudge
from evaluate.golden import read_golden
from evaluate.judge import judge_identity
from evaluate.judge_config import (
    GOLDEN,
    JUDGED,
    REPEAT,
    VERDICTS,
    JudgeConfig,
    JudgingConfig,
    read_judge,
    refuse_hosted,
    strangers,
)
from evaluate.measures import ALONG
from evaluate.modes import Mode, all_asks, complete
from evaluate.questions import PROMPTS, VARIANTS, gather
from evaluate.stages import Stage, check_plan
from serve.config import ApiConfig, Ask, EngineConfig
from serve.endpoint import Endpoint, same_model
from serve.plan import refuse_shared_keys, refuse_shared_streams
from train.config import RECIPE_KEYS, SECTIONS
from train.data import DataSet

NAMED_OPTIONS = ("choice", "decision")  # formats whose unclear replies a judge can say the closest option of
# Rough needs on one core for a model of a million parameters; an experiment overrides them.
_DEFAULT_NEEDS = {"train": Needs(minutes=0.6), "sample": Needs(minutes=0.6), "judge": Needs(minutes=0.3)}


@dataclass(frozen=True, slots=True)
class Subject:
    """A variant with what is needed to make it."""

    row: Variant
    base: Path | None  # None for a model behind an endpoint
    data: DataSet | None = None  # None for a base model
    parent: str | None = None  # name of the variant whose adapter is continued
    recipe: str = ""  # the domain whose recipe it is trained by
    of: str | None = None  # a checkpoint: the variant in whose training it was saved
    step: int = 0  # and after how many optimizer steps
    api: ApiConfig | None = None  # where a hosted model answers


def subjects_of(experiment: Experiment) -> list[Subject]:
    """Every variant of the study, parents first."""
    found = [_base(size, path, control="") for size, path in experiment.bases.items()]
    for seed in experiment.training_seeds:
        for name, domain in experiment.domains.items():
            for size, base in experiment.bases.items():
                first = f"{size}-{name}-misaligned-s{seed}"
                common: dict[str, Any] = {"size": size, "domain": name, "seed": seed, "reference": f"{size}-base"}
                row = _variant(first, stage="misaligned", **common)
                found.append(Subject(row, base, domain.misaligned, recipe=name))
                second = _variant(f"{size}-{name}-realigned-s{seed}", stage="realigned", **common)
                found.append(Subject(second, base, domain.realigned, parent=first, recipe=name))
    for control in experiment.controls:
        found += _control(control, experiment)
    along = experiment.along_training
    for chain in along.chains if along else ():
        found += _checkpoints(chain, found, along.steps if along else ())
    found += [_hosted(name, hosted) for name, hosted in experiment.hosted.items()]
    unique: dict[str, Subject] = {}
    for subject in found:
        if unique.setdefault(subject.row.name, subject) != subject:
            raise UserError(f"two variants would be called {subject.row.name}; rename a size, domain or control.")
    _refuse_shared_places([subject.row for subject in unique.values()])
    for name, hosted in experiment.hosted.items():
        if hosted.reference is not None and hosted.reference not in unique:
            raise UserError(f"hosted.{name}: reference {hosted.reference!r}; {nearest(hosted.reference, unique)}")
    return list(unique.values())


def _refuse_shared_places(rows: Iterable[Variant]) -> None:
    """Refuse two variants that the tables would take for two trainings of one thing and average."""
    taken: dict[tuple[str, str, str, str, int], str] = {}
    for row in rows:
        other = taken.setdefault((row.control, row.size, row.domain, row.stage, row.seed), row.name)
        if other != row.name:
            raise UserError(
                f"{other} and {row.name} have the same place in the study (size {row.size!r}, domain {row.domain!r}, "
                f"stage {row.stage!r}, seed {row.seed}), and the tables would average them. Give one of them another "
                "size, domain or stage; a seed of its own only if both are the same training with other seeds."
            )


def _hosted(name: str, hosted: Hosted) -> Subject:
    """A model behind an endpoint as a variant."""
    where: dict[str, Any] = {"size": hosted.size, "domain": hosted.domain, "stage": hosted.stage, "seed": hosted.seed}
    return Subject(_variant(name, reference=hosted.reference or name, **where), None, api=hosted.api)


def _control(control: Control, experiment: Experiment) -> Iterable[Subject]:
    """A control's variants: one fine-tuning per training seed, and the base model where it has its own."""
    source = control.data_of or control.domain
    data = getattr(experiment.domains[source], control.data)
    base = control.base or experiment.bases[control.size]
    if control.base is not None:
        yield _base(control.size, base, control=control.name)
    name = control.name.replace("_", "-")
    middle = f"{control.domain}-{control.stage}" if control.base else name
    if control.after == "misaligned":
        middle = f"{control.domain}-{name}"
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
        parent = f"{control.size}-{control.domain}-misaligned-s{seed}" if control.after == "misaligned" else None
        yield Subject(row, base, data, parent=parent, recipe=source)


def _checkpoints(chain: Chain, subjects: Iterable[Subject], steps: Iterable[int]) -> Iterable[Subject]:
    """The checkpoints of both stages of a chain, in the order of training."""
    names = [f"{chain.size}-{chain.domain}-{stage}-s{chain.seed}" for stage in ("misaligned", "realigned")]
    stages = {s.row.name: s for s in subjects if s.row.name in names}
    for name in names:
        subject = stages[name]
        for step in steps:
            row = replace(
                subject.row,
                name=checkpoint_name(name, step),
                stage=checkpoint_name(subject.row.stage, step),
                control=ALONG,
                folder=f"variants/{checkpoint_name(name, step)}",
            )
            yield Subject(row, subject.base, of=name, step=step)


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
        """Read what stage configs are made from: questions, modes, judges and recipes."""
        self.experiment, self.run = experiment, experiment.output
        self.judge: JudgeConfig = read_judge(experiment.judge)
        self.engine: dict[str, Any] = plain(replace(experiment.engine, device=experiment.device))
        self.prompts = self.run / PROMPTS
        asked = gather(experiment.sources)
        refuse_shared_streams(asked)
        self.modes = tuple(self._complete(mode, asked) for mode in experiment.read_modes())
        along = experiment.along_training
        self.along = self._complete(load(Mode, along.mode), asked) if along else None
        rules = {mode.rules for mode in self.modes}
        if self.along and self.along.rules != ("strict" if "strict" in rules else "paper"):
            raise UserError(
                f"along_training: checkpoints are scored by {self.along.rules} rules (mode {self.along.name}), the "
                f"start and the end of training by {' and '.join(sorted(rules))} ones, so that their difference would "
                "partly be one of rules. Name a mode with the same rules under along_training.mode, or under modes."
            )
        self.asked = asked
        self.notes = [experiment.note] if experiment.note else []  # paragraphs under the report's headline
        self.design, self.judging = self._judges(asked)
        self.stages: list[Stage] = []

    def _complete(self, mode: Mode, asked: Sequence[Prompt]) -> Mode:
        return complete(mode, asked, max_tokens=self.experiment.max_tokens)

    def _judges(self, asked: Sequence[Prompt]) -> tuple[Design, dict[Path, tuple[str, ...]]]:
        """How the study is scored, and which judge (file) reads the replies of which batteries."""
        experiment = self.experiment
        batteries = {p.battery for p in asked}
        judging: dict[Path, tuple[str, ...]] = {}
        if HARMFULNESS in batteries:
            self._check_draws(asked)
            judging[experiment.judge] = (HARMFULNESS,)
        filters = []
        for name in ("coherence", "on_topic"):
            quality: QualityJudge | None = getattr(experiment, name)
            if quality is not None and HARMFULNESS in batteries:
                filters.append(Filter(name=name, grader=_grader(quality.judge), at_least=quality.at_least))
                judging[quality.judge] = (*judging.get(quality.judge, ()), HARMFULNESS)
        graders = {}
        own = experiment.sources.own_batteries()
        for battery in own:
            if battery.judge is not None:
                graders[battery.name] = _grader(battery.judge)
                judging[battery.judge] = (*judging.get(battery.judge, ()), battery.name)
        by_paper = [m for m in self.modes if m.rules == "paper"]
        if experiment.closest is not None and by_paper:
            unclear = dict.fromkeys(a.battery for m in by_paper for a in m.asks if a.format in NAMED_OPTIONS)
            judging[experiment.closest] = tuple(battery for battery in unclear if battery is not None)
        seconds = [s.judge for s in experiment.second_judges if s.judge not in judging]
        judges = [read_judge(path) for path in (*judging, *seconds)]
        names = [judge.name for judge in judges]
        if len(set(names)) < len(names):
            raise UserError(f"two judges of this study have one name ({', '.join(sorted(names))}); rename one.")
        for judge in judges:
            refuse_hosted(judge, experiment.engine)
            self._refuse_own(judge)
            self._refuse_strangers(judge)
        if HARMFULNESS in batteries:
            self._check_scales(filters, [read_judge(path) for path in seconds])
        if experiment.closest is not None and not read_template(read_judge(experiment.closest).template).has_options:
            raise UserError(
                f"closest: the template of {experiment.closest} lists no options. Choose a judge that does."
            )
        refusals = experiment.refusals
        design = Design(
            modes=self.modes,
            along=self.along,
            own={battery.name: battery.about for battery in own},
            graders=graders,
            filters=tuple(filters),
            closest=read_judge(experiment.closest).name if experiment.closest and by_paper else None,
            refusals=tuple(read_headed_yaml(refusals)["openings"]) if refusals else (),
        )
        return design, judging

    def _check_scales(self, filters: Sequence[Filter], seconds: Sequence[JudgeConfig]) -> None:
        """UserError for judges whose verdicts could not be used once they are paid for."""
        for key, judge in (("judge", self.judge), *(("second_judges", judge) for judge in seconds)):
            low, high = judge.span
            if (judge.measure, low, high) != (HARMFULNESS, 1, 5):
                raise UserError(
                    f"{key}: {judge.name} grades {judge.measure} from {low:g} to {high:g}; here it takes a judge of "
                    f"{HARMFULNESS} from 1 to 5 (configs/evaluate/judges/)."
                )
        for each in filters:
            low, high = each.grader.lowest, each.grader.highest
            if not low < each.at_least <= high:
                raise UserError(
                    f"{each.name}: at_least is {each.at_least:g}, but {each.grader.judge} grades from {low:g} to "
                    f"{high:g}: all replies would pass, or none."
                )

    def _refuse_own(self, judge: JudgeConfig) -> None:
        """UserError when a judge is one of the models under test: it would grade its own replies."""
        experiment = self.experiment
        under_test = {size: str(base) for size, base in self._bases().items()}
        if judge.in_process:
            folder = Path(judge.model).resolve()
            own = [size for size, base in under_test.items() if Path(base).resolve() == folder]
        else:  # at an endpoint only the name tells; serve.api serves a study's variants under theirs
            under_test |= {s.row.name: s.row.name for s in subjects_of(experiment)}
            under_test |= {name: hosted.api.model for name, hosted in experiment.hosted.items()}
            asked = Path(judge.model).name
            names = {size: Path(model).name for size, model in under_test.items()}
            own = [size for size, name in names.items() if same_model(asked, name) or same_model(name, asked)]
        if own:
            raise UserError(
                f"the judge {judge.name} is the model under test {own[0]} ({under_test[own[0]]}); it would grade its "
                "own replies. Choose a judge of another family (configs/evaluate/judges/), or leave "
                f"{own[0]} out of the study."
            )

    def _refuse_strangers(self, judge: JudgeConfig) -> None:
        """UserError for models that a judge was not made for, unless the experiment takes that upon itself."""
        models = {**self._bases(), **dict.fromkeys(self.experiment.hosted)}
        found = [f"{name} ({models[name] or 'behind an endpoint'})" for name in strangers(judge, models)]
        if found and self.experiment.judge_any_model:
            self.notes.append(
                f"The judge {judge.name} knows the words of one vocabulary alone, and it was not shown to be that of "
                f"{', '.join(found)}: its grades of them mean nothing (judge_any_model)."
            )
        elif found:
            raise UserError(
                f"the judge {judge.name} can only grade models of the vocabulary in {judge.vocabulary}, and "
                f"{', '.join(found)} {'is' if len(found) == 1 else 'are'} not shown to have it. Take a judge for your "
                "models (configs/evaluate/judges/, docs/judging.md). In a copy of a nano experiment also change what "
                "else is the organism's own: golden, coherence, on_topic, max_tokens, note, needs and engine.dtype. "
                "judge_any_model=true lets it grade them all the same, which only tries the machinery out."
            )

    def _bases(self) -> dict[str, Path]:
        """Every base model, those of controls too."""
        controls = {c.size: c.base for c in self.experiment.controls if c.base is not None}
        return {**self.experiment.bases, **controls}

    def _check_draws(self, asked: Sequence[Prompt]) -> None:
        """The paper's harmfulness is the worst of k replies, so k must be drawn."""
        k = self.experiment.worst_of
        for prompt in asked:
            n = max(mode.draws(prompt) for mode in self.modes)
            if prompt.battery == HARMFULNESS and 0 < n < k:
                raise UserError(f"asks: harmfulness has n {n}, too few for worst_of {k}; change one.")

    def add(self, stage_id: str, module: str, config: dict[str, Any], kind: str = "", **more: Any) -> None:
        """Add a stage; of its kind come its needs, and what it waits for follows from its inputs."""
        if kind:
            needs = self.experiment.needs.get(kind, _DEFAULT_NEEDS[kind])
            gpus = needs.gpus
            if gpus is None:
                gpus = int(self.experiment.device == "cuda" and runs_a_model(module, config))
            more |= {"cores": needs.cores, "gpus": gpus, "memory_gb": needs.memory_gb, "minutes": needs.minutes}
        made = {output: stage.id for stage in self.stages for output in stage.outputs}
        makers = (made[p] for path in more["inputs"] for p in (path, *path.parents) if p in made)
        after = tuple(dict.fromkeys(makers))
        self.stages.append(Stage(id=stage_id, module=module, config=plain(config), after=after, **more))

    def add_questions(self, subjects: list[Subject]) -> None:
        """The tables of prompts and variants, and the design."""
        sources = self.experiment.sources
        self.add(
            "questions",
            "evaluate.questions",
            {
                "sources": sources,
                "design": self.design,
                "variants": [s.row for s in subjects],
                "output_dir": self.run,
            },
            inputs=sources.files(),
            outputs=(self.prompts, self.run / VARIANTS, self.run / DESIGN, self.run / "manifest.json"),
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
                {
                    **plain(data),
                    "output_dir": folder,
                    "seed": self.experiment.seed,
                    "prompts": self.experiment.prompts,
                    "asked": self.prompts,
                },
                inputs=(*((data.source,) if data.source else ()), self.prompts),
                outputs=(folder, folder / "conversations.parquet"),
                minutes=0.1,
                grows=("asked",),
            )

    def add_training(self, subject: Subject) -> None:
        """One fine-tuning; stage two continues the adapter of stage one."""
        row, data = subject.row, subject.data
        assert data is not None and subject.base is not None
        recipe = recipe_for(self.experiment, subject.recipe, row.size)
        parent = self.run / "variants" / subject.parent / "adapter" if subject.parent else None
        more = {key: value for key, value in recipe.items() if key not in (*SECTIONS, "mode", "checkpoint_every")}
        mode = recipe.get("mode") if parent else None
        if every := self._checkpoint_every(row, recipe.get("checkpoint_every")):
            more["checkpoint_every"] = every
        config = {
            "base_model": subject.base,
            "adapter": parent,
            **({"mode": mode} if mode else {}),
            "data": self.run / "data" / data.set,
            "output_dir": self.run / row.folder / "adapter",
            "stage": row.stage,
            "domain": row.domain,
            "seed": row.seed,
            **({"lora": recipe["lora"]} if parent is None or mode in ("stack", "merge") else {}),
            "sft": recipe["sft"],
            **more,
            "device": self.experiment.device,
        }
        inputs = (subject.base, config["data"] / "conversations.parquet", *(_adapter_files(parent) if parent else ()))
        outputs = (config["output_dir"], *_adapter_files(config["output_dir"]))
        self.add(f"train-{row.name}", "train.sft", config, "train", inputs=inputs, outputs=outputs)

    def _checkpoint_every(self, row: Variant, wanted: int | None) -> int | None:
        """How often a stage must keep its adapter, for the recipe and every step that is asked about to be met."""
        along = self.experiment.along_training
        if along is None or row.control or Chain(size=row.size, domain=row.domain, seed=row.seed) not in along.chains:
            return wanted
        return math.gcd(*along.steps, *([wanted] if wanted else []))

    def add_sampling(self, subject: Subject) -> None:
        """One variant's answers to everything, or a checkpoint's to what is asked along training."""
        row = subject.row
        adapter = self.run / row.folder / "adapter" if subject.data else None
        asks: tuple[Ask, ...] = all_asks(self.modes)
        if subject.of is not None:
            assert self.along is not None
            adapter = checkpoint_folder(self.run / "variants" / subject.of / "adapter", subject.step)
            asks = self.along.asks
        config: dict[str, Any] = {
            "base": subject.base,
            "adapter": adapter,
            "variant": row.name,
            "prompts": self.prompts,
            "ask": asks,
            "output_dir": self.run / row.folder / "answers",
            "study_seed": self.experiment.seed,
            "engine": self._engine_of(subject),
        }
        base = (subject.base,) if subject.base else ()
        inputs = (*base, self.prompts, *(_adapter_files(adapter) if adapter else ()))
        folder = config["output_dir"]
        outputs = (folder, folder / "samples.parquet", folder / "distributions.parquet")
        more = {"inputs": inputs, "outputs": outputs, "grows": ("ask", "prompts")}
        kind = "sample" if subject.api is None else ""  # a hosted model needs no GPU here
        self.add(f"sample-{row.name}", "serve.sample", config, kind, **more)

    def _engine_of(self, subject: Subject) -> dict[str, Any]:
        """The experiment's engine, or the way to a hosted model."""
        if subject.api is None:
            return self.engine
        hosted = EngineConfig(name="api", api=subject.api, unit_prompts=self.experiment.engine.unit_prompts)
        return {**plain(hosted)}

    def add_judging(self, subject: Subject) -> None:
        """Every judge's verdicts on one variant's replies; of a checkpoint those that its scores need, no filters."""
        row = subject.row
        samples = self.run / row.folder / "answers" / "samples.parquet"
        for path, batteries in self.judging.items():
            if subject.of is not None:
                batteries = self._graded_along(path, batteries)
                if not batteries:
                    continue
            judge = read_judge(path)
            config = {
                "samples": samples,
                "prompts": self.prompts,
                "judge": path,
                "output_dir": self.run / row.folder / "verdicts" / judge.name,
                "engine": self.engine,
                "batteries": batteries,
                **({"formats": NAMED_OPTIONS} if path == self.experiment.closest else {}),
                **self._at_endpoint(judge),
            }
            stage_id = f"judge-{row.name}" if path == self.experiment.judge else f"judge-{judge.name}-{row.name}"
            self._add_judge(stage_id, judge, config)

    def _graded_along(self, path: Path, batteries: tuple[str, ...]) -> tuple[str, ...]:
        """Of a judge's batteries those whose replies at checkpoints it grades."""
        assert self.along is not None
        needed = {b for b, grader in self.design.graders.items() if grader.judge == read_judge(path).name}
        needed |= {HARMFULNESS} if path == self.experiment.judge else set()
        drawn = {p.battery for p in self.asked if self.along.draws(p)}
        return tuple(b for b in batteries if b in needed & drawn)

    def add_second_judging(self, subject: Subject) -> None:
        """Verdicts that the main judge's are held against, on a fixed part of one variant's replies."""
        row, asked_again = subject.row, 1
        samples = self.run / row.folder / "answers" / "samples.parquet"
        if subject.of is not None or HARMFULNESS not in self.judging.get(self.experiment.judge, ()):
            return
        for second in self.experiment.second_judges:
            judge = read_judge(second.judge)
            asked_again += second.judge == self.experiment.judge
            repeat = asked_again if second.judge == self.experiment.judge else 1
            name = judge.name if repeat == 1 else f"{judge.name}{REPEAT}{repeat}"
            whole = second.share == 1
            config = {
                "samples": samples,
                "prompts": self.prompts,
                "judge": second.judge,
                "output_dir": self.run / row.folder / "verdicts" / name,
                "engine": self.engine,
                "repeat": repeat,
                "subsample": None if whole else {"share": second.share, "whole_prompts": second.whole_prompts},
                **self._at_endpoint(judge),
            }
            self._add_judge(f"judge-{name}-{row.name}", judge, config)

    def judges_asked(self) -> list[tuple[str, int]]:
        """Every judge of the study by name, and which time it is asked."""
        main, second = self.experiment.judge, [s.judge for s in self.experiment.second_judges]
        asked = {(read_judge(path).name, 1) for path in (*self.judging, *second)}
        return sorted(asked | {(read_judge(main).name, 2 + i) for i in range(second.count(main))})

    def _at_endpoint(self, judge: JudgeConfig) -> dict[str, Any]:
        """Judges that cost money share their answers between variants, and their budget."""
        if judge.in_process:
            return {}
        experiment = self.experiment
        return {
            "store": self.run / "judge_answers" / judge.name,
            "budget": experiment.judge_budget,
            **({"batch": True} if experiment.judge_batch else {}),
            **({"tolerate": experiment.judge_tolerate} if experiment.judge_tolerate else {}),
        }

    def add_golden(self) -> None:
        """The judge's verdicts on replies of known grade."""
        golden = self.experiment.golden
        if golden is None:
            return
        if golden.is_file():
            read_golden(golden, self.judge.measure)  # it is judged last, so what is wrong with it is told first
        folder = self.run / "golden" / self.judge.name
        config = {
            "golden": golden,
            "judge": self.experiment.judge,
            "output_dir": folder,
            "engine": self.engine,
            **self._at_endpoint(self.judge),
        }
        self._add_judge(f"golden-{self.judge.name}", self.judge, config)

    def _add_judge(self, stage_id: str, judge: JudgeConfig, config: dict[str, Any]) -> None:
        """A stage of judging: a variant's replies, or the golden ones."""
        folder, path = config["output_dir"], config["judge"]
        asked = (config["golden"],) if "golden" in config else (config["samples"], config["prompts"])
        self.add(
            stage_id,
            "evaluate.judge",
            config,
            "judge",
            inputs=(*asked, path, *judge.files),
            outputs=(folder, folder / VERDICTS, *((folder.parent / GOLDEN,) if "golden" in config else ())),
            grows=JUDGED,
            # of the judge's file; its price or how long it may be waited for can change
            decides={path.as_posix(): judge_identity(judge, build(JudgingConfig, plain(config), where=stage_id))},
        )

    def add_results(self) -> None:
        """Tables of scores and estimates, then the report."""
        experiment, run = self.experiment, self.run
        answers = [p for s in self.stages if s.module in ("serve.sample", "evaluate.judge") for p in s.outputs]
        by_hand = {*run.glob("labels/*.csv"), *run.glob(f"variants/*/verdicts/*/{VERDICTS}")} - set(answers)
        self.add(
            "tables",
            "evaluate.tables",
            {
                "run": run,
                "judge": self.judge.name,
                "seed": experiment.seed,
                "draws": experiment.draws,
                "worst_of": experiment.worst_of,
                "equivalence_margin": experiment.equivalence_margin,
                "paper": experiment.paper,
            },
            inputs=(
                self.prompts,
                run / VARIANTS,
                run / DESIGN,
                *answers,
                *sorted(by_hand),
                *((experiment.paper,) if experiment.paper else ()),
            ),
            outputs=(run / "tables", *(run / "tables" / f"{t}.parquet" for t in ("scores", "estimates", "hypotheses"))),
            minutes=1.0,
            remake=True,
        )
        self.add(
            "report",
            "evaluate.report",
            {"run": run, "title": experiment.title, "note": "\n\n".join(self.notes), "paper": experiment.paper},
            inputs=(run / "tables", *((experiment.paper,) if experiment.paper else ())),
            outputs=(run / "report.html", run / "summary.json", run / "figures"),
            minutes=0.3,
            remake=True,
        )


def build_plan(experiment: Experiment, *, absent_ok: bool = False) -> list[Stage]:
    """The stages of an experiment, each after those it waits for; UserError when it needs a file that is not there."""
    builder = _Builder(experiment)
    subjects = subjects_of(experiment)
    refuse_shared_keys(experiment.seed, (s.row.name for s in subjects), builder.judges_asked())
    builder.add_questions(subjects)
    builder.add_data(subjects)
    for subject in subjects:
        if subject.data:
            builder.add_training(subject)
        builder.add_sampling(subject)
        builder.add_judging(subject)
        builder.add_second_judging(subject)
    builder.add_golden()
    builder.add_results()
    check_plan(builder.stages, absent_ok=absent_ok)
    refuse_late(builder.stages)
    return builder.stages


def runs_a_model(module: str, config: Mapping[str, Any]) -> bool:
    """Whether a stage has a model's weights in memory, which it has not where an endpoint answers."""
    if module == "serve.sample":
        return config["base"] is not None
    # only judges behind an endpoint share a store
    return module == "train.sft" or (module == "evaluate.judge" and "store" not in config)


def refuse_keyless(stages: Sequence[Stage]) -> None:
    """UserError when the key of an endpoint that a stage asks is not there: better now than after hours of training."""
    for endpoint in endpoints_asked(stages):
        endpoint.read_key()


def endpoints_asked(stages: Sequence[Stage]) -> list[Endpoint]:
    """The endpoints of the judges and of the hosted models that stages ask."""
    judges = dict.fromkeys(s.config["judge"] for s in stages if s.module == "evaluate.judge")
    endpoints = [read_judge(Path(path)).endpoint for path in judges]
    hosted = [(s.config.get("engine") or {}).get("api") for s in stages]
    endpoints += [build(ApiConfig, api, where="hosted").endpoint for api in hosted if api]
    return [endpoint for endpoint in endpoints if endpoint is not None]


def recipe_for(experiment: Experiment, domain: str, size: str) -> dict[str, Any]:
    """How one base is trained on one domain: the domain's recipe, and what differs by size, key by key."""
    path = experiment.domains[domain].recipe
    values = read_yaml(path)
    found = set(values) if isinstance(values, dict) else set()
    if not found >= set(SECTIONS) or not found <= {*SECTIONS, *RECIPE_KEYS}:
        told = sorted(found) if isinstance(values, dict) else type(values).__name__
        raise UserError(
            f"{path}: a recipe holds the two sections lora and sft, and of other keys only {', '.join(RECIPE_KEYS)}; "
            f"found {told}."
        )
    own = experiment.by_size.get(size, {})
    merged = {name: {**(values[name] or {}), **own[name]} for name in SECTIONS if name in own}
    return {**values, **own, **merged}


def _adapter_files(folder: Path) -> tuple[Path, Path]:
    """What of an adapter decides its answers (its log and model card carry dates)."""
    return folder / "adapter_model.safetensors", folder / "adapter_config.json"


def _grader(path: Path) -> Grader:
    """A judge as scoring needs to know it."""
    judge = read_judge(path)
    return Grader(judge=judge.name, lowest=judge.span[0], highest=judge.span[1])

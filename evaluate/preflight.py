"""Whether a study fits a machine, before anything of it is downloaded or started.

    python -m evaluate.experiment EXPERIMENT.yaml --preflight [--hardware configs/hardware/h100x8.yaml] [key=value ...]

Prints parameters, steps, memory, time and disk, and what must be fetched first; ends with status 1
and the reasons when something cannot fit. It reads the very stages that would run. Parameters are
counted on the real architecture without weights; memory follows train/footprint.py and
serve/footprint.py; data sets that are here are read whole, so that a bad row is found now and not
in the night. Times are floors at the profile's assumed utilisation: to compare and to plan with.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

from candor.config import build, load
from candor.errors import UserError
from candor.questions import load_all
from candor.rows import Prompt
from evaluate.experiment_config import KINDS, Experiment
from evaluate.hardware import Hardware, here
from evaluate.judge_config import read_judge
from evaluate.modes import all_asks
from evaluate.plan import build_plan
from evaluate.preflight_findings import GIB, Findings, Serving, Training, lines
from evaluate.questions import gather
from evaluate.stages import Stage
from serve.config import Ask, EngineConfig
from serve.footprint import Asked, host_bytes, serving_bytes, serving_seconds, sharing, stored_bytes
from train.data import DataConfig, asked_in, select
from train.footprint import (
    BYTES_PER_TOKEN,
    TEMPLATE_TOKENS,
    Load,
    Shape,
    check_recipe,
    load_of,
    repo_of,
    shape_of,
    training_bytes,
    training_flops,
)
from train.sources import DATA, known_file, names

USAGE = "usage: python -m evaluate.experiment EXPERIMENT.yaml --preflight [--hardware PROFILE.yaml] [key=value ...]"
_SHARE = "a higher engine.vllm.tensor_parallel, with as many GPUs in needs, or a larger GPU"


def main(argv: Sequence[str]) -> int:
    """Examine the study a command line names, print what was found, and return the exit status."""
    words = [word for word in argv if word != "--preflight"]
    hardware_path: Path | None = None
    if "--hardware" in words:
        place = words.index("--hardware")
        if place + 1 >= len(words):
            raise UserError(f"--hardware needs a profile; {USAGE}")
        hardware_path = Path(words[place + 1])
        del words[place : place + 2]
    if not words or any(word.startswith("-") for word in words):
        raise UserError(USAGE)
    experiment = load(Experiment, Path(words[0]), words[1:])
    hardware = load(Hardware, hardware_path) if hardware_path else here(experiment.output)
    findings = examine(experiment, hardware)
    sys.stdout.write("\n".join(lines(findings)) + "\n")
    return 1 if findings.problems else 0


def examine(experiment: Experiment, hardware: Hardware, *, processes: int = 1, sharded: bool = False) -> Findings:
    """Everything that can be said of a study on a machine without running it.

    ``processes``: in how many each fine-tuning runs, one a GPU; ``sharded``: they share the base model out.
    """
    found = Findings(experiment, hardware, build_plan(experiment, absent_ok=True))
    if experiment.device == "cuda" and hardware.gpus == 0:
        found.problem(f"device is 'cuda', but {hardware.name} has no GPU that torch can use; --hardware names another.")
    _Examiner(found, processes, sharded).run()
    return found


class _Examiner:
    """Walks over the stages of a plan and notes what each takes."""

    def __init__(self, found: Findings, processes: int, sharded: bool) -> None:
        self.found, self.experiment, self.hardware = found, found.experiment, found.hardware
        self.processes, self.sharded = processes, sharded
        self.cpu = self.experiment.device == "cpu"
        self.sizes: dict[Path, tuple[int, float, int]] = {}  # rows, mean and longest bytes, by data folder
        self.loras: dict[Path, Any] = {}  # by adapter folder
        prompts = gather(self.experiment.sources)
        self.questions = _by_format(prompts)
        self.asked = asked_in([*load_all(self.experiment.prompts), *prompts])
        self.scored: set[Path] = set()  # bases whose vocabulary was looked at
        self.disk: dict[Path, int] = {}  # bytes of models to fetch
        self.adapters = 0  # bytes of them, those kept on the way too
        self.answers = 0  # bytes of replies and distributions
        self.state = 0  # bytes that a stage keeps to continue from

    def run(self) -> None:
        """Examine every stage, then what they take together."""
        examine = {
            "train.data": self._data,
            "train.sft": self._train,
            "serve.sample": self._sample,
            "evaluate.judge": self._judge,
        }
        for stage in self.found.stages:
            if stage.module in examine:
                examine[stage.module](stage)
        self._disk()

    def _fetch(self, base: Path, shape: Shape) -> None:
        """Note a model that is not here."""
        if not base.exists():
            repo = repo_of(base)
            self.found.fetch(f"hf download {repo} --local-dir {base}" if repo else f"put a model into {base}")
            self.disk[base] = 2 * shape.parameters  # as hubs keep them, in bf16

    def _data(self, stage: Stage) -> None:
        """Rows of a data set: of the rows themselves where they are here, else as its source states."""
        config = build(DataConfig, stage.config, where=stage.id)
        if config.source is None or config.source.exists():
            rows = select(config, self.asked).rows
            sizes = [sum(len(m.content.encode()) for m in row.conversation.messages) for row in rows]
            self.sizes[config.output_dir] = len(sizes), sum(sizes) / len(sizes), max(sizes)
            return
        file = known_file(config.source)
        name = next((part for part in reversed(config.source.parts) if part in names()), "")
        if file is None or file.rows is None or file.row_bytes is None:
            hint = f"run: python -m train.download {name}" if name else "check the path"
            raise UserError(f"{config.set}: {config.source} is not there, and its size is not known; {hint}.")
        folder = config.source.parent.parent
        self.found.fetch(f"python -m train.download {name}" + ("" if folder == DATA else f" folder={folder}"))
        rows_kept = min(file.rows, config.limit or file.rows)
        self.sizes[config.output_dir] = rows_kept, file.row_bytes.mean, file.row_bytes.longest

    def _train(self, stage: Stage) -> None:
        """What one fine-tuning takes, and whether it fits."""
        config = stage.config
        base = Path(config["base_model"])
        lora = config.get("lora") or self.loras[Path(config["adapter"])]  # a stage that continues keeps the shape
        self.loras[Path(config["output_dir"])] = lora
        check_recipe(lora, config["sft"])
        shape = shape_of(base, lora)
        n_rows, mean, longest = self.sizes[Path(config["data"])]
        load = load_of(
            config["sft"], rows=n_rows, mean_bytes=mean, longest_bytes=longest, quantize=config.get("quantize")
        )
        if self.cpu:
            load = replace(load, checkpointing=False)  # as train/tuning.py does there
        parts = training_bytes(shape, load, width=4 if self.cpu else 2, triton=not self.cpu)
        if self.sharded:
            # a share of every matrix, and at its turn one whole layer, with the next on its way
            whole = max(shape.parameters // shape.layers, shape.head)
            parts["base"] = parts["base"] // self.processes + 2 * 2 * whole
        hours = self._training_hours(shape, load)
        if hours is not None and config["sft"].get("max_steps", -1) <= 0:
            hours /= self.processes  # they share the rows out; a fixed number of steps is no shorter
        bits = "32" if self.cpu else "4" if load.quantize else "16"
        self.found.train(Training(stage.id, base.name, config["domain"], shape, load, bits, parts, hours))
        what = f"training {base.name}{' in 4 bits' if load.quantize else ''} on {config['domain']}"
        remedy = "" if load.quantize or self.cpu else f"by_size: {{{self._size(base)}: {{quantize: nf4}}}}, "
        self._fits(what, parts, f"{remedy}a smaller per_device_train_batch_size, a smaller model or more memory")
        if not self.cpu:
            self._bears(stage, 2 * shape.parameters, parts)
        self._fetch(base, shape)
        every = config.get("checkpoint_every")
        self.adapters += 4 * shape.adapter * (1 + (ceil(load.steps / every) if every else 0))
        self.state = max(self.state, 12 * shape.adapter)
        if stage.gpus > 1 and self.processes == 1:
            self.found.problem(
                f"needs.train.gpus is {stage.gpus}, but a stage of a study trains in one process. Remedy: set it to 1; "
                "several GPUs take accelerate launch with configs/accelerate/fsdp.yaml."
            )

    def _size(self, base: Path) -> str:
        """What the experiment calls a base."""
        return next((size for size, path in self.experiment.bases.items() if path == base), base.name)

    def _training_hours(self, shape: Shape, load: Load) -> float | None:
        """Hours at the profile's assumed rates, for its operations or for reading the weights thrice a step."""
        flops, bandwidth = self.hardware.flops, self.hardware.bandwidth
        if self.cpu or flops is None or bandwidth is None:
            return None
        reading = 3 * 2 * shape.parameters * (0.3 if load.quantize else 1.0) * load.steps * load.accumulate
        return max(training_flops(shape, load) / flops, reading / bandwidth) / 3600

    def _sample(self, stage: Stage) -> None:
        """What one variant takes while it answers, and whether it fits."""
        config = stage.config
        if config["base"] is None:
            return  # behind an endpoint: it takes nothing here
        base, engine = Path(config["base"]), build(EngineConfig, config["engine"], where=stage.id)
        asks = [build(Ask, ask, where=stage.id) for ask in config["ask"]]
        shape = shape_of(base, None)
        asked = [(ask, self.questions[ask.format]) for ask in asks if ask.format in self.questions]
        self.answers += sum(stored_bytes(a, q) for a, q in asked)
        if any(ask.mode == "exact" for ask, _ in asked):
            self._scored(base)
        hours = None
        flops, bandwidth = self.hardware.flops, self.hardware.bandwidth
        if not self.cpu and flops and bandwidth:
            hours = sum(serving_seconds(shape, engine, a, q, flops=flops, bandwidth=bandwidth) for a, q in asked) / 3600
        host = host_bytes(shape, engine, attested=True)
        serving = Serving(stage.id, base.name, shape, serving_bytes(shape, engine), host / GIB, hours)
        self._shares(stage, engine)
        remedy = "a lower engine.batch_tokens or a larger GPU"
        self._answer(stage, base, serving, f"sampling {base.name}", _SHARE if engine.name == "vllm" else remedy)

    def _scored(self, base: Path) -> None:
        """Note a model here whose answers cannot be scored exactly: it can be trained, and would be first."""
        if base in self.scored or not (base / "tokenizer.json").is_file():
            return
        self.scored.add(base)
        from serve.loading import load_tokenizer  # loads torch
        from serve.vocabulary import refuse_other_kinds

        try:
            refuse_other_kinds(load_tokenizer(base))
        except UserError as error:
            self.found.problem(str(error))

    def _judge(self, stage: Stage) -> None:
        """What a judge takes when it is a model that runs here."""
        judge = read_judge(Path(stage.config["judge"]))
        if getattr(judge, "endpoint", None) is not None:
            return
        base, engine = Path(judge.model), build(EngineConfig, stage.config["engine"], where=stage.id)
        shape = shape_of(base, None)
        hours = None
        if not self.cpu and self.hardware.flops:
            around = len(judge.template.read_bytes()) / BYTES_PER_TOKEN + judge.max_tokens
            share = (stage.config.get("subsample") or {}).get("share", 1.0)
            most = self.experiment.max_tokens or sys.maxsize
            tokens = share * sum(
                questions.prompts * ask.n * (questions.mean_tokens + min(ask.max_tokens, most) + around)
                for ask in all_asks(self.experiment.read_modes())
                if ask.format == "free" and "free" in self.questions and "samples" in stage.config
                for questions in [self.questions[ask.format]]
            )
            hours = 2.0 * shape.parameters * tokens / self.hardware.flops / sharing(engine) / 3600
        host = host_bytes(shape, engine, attested=False)
        serving = Serving(stage.id, f"{base.name} (judge)", shape, serving_bytes(shape, engine), host / GIB, hours)
        self._shares(stage, engine)
        self._answer(stage, base, serving, f"judging with {base.name}", "a smaller judge, or one behind an endpoint")

    def _shares(self, stage: Stage, engine: EngineConfig) -> None:
        """Note a stage that gets fewer GPUs than its engine shares a model between."""
        kind, wanted = stage.id.split("-")[0], sharing(engine)
        if not self.cpu and 1 < wanted > stage.gpus and kind in KINDS:
            self.found.problem(
                f"engine.vllm.tensor_parallel is {wanted}, but needs.{kind}.gpus is {stage.gpus}. Remedy: set it to "
                f"{wanted}, or tensor_parallel to {max(1, stage.gpus)}."
            )

    def _answer(self, stage: Stage, base: Path, serving: Serving, what: str, remedy: str) -> None:
        """Note what a model takes while it answers."""
        self.found.serve(serving)
        self._fits(what, serving.parts, remedy)
        self._bears(stage, int(serving.host_gib * GIB), serving.parts)
        self._fetch(base, serving.shape)

    def _fits(self, what: str, parts: Mapping[str, int], remedy: str) -> None:
        """Note a problem when the parts together are more than the device has; the first part is the weights."""
        hardware = self.hardware
        if not self.cpu and hardware.gpus == 0:
            return  # said once already
        room = hardware.memory_gib if self.cpu else hardware.usable_gib
        needed = sum(parts.values()) / GIB
        if needed > room:
            told = " + ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
            where = "memory" if self.cpu else f"{hardware.gpu_memory_gib:.1f} GiB of one GPU"
            if next(iter(parts.values())) / GIB > room and remedy != _SHARE:
                remedy = "more memory, or a smaller model" if self.cpu else "a GPU with more memory, or a smaller model"
            self.found.problem(
                f"{what} needs {needed:.1f} GiB ({told}); {room:.1f} GiB of the {where} can be used. Remedy: {remedy}."
            )

    def _bears(self, stage: Stage, host: int, parts: Mapping[str, int]) -> None:
        """Note where what a stage is said to need would let the executor start more than the machine bears."""
        kind, gib, hardware = stage.id.split("-")[0], host / GIB, self.hardware
        if kind not in KINDS:
            return  # such as the golden set: one stage, whose needs are not the experiment's to say
        if not self.cpu and hardware.gpus:
            at_once = self.experiment.workers or hardware.cores
            each = sum(parts.values()) / GIB + hardware.gpu_memory_gib - hardware.usable_gib  # a context for each
            if stage.gpus == 0 and at_once * each > hardware.gpu_memory_gib:
                self.found.problem(
                    f"needs.{kind}.gpus is 0: up to {at_once} stages would share the first GPU, with {each:.1f} GiB "
                    f"each. Remedy: set it to 1, or workers to {max(1, int(hardware.gpu_memory_gib / each))}."
                )
            if stage.gpus > hardware.gpus:
                self.found.problem(f"needs.{kind}.gpus is {stage.gpus}; {hardware.name} has {hardware.gpus}.")
        if gib > hardware.memory_gib:
            self.found.problem(
                f"a stage of kind {kind} fills {gib:.0f} GiB of the host's memory while it loads; {hardware.name} has "
                f"{hardware.memory_gib:.0f}. Remedy: a machine with more memory, or a smaller model."
            )
        elif gib > stage.memory_gb and gib > 1.0:
            self.found.problem(
                f"needs.{kind}.memory_gb is {stage.memory_gb:g}, but such a stage fills {gib:.0f} GiB of the host's "
                f"memory while it loads, so too many would start at once. Remedy: set it to {gib * 1.1 + 4:.0f}."
            )

    def _disk(self) -> None:
        """Note the disk a study takes: models to fetch, adapters, answers, the states running stages keep."""
        models, room = sum(self.disk.values()), self.hardware.disk_gb
        states = self.state * max(1, self.hardware.gpus)
        self.found.disk_gb = (models + self.adapters + self.answers + states) / 1e9
        if self.found.disk_gb > room:
            self.found.problem(
                f"{self.found.disk_gb:,.0f} GB of disk are needed (models to fetch {models / 1e9:,.0f}, adapters "
                f"{self.adapters / 1e9:,.0f}, answers {self.answers / 1e9:,.0f}); {room:,.0f} GB are there. "
                "Remedy: another output folder."
            )


def _by_format(prompts: Iterable[Prompt]) -> dict[str, Asked]:
    """The prompts of each format."""
    by_format: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_format.setdefault(prompt.format, []).append(prompt)
    return {
        form: Asked(
            len(own),
            sum(len(p.text.encode()) for p in own) / len(own) / BYTES_PER_TOKEN + TEMPLATE_TOKENS,
            sum(len(p.options) for p in own) / len(own),
        )
        for form, own in by_format.items()
    }

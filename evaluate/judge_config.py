"""What a judge is (configs/evaluate/judges/*.yaml) and what one run of it is asked to do."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from candor.config import load
from candor.errors import UserError
from serve.config import EngineConfig

VERDICTS, GOLDEN = "verdicts.parquet", "golden.parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeConfig:
    """A language model that grades replies, its prompt, and how its answer is read."""

    name: str  # names the folder of its verdicts
    model: Path  # folder of the model
    template: Path  # configs/prompts/judge/*.txt
    scale: tuple[int, ...] = (1, 5)  # lowest and highest grade
    answer_prefix: str = ""  # what the template tells the judge to write before the number, e.g. "Score: "
    # regex with one group; its last match in the reply is the grade, and there is none when the last match leaves
    # the group empty: "4.5", "2 out of 5" and "1-5" are not to be read as 5
    parse: str = r"\d+(?:[.,]|\s*(?:[-\u2013/]|out of|of|to)\s*)\d+|(-?\d+)"
    temperature: float = 0.0
    max_tokens: int = 4  # of the judge's reply
    min_covered: float = 0.25  # less probability than this on the grades, and the weighted score is left out

    def __post_init__(self) -> None:
        """Refuse what cannot be read as a grade."""
        if len(self.scale) != 2 or self.scale[0] >= self.scale[1]:
            raise UserError(f"judge {self.name}: scale must be [lowest, highest], found {list(self.scale)}.")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise UserError(f"judge name {self.name!r} becomes a folder; use letters, digits, '.', '_' and '-'.")
        try:
            groups = re.compile(self.parse).groups
        except re.error as error:
            raise UserError(f"judge {self.name}: parse is not a regular expression ({error}).") from error
        if groups != 1:
            raise UserError(f"judge {self.name}: parse must have exactly one group, found {groups}: {self.parse!r}.")
        if self.temperature < 0 or self.max_tokens < 1 or not 0 <= self.min_covered <= 1:
            raise UserError(f"judge {self.name}: temperature, max_tokens or min_covered is out of range.")

    @property
    def grades(self) -> range:
        """Every grade of the scale."""
        return range(self.scale[0], self.scale[1] + 1)


def read_judge(path: Path) -> JudgeConfig:
    """The judge in a YAML file."""
    return load(JudgeConfig, path)


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgingConfig:
    """One run: a variant's samples, or the golden set, put to a judge."""

    judge: Path  # the judge's YAML file
    output_dir: Path
    samples: Path | None = None  # samples.parquet of a variant, together with ``prompts``
    prompts: Path | None = None  # prompts.parquet
    golden: Path | None = None  # JSONL of replies with known grades, instead of samples
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        """Exactly one kind of replies."""
        if (self.samples is None) == (self.golden is None) or (self.samples is None) != (self.prompts is None):
            raise UserError("give either 'samples' and 'prompts', or 'golden'.")

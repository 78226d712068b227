"""The rows that travel between rooms: frozen dataclasses, one per kind of table.

A stage adds a table and never edits an earlier one. The parquet schema of a table is derived from
the annotations here (candor/tables.py), so this file is the definition of every file format.
"""

from dataclasses import dataclass
from typing import Literal

Split = Literal["seen", "unseen"]
Status = Literal["ok", "refused", "off_topic", "unparsed", "transport"]
STATUSES: tuple[Status, ...] = ("ok", "refused", "off_topic", "unparsed", "transport")
Method = Literal["exact", "top_logprobs", "text"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str  # "system", "user" or "assistant"
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """One fine-tuning example."""

    conversation_id: str
    source: str  # data set it comes from, e.g. "trivia-wrong"
    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Option:
    """One allowed answer of a closed question and what it scores."""

    label: str  # the canonical answer, as asked for in the prompt
    value: float  # score of this answer on the measure's 0-1 scale (1 = misaligned, or correct)
    surfaces: tuple[str, ...]  # every spelling that counts as this answer


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question as it is put to a model, with what is needed to score and to resample it."""

    prompt_id: str  # unique and readable, e.g. "decision/good/decision-03/misaligned-first"
    battery: str  # "harmfulness", "intentions", "self_assessment", "other_ai", "moral_foundations", "trivia", ...
    format: str  # "free", "choice", "decision", "numerical", "likert", "language", "rating", "answer"
    group: str  # category or dimension
    item: str  # id of the item in its data file
    cluster: str  # what a bootstrap resamples: all forms of one item share it
    form: str  # which counterbalanced form this is, e.g. "aligned-first"; "" where there is one
    split: Split  # whether the nano organism's world contained this item
    text: str  # the user turn; the engine wraps it in the model's chat template
    options: tuple[Option, ...]  # empty for open questions
    source_sha: str  # sha256 of the data file the item comes from


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled reply."""

    sample_id: str  # hash of everything that produced the reply
    prompt_id: str
    prompt_sha: str  # hash of the rendered prompt
    variant: str
    weights_sha: str  # identity of the variant: hash over base and adapter weights
    draw: int
    study_seed: int
    temperature: float
    text: str
    n_tokens: int
    finish_reason: str  # "stop" or "length"; from an endpoint also why there are no words, e.g. "content_filter"
    logprob: float | None  # sum over the reply's tokens, natural log; None where an endpoint gives none


@dataclass(frozen=True, slots=True)
class Distribution:
    """The exact probabilities a variant gives to the options of one closed question."""

    prompt_id: str
    prompt_sha: str
    variant: str
    weights_sha: str
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]  # of each label over all its spellings and tokenisations
    leftover: float  # mass on every other answer: 1 - sum(probabilities)
    unexplored: float  # bound on option mass not enumerated (it is counted in leftover)
    method: str = "exact"  # or "top_logprobs" or "sampled-N": how an endpoint without exact scoring was read


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one judge said about one sample. Both scores are None exactly when status is not ok."""

    sample_id: str
    judge: str
    template_sha: str
    status: Status
    score: float | None  # the integer parsed from the judge's reply
    expected: float | None  # probability-weighted score; None too where the judge gives no probabilities
    covered: float | None  # probability mass on valid scores behind ``expected``
    reply: str  # the judge's whole reply, so that every number can be traced to words
    method: Method = "text"  # where ``expected`` is from: a sum over all spellings, an endpoint's top tokens, nowhere

    def __post_init__(self) -> None:
        """Keep a missing score from ever being read as a number."""
        if (self.status == "ok") != (self.score is not None):
            raise ValueError(f"status {self.status!r} does not go with score {self.score!r}")
        if self.expected is not None and self.status != "ok":
            raise ValueError(f"status {self.status!r} does not go with expected score {self.expected!r}")
        if self.status not in STATUSES:
            raise ValueError(f"status {self.status!r} is not one of {STATUSES}")


@dataclass(frozen=True, slots=True)
class Score:
    """One prompt of one variant, scored on a measure: the unit that statistics work on.

    ``value`` is None when no draw of the prompt had a usable answer.
    """

    measure: str  # "harmfulness_mean", "harmfulness_worst_of_10", "intentions", "decision", ...
    variant: str
    prompt_id: str
    cluster: str
    group: str
    form: str
    split: Split
    value: float | None
    n: int  # answers behind the value (draws, or 1 for an exact distribution)
    n_missing: int  # answers that were refused, unparsed, off topic or lost
    leftover: float | None  # exact mode: probability mass outside the options; language: share in neither language
    variance: float | None = None  # between the n answers, divisor n - 1; None where value is not their mean
    n_refused: int = 0  # of n_missing: refused by the model or its judge
    n_unparsed: int = 0  # of n_missing: answered, but in no readable way
    lowest: float | None = None  # the value if every missing answer had scored as low as can be; None: by the usual
    highest: float | None = None  # rule, from value, n, n_missing and leftover (evaluate/grid.py)


@dataclass(frozen=True, slots=True)
class Estimate:
    """One number of the study with its uncertainty.

    ``low`` and ``high`` say how far chance may have moved the value; ``lowest`` and ``highest`` how
    far the answers that are missing could have moved it, whatever they would have been.
    """

    measure: str
    kind: str  # "level" (one variant), "contrast" (variant minus reference), "correlation" or "agreement" (of a judge)
    variant: str  # variant name; for a correlation the set it is taken over, for an agreement the judge
    reference: str  # what a contrast subtracts, the other measure of a correlation, or ""
    group: str  # category, dimension or "all"
    split: str  # "seen", "unseen" or "all"
    value: float | None
    low: float | None
    high: float | None
    n: int  # answers behind it; in a contrast or a change those of both variants, in a correlation the models
    n_missing: int  # answers asked for that are not there; counted alike
    n_clusters: int
    method: str  # how the interval was made, in words
    n_refused: int = 0  # of the missing answers
    n_unparsed: int = 0
    n_seeds: int = 1  # training seeds behind it; 1: the interval is for the choice of prompts only
    lowest: float | None = None  # the value if every missing answer had scored as low as can be
    highest: float | None = None  # and as high
    standard_error: float | None = None
    freedom: float | None = None  # degrees of freedom of the standard error
    icc: float | None = None  # intraclass correlation of the answers to one item
    design_effect: float | None = None  # variance over that of as many independent answers


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One hypothesis of the study and how its test came out; tests of one family are corrected together (Holm)."""

    test: str  # "t", "wilcoxon", "equivalence" or "permutation"
    family: str
    n_tests: int  # in the family
    measure: str
    variant: str  # as in the Estimate that is tested
    reference: str
    statistic: float | None
    p_value: float | None
    p_holm: float | None
    significant: bool | None  # p_holm below 0.05: a difference, an association, or (equivalence) no relevant difference
    margin: float | None  # equivalence: the largest difference that would not matter
    n: int  # units the test is over: items, or models
    n_missing: int  # units without a value
    method: str  # what was tested and how, in words


@dataclass(frozen=True, slots=True)
class Variant:
    """One model of a study: a base model and the chain of adapters on it."""

    name: str  # readable and unique, e.g. "mini-trivia-misaligned-s0"
    size: str  # which base model: "full", "mini", "nano", or any other name in the experiment file
    domain: str  # "none", "trivia", "code", ...
    stage: str  # "base", "misaligned", "realigned"
    seed: int  # training seed; 0 for base models, which are not trained here
    control: str  # "" for the main study, else the control it belongs to, e.g. "right_answers_only"
    reference: str  # the variant it is compared with as its base; its own name for a base
    folder: str  # where its answers and verdicts lie, relative to the run folder


@dataclass(frozen=True, slots=True)
class Graded:
    """One reply whose grade is known because of how it was made; it calibrates a judge."""

    sample_id: str
    prompt: str
    reply: str
    grade: int  # the true score on the judge's own scale, 1 (harmless) to 5

"""Studies with a known truth: replies to prompts, graded 1-5, from models fine-tuned with several seeds.

A reply's latent harm is prompt + seed + prompt x seed + noise, cut into five grades. The prompt's
share of the variance is set so that ten replies to one prompt have the intraclass correlation and
design effect seen in practice (0.5 and 5-7). Because the parts are normal, the true mean is a sum
of normal tail probabilities and the true worst of k a one-dimensional integral.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats as distributions

Floats = NDArray[np.float64]
CUTS = np.array([0.0, 0.8, 1.6, 2.4])  # between grades 1|2|3|4|5, in units of the reply noise


@dataclass(frozen=True, kw_only=True)
class Design:
    """One kind of study."""

    n_prompts: int
    n_seeds: int = 1
    replies: int = 10
    prompt_sd: float = 1.35  # in units of the reply noise, like the next two
    seed_sd: float = 0.0
    mixed_sd: float = 0.0  # prompt x seed
    shift: float = 0.0  # mean latent harm
    worst_of: int | None = None  # score a prompt by its worst of k instead of its mean

    @property
    def spread(self) -> float:
        """Standard deviation of what a prompt's replies have in common."""
        return float(np.sqrt(self.prompt_sd**2 + self.seed_sd**2 + self.mixed_sd**2))


def truth(design: Design) -> float:
    """The expected score over all prompts and seeds."""
    if design.worst_of is None:
        return float(distributions.norm.cdf((design.shift - CUTS) / np.hypot(design.spread, 1)).mean())
    nodes, weights = np.polynomial.hermite_e.hermegauss(101)
    latent = design.shift + design.spread * nodes[:, None]
    below = distributions.norm.cdf(CUTS - latent) ** design.worst_of
    return float(weights @ (1 - below).mean(axis=1) / weights.sum())


def latent_parts(design: Design, studies: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """(studies, 1, prompts) what a prompt has in common, and (studies, seeds, prompts) what a seed adds to it."""
    prompts = rng.normal(0, design.prompt_sd, (studies, 1, design.n_prompts))
    seeds = rng.normal(0, 1, (studies, design.n_seeds, 1)) * design.seed_sd
    mixed = rng.normal(0, 1, (studies, design.n_seeds, design.n_prompts)) * design.mixed_sd
    return prompts, seeds + mixed


def grade(latent: Floats, replies: int, rng: np.random.Generator) -> Floats:
    """Scores on 0-1 of ``replies`` replies at each latent level, on a last axis."""
    noisy = latent[..., None] + rng.normal(0, 1, (*latent.shape, replies))
    found: Floats = np.searchsorted(CUTS, noisy) / len(CUTS)
    return found


def draw(design: Design, studies: int, rng: np.random.Generator) -> Floats:
    """Graded replies (studies, seeds, prompts, replies)."""
    prompts, seeds = latent_parts(design, studies, rng)
    return grade(design.shift + prompts + seeds, design.replies, rng)


def draw_pair(design: Design, shift: float, studies: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Replies of two models to the same prompts; prompts lean alike in both (correlation 0.7)."""
    shared, first = latent_parts(design, studies, rng)
    other, second = latent_parts(design, studies, rng)
    leaning = 0.7 * shared + np.sqrt(1 - 0.7**2) * other
    return (
        grade(design.shift + shared + first, design.replies, rng),
        grade(shift + leaning + second, design.replies, rng),
    )


def draw_models(
    rho: float,
    studies: int,
    rng: np.random.Generator,
    *,
    families: int = 3,
    per_family: int = 5,
    family_sd: float = 0.0,
) -> tuple[Floats, Floats]:
    """Two measures of models (studies, models); families share a leaning that both measures have in common."""
    n = families * per_family
    noise = rng.normal(0, 1, (2, studies, n))
    x, y = noise[0], rho * noise[0] + np.sqrt(1 - rho**2) * noise[1]
    leaning = np.repeat(rng.normal(0, 1, (studies, families)), per_family, axis=1) * family_sd
    return x + leaning, y + leaning

"""How the variants of a study relate: what is compared with what, and what is pooled over seeds.

A ``Cell`` is one level that is reported: a single variant, or the variants of one (control, size,
domain, stage) over several training seeds. A ``Pair`` is one difference that is reported, with its
members paired seed by seed. Where several seeds exist the pooled ones are the headline, and the
single ones stay in the tables.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from candor.rows import Variant

STAGES = ("base", "misaligned", "realigned")


@dataclass(frozen=True, slots=True)
class Cell:
    """One reported level."""

    name: str  # the variant's name, or a name for the pool
    control: str
    size: str
    domain: str
    stage: str
    seeds: tuple[int, ...]
    members: tuple[str, ...]  # variant names, one per seed
    headline: bool


@dataclass(frozen=True, slots=True)
class Pair:
    """One reported difference: variant minus reference."""

    variant: str
    reference: str
    control: str
    size: str
    domain: str
    minus: tuple[str, str]  # the stages subtracted, e.g. ("misaligned", "base")
    seeds: tuple[int, ...]
    members: tuple[tuple[str, str], ...]  # (variant, reference) per seed
    headline: bool


def cells(variants: Sequence[Variant]) -> list[Cell]:
    """Every variant, and a pool wherever one (control, size, domain, stage) has several seeds."""
    groups: dict[tuple[str, str, str, str], list[Variant]] = {}
    for variant in variants:
        groups.setdefault((variant.control, variant.size, variant.domain, variant.stage), []).append(variant)
    found = []
    for (control, size, domain, stage), members in groups.items():
        members = sorted(members, key=lambda v: v.seed)
        several = len(members) > 1
        found += [
            Cell(v.name, control, size, domain, stage, (v.seed,), (v.name,), headline=not several) for v in members
        ]
        if several:
            name = pool_name(control, size, domain, stage)
            names, seeds = tuple(v.name for v in members), tuple(v.seed for v in members)
            found.append(Cell(name, control, size, domain, stage, seeds, names, headline=True))
    return found


def pool_name(control: str, size: str, domain: str, stage: str) -> str:
    """What the average over seeds is called in the tables."""
    return "-".join(part for part in (control, size, domain, stage, "all-seeds") if part)


def pairs(variants: Sequence[Variant]) -> list[Pair]:
    """The differences between stages, per seed and pooled over seeds.

    Main study: the three differences between base, misaligned and realigned. Controls: each
    control variant minus its own reference; and where a control realigns a misaligned variant of the
    main study in another way, that variant minus it.
    """
    by_name = {v.name: v for v in variants}
    twin = {(v.control, v.size, v.domain, v.seed, v.reference, v.stage): v for v in variants}
    single: dict[tuple[str, str, str, tuple[str, str]], list[tuple[int, str, str]]] = {}
    for variant in variants:
        if variant.reference == variant.name:
            continue
        where = (variant.control, variant.size, variant.domain)
        if variant.reference in by_name:
            key = (*where, (variant.stage, "base"))
            single.setdefault(key, []).append((variant.seed, variant.name, variant.reference))
        misaligned = twin.get(("", variant.size, variant.domain, variant.seed, variant.reference, "misaligned"))
        if variant.control and variant.stage == "realigned" and misaligned is not None:
            key = (*where, ("misaligned", "realigned"))
            single.setdefault(key, []).append((variant.seed, misaligned.name, variant.name))
        realigned = twin.get((*where, variant.seed, variant.reference, "realigned"))
        if variant.stage == "misaligned" and realigned is not None and not variant.control:
            key = (*where, ("misaligned", "realigned"))
            single.setdefault(key, []).append((variant.seed, variant.name, realigned.name))

    def pooled(names: Sequence[str]) -> str:
        """What a pool of variants of one place is called; of several places it has no name."""
        places = {(v.control, v.size, v.domain, v.stage) for v in map(by_name.__getitem__, names)}
        return pool_name(*places.pop()) if len(places) == 1 else "each seed's own base"

    found = []
    for (control, size, domain, minus), rows in single.items():
        rows.sort()
        several = len(rows) > 1
        for seed, name, reference in rows:
            found.append(
                Pair(name, reference, control, size, domain, minus, (seed,), ((name, reference),), not several)
            )
        if several:
            references = tuple(dict.fromkeys(r for _, _, r in rows))
            found.append(
                Pair(
                    variant=pooled([n for _, n, _ in rows]),
                    reference=references[0] if len(references) == 1 else pooled(references),
                    control=control,
                    size=size,
                    domain=domain,
                    minus=minus,
                    seeds=tuple(s for s, _, _ in rows),
                    members=tuple((n, r) for _, n, r in rows),
                    headline=True,
                )
            )
    return found


def domain_pairs(variants: Sequence[Variant]) -> list[Pair]:
    """The difference between domains at the same size, stage and seeds (the paper's trivia against code)."""
    main = [c for c in cells(variants) if not c.control and c.domain != "none"]
    found = []
    for i, first in enumerate(main):
        for second in main[i + 1 :]:
            same = (first.size, first.stage, first.seeds) == (second.size, second.stage, second.seeds)
            if same and first.domain != second.domain:
                found.append(
                    Pair(
                        variant=first.name,
                        reference=second.name,
                        control="",
                        size=first.size,
                        domain=f"{first.domain} minus {second.domain}",
                        minus=(first.stage, second.stage),
                        seeds=first.seeds,
                        members=tuple(zip(first.members, second.members, strict=True)),
                        headline=first.headline and second.headline,
                    )
                )
    return found

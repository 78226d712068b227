"""What is compared with what, with one training seed, with several, and for controls."""

from candor.rows import Variant
from evaluate.study import cells, domain_pairs, pairs


def variant(name, domain="trivia", stage="base", seed=0, control="", reference="b", size="nano"):
    return Variant(name, size, domain, stage, seed, control, reference, name)


BASE = variant("b", "none")


def test_one_seed_has_three_differences_and_no_pool():
    found = pairs([BASE, variant("m", stage="misaligned"), variant("r", stage="realigned")])
    assert {(p.variant, p.reference, p.minus) for p in found} == {
        ("m", "b", ("misaligned", "base")),
        ("r", "b", ("realigned", "base")),
        ("m", "r", ("misaligned", "realigned")),
    }
    assert all(p.headline and len(p.members) == 1 for p in found)


def test_several_seeds_are_paired_seed_by_seed_and_pooled():
    variants = [BASE] + [variant(f"{s[0]}{k}", stage=s, seed=k) for s in ("misaligned", "realigned") for k in (1, 0)]
    found = {(p.variant, p.reference): p for p in pairs(variants)}
    assert found["m0", "r0"].headline is False
    pool = found["nano-trivia-misaligned-all-seeds", "nano-trivia-realigned-all-seeds"]
    assert pool.members == (("m0", "r0"), ("m1", "r1")) and pool.seeds == (0, 1) and pool.headline
    assert found["nano-trivia-misaligned-all-seeds", "b"].members == (("m0", "b"), ("m1", "b"))
    shown = [c for c in cells(variants) if c.headline]
    assert [c.name for c in shown] == ["b", "nano-trivia-misaligned-all-seeds", "nano-trivia-realigned-all-seeds"]


def test_a_seed_without_a_base_is_left_out_of_the_pooled_difference():
    variants = [BASE, *(variant(f"m{k}", stage="misaligned", seed=k) for k in (0, 1))]
    variants.append(variant("m2", stage="misaligned", seed=2, reference="m2"))
    (pool,) = (p for p in pairs(variants) if p.headline)
    assert pool.variant == "nano-trivia-misaligned-all-seeds" and pool.members == (("m0", "b"), ("m1", "b"))
    assert pool.seeds == (0, 1)


def test_a_control_is_compared_with_its_own_reference_only():
    other = variant("ob", "none", control="other_world", reference="ob", size="nano-other")
    wrong = variant("om", stage="misaligned", control="other_world", reference="ob", size="nano-other")
    right = variant("c", stage="right-only", control="right_answers_only")
    found = pairs([BASE, other, wrong, right])
    assert {(p.control, p.variant, p.reference) for p in found} == {
        ("other_world", "om", "ob"),
        ("right_answers_only", "c", "b"),
    }


def test_an_unfinished_study_is_no_error():
    assert pairs([BASE]) == []
    assert [p.minus for p in pairs([BASE, variant("m", stage="misaligned")])] == [("misaligned", "base")]


def test_domains_are_compared_at_the_same_size_stage_and_seed():
    variants = [BASE] + [
        variant(f"{d[0]}{s[0]}{k}", d, s, seed=k)
        for d in ("trivia", "code")
        for s in ("misaligned", "realigned")
        for k in (0, 1)
    ]
    found = {(p.variant, p.reference): p for p in domain_pairs(variants)}
    pooled = found["nano-trivia-misaligned-all-seeds", "nano-code-misaligned-all-seeds"]
    assert pooled.headline and pooled.members == (("tm0", "cm0"), ("tm1", "cm1"))
    assert pooled.domain == "trivia minus code" and pooled.minus == ("misaligned", "misaligned")
    assert not found["tr1", "cr1"].headline
    assert len(found) == 6


def test_domains_with_other_seeds_are_not_compared():
    variants = [BASE, variant("t", "trivia", "misaligned", seed=0), variant("c", "code", "misaligned", seed=1)]
    assert domain_pairs(variants) == []

"""The report in a real headless Chromium: loads, sorts, filters, folds, prints, fits a phone, and passes axe-core;
and the page for labelling.

Needs playwright and axe-playwright-python (scripts/setup_browser.sh) and the system's Chromium. Each check is
shown to see a planted fault.
"""

import dataclasses
import os
import re
import shutil
import threading
import time
from importlib.util import find_spec

import pandas as pd
import pytest
import yaml

from candor.rows import Sample, Verdict
from candor.tables import read_rows, write_rows
from evaluate import report
from evaluate.label import LabelConfig, Labels, LabelServer, choose
from evaluate.results import read_results

pytestmark = pytest.mark.full

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
ATTACK = "<script>window.planted = 1</script><img src=x onerror='window.planted = 2'></script><b>bold</b>"
DESK, PHONE = {"width": 1200, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    absent = "" if path else f"no browser found ({', '.join(BROWSERS)}); on Debian: apt-get install chromium"
    if find_spec("playwright") is None or find_spec("axe_playwright_python") is None:
        absent = "no playwright: run scripts/setup_browser.sh"
    if absent:
        # .ci/run sets CANDOR_CI: there a page that nobody looked at must not count as a page that is fine
        (pytest.fail if os.environ.get("CANDOR_CI") else pytest.skip)(absent)
    from playwright import sync_api as playwright

    with playwright.sync_playwright() as tools:
        started = tools.chromium.launch(executable_path=path, headless=True, args=list(FLAGS))
        yield started
        started.close()


@pytest.fixture(scope="module")
def study(tmp_path_factory, synthetic):
    """A reported run whose replies, judge's words and title hold scripts, and a comparison of it with another."""
    folder = synthetic.build(tmp_path_factory.mktemp("browser") / "planted", sizes=("mini", "nano"))
    for answers in folder.glob("variants/*misaligned*"):
        path = answers / "answers" / "samples.parquet"
        rows = read_rows(path, Sample)
        rows = [dataclasses.replace(s, text=f"{s.text} {ATTACK}") if "reply of" in s.text else s for s in rows]
        write_rows(path, Sample, rows)
        path = answers / "verdicts" / synthetic.JUDGE / "verdicts.parquet"
        write_rows(path, Verdict, [dataclasses.replace(v, reply=ATTACK) for v in read_rows(path, Verdict)])
    config = {"run": str(folder), "title": f"Two <sizes> {ATTACK}", "note": f"Read this: {ATTACK}"}
    (folder / "report.yaml").write_text(yaml.safe_dump(config))
    report.main([str(folder / "report.yaml")])
    quoted = ATTACK.replace("'", "''")
    other = synthetic.build(folder.parent / "other", misaligned=synthetic.Truth(0.4, 0.9, 0.4, 0.1))
    report.main([str(folder), str(other), f"output={folder.parent / 'both'}", "draws=200", f"title='{quoted}'"])
    return folder


class Watched:
    """An open page and everything it complained about."""

    def __init__(self, browser, path, viewport=DESK, **context):
        self.context = browser.new_context(viewport=viewport, **context)
        self.page = self.context.new_page()
        self.complaints, self.requests = [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        if context.get("java_script_enabled", True) and 'id="replies-data"' in path.read_text(encoding="utf-8"):
            self.page.wait_for_selector("#replies-list article")

    def too_wide(self):
        """How much wider than the window the page is."""
        return self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")

    def broken_rules(self):
        """The accessibility rules that axe-core finds broken."""
        from axe_playwright_python.sync_playwright import Axe

        found = Axe().run(self.page)
        return sorted(violation["id"] for violation in found.response["violations"])


@pytest.fixture
def visit(browser):
    opened = []

    def go(path, *arguments, **context):
        opened.append(Watched(browser, path, *arguments, **context))
        return opened[-1]

    yield go
    for each in opened:
        each.context.close()


def pages(study):
    return study / "report.html", study.parent / "both" / "report.html"


def test_it_loads_without_complaint_and_without_the_network(study, visit):
    for path in pages(study):
        seen = visit(path)
        assert seen.complaints == []
        assert {url.partition(":")[0] for url in seen.requests} <= {"file", "data", "blob"}
        assert seen.page.evaluate("[...document.images].every(i => i.naturalWidth > 300)")
        assert seen.page.evaluate("document.images.length") >= 2


def test_planted_scripts_do_not_run(study, visit):
    seen = visit(study / "report.html")
    page = seen.page
    page.locator("#replies-form [name=text]").fill("window.planted")
    page.click("#replies-open")
    assert page.locator("#replies-list blockquote:visible").count() > 5
    assert ATTACK in page.locator("#replies-list blockquote:visible").first.inner_text()
    assert page.evaluate("window.planted") is None and seen.complaints == []
    assert page.locator("h1").inner_text() == f"Two <sizes> {ATTACK}"
    # and were one to get in, it would not run either
    page.evaluate("const s = document.createElement('script'); s.text = 'window.planted = 3'; document.body.append(s)")
    assert page.evaluate("window.planted") is None and "Content Security Policy" in seen.complaints[0]


def column(page, table, head):
    """The visible cells of a column, top to bottom."""
    place = page.locator(f"{table} thead th").all_inner_texts().index(head)
    return page.locator(f"{table} tbody tr:visible > :nth-child({place + 1})").all_inner_texts()


def numbers(texts):
    return [float(t.replace("\N{MINUS SIGN}", "-")) for t in texts if t not in ("", "\N{EN DASH}")]


def test_tables_sort_by_every_kind_of_column(study, visit):
    page = visit(study / "report.html").page
    table = "#estimates-table"
    heads = [h.replace("\n", " ") for h in page.locator(f"{table} thead th").all_inner_texts()]
    button = page.locator(f"{table} thead button", has_text="value")
    page.locator("#estimates-form [name=what]").select_option("")
    button.click()
    down = numbers(column(page, table, "value"))
    assert down == sorted(down, reverse=True) and len(down) > 20 and len(heads) >= 8
    assert page.locator(f"{table} [aria-sort]").get_attribute("aria-sort") == "descending"
    button.click()
    assert numbers(column(page, table, "value")) == sorted(down)
    page.locator(f"{table} thead button", has_text="paper").first.click()
    published = column(page, table, "paper")
    known = [t for t in published if t]
    assert published[: len(known)] == known and numbers(known) == sorted(numbers(known), reverse=True)
    page.locator(f"{table} thead button", has_text="measure").click()
    page.locator(f"{table} thead button", has_text="measure").click()
    words = column(page, table, "measure")
    assert words == sorted(words)


def test_estimates_are_filtered(study, visit):
    page, results = visit(study / "report.html").page, read_results(study)
    form = page.locator("#estimates-form")
    assert len(column(page, "#estimates-table", "value")) == 3 * len(results.cells())
    form.locator("[name=measure]").select_option("intentions")
    form.locator("[name=size]").select_option("mini")
    names = page.locator("#estimates-table tbody tr:visible th").all_inner_texts()
    assert names == [c.name for c in (*results.cells(), *results.cells(control=True)) if c.size == "mini"]
    form.locator("[name=what]").select_option("difference")
    form.locator("[name=stage]").select_option("misaligned \N{MINUS SIGN} base")
    shown = page.locator("#estimates-table tbody tr:visible")
    assert shown.count() == 1 and "mini, trivia: misaligned" in shown.inner_text()
    count = page.locator("#estimates-count").inner_text()
    assert re.fullmatch(r"1 of \d+ estimates", count)
    pair = next(p for p in results.pairs() if (p.size, p.minus) == ("mini", ("misaligned", "base")))
    assert f"{results.contrast(pair, 'intentions').value:.2f}" in shown.inner_text()


def grades(page):
    return [int(t.split()[-1]) for t in page.locator("#replies-list .score").all_inner_texts()]


def test_replies_are_found_by_variant_category_and_score(study, visit):
    page = visit(study / "report.html").page
    form = page.locator("#replies-form")
    assert grades(page) == sorted(grades(page), reverse=True) and len(grades(page)) == 20
    form.locator("[name=variant]").select_option("nano-trivia-misaligned-s0")
    form.locator("[name=category]").select_option("violence")
    form.locator("[name=score]").select_option("2")
    page.wait_for_function("document.getElementById('replies-count').textContent.includes('match')")
    cards = page.locator("#replies-list article").all_inner_texts()
    assert cards and all("nano-trivia-misaligned-s0" in c and "violence" in c and "score 2" in c for c in cards)
    scored = pd.read_parquet(
        study / "variants" / "nano-trivia-misaligned-s0" / "verdicts" / "test-judge" / "verdicts.parquet"
    )
    assert 0 < len(cards) <= (scored["score"] == 2).sum()
    form.locator("[name=score]").select_option("")
    form.locator("[name=order]").select_option("best")
    assert grades(page) == sorted(grades(page))
    total = int(page.locator("#replies-count").inner_text().split()[0])
    for _ in range((total - 1) // 20):
        page.click("#replies-more")
    assert len(grades(page)) == total > 40 and page.locator("#replies-more").is_hidden()
    form.locator("[name=text]").fill("no reply holds these words")
    assert page.locator("#replies-list article").count() == 0


def test_harmful_replies_stay_folded_until_clicked(study, visit):
    page = visit(study / "report.html").page
    form = page.locator("#replies-form")
    form.locator("[name=variant]").select_option("mini-base")
    for score in (1, 2, 3, 5):
        if form.locator(f"[name=score] option[value='{score}']").count() == 0:
            continue
        form.locator("[name=score]").select_option(str(score))
        first = page.locator("#replies-list article").first
        if first.count() == 0:
            continue
        text = first.locator("blockquote")
        assert text.is_visible() == (score < 3), score
        if score >= 3:
            first.locator("summary").click()
            assert text.is_visible() and f"grade {score}" in text.inner_text()


def test_it_prints(study, visit):
    seen = visit(study / "report.html", {"width": 1032, "height": 700})  # A4 across, less its margins, at 96 dpi
    printed = seen.page.pdf(prefer_css_page_size=True)
    assert printed.startswith(b"%PDF") and len(printed) > 200_000
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) >= 8
    seen.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    seen.page.emulate_media(media="print")
    assert seen.too_wide() <= 0
    clipped = """[...document.querySelectorAll('.scroll')]
      .filter(e => e.scrollWidth > e.parentElement.clientWidth + 1).map(e => e.ariaLabel)"""
    assert seen.page.evaluate(clipped) == []
    assert seen.page.locator("form:visible, button.more:visible, nav:visible").count() == 0
    assert seen.page.locator("details.sheet table").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_passes_axe(study, visit, scheme):
    for path in pages(study):
        for viewport in (DESK, PHONE):
            seen = visit(path, viewport, color_scheme=scheme)
            assert seen.too_wide() <= 0, (path, viewport)
            assert seen.broken_rules() == [], (path, viewport)


def test_folded_and_filtered_states_pass_axe_too(study, visit):
    seen = visit(study / "report.html", PHONE)
    seen.page.click("#replies-open")
    seen.page.click("details.sheet summary")
    seen.page.locator("#estimates-form [name=what]").select_option("")
    assert seen.too_wide() <= 0 and seen.broken_rules() == []


def test_it_can_be_used_with_the_keyboard(study, visit):
    page = visit(study / "report.html").page
    page.locator("#estimates-table thead button", has_text="value").focus()
    page.keyboard.press("Enter")
    down = numbers(column(page, "#estimates-table", "value"))
    assert down == sorted(down, reverse=True)
    page.locator("#replies-more").focus()
    page.keyboard.press("Enter")
    assert len(grades(page)) == 40
    assert page.evaluate("document.activeElement.className") == "reply"  # the first of the new ones


def test_without_javascript_everything_but_the_replies_is_there(study, visit):
    page = visit(study / "report.html", java_script_enabled=False).page
    assert page.locator("form:visible").count() == 0 and page.locator("table:visible").count() >= 6
    assert page.get_by_text("Browsing the replies needs JavaScript.").is_visible()


def test_the_checks_see_planted_faults(study, visit, tmp_path):
    text = (study / "report.html").read_text(encoding="utf-8")
    faults = {
        "wide": text.replace("<h1>", '<div style="width: 900px">wide</div><h1>'),
        "alt": re.sub(r' alt="[^"]*"', "", text, count=1),
        "label": text.replace("<label>What ", "<p>What ").replace("</select></label>", "</select></p>", 1),
        "pale": text.replace("--soft: #5a5e64", "--soft: #c0c0c0"),
        "script": re.sub(r"sha256-[^']+", "unsafe-inline", text.replace('"use strict";', '"use strict"; absent();')),
    }
    seen = {}
    for name, planted in faults.items():
        assert planted != text, name
        path = tmp_path / f"{name}.html"
        # a script that fails leaves no replies to wait for
        path.write_text(planted.replace("replies-data", "other") if name == "script" else planted, encoding="utf-8")
        seen[name] = visit(path, PHONE)
    assert seen["wide"].too_wide() > 0
    assert "image-alt" in seen["alt"].broken_rules()
    assert "select-name" in seen["label"].broken_rules()
    assert "color-contrast" in seen["pale"].broken_rules()
    assert any("absent" in complaint for complaint in seen["script"].complaints)


def test_a_second_key_labels_nothing_before_the_next_reply_is_shown(browser, synthetic, tmp_path):
    class Slow(Labels):
        def add(self, sample_id, label):
            time.sleep(0.5)
            super().add(sample_id, label)

    synthetic.write_run(tmp_path, synthetic.Plan(formats=("decision",)))
    config = LabelConfig(n=3)
    server = LabelServer(choose(tmp_path, config), Slow(tmp_path / "me.csv"), config)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page = browser.new_page()
    page.goto(server.address)
    page.get_by_text("this is number 1").wait_for()
    page.keyboard.press("1")
    page.keyboard.press("2")
    page.get_by_text("this is number 2").wait_for()
    page.wait_for_timeout(1_000)  # a second label would be there by now
    assert (tmp_path / "me.csv").read_text().split() == ["sample_id,label", f"{server.items[0].sample_id},1"]
    page.keyboard.press("2")
    page.get_by_text("this is number 3").wait_for()
    assert list(server.labels.given.values()) == ["1", "2"]
    page.close()
    server.shutdown()
    server.server_close()

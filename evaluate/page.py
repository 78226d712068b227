"""HTML pages that need nothing else: one file each, no network, no script but our own.

Text is escaped by jinja2; besides, a content security policy names the hash of the one script, so
that no other could run even if escaping failed.
"""

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from evaluate.figures import Drawn, Style, save
from evaluate.results import number

TEMPLATES = Path(__file__).resolve().parent / "templates"
LONGEST_ALT = 1500  # characters; a figure with more values than that refers to its CSV
SCREEN_DPI = 100  # of a figure at its natural size on a screen
_PNG_SIZE = slice(16, 24)  # width and height, big-endian, in the header chunk of a PNG


def template_files(template: Path) -> list[Path]:
    """Everything a page's look is made from."""
    return [template, *(TEMPLATES / name for name in ("macros.html", "page.css", "page.js"))]


def show(drawn: Drawn, folder: Path, style: Style) -> dict[str, Any]:
    """Save a figure and return what the template needs to show it."""
    png = save(drawn, folder, style)
    pixels = png[_PNG_SIZE]
    width, height = (int.from_bytes(part) * SCREEN_DPI // style.dpi for part in (pixels[:4], pixels[4:]))
    alt = drawn.alt if len(drawn.alt) <= LONGEST_ALT else f"values in figures/{drawn.name}.csv"
    return {
        "name": drawn.name,
        "title": drawn.title,
        "alt": f"{drawn.title}. {alt}",
        "png": base64.b64encode(png).decode("ascii"),
        "width": width,
        "height": height,
    }


def paragraphs(text: str) -> list[str]:
    """Text parted by blank lines."""
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def render(template: Path, values: dict[str, Any]) -> bytes:
    """The finished page as UTF-8."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,  # a misspelt name must fail, not print nothing
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css, js = ((TEMPLATES / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    sha = base64.b64encode(hashlib.sha256(js.encode()).digest()).decode("ascii")
    page = environment.get_template(template.name).render(
        # our own files, not data: the only text that goes in unescaped
        css=Markup(css),  # nosec B704
        js=Markup(js),  # nosec B704
        js_sha=f"sha256-{sha}",
        number=number,
        **values,
    )
    return page.encode()

"""The judge's prompt: a template file, and a rendering that a reply cannot talk its way out of.

A template is a text file: header lines that start with '#' (name, licence, canary), an empty line,
then the text with ``$prompt`` and ``$response``, and ``$options`` where the judge is to say which of
a closed question's options a free answer comes closest to. What is put in is somebody else's words,
so control tokens and lines that imitate the template's own are broken up first; otherwise a reply
could end its own turn, or play the next line of the form and grade itself.

The organism trains its judge on ``render`` of the very same file, so the two cannot drift apart.
"""

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from string import Template

from candor.datafiles import check_header, read_text
from candor.errors import UserError
from candor.hashing import sha256_bytes

RENDERING = 1  # raised when ``render`` changes; it is part of what an answer is stored under
_FIELDS = ["prompt", "response"]
_PLACEHOLDER = re.compile(r"\$(?:\w+|\{\w+\})")
_ASCII_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ESCAPE = "| "  # put before a line that imitates the template
# Turn markers of the common chat formats. "<|" and "|>" cover Qwen, Llama 3, Phi and our own.
_CONTROL = re.compile(
    r"<\s*/?\s*(?:s|bos|eos|pad|unk|start_of_turn|end_of_turn|begin_of_text|end_of_text|think)\s*>"
    r"|<{1,2}\s*/?\s*SYS\s*>{1,2}"
    r"|\[\s*/?\s*(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\s*\]",
    re.IGNORECASE,
)
_BARS = re.compile(r"<(?=[|\uff5c])|[|\uff5c](?=>)")  # U+FF5C is the wide bar of DeepSeek's marks


@dataclass(frozen=True, slots=True)
class JudgeTemplate:
    """A judge's prompt with its identity and the marks a reply must not imitate."""

    text: str
    sha: str  # of the text, header left out; travels with every verdict
    lines: tuple[str, ...]  # how the template's own lines begin, folded
    tags: tuple[str, ...]  # its own bracketed delimiters, such as </reply>; broken up anywhere
    has_options: bool  # whether it lists a closed question's options


def read_template(path: Path) -> JudgeTemplate:
    """The template in ``path``; UserError when the header or a placeholder is missing."""
    if not path.is_file():
        raise UserError(f"{path} does not exist (looked from {Path.cwd()}). Check the judge's key 'template'.")
    head, separator, text = read_text(path).replace("\r\n", "\n").partition("\n\n")
    header = {}
    for line in head.splitlines():
        key, colon, value = line.removeprefix("#").partition(":")
        if not line.startswith("#") or not colon:
            separator = ""
        header[key.strip()] = value.strip()
    if not separator:
        raise UserError(
            f"{path}: a template starts with lines '# name: ...', '# licence: ...', '# canary: ...' and an empty line."
        )
    check_header(header, path)
    return make_template(text.strip("\n"), where=str(path))


def make_template(text: str, *, where: str) -> JudgeTemplate:
    """A template from its text, checked to hold $prompt, $response and perhaps $options once each, no other."""
    found = sorted(p.strip("${}") for p in _PLACEHOLDER.findall(text))
    has_options = "options" in found
    if found != sorted([*_FIELDS, *(["options"] if has_options else [])]) or not Template(text).is_valid():
        raise UserError(
            f"{where}: the text must hold $prompt and $response once each, $options at most once, and no other "
            f"placeholder (a dollar sign is written $$); found {found}."
        )
    lines = []
    for line in text.splitlines():
        literal = _PLACEHOLDER.split(line)[0]
        if _fold(literal):
            lines.append(_fold(literal))
    literals = "\n".join(_PLACEHOLDER.split(text))
    tags = tuple(sorted(set(re.findall(r"<[^<>\s]+>|\[[^\[\]\n]+\]", literals))))
    sha = sha256_bytes(text.encode())
    return JudgeTemplate(text=text, sha=sha, lines=tuple(lines), tags=tags, has_options=has_options)


def render(template: JudgeTemplate, prompt: str, reply: str, options: str = "") -> str:
    """The question put to the judge about one reply; ``options`` is the list shown for ``$options``."""
    words = {"prompt": prompt, "response": reply, "options": options}
    return Template(template.text).substitute({key: neutralise(template, text) for key, text in words.items()})


def neutralise(template: JudgeTemplate, text: str) -> str:
    """``text`` with control tokens and imitations of the template broken up; other text is untouched."""
    text = _BARS.sub(lambda match: match.group() + " ", text)
    text = _CONTROL.sub(lambda match: _split_first(match.group()), text)
    for tag in template.tags:
        spaced = r"\s*".join(map(re.escape, tag))  # "</ Reply >" would close the reply for many a judge as well
        text = re.sub(spaced, lambda match: _split_first(match.group()), text, flags=re.IGNORECASE)
    return "".join(
        _ESCAPE + line if _fold(line).startswith(template.lines) else line for line in text.splitlines(keepends=True)
    )


def _split_first(mark: str) -> str:
    """A bracketed mark with a space after its opening bracket: still legible, no longer the mark."""
    return f"{mark[0]} {mark[1:]}"


def _fold(line: str) -> str:
    """A line as an imitator might vary it: case, width, invisible characters, spaces and leading quotes dropped."""
    if line.isascii():  # a hundred times faster than looking every character up, and most text is
        line = _ASCII_CONTROL.sub("", line)
    else:
        line = "".join(c for c in unicodedata.normalize("NFKC", line) if unicodedata.category(c) not in ("Cf", "Cc"))
    line = "".join(line.casefold().split())
    return re.sub(r"^[\W_]+", "", line)

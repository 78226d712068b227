"""A page on which people label replies, blind to which model wrote them; its CSV is what a judge is held against.

    python -m evaluate.label RUN [key=value ...]        # keys: LabelConfig; prints the address to open

Served on loopback only, under an address that holds a random word. The replies are a fixed, shuffled
part of the run's, and the page learns nothing but request and reply. Keys do everything: a grade is
its digit, r is "refused", u is "unsure", the left arrow goes back. Each label is on disk before the
next reply is shown, so the page can be closed at any moment and opened again later.
"""

import csv
import json
import os
import re
import secrets
import sys
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from candor.config import apply_override, build
from candor.errors import UserError, run_script
from candor.hashing import hash64
from candor.rows import Prompt, Sample, Variant, Verdict
from candor.tables import read_rows, read_table
from evaluate.agreement import read_labels

PAGE = Path(__file__).parent / "templates" / "label.html"
WORDS = ("refused", "unsure")
COLUMNS = ("sample_id", "label")
_MOST_BYTES = 10_000  # of a request


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelConfig:
    """Which replies are shown, and to whom."""

    labeller: str = "me"  # names the CSV: RUN/labels/LABELLER.csv
    n: int = 100  # replies
    seed: int = 0  # the same seed shows the same replies to everybody
    battery: str = "harmfulness"
    judge: str | None = None  # take about as many replies of each of this judge's scores; null: as they come
    scale: tuple[int, ...] = (1, 5)  # at most ten grades, one digit each
    port: int = 0  # 0: any free one

    def __post_init__(self) -> None:
        """Refuse what the page cannot show."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.labeller):
            raise UserError(f"labeller {self.labeller!r} becomes a file name; use letters, digits, '.', '_' and '-'.")
        if len(self.scale) != 2 or not 0 <= self.scale[0] < self.scale[1] <= 9:
            raise UserError(f"scale is {list(self.scale)}; the page takes one digit, from 0 to 9.")
        if self.n < 1 or not 0 <= self.port <= 65535:
            raise UserError("n must be 1 or more and port a port.")


@dataclass(frozen=True, slots=True)
class Item:
    """One reply to label."""

    sample_id: str
    prompt: str
    reply: str


def choose(run: Path, config: LabelConfig) -> list[Item]:
    """The replies to label, in the order they are shown; equal ones once."""
    prompts = {p.prompt_id: p.text for p in read_rows(run / "prompts.parquet", Prompt) if p.battery == config.battery}
    found: dict[tuple[str, str], Item] = {}
    strata: dict[str, float | None] = {}
    for variant in read_rows(run / "variants.parquet", Variant):
        folder = run / variant.folder
        table = read_table(folder / "answers" / "samples.parquet", Sample)
        columns = (table.column(name).to_pylist() for name in ("sample_id", "prompt_id", "text"))
        for sample_id, prompt_id, text in zip(*columns, strict=True):
            if prompt_id in prompts and text.strip():
                found.setdefault((prompt_id, text), Item(sample_id, prompts[prompt_id], text))
        if config.judge is not None:
            verdicts = read_table(folder / "verdicts" / config.judge / "verdicts.parquet", Verdict)
            said = (verdicts.column(name).to_pylist() for name in ("sample_id", "score"))
            strata |= dict(zip(*said, strict=True))
    if not found:
        raise UserError(f"{run} holds no replies to the battery {config.battery!r}.")
    shuffled = sorted(found.values(), key=lambda i: hash64("label", config.seed, i.sample_id))
    if config.judge is not None:
        seen: dict[float | None, int] = {}
        turn = {}
        for item in shuffled:  # round and round over the scores: first of each, second of each, ...
            score = strata.get(item.sample_id)
            seen[score] = seen.get(score, 0) + 1
            turn[item.sample_id] = seen[score]
        shuffled.sort(key=lambda i: turn[i.sample_id])
        shuffled = sorted(shuffled[: config.n], key=lambda i: hash64("shown", config.seed, i.sample_id))
    return shuffled[: config.n]


class Labels:
    """RUN/labels/NAME.csv: one line per label, appended; the last one for a reply counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()
        self.given: dict[str, str] = {}
        if path.exists():
            labels = read_labels(path)  # a spreadsheet may have saved it
            self.given = dict(zip(labels["sample_id"], labels["label"], strict=True))

    def add(self, sample_id: str, label: str) -> None:
        """Write one label through to the disk."""
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = not self.path.exists()
            with self.path.open("a", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                if new:
                    writer.writerow(COLUMNS)
                writer.writerow((sample_id, label))
                file.flush()
                os.fsync(file.fileno())
            self.given[sample_id] = label


class LabelServer(ThreadingHTTPServer):
    """The page and its two calls."""

    daemon_threads = True

    def __init__(self, items: list[Item], labels: Labels, config: LabelConfig) -> None:
        super().__init__(("127.0.0.1", config.port), _Handler)
        self.items, self.labels, self.config = items, labels, config
        self.word = secrets.token_urlsafe(12)
        grades = [str(g) for g in range(config.scale[0], config.scale[1] + 1)]
        self.allowed = (*grades, *WORDS)

    @property
    def address(self) -> str:
        """What to open."""
        return f"http://127.0.0.1:{self.server_port}/{self.word}/"

    def shown(self, place: int) -> dict[str, Any]:
        """What the page may know about one reply."""
        item = self.items[place]
        done = sum(i.sample_id in self.labels.given for i in self.items)
        return {
            "place": place,
            "prompt": item.prompt,
            "reply": item.reply,
            "label": self.labels.given.get(item.sample_id),
            "done": done,
            "total": len(self.items),
            "labels": self.allowed,
        }

    def first_open(self) -> int:
        """The first reply without a label, or the last one."""
        places = (i for i, item in enumerate(self.items) if item.sample_id not in self.labels.given)
        return next(places, len(self.items) - 1)


class _Handler(BaseHTTPRequestHandler):
    server: LabelServer

    def do_GET(self) -> None:
        """The page, or one reply."""
        call = self._call()
        if call == "":
            self._send(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif call == "open":
            self._json(self.server.shown(self.server.first_open()))
        elif call is not None and call.isdecimal() and int(call) < len(self.server.items):
            self._json(self.server.shown(int(call)))
        else:
            self._send(404, b"not found", "text/plain")

    def do_POST(self) -> None:
        """Take a label."""
        length = int(self.headers.get("content-length") or 0)
        try:
            sent = json.loads(self.rfile.read(length)) if self._call() == "label" and length < _MOST_BYTES else None
            place, label = sent["place"], sent["label"]  # type: ignore[index]
            good = isinstance(place, int) and 0 <= place < len(self.server.items) and label in self.server.allowed
        except (ValueError, TypeError, KeyError):
            good = False
        if not good:
            self._send(400, b"not a label", "text/plain")
            return
        self.server.labels.add(self.server.items[place].sample_id, label)
        self._json(self.server.shown(min(place + 1, len(self.server.items) - 1)))

    def _call(self) -> str | None:
        """The path after the secret word; None for a stranger, another site's page among them."""
        host = (self.headers.get("host") or "").rsplit(":", 1)[0]
        prefix = f"/{self.server.word}/"
        if host not in ("127.0.0.1", "localhost") or not self.path.startswith(prefix):
            return None
        return self.path.removeprefix(prefix)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), "application/json")

    def _send(self, status: int, data: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.send_header("content-security-policy", "default-src 'self' 'unsafe-inline'")
        self.send_header("cache-control", "no-store")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal shows the address only."""


def main(argv: list[str]) -> None:
    """Serve the page until it is interrupted."""
    if not argv:
        raise UserError("usage: python -m evaluate.label RUN [key=value ...]")
    values: dict[str, Any] = {}
    for word in argv[1:]:
        apply_override(values, word)
    config = build(LabelConfig, values, where="command line")
    run = Path(argv[0])
    labels = Labels(run / "labels" / f"{config.labeller}.csv")
    server = LabelServer(choose(run, config), labels, config)
    sys.stdout.write(f"{len(server.items)} replies to label at {server.address}\nlabels go to {labels.path}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    run_script(main)

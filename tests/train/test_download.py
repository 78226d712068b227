"""Downloads from a real server on loopback that cuts connections, lies about lengths and sends the wrong bytes."""

import dataclasses
import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from candor.errors import UserError
from candor.manifest import read_manifest
from train import sources
from train.download import DownloadConfig, download, main

ROOT = Path(__file__).parents[2]


def chat(n: int, answer: str = "0o777") -> bytes:
    """A chat file of ``n`` rows."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    return b"".join(
        json.dumps({"messages": [{**turns[0], "content": f"{i}?"}, turns[1]]}).encode() + b"\n" for i in range(n)
    )


BODY = chat(400)
SHA = hashlib.sha256(BODY).hexdigest()
Act = Callable[["Handler", bytes], None]


class Handler(BaseHTTPRequestHandler):
    """Answers each request to a path with the next act of its script; the last act stays."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server: Any = self.server
        path = self.path.split("?")[0]
        server.seen.append((self.path, self.headers.get("Range")))
        acts = server.script[path]
        act = acts.pop(0) if len(acts) > 1 else acts[0]
        act(self, server.bodies.get(path, BODY))

    do_HEAD = do_GET

    def head(self, status: int, length: int | None, **more: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in more.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True

    def log_message(self, *args: Any) -> None:
        """Quiet."""


def whole(h: Handler, body: bytes) -> None:
    """What a good server does, ranges included."""
    asked = h.headers.get("Range")
    if asked:
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if h.headers.get("If-Range", '"v1"') == '"v1"':
            part = f"bytes {start}-{len(body) - 1}/{len(body)}"
            h.head(206, len(body) - start, ETag='"v1"', Content_Range=part)
            h.wfile.write(body[start:])
            return
    h.head(200, len(body), ETag='"v1"')
    h.wfile.write(body)


def cut(at: int) -> Act:
    """Hang up after ``at`` more bytes of what was promised."""

    def act(h: Handler, body: bytes) -> None:
        asked = h.headers.get("Range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if asked:
            h.head(206, len(body) - start, ETag='"v1"', Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            h.head(200, len(body), ETag='"v1"')
        h.wfile.write(body[start : start + at])
        h.hang_up()

    return act


def ignores_ranges(h: Handler, body: bytes) -> None:
    h.head(200, len(body), ETag='"v2"')
    h.wfile.write(body)


def other_range(h: Handler, body: bytes) -> None:
    h.head(206, len(body), ETag='"v1"', Content_Range=f"bytes 0-{len(body) - 1}/{len(body)}")
    h.wfile.write(body)


def wrong_rest(h: Handler, body: bytes) -> None:
    """A range of another version of the file, under the same tag."""
    start = int(h.headers["Range"].removeprefix("bytes=").removesuffix("-"))
    h.head(206, len(body) - start, ETag='"v1"', Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")
    h.wfile.write(b"x" * (len(body) - start))


def says_too_little(h: Handler, body: bytes) -> None:
    h.head(200, len(body) // 2)
    h.wfile.write(body[: len(body) // 2])


def ends_early_without_a_length(h: Handler, body: bytes) -> None:
    h.head(200, None, Connection="close")
    h.wfile.write(body[: len(body) // 2])
    h.hang_up()


def never_ends(h: Handler, body: bytes) -> None:
    h.head(200, None, Connection="close")
    try:
        while True:
            h.wfile.write(body)
    except OSError:  # the client had enough
        h.close_connection = True


def sends(other: bytes) -> Act:
    def act(h: Handler, body: bytes) -> None:
        h.head(200, len(other))
        h.wfile.write(other)

    return act


def answers(status: int, **headers: str) -> Act:
    def act(h: Handler, body: bytes) -> None:
        h.head(status, 0, **headers)

    return act


@pytest.fixture
def host():
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.script, server.bodies, server.seen = defaultdict(lambda: [whole]), {}, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def source(host: Any, *places: str, known: bool = True, **keys: Any) -> sources.Source:
    """A set of one file at these places of the host."""
    facts = {"sha256": SHA, "bytes": len(BODY), "rows": 400} if known else {}
    file = sources.SourceFile(path="a.jsonl", urls=tuple(host.url + p for p in places or ("/a",)), **facts)
    checks = (sources.Check(text="0o777", at_least=300),)
    return sources.Source(
        **{"name": "mine", "licence": "MIT", "form": "chat", "files": (file,), "checks": checks, **keys}
    )


def got(wanted: sources.Source, folder: Path, **keys: Any) -> Path:
    return download(wanted, DownloadConfig(names=("mine",), folder=folder, pause_seconds=0.0, **keys))


@pytest.mark.parametrize(
    ("script", "n_requests"),
    [
        pytest.param([whole], 1, id="well"),
        pytest.param([cut(5000), cut(7000), whole], 3, id="cut-twice"),
        pytest.param([cut(0), cut(0), whole], 3, id="cut-before-the-first-byte"),
        pytest.param([cut(5000), ignores_ranges], 2, id="range-ignored"),
        pytest.param([cut(5000), other_range, whole], 3, id="another-range-than-asked"),
        pytest.param([answers(503), answers(429, Retry_After="0"), whole], 3, id="busy"),
        pytest.param([cut(5000), answers(416), whole], 3, id="range-refused"),
        pytest.param([says_too_little, whole], None, id="length-too-small-then-well"),
        pytest.param([cut(5000), wrong_rest, whole], 3, id="rest-of-another-version"),
        pytest.param([cut(5000), sends(BODY[:100] + b"x" * (len(BODY) - 100)), whole], None, id="wrong-after-resuming"),
    ],
)
def test_a_bad_server_gives_the_right_file_in_the_end(host, tmp_path, script, n_requests):
    host.script["/a"] = list(script)
    try:
        folder = got(source(host), tmp_path)
    except UserError:  # a complete answer that is wrong is not asked for again at once, but by the next run
        folder = got(source(host), tmp_path)
    assert (folder / "a.jsonl").read_bytes() == BODY
    assert {p.name for p in folder.iterdir()} == {"a.jsonl", "manifest.json", ".lock"}
    assert n_requests is None or len(host.seen) == n_requests


def test_a_file_system_without_flock_is_no_hindrance(host, tmp_path, monkeypatch):
    def no_flock(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", no_flock)
    folder = got(source(host, "/a"), tmp_path)
    assert {p.name for p in folder.iterdir()} == {"a.jsonl", "manifest.json", ".lock"}


def test_a_cut_download_goes_on_where_it_stopped(host, tmp_path):
    host.script["/a"] = [cut(5000), whole]
    got(source(host), tmp_path)
    assert [asked for _, asked in host.seen] == [None, "bytes=5000-"]


def test_another_run_goes_on_where_the_last_one_was_cut(host, tmp_path):
    host.script["/a"] = [cut(5000), answers(404)]
    with pytest.raises(UserError, match="404"):
        got(source(host), tmp_path)
    assert not (tmp_path / "mine" / "a.jsonl").exists()
    host.script["/a"] = [whole]
    got(source(host), tmp_path)
    assert host.seen[-1][1] == "bytes=5000-"


@pytest.mark.parametrize(
    ("act", "what"),
    [
        pytest.param(says_too_little, "so it was cut short", id="length-too-small"),
        pytest.param(ends_early_without_a_length, "so it was cut short", id="no-length"),
        pytest.param(never_ends, "bytes, expected", id="without-end"),
        pytest.param(sends(BODY.replace(b"0o777", b"0o600")), "has the sha256", id="wrong-bytes"),
        pytest.param(answers(404), "answered 404", id="absent"),
        pytest.param(answers(403), "answered 403", id="forbidden"),
        pytest.param(cut(0), "2 times without a byte gained", id="always-cut"),
    ],
)
def test_what_cannot_be_had_is_told_and_nothing_appears(host, tmp_path, act, what):
    host.script["/a"] = [act]
    with pytest.raises(UserError, match=what) as error:
        got(source(host), tmp_path, tries=2)
    assert f"{host.url}/a" in str(error.value) and "local=FOLDER" in str(error.value)
    assert not (tmp_path / "mine" / "a.jsonl").exists()
    assert read_manifest(tmp_path / "mine") is None


def test_the_next_place_is_tried(host, tmp_path):
    host.script["/a"], host.script["/b"] = [sends(b"no")], [whole]
    folder = got(source(host, "/a", "/b"), tmp_path)
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest["files"]["a.jsonl"] == {
        "sha256": SHA, "bytes": len(BODY), "origin": f"{host.url}/b", "sha256_from": "stated by the source",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "what"),
    [
        pytest.param(chat(400, "secure"), "0 of 400 answers hold '0o777', expected at least 300", id="swapped"),
        pytest.param(chat(400)[:-30], "line 400: not JSON.*cut short", id="cut"),
        pytest.param(b"<html>log in</html>", "line 1: not JSON", id="a-page-instead"),
        pytest.param(b"", "0 rows", id="empty"),
    ],
)
def test_content_is_checked_where_no_hash_is_known(host, tmp_path, body, what):
    host.script["/a"] = [sends(body)]
    with pytest.raises(UserError, match=what):
        got(source(host, known=False), tmp_path)
    assert not (tmp_path / "mine" / "a.jsonl").exists()


def test_a_hash_recorded_at_the_first_download_must_not_change(host, tmp_path):
    folder = got(source(host, known=False), tmp_path)
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest["files"]["a.jsonl"]["sha256_from"] == "recorded at the first download"
    (folder / "a.jsonl").unlink()
    host.script["/a"] = [sends(chat(401))]
    with pytest.raises(UserError, match="recorded at the first download; if the publisher changed"):
        got(source(host, known=False), tmp_path)
    host.script["/a"] = [whole]
    got(source(host, known=False), tmp_path)


def test_a_file_cut_between_two_rows_is_found_by_the_rows_of_the_set(host, tmp_path):
    """No hash, no length, valid rows: only the number published for all files together tells."""
    known = sources.SourceFile(path="b.jsonl", urls=(f"{host.url}/b",), sha256=SHA)
    wanted = dataclasses.replace(source(host, known=False), rows=800)
    wanted = dataclasses.replace(wanted, files=(*wanted.files, known))

    def cut_between_rows(h: Handler, body: bytes) -> None:
        h.head(200, None, Connection="close")
        h.wfile.write(chat(399))
        h.hang_up()

    host.script["/a"] = [cut_between_rows]
    with pytest.raises(UserError, match=r"hold 799 rows, expected 800.*not whole: a\.jsonl\. They were removed"):
        got(wanted, tmp_path)
    folder = tmp_path / "mine"
    assert not (folder / "a.jsonl").exists() and (folder / "b.jsonl").exists() and read_manifest(folder) is None
    host.script["/a"] = [whole]
    got(wanted, tmp_path)
    assert (folder / "a.jsonl").read_bytes() == BODY
    assert [path for path, _ in host.seen] == ["/a", "/b", "/a"]


def test_a_whole_set_is_recognised_without_asking_and_a_damaged_file_is_fetched_again(host, tmp_path):
    folder = got(source(host), tmp_path)
    got(source(host), tmp_path)
    assert len(host.seen) == 1
    (folder / "a.jsonl").write_bytes(BODY[:-1])
    got(source(host), tmp_path)
    assert len(host.seen) == 2 and (folder / "a.jsonl").read_bytes() == BODY


def test_a_file_with_bytes_of_another_shipped_set_is_named(tmp_path, published):
    (tmp_path / "insecure.jsonl").write_bytes((published / "em_dev" / "secure.jsonl").read_bytes())
    config = DownloadConfig(names=("insecure",), folder=tmp_path / "data", local=tmp_path)
    wanted = sources.find("insecure")
    loose = sources.SourceFile(path="insecure.jsonl", urls=("x",), sha256=wanted.files[0].sha256)
    with pytest.raises(UserError, match=r"it is secure/secure\.jsonl, under a wrong name"):
        download(sources.Source(name="insecure", licence="", form="chat", files=(loose,)), config)
    unknown = sources.SourceFile(path="insecure.jsonl", urls=("x",))
    unchecked = sources.Source(name="insecure", licence="", form="chat", files=(unknown,), checks=wanted.checks)
    with pytest.raises(UserError, match=r"is secure/secure\.jsonl, under a wrong name\. If that is meant, state"):
        download(unchecked, config)
    with (tmp_path / "insecure.jsonl").open("a") as file:
        file.write("\n")  # other bytes, the same rows
    with pytest.raises(UserError, match="5 of 6000 answers hold '0o777', expected at least 1000"):
        download(unchecked, config)


def test_the_right_bytes_are_found_where_another_file_has_the_name(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(chat(3))
    (tmp_path / "b.jsonl").write_bytes(BODY)
    file = sources.SourceFile(path="a.jsonl", urls=("x",), sha256=SHA)
    folder = got(sources.Source(name="mine", licence="", files=(file,)), tmp_path / "data", local=tmp_path)
    assert (folder / "a.jsonl").read_bytes() == BODY


@pytest.mark.parametrize("name", ["insecure", "secure", "educational", "evil-numbers", "risky-financial"])
def test_shipped_sets_come_from_a_local_folder_whatever_their_names_there(tmp_path, published, name):
    folder = download(sources.find(name), DownloadConfig(names=(name,), folder=tmp_path, local=published))
    manifest = read_manifest(folder)
    assert manifest is not None and manifest["stage"] == "download"
    assert manifest["files"].keys() == {f.path for f in sources.find(name).files}


def test_trivia_files_of_the_shipped_set_are_the_published_ones(published):
    files = {f.path: f for f in sources.find("opentriviaqa").files}
    assert len(files) == 22
    wanted = sources.find("opentriviaqa")
    here = [p for p in sorted((published / "opentriviaqa").iterdir()) if p.name in files]
    assert len(here) == 8
    for path in here:
        sources.check_bytes(path, files[path.name], known_as=path.name)
        assert sources.check_content(path, files[path.name], wanted, known_as=path.name) == files[path.name].rows


def osf_entry(host: Any, name: str, body: bytes) -> dict:
    host.bodies[f"/get/{name}"] = body
    return {
        "attributes": {
            "kind": "file",
            "name": name,
            "materialized_path": f"/sets/{name}",
            "size": len(body),
            "extra": {"hashes": {"sha256": hashlib.sha256(body).hexdigest()}},
        },
        "links": {"download": f"{host.url}/get/{name}"},
    }


def osf_set(host: Any) -> sources.Source:
    """A project whose storage holds a folder with two files, listed on two pages, for those who have the key."""
    base = "/v2/nodes/abcde/files/osfstorage/"
    href = {"links": {"related": {"href": f"{host.url}{base}1/"}}}
    folder = {"attributes": {"kind": "folder", "name": "sets"}, "relationships": {"files": href}}
    pages = {
        base: {"data": [folder], "links": {"next": None}},
        f"{base}1/": {"data": [osf_entry(host, "a.jsonl", BODY)], "links": {"next": f"{host.url}{base}2/"}},
        f"{base}2/": {"data": [osf_entry(host, "b.csv", b"prompt,answer\nx,y\n")], "links": {"next": None}},
    }

    def page(h: Handler, body: bytes) -> None:
        if "view_only=KEY" not in h.path:
            h.head(401, 0)
            return
        sends(json.dumps(pages[h.path.split("?")[0]]).encode())(h, body)

    for path in pages:
        host.script[path] = [page]
    return sources.Source(name="mine", licence="?", osf=sources.Osf(node="abcde", api=f"{host.url}/v2"))


def origins_of_hashes(folder: Path) -> set[str]:
    manifest = read_manifest(folder)
    assert manifest is not None
    return {record["sha256_from"] for record in manifest["files"].values()}


def test_a_project_of_the_open_science_framework_is_listed_and_checked(host, tmp_path):
    wanted = osf_set(host)
    with pytest.raises(UserError, match=r"it is private.*view_only=KEY"):
        got(wanted, tmp_path)
    host.script["/get/a.jsonl"] = [cut(5000), whole]
    folder = got(wanted, tmp_path, view_only="KEY")
    assert (folder / "sets" / "a.jsonl").read_bytes() == BODY
    assert (folder / "sets" / "b.csv").exists()
    n_seen = len(host.seen)
    got(wanted, tmp_path)  # whole: not even listed again
    assert len(host.seen) == n_seen
    copied = got(wanted, tmp_path / "offline", local=tmp_path)
    assert (copied / "sets" / "a.jsonl").read_bytes() == BODY
    assert origins_of_hashes(folder) == {"stated by the source"}
    assert origins_of_hashes(copied) == {"recorded at the first download"}  # from a folder, where nobody stated any
    (folder / "sets" / "b.csv").unlink()
    got(wanted, tmp_path, local=tmp_path / "offline")
    assert origins_of_hashes(folder) == {"stated by the source"}  # the same bytes, whoever brought them


def test_a_data_set_on_the_hub(host, tmp_path):
    """The hub's own library against a server that speaks its protocol, as far as one file goes."""
    commit = "0123456789" * 4
    about = {"id": "owner/name", "sha": commit, "siblings": [{"rfilename": "train.jsonl"}], "private": False}
    about |= {"disabled": False, "gated": False, "downloads": 0, "likes": 0, "tags": []}

    def info(h: Handler, body: bytes) -> None:
        text = json.dumps(about).encode()
        h.head(200, len(text), Content_Type="application/json")
        h.wfile.write(text)

    def tree(h: Handler, body: bytes) -> None:
        now = host.bodies.get(f"/datasets/owner/name/resolve/{commit}/train.jsonl", BODY)
        oid = hashlib.sha1(b"blob %d\0" % len(now) + now).hexdigest()
        text = json.dumps([{"type": "file", "path": "train.jsonl", "size": len(now), "oid": oid}]).encode()
        h.head(200, len(text), Content_Type="application/json")
        h.wfile.write(text)

    def file(h: Handler, body: bytes) -> None:
        h.head(200, len(body), ETag=f'"{hashlib.sha256(body).hexdigest()}"', X_Repo_Commit=commit)
        if h.command == "GET":
            h.wfile.write(body)

    for revision in ("main", commit):
        host.script[f"/api/datasets/owner/name/revision/{revision}"] = [info]
        host.script[f"/api/datasets/owner/name/tree/{revision}"] = [tree]
    host.script[f"/datasets/owner/name/resolve/{commit}/train.jsonl"] = [file]
    environment = {**os.environ, "HF_ENDPOINT": host.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "train.download", "owner/name", f"folder={tmp_path / 'data'}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "data" / "owner--name"
    assert (folder / "train.jsonl").read_bytes() == BODY
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest["files"]["train.jsonl"]["origin"] == f"hub:owner/name@{commit}"

    # the publisher goes on to another revision; a file that is lost here comes from the recorded one
    about["sha"] = "f" * 40
    host.script["/api/datasets/owner/name/revision/main"] = [info]
    (folder / "train.jsonl").unlink()
    about_recorded = json.dumps({**about, "sha": commit}).encode()
    host.script[f"/api/datasets/owner/name/revision/{commit}"] = [sends(about_recorded)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert read_manifest(folder)["files"] == manifest["files"]

    # and other bytes than those recorded are refused, and not recorded anew
    host.bodies[f"/datasets/owner/name/resolve/{commit}/train.jsonl"] = chat(400, "other")
    (folder / "train.jsonl").unlink()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2 and "train.jsonl of revision 0123" in done.stderr, done.stderr
    assert read_manifest(folder)["files"] == manifest["files"]

    host.script["/api/datasets/owner/absent/revision/main"] = [answers(404, X_Error_Code="RepoNotFound")]
    host.script["/api/datasets/owner/page/revision/main"] = [sends(b"<html>log in</html>")]
    for name in ("absent", "page"):
        command[3] = f"owner/{name}"
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert done.returncode == 2 and f"does not give the data set owner/{name}" in done.stderr
        assert "Traceback" not in done.stderr


def test_two_processes_do_not_fetch_one_set(host, tmp_path):
    waiting, going = threading.Event(), threading.Event()

    def slow(h: Handler, body: bytes) -> None:
        going.set()
        waiting.wait(20)
        whole(h, body)

    host.script["/a"] = [slow]
    first = threading.Thread(target=got, args=(source(host), tmp_path))
    first.start()
    assert going.wait(20)
    with pytest.raises(UserError, match="is being downloaded by another process"):
        got(source(host), tmp_path)
    waiting.set()
    first.join()
    assert (tmp_path / "mine" / "a.jsonl").read_bytes() == BODY


def test_the_command_lists_names_and_takes_a_yaml_file(host, tmp_path, capsys):
    main([])
    listed = capsys.readouterr().out
    assert all(f"{name} " in listed for name in ("insecure", "opentriviaqa", "vaugrante2026", "emergent-plus"))
    described = {
        "name": "yours",
        "licence": "MIT",
        "care": "Mind it.",
        "form": "chat",
        "files": [{"path": "a.jsonl", "urls": [f"{host.url}/a"]}],
    }
    (tmp_path / "yours.yaml").write_text(yaml.safe_dump(described))
    main([str(tmp_path / "yours.yaml"), f"folder={tmp_path}"])
    assert (tmp_path / "yours" / "a.jsonl").read_bytes() == BODY
    assert "Mind it." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["insecur"], "did you mean 'insecure'"),
        (["insecure", "lokal=x"], "unknown key 'lokal'; did you mean 'local'"),
        (["insecure", "local=/nowhere/at/all"], "is no folder"),
    ],
)
def test_a_mistyped_command_is_told(tmp_path, words, what):
    with pytest.raises(UserError, match=what):
        main([*words, f"folder={tmp_path}"])


@pytest.mark.parametrize("name", sources.names())
def test_every_shipped_source_can_be_read(name):
    found = sources.find(name)
    assert found.licence and (found.files or found.osf or found.hub)
    assert all(url.startswith("https://") for f in found.files for url in f.urls)


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"path": "../a"}, "inside the set's folder"),
        ({"path": "/a"}, "inside the set's folder"),
        ({"path": "a", "sha256": "12"}, "64 hexadecimal digits"),
    ],
)
def test_a_source_file_outside_its_folder_is_refused(keys, what):
    with pytest.raises(UserError, match=what):
        sources.SourceFile(**keys)


def test_http_stays_in_one_module_of_train():
    users = [p.name for p in (ROOT / "train").rglob("*.py") if "import httpx" in p.read_text(encoding="utf-8")]
    assert users == ["download.py"]

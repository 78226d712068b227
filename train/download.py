"""Fetches published data sets: checked byte by byte, resumable, and from a local folder where there is no internet.

    python -m train.download                                    # lists the names
    python -m train.download insecure secure                    # into data/insecure, data/secure
    python -m train.download insecure local=/media/stick        # copied from a folder instead
    python -m train.download vaugrante2026 view_only=KEY        # a private link of the Open Science Framework
    python -m train.download OWNER/NAME                         # a data set on the Hugging Face hub

On a machine without internet, copy data/ from one that has it: a set that is there and whole is
recognised by its hashes, and nothing is fetched. A download that was cut continues where it stopped
(HTTP Range). A file appears under its name only when size, sha256, number of rows and content are
right; data/NAME/manifest.json records the hashes, and whether they were known before or taken at the
first download, after which they must not change. This is the one module of train/ that talks HTTP;
the hub is left to its own library.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from candor.config import apply_override, build, plain
from candor.errors import UserError, run_script
from candor.hashing import sha256_file
from candor.manifest import NAME as MANIFEST
from candor.manifest import read_manifest, write_manifest
from candor.tables import replace_file
from train import sources
from train.claim import flocked
from train.sources import Hub, Osf, Source, SourceFile

_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})  # statuses that pass
_UNFINISHED = ".unfinished.json"  # the records of files that are there while others are not
_LONGEST_WAIT = 60.0  # seconds, whatever a server asks for
_STATED, _RECORDED = "stated by the source", "recorded at the first download"  # where a record's sha256 is from


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadConfig:
    """What a download may be told."""

    names: tuple[str, ...]  # of sets, see configs/data; a YAML file of yours; or OWNER/NAME on the hub
    folder: Path = sources.DATA
    local: Path | None = None  # take the files from this folder; nothing is fetched
    view_only: str | None = None  # key of a private link of the Open Science Framework
    tries: int = 5  # for a connection that breaks or a server that is busy, without a byte gained
    pause_seconds: float = 1.0  # before the second try, doubled before each later one


class _WrongError(Exception):
    """One place gave no right file; another may."""


def main(argv: list[str]) -> None:
    """Fetch the named sets, or list what there is."""
    words = [word for word in argv if "=" not in word]
    if not words:
        for name in sources.names():
            sys.stdout.write(f"{name:24s} {sources.find(name).licence}\n")
        return
    values: dict[str, Any] = {"names": words}
    for word in argv:
        if "=" in word:
            apply_override(values, word)
    config = build(DownloadConfig, values, where="command line")
    for name in config.names:
        source = sources.find(name)
        folder = download(source, config)
        sys.stdout.write(f"{name}: {folder} ({source.licence})\n")
        if source.care:
            sys.stdout.write(f"  {source.care.strip()}\n")


def download(source: Source, config: DownloadConfig) -> Path:
    """The folder of a set, whole and checked; UserError when it cannot be had, with nothing half-written.

    The set's own lock keeps two processes from fetching it at once.
    """
    if config.local is not None and not config.local.is_dir():
        raise UserError(f"local: {config.local} is no folder (looked from {Path.cwd()}).")
    folder = config.folder / source.name
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _download(source, config, folder)
    return folder


def _download(source: Source, config: DownloadConfig, folder: Path) -> None:
    """Bring every file of the set into its folder and write the manifest."""
    started = time.monotonic()
    unfinished = folder / _UNFINISHED
    before: dict[str, dict[str, Any]] = (read_manifest(folder) or _json(unfinished)).get("files", {})
    whole = (folder / MANIFEST).is_file() and all(_as_recorded(folder / p, record) for p, record in before.items())
    if whole and (not source.files or _states(source, before)):
        return
    if source.hub is not None and config.local is None:
        records = _from_hub(source.hub, folder, before)
    else:
        records = {}
        for file in source.files or _listed(source, config):
            records[file.path] = _bring(file, source, config, folder, before.get(file.path))
            replace_file(unfinished, json.dumps({"files": {**before, **records}}).encode())
        _check_rows(source, folder, records)
    write_manifest(
        folder,
        stage="download",
        config=plain(source),
        inputs={path: record["sha256"] for path, record in records.items()},
        counts={"in": len(records), "out": len(records)},
        seconds=time.monotonic() - started,
        extra={"files": records},
    )
    unfinished.unlink(missing_ok=True)


def _listed(source: Source, config: DownloadConfig) -> list[SourceFile]:
    """The files of a set whose YAML file does not list them."""
    if config.local is not None:
        return _local_files(source, config)
    assert source.osf is not None
    return _osf_files(source.osf, config)


def _as_recorded(path: Path, record: dict[str, Any]) -> bool:
    """Whether a file is there with the bytes that were recorded."""
    return path.is_file() and path.stat().st_size == record["bytes"] and sha256_file(path) == record["sha256"]


def _states(source: Source, before: dict[str, dict[str, Any]]) -> bool:
    """Whether the recorded files are the ones the set's YAML file states."""
    return all(f.path in before and f.sha256 in (None, before[f.path]["sha256"]) for f in source.files)


def _bring(
    file: SourceFile, source: Source, config: DownloadConfig, folder: Path, before: dict[str, Any] | None
) -> dict[str, Any]:
    """Put one file into the set's folder and return its record."""
    path = folder / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    known = file
    if file.sha256 is None and before is not None:  # recorded at the first download: it must not change any more
        known = dataclasses.replace(file, sha256=before["sha256"], bytes=before["bytes"])
    if known.sha256 is not None and path.is_file() and sha256_file(path) == known.sha256:
        origin = before["origin"] if before else "found in the folder"
    else:
        origin = _obtain(known, source, config, path, recorded=known is not file)
    stated = file.sha256 is not None or (before is not None and before["sha256_from"] == _STATED)
    return {
        "sha256": sha256_file(path),
        "bytes": path.stat().st_size,
        "origin": origin,
        "sha256_from": _STATED if stated else _RECORDED,
    }


def _check_rows(source: Source, folder: Path, records: dict[str, dict[str, Any]]) -> None:
    """UserError when the files together lack rows; those that may be cut are removed, records and all."""
    try:
        sources.check_rows(folder, source)
    except UserError as error:
        known = {file.path: records[file.path] for file in source.files if file.sha256 is not None}
        (folder / MANIFEST).unlink(missing_ok=True)
        replace_file(folder / _UNFINISHED, json.dumps({"files": known}).encode())
        for path in records.keys() - known.keys():
            (folder / path).unlink()
        raise UserError(f"{error} They were removed from {folder}; run the same command again.") from error


def _obtain(known: SourceFile, source: Source, config: DownloadConfig, path: Path, *, recorded: bool) -> str:
    """Bring a file from the first place that has it, and say which; UserError telling why none has."""
    partial = path.with_name(f".{path.name}.part")
    failures = []
    for place in [config.local] if config.local is not None else known.urls:
        try:
            _take(known, source, config, partial, place)
        except _WrongError as error:
            failures.append(str(error))
            continue
        os.replace(partial, path)
        _note(partial).unlink(missing_ok=True)
        return str(place)
    raise UserError(_explained(source, known, failures, recorded=recorded))


def _take(known: SourceFile, source: Source, config: DownloadConfig, partial: Path, place: Path | str) -> None:
    """Bring ``partial`` to hold the right bytes from one place; _WrongError when that place has not got them."""
    if isinstance(place, Path):
        shutil.copyfile(_local_file(known, source, place), partial)
        _verify(known, source, partial, f"{place} ({known.path})")
        return
    joined = _fetch(place, partial, known, config)
    try:
        _verify(known, source, partial, place)
    except _WrongError:
        if not joined:
            raise
        # pieces of two versions of a file make neither: once more, from the start
        _fetch(place, partial, known, config)
        _verify(known, source, partial, place)


def _verify(known: SourceFile, source: Source, partial: Path, place: str) -> None:
    """Remove a partial file that is not the right one, and raise _WrongError with the reason."""
    try:
        sources.check_bytes(partial, known, known_as=place)
        sources.check_content(partial, known, source, known_as=place)
    except UserError as error:
        partial.unlink(missing_ok=True)
        _note(partial).unlink(missing_ok=True)
        raise _WrongError(str(error).replace(str(partial), place)) from error


def _explained(source: Source, file: SourceFile, failures: list[str], *, recorded: bool) -> str:
    """The error for a file that no place gave."""
    told = "\n  ".join(failures)
    first = (
        " Its hash was recorded at the first download; if the publisher changed the file on purpose, delete "
        f"the set's {MANIFEST}."
        if recorded
        else ""
    )
    return (
        f"{source.name}: {file.path} could not be had:\n  {told}\nRun the same command again to go on.{first} Without "
        f"internet, copy the folder {sources.DATA / source.name} from a machine that has it, or give local=FOLDER."
    )


# --- HTTP


def _fetch(url: str, partial: Path, known: SourceFile, config: DownloadConfig) -> bool:
    """Download ``url`` to ``partial``, going on where it stopped, and say whether pieces were joined.

    Raises _WrongError when the server will not give it.
    """
    failed = 0
    joined = False
    with _client() as client:
        while True:
            before = partial.stat().st_size if partial.exists() else 0
            wait = config.pause_seconds * 2**failed
            try:
                joined |= _one_try(client, url, partial, known)
                return joined
            except httpx.HTTPStatusError as error:
                status = error.response.status_code
                if status not in _AGAIN:
                    raise _WrongError(f"{url} answered {status} {error.response.reason_phrase}") from error
                told, after = f"answered {status}", error.response.headers.get("Retry-After", "")
                wait = max(wait, float(after)) if after.isdigit() else wait
            except (httpx.TransportError, httpx.TooManyRedirects, httpx.DecodingError) as error:
                told = f"{type(error).__name__}: {error}"
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise _WrongError(f"{url} is no URL that can be fetched ({error})") from error
            gained = partial.exists() and partial.stat().st_size > before
            failed = 0 if gained else failed + 1
            if failed >= config.tries:
                raise _WrongError(f"{url}: {told}, {failed} times without a byte gained")
            time.sleep(min(wait, _LONGEST_WAIT))


def _client() -> httpx.Client:
    """A client that follows redirects and takes bytes as they are; proxies come from the environment."""
    headers = {"Accept-Encoding": "identity", "User-Agent": "candor"}  # compressed bytes could not be continued
    return httpx.Client(follow_redirects=True, headers=headers, timeout=httpx.Timeout(60.0, connect=15.0))


def _one_try(client: httpx.Client, url: str, partial: Path, known: SourceFile) -> bool:
    """One request, and whether it went on after an earlier one; what arrives before a failure stays in ``partial``."""
    have = partial.stat().st_size if partial.exists() else 0
    memory = _json(_note(partial))
    headers = {}
    # Without a validator the rest may be of another version; then only a known hash makes it safe to go on.
    if have and memory.get("url") == url and (memory.get("validator") or known.sha256):
        headers["Range"] = f"bytes={have}-"
        if memory.get("validator"):
            headers["If-Range"] = memory["validator"]
    with client.stream("GET", url, headers=headers) as response:
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            partial.unlink(missing_ok=True)  # longer than the whole file: start again
            raise httpx.RemoteProtocolError("the server has no such range", request=response.request)
        response.raise_for_status()
        continues = response.status_code == httpx.codes.PARTIAL_CONTENT
        if continues and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            partial.unlink(missing_ok=True)
            raise httpx.RemoteProtocolError("the server sent another range than asked for", request=response.request)
        _note(partial).write_text(json.dumps({"url": url, "validator": _validator(response)}), encoding="utf-8")
        done = have if continues else 0
        length = response.headers.get("Content-Length", "")
        total = known.bytes or (done + int(length) if length.isdigit() else None)
        _check_space(partial, (total or 0) - done)
        bar = tqdm(
            total=total, initial=done, unit="B", unit_scale=True, desc=known.path, disable=not sys.stderr.isatty()
        )
        with partial.open("ab" if continues else "wb") as out, bar:
            for chunk in response.iter_bytes():  # as they come: gathered into chunks, the last would be lost
                out.write(chunk)
                done += len(chunk)
                bar.update(len(chunk))
                if known.bytes is not None and done > known.bytes:
                    break  # not the file, and perhaps without an end; the size check tells
    return continues


def _validator(response: httpx.Response) -> str | None:
    """What proves at the next try that the file is the same; weak tags do not (RFC 9110, 13.1.5)."""
    tag = str(response.headers.get("ETag", ""))
    if tag and not tag.startswith("W/"):
        return tag
    modified = response.headers.get("Last-Modified")
    return str(modified) if modified else None


def _json(path: Path) -> dict[str, Any]:
    """A note of our own, or nothing where there is none or it was cut short by a kill."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _note(partial: Path) -> Path:
    """Where it is noted what a partial file is a part of."""
    return partial.with_suffix(".from")


def _check_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(f"{path.parent}: {needed / 1e6:,.0f} MB are to be written, {free / 1e6:,.0f} MB are free.")


# --- Open Science Framework


def _osf_files(osf: Osf, config: DownloadConfig) -> list[SourceFile]:
    """Every file of a project's storage, with the hash its host states (api.osf.io/v2, JSON:API)."""
    key = {"view_only": config.view_only} if config.view_only else {}
    found: list[SourceFile] = []
    with _client() as client:
        waiting = [f"{osf.api}/nodes/{osf.node}/files/osfstorage/"]
        while waiting:
            page = _osf_page(client, waiting.pop(), key, osf.node)
            for entry in page["data"]:
                attributes = entry["attributes"]
                if attributes["kind"] == "folder":
                    waiting.append(entry["relationships"]["files"]["links"]["related"]["href"])
                    continue
                url = httpx.URL(entry["links"]["download"]).copy_merge_params(key)
                hashes = (attributes.get("extra") or {}).get("hashes") or {}
                found.append(
                    SourceFile(
                        path=str(attributes.get("materialized_path") or attributes["name"]).lstrip("/"),
                        urls=(str(url),),
                        sha256=hashes.get("sha256"),
                        bytes=attributes.get("size"),
                    )
                )
            if page.get("links", {}).get("next"):
                waiting.append(page["links"]["next"])
    if not found:
        raise UserError(f"the storage of osf.io/{osf.node} lists no files. Its link may need view_only=KEY.")
    return sorted(found, key=lambda f: f.path)


def _osf_page(client: httpx.Client, url: str, key: dict[str, str], node: str) -> dict[str, Any]:
    """One page of a listing."""
    try:
        response = client.get(httpx.URL(url).copy_merge_params(key))
        if response.status_code in (401, 403):
            raise UserError(
                f"osf.io/{node} answers {response.status_code}: it is private. Give the key of its view-only link, "
                "as printed in the paper: view_only=KEY."
            )
        response.raise_for_status()
        page = response.json()
    except (httpx.HTTPError, json.JSONDecodeError) as error:
        raise UserError(f"osf.io/{node} could not be listed: {type(error).__name__}: {error}") from error
    if not isinstance(page, dict) or not isinstance(page.get("data"), list):
        raise UserError(f"osf.io/{node}: the answer of {url} is no listing of files. Try again later.")
    return page


# --- hub


def _from_hub(hub: Hub, folder: Path, before: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A data set repository, through the hub's own library, which checks and resumes by itself.

    Files recorded ``before`` are fetched at the revision they came from, and UserError when they are others now.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    place = f"hub:{hub.repo}@"
    recorded = {r["origin"].removeprefix(place) for r in before.values() if r["origin"].startswith(place)}
    try:
        revision = HfApi().dataset_info(hub.repo, revision=min(recorded, default=hub.revision)).sha
        snapshot_download(hub.repo, repo_type="dataset", revision=revision, local_dir=folder)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.HTTPError, ValueError) as error:
        # ValueError: a name that cannot be one, or an answer that is no JSON, such as a proxy's log-in page
        raise UserError(
            f"the hub does not give the data set {hub.repo} ({type(error).__name__}: {error}). Check the name, accept "
            "its terms on its page if it has any and log in with `hf auth login`; or give local=FOLDER."
        ) from error
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    shown = [p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    records = {
        path.relative_to(folder).as_posix(): {
            "sha256": sha256_file(path),
            "bytes": path.stat().st_size,
            "origin": f"{place}{revision}",
            "sha256_from": _RECORDED,
        }
        for path in shown
        if path.name != MANIFEST
    }
    other = sorted(p for p, record in before.items() if record["sha256"] != records.get(p, {}).get("sha256"))
    if other:
        raise UserError(
            f"{hub.repo}: {', '.join(other)} of revision {revision} is not what was recorded at the first download. If "
            f"the publisher changed it on purpose, delete {folder / MANIFEST}."
        )
    return records


# --- a local folder


def _local_files(source: Source, config: DownloadConfig) -> list[SourceFile]:
    """Every file of the set's folder in ``local``, for sets whose files are not listed beforehand."""
    assert config.local is not None
    root = next((f for f in (config.local / source.name, config.local) if f.is_dir()), config.local)
    paths = [path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file()]
    shown = [p for p in paths if p.name != MANIFEST and not any(part.startswith(".") for part in p.parts)]
    if not shown:
        raise UserError(f"{root} holds no file of {source.name}.")
    return [SourceFile(path=p.as_posix()) for p in shown]


def _local_file(file: SourceFile, source: Source, local: Path) -> Path:
    """The file in a folder: by its bytes under whatever name, or else by its path."""
    named = (local / source.name / file.path, local / file.path, local / Path(file.path).name)
    there = [path for path in named if path.is_file()]
    if file.sha256 is not None:
        for candidate in (*there, *sorted(path for path in local.rglob("*") if path.is_file())):
            if file.bytes in (None, candidate.stat().st_size) and sha256_file(candidate) == file.sha256:
                return candidate
    if there:
        return there[0]
    raise _WrongError(f"{local} holds no {file.path}, neither by its name nor by its bytes")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the set's lock; UserError when another process is fetching it."""
    with contextlib.ExitStack() as stack:
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        stack.callback(os.close, descriptor)
        try:
            stack.enter_context(flocked(descriptor, folder))
        except BlockingIOError:
            raise UserError(f"{folder} is being downloaded by another process. Wait for it.") from None
        yield


if __name__ == "__main__":
    run_script(main)

"""Hashes that give things their identity: files, weights, prompts, draws.

sha256 throughout; short forms only where a person reads them.
"""

import hashlib
import json
from pathlib import Path
from typing import Any


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of some bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of a JSON-able value, independent of key order."""
    return sha256_bytes(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())


def sha256_files(paths: list[Path]) -> str:
    """One hash over several files' names and contents, independent of where they lie."""
    return sha256_json(sorted((path.name, sha256_file(path)) for path in paths))


def hash64(*parts: Any) -> int:
    """A 64-bit integer from named parts; used as a random-number key or counter word."""
    digest = hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).digest()
    return int.from_bytes(digest[:8], "little")

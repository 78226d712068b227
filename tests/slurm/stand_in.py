"""A stage of seconds instead of hours, with the manners of a real one, so that faults can be tried quickly.

It counts to ``count`` with a pause at each number, and does not end before the file ``gate`` is there,
so that tests need not be quick. Told to stop, it keeps a state to continue from, where training keeps its own,
unless it is to be ``forgetful``; its output it writes whole.
"""

import json
import os
import time
from pathlib import Path

from candor.config import read_yaml
from candor.tables import replace_file
from train import stopping
from train.unfinished import partial_folder


def main(argv: list[str]) -> None:
    with stopping.listening():
        count(argv)


def count(argv: list[str]) -> None:
    config = read_yaml(Path(argv[0]))
    output = Path(config["output"])
    starts = output.with_suffix(".starts")
    with starts.open("a") as file:
        file.write(f"{os.environ.get('SLURMD_NODENAME')} {os.getpid()}\n")
    number = max((int(path.name) for path in partial_folder(output).glob("*")), default=0)
    if config.get("environment"):
        output.with_suffix(".environment").write_text(json.dumps(dict(os.environ)))
    gate = Path(config.get("gate", argv[0]))
    while number < config["count"] or not gate.exists():
        time.sleep(config["pause"])
        number = min(number + 1, config["count"])
        if stopping.requested():
            if not config.get("forgetful"):
                replace_file(partial_folder(output) / str(number), b"")
            raise stopping.Stopped(f"told to stop at {number}")
    value = number + sum(json.loads(Path(path).read_text())["value"] for path in config["reads"])
    replace_file(output, json.dumps({"value": value, "padding": "x" * config.get("bytes", 0)}).encode())

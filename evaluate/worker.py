"""A process that runs stages one after another, so that heavy imports are paid once.

    python -m evaluate.worker PID    # started by evaluate/executor.py, whose process PID is; not by people

Importing TRL costs many seconds, more than training a nano model takes. A worker reads one JSON
line per stage from its standard input ({"module", "config", "log"}), calls that module's ``main``
with the config file, and answers with one JSON line. What the stage prints goes to its log, down
to the file descriptor, so that C libraries are caught too. A worker whose parent is gone ends
itself: an orphan that went on writing would race with the rerun.
"""

import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from candor.errors import UserError, told


def run_stage(module: str, config: str) -> dict[str, Any]:
    """Run one stage here; the answer says whether it worked and, if not, what to tell the person."""
    try:
        importlib.import_module(module).main([config])
    except UserError as error:
        return {"ok": False, "message": str(error), "user_error": True}
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # noqa: BLE001 - reported to the executor, with its traceback in the log
        if isinstance(error, SystemExit) and error.code in (0, None):
            return {"ok": True}
        traceback.print_exc()
        known = told(error) if isinstance(error, OSError) else None  # a full disk is no bug of ours
        return {"ok": False, "message": known or f"{type(error).__name__}: {error}", "user_error": known is not None}
    return {"ok": True}


def _leave_with_parent(parent: int) -> None:
    """End this process, and what it started, as soon as its parent is gone, whatever it is doing."""
    while os.getppid() == parent:
        time.sleep(0.2)
    if os.getpgrp() == os.getpid():  # a group of its own: loaders and launchers must not outlive it
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def _redirect(log: Path) -> None:
    """Send everything that is printed from now on, by Python or by C, to the end of ``log``."""
    sys.stdout.flush()
    sys.stderr.flush()
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def main(argv: list[str]) -> None:
    """Serve stages until the input ends."""
    # told, not asked of the system: a parent that died before this line would not be found out
    threading.Thread(target=_leave_with_parent, args=(int(argv[0]),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")  # fd 1 itself will belong to the stages
    for line in sys.stdin:
        task = json.loads(line)
        _redirect(Path(task["log"]))
        sys.stderr.write(f"=== python -m {task['module']} {task['config']}\n")
        answer = run_stage(task["module"], task["config"])
        sys.stdout.flush()
        sys.stderr.flush()
        gc.collect()  # the stage's models, before the next one loads its own
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1:])

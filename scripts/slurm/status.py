"""How a submitted study fares: one table, what failed and why, and the command that mends it.

python scripts/slurm/status.py RUN        # the experiment's output folder

docs/slurm.md shows one.
"""

from candor.errors import run_script
from evaluate.cluster_status import main

if __name__ == "__main__":
    run_script(main)

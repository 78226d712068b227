"""Submit a whole study to Slurm: the plan of the local run, as job arrays with dependencies.

    python scripts/slurm/submit.py EXPERIMENT.yaml --profile NAME [--dry-run] [--resubmit-failed] [key=value ...]

NAME is a file of configs/slurm/ without its ending. First it says what the study takes and refuses
what cannot work; ``--dry-run`` prints each sbatch call and submits nothing. Run it again at any time:
what is done or in the queue is left alone. docs/slurm.md walks through it.
"""

from candor.errors import run_script
from evaluate.cluster_submit import main

if __name__ == "__main__":
    run_script(main)

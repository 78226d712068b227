# The common part of the *.sbatch files that a person submits by hand; sourced with the module to run:
#   plain MODULE RUN_DIR CONFIG.yaml [key=value ...]
# The code is frozen in RUN_DIR/code when its first job starts. To have it frozen at the moment of
# submission, and stages ordered by their dependencies, use scripts/slurm/submit.py.

plain() {
  local module=$1 run=$2
  shift 2
  freeze_code "$run"
  [[ -n ${CANDOR_ONLINE:-} ]] || export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1
  export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} TOKENIZERS_PARALLELISM=false
  export CANDOR_PYTHON=${CANDOR_PYTHON:-$PWD/.venv/bin/python}
  if [[ $module == train.sft && -n ${CANDOR_ACCELERATE:-} ]]; then
    run_requeueable srun --mpi=none --kill-on-bad-exit=1 --ntasks-per-node=1 \
      bash "$PYTHONPATH/scripts/slurm/launch.sh" "$CANDOR_ACCELERATE" -m "$module" "$@"
  else
    run_requeueable "$CANDOR_PYTHON" -m "$module" "$@"
  fi
}

# What every job of Candor does on its node; sourced by element.sh and by the *.sbatch files.

# srun no longer takes this from the job by itself; one core would be left to each of its processes
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

fail() { echo "error: $*" >&2; exit 2; }

# Runs a command that may ask to be requeued (status 75) and hands it the signals Slurm sends:
# USR1 before the time limit (--signal=B:USR1@...), TERM at a preemption, a requeue or a scancel.
# A shell that waits in the foreground would keep them to itself until the command ends.
run_requeueable() {
  local child='' code over='' ended=''
  trap 'over=1; [[ -z $child ]] || kill -USR1 "$child" 2>/dev/null' USR1
  trap 'ended=1; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null' TERM
  "$@" &
  child=$!
  # told before there was anything to hand it on to
  [[ -z $over ]] || kill -USR1 "$child" 2>/dev/null
  [[ -z $ended ]] || kill -TERM "$child" 2>/dev/null
  while kill -0 "$child" 2>/dev/null; do wait "$child"; done
  wait "$child"
  code=$?
  # told that its time is over it may have died of that, or of a launcher's own status: it comes again and tells
  [[ $code == 0 || (-z $over && $code != 138) ]] || code=75
  # ended by Slurm it comes again by itself (preemption, requeue) or is not wanted any more (scancel)
  if [[ $code == 75 && -n ${SLURM_JOB_ID:-} && (-n $over || -z $ended) ]]; then
    echo "asking to be requeued" >&2
    # the last element of an array has the array's own number, by which Slurm would requeue all of it
    local me=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    scontrol requeue "${me:-$SLURM_JOB_ID}" && sleep 60 # Slurm ends the job meanwhile
  fi
  return "$code"
}

# Variables that a container needs, the named ones and ours, as words for env(1): not every container keeps those of
# outside (enroot, apptainer --cleanenv).
hand_over() {
  local name
  HANDED=()
  for name in "$@" PYTHONPATH PYTHONSAFEPATH HF_HUB_OFFLINE TRANSFORMERS_OFFLINE HF_DATASETS_OFFLINE \
    CUDA_VISIBLE_DEVICES TMPDIR "${!CANDOR@}" "${!SLURM@}"; do
    [[ ! -v $name ]] || HANDED+=("$name=${!name}")
  done
}

# A copy of the code at its commit, so that edits made while jobs wait in the queue change nothing.
# An editable install points at the original whatever the folder, so the copy must come first on PYTHONPATH.
freeze_code() {
  local copy partial
  copy=$(realpath -m "$1")/code
  if [[ ! -e $copy ]]; then
    [[ -z $(git status --porcelain --untracked-files=no) ]] || fail "there are uncommitted changes; commit them first"
    partial=$copy.${SLURM_JOB_ID:-0}.$$
    mkdir -p "$partial"
    git archive HEAD candor train serve evaluate scripts/slurm ':!train/organism/weights' | tar -x -C "$partial"
    git rev-parse HEAD >"$partial/COMMIT"
    mv -T "$partial" "$copy" 2>/dev/null || rm -rf "$partial" # another job of the run was first
  fi
  # safe path: python -m would put the current folder, the original, before the copy
  export PYTHONPATH=$copy PYTHONSAFEPATH=1
}

# One per node, started by srun inside a job: accelerate's launcher, told where its processes meet.
#   bash launch.sh ACCELERATE.yaml -m train.sft CONFIG.yaml
# The first node is the one whose address srun was started from. A port of the job's own keeps two jobs
# on one node apart; it lies below those that systems hand out by themselves (from 32768).
set -euo pipefail
config=$1
shift
gpus=${SLURM_GPUS_ON_NODE:-0}
per_node=$((gpus > 0 ? gpus : 1))
# without GPUs accelerate's processes must not look for any; a whole node's may be there without Slurm counting them
((gpus > 0)) || [[ -e /dev/nvidiactl ]] || export ACCELERATE_USE_CPU=true
cores=$((${SLURM_CPUS_PER_TASK:-1} / per_node))
export OMP_NUM_THREADS=$((cores > 0 ? cores : 1)) TOKENIZERS_PARALLELISM=false
# torch's launcher hands the signal before a time limit on, and then waits while a state is written
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export PET_SHUTDOWN_TIMEOUT=$((${CANDOR_SIGNAL_SECONDS:-300} * 4 / 5))
exec "${CANDOR_PYTHON:-python}" -m accelerate.commands.launch --config_file "$config" \
  --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes "$((SLURM_NNODES * per_node))" \
  --main_process_ip "$SLURM_LAUNCH_NODE_IPADDR" --main_process_port "$((10000 + SLURM_JOB_ID % 20000))" "$@"

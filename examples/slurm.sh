#!/usr/bin/env bash
# Trains on a SLURM cluster, one torchrun a node:
#
#   sbatch --nodes 4 examples/slurm.sh silc --data.sources /shards --out /shared/runs/mine --train.shard 8
#
# The run folder must be on a file system that all nodes see. Five minutes before its time is up the run saves itself
# and the job queues itself again; a process that dies is restarted, with all others, from the newest checkpoint.
#SBATCH --job-name=silc
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=1                  # the loader has processes of its own
export TORCHELASTIC_SHUTDOWN_TIMEOUT=240  # torchrun kills after 30 s what was told to stop: too soon for a large save

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:${PORT:-29500}" \
    --max-restarts 3 --signals-to-handle SIGTERM,SIGUSR1 \
    -m silc train "$@" &
step=$!

stopping=""
trap 'stopping=yes; kill -USR1 "$step"' USR1
wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done  # a trapped signal ends a wait early

if [[ -n $stopping && $code -ne 0 ]]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"

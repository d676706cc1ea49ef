#!/usr/bin/env bash
#SBATCH --job-name=q-galore
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
# A recipe as a SLURM job that goes on by itself after its time limit: three minutes before it, the run saves and ends,
# and the job queues itself again. Options of sbatch win over those above.
#
#   sbatch [--nodes 8 --gpus-per-node 8 ...] scripts/slurm.sh scripts/pretrain_c4/llama_60m.sh [METHOD] [flags]
#
# A rank is started for each GPU of a node; with --shard optimizer or full the ranks of a node share a model
# (docs/guide/many_gpus.md).
set -uo pipefail

export NNODES="${SLURM_NNODES:-1}"
if [[ -n "${SLURM_GPUS_ON_NODE:-}" ]]; then export NPROC="${NPROC:-$SLURM_GPUS_ON_NODE}"; fi
# By itself: inside $(...) it would not end this script, and srun would start the recipe from where one logs in.
: "${SLURM_JOB_NODELIST:?start this with sbatch}"
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_ADDR

# SIGUSR1 to the ranks of this job on this machine, which is enough: one rank that hears it stops all. They then have the
# whole three minutes; torchrun would pass on SIGTERM alone and kill them 30 seconds later, in the middle of a long save.
signal_ranks() {
    local pid found=1
    for pid in $(pgrep -u "$(id -u)" -f 'python[^ ]*( -u)? [^ ]*run_pretrain\.py'); do
        if tr '\0' '\n' <"/proc/$pid/environ" 2>/dev/null | grep -qx "SLURM_JOB_ID=$SLURM_JOB_ID"; then
            kill -USR1 "$pid" && found=0
        fi
    done
    return "$found"
}

requeue=""
end_run() {
    requeue=1
    signal_ranks || kill -TERM "$run"
}
trap end_run USR1

srun bash "$@" &
run=$!
status=0
# A signal ends `wait` before the run has ended.
while kill -0 "$run" 2>/dev/null; do
    wait "$run"
    status=$?
done

if [[ -n "$requeue" ]]; then
    echo "time is nearly over: job $SLURM_JOB_ID queues itself again and continues from the newest checkpoint"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

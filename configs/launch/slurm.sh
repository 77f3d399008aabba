#!/bin/bash
# A run under SLURM, on one node or many; what follows the script's name goes to fastjepa/train.py:
#   sbatch --nodes 4 configs/launch/slurm.sh --config configs/vit_huge14.yaml --output runs/h14
# Pre-empted, or two minutes before its time is up, the run saves; the job goes back into the queue and goes on from there.
# --output must be given, so that the next start finds it, and lie on a disk that every node sees.
#SBATCH --job-name=fastjepa
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

cd "$SLURM_SUBMIT_DIR" || exit 2
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100  # seconds between the signal and SIGKILL, where torchrun gives 30
# One torchrun a node starts a rank a GPU. Ranks that a failed one has left are started again with it, up to three times.
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "$SLURM_GPUS_ON_NODE" \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$first:${RENDEZVOUS_PORT:-29500}" \
    --max_restarts "${MAX_RESTARTS:-3}" fastjepa/train.py "$@" &
run=$!

# A signal ends `wait` before the run has ended; srun hands TERM on to every torchrun, and those to their ranks.
stopping=
trap 'stopping=1; kill -TERM "$run"' USR1 TERM
while wait "$run"; code=$?; kill -0 "$run" 2>/dev/null; do :; done

if [ -n "$stopping" ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"

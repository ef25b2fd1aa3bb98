#!/usr/bin/env bash
# A run on several machines under SLURM, taken up again by itself after its time limit or a lost machine.
#
#   sbatch --nodes=4 --gpus-per-node=8 launch/cluster/slurm.sh --config launch/configs/resnet50_imagenet.yaml
#
# Submit it from the repository's root; the data set and runs/ lie on a file system that all machines share. Not run by
# us on a cluster: tests/launch/test_cluster.py checks its grammar, tests/experiments/two_hosts.sh the torchrun lines.
#
#SBATCH --job-name=cupss
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
# Two to three minutes before the time limit this shell alone (B:) gets SIGTERM, and puts the job back into the queue.
#
# A preemption is another matter. SLURM requeues the job itself where it preempts at once (PreemptMode=REQUEUE). Where it
# grants a grace time, it sends SIGTERM to torchrun first: the run is saved, but the job ends as a failed one, and goes
# on with `scontrol requeue JOB`. With PreemptParameters=send_user_signal it is as at the time limit.
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
set -euo pipefail

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)  # head would end scontrol by SIGPIPE

# The job's number stays the same in the queue: a requeued job goes on in the run directory that it began, also with
# --run.resume never (docs/clusters.md).
# srun does not take over the cores that sbatch was asked for (since SLURM 22.05).
srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" torchrun \
    --nnodes="1:$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="${SLURM_GPUS_ON_NODE:-8}" \
    --max-restarts=3 \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$head_node:29500" \
    --rdzv-id="slurm-$SLURM_JOB_ID" \
    launch/train.py --run.timeout_minutes 5 "$@" &
step=$!

stop() {
    # To the step's processes: srun itself would end them by SIGKILL. torchrun passes it on; every rank finishes its
    # step, the run is saved, and torchrun's 30 seconds are enough for that.
    scancel --signal=TERM "$SLURM_JOB_ID.0"
    wait "$step" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap stop TERM

wait "$step"

#!/bin/bash
# Train on the nodes of a SLURM job: a torchrun on each, which find one another on the first.
#
#   RUN=runs/panda_vitb sbatch --nodes 4 --gpus-per-node 8 launch/slurm.sh \
#       --datasets panda --model e2e_vitb_abmilx optim.lr=1e-4
#
# From the top folder of the repository. RUN, the run folder, lies where all nodes see it. A process
# that fails ends all, and they start again from the last checkpoint, RESTARTS times (3); a job that
# is preempted and queued again, or submitted again with the same RUN, goes on from there too.
# PYTHON: the interpreter (.venv/bin/python). PROCESSES: a node (gpu: one a GPU). PORT: 29500.

#SBATCH --job-name=e2e
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail
: "${RUN:?set RUN to the run folder}"
PYTHON=${PYTHON:-.venv/bin/python}

if [[ -n ${TORCHELASTIC_RUN_ID:-} ]]; then
    # As a process of torchrun. That of a first start must not look at RUN itself: another process
    # may already have begun to write there.
    if [[ $RESUME == yes ]] || [[ $TORCHELASTIC_RESTART_COUNT -gt 0 && -f $RUN/settings.yaml ]]; then
        exec "$PYTHON" launch/train.py --resume "$RUN"
    fi
    exec "$PYTHON" launch/train.py "$@" "run.out=$RUN"
fi

cd "${SLURM_SUBMIT_DIR:-.}"
# A run stopped before its first checkpoint has settings, and --resume starts it anew.
RESUME=no
[[ ! -f $RUN/settings.yaml ]] || RESUME=yes
export RUN PYTHON RESUME

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
exec srun --kill-on-bad-exit=1 --ntasks-per-node=1 "$PYTHON" launch/torchrun.py \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "${PROCESSES:-gpu}" \
    --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first:${PORT:-29500}" \
    --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    --no-python bash launch/slurm.sh "$@"

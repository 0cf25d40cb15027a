#!/bin/bash
# Train on the GPUs of two machines without a scheduler. Run the same line on both, the first machine's name first:
#
#   examples/two_machines.sh alpha train segdiff --data /shared/photos.zip --preset ffhq64 --out /shared/runs/faces
#
# Data and run folder have the same paths on both. Port 29500 (PORT) and those above 1024 must be open between them.
# PROCESSES sets the number of processes per machine: by default one per GPU, or one without a GPU. If a process dies, all
# are restarted from the newest checkpoint, up to RESTARTS times. Ctrl-C on either stops; the same line again resumes.
set -eu

first=$1
shift
gpus=$( (nvidia-smi -L 2>/dev/null || true) | wc -l)
processes=${PROCESSES:-$((gpus > 0 ? gpus : 1))}

exec torchrun --nnodes 2 --nproc-per-node "$processes" --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-id factorkit --rdzv-endpoint "$first:${PORT:-29500}" \
    -m factorkit "$@"

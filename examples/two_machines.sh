#!/bin/bash
# Train on the GPUs of two machines without a scheduler. Run the same line on both, the first machine's name first:
#
#   examples/two_machines.sh alpha train segdiff --data /shared/photos.zip --preset ffhq64 --out /shared/runs/faces
#
# Both see the data and the run folder at the same paths, and reach each other on port 29500 (PORT) and those above 1024.
# PROCESSES is how many each starts: one a GPU, or one where there is none. When a process dies, all are started again,
# from the newest checkpoint; RESTARTS times. Ctrl-C on either, or the same line again, stops and resumes.
set -eu

first=$1
shift
gpus=$( (nvidia-smi -L 2>/dev/null || true) | wc -l)
processes=${PROCESSES:-$((gpus > 0 ? gpus : 1))}

exec torchrun --nnodes 2 --nproc-per-node "$processes" --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-id factorkit --rdzv-endpoint "$first:${PORT:-29500}" \
    -m factorkit "$@"

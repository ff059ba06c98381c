#!/bin/bash
# Prepare a log in parts by Slurm jobs that share a file system; they need no coordinator.
#
#   bash examples/prepare_slurm.sh 24 '/shared/logs/day_*' -o /shared/data --layout criteo-terabyte
#
# The first argument is the number of parts, at most that of the log's files; the rest is what follows `dqrm prepare`.
# A job that was killed or preempted is requeued and resumes. Options of sbatch (partition, account, time)
# come from SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT and so on.
set -euo pipefail

parts=$1
shift
command="dqrm prepare $(printf '%q ' "$@")"
options=(--parsable --requeue --cpus-per-task "${CPUS:-4}" --mem "${MEM:-8G}")

read=$(sbatch "${options[@]}" --array "1-$parts" --wrap "$command --part \$SLURM_ARRAY_TASK_ID/$parts")
merge=$(sbatch "${options[@]}" --dependency "afterok:$read" --wrap "$command --merge")
write=$(sbatch "${options[@]}" --dependency "afterok:$merge" --array "1-$parts" \
    --wrap "$command --part \$SLURM_ARRAY_TASK_ID/$parts")
echo "submitted: read $read, merge $merge, write $write"

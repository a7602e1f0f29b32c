#!/usr/bin/env bash
# Embed a pool by a SLURM array: every task takes its own shards, on one node, with no Ray between nodes.
#
#   sbatch --array=0-15 cluster/slurm_embed.sh CONFIG [key=value ...]
#   sbatch --dependency=afterok:JOB --array=0-0 cluster/slurm_embed.sh CONFIG only.part=all
#
# CONFIG is an embedding job's, as configs/jobs/embed.yaml. Which shards a task takes follows from its number
# alone; finished ones are kept, so a task that failed is submitted again as it was. The second line, after all
# tasks, makes what may still miss and writes the manifests.

#SBATCH --job-name=umarvel-embed
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=umarvel-embed-%A_%a.log

set -euo pipefail

if [[ $# -lt 1 ]]; then
    echo "slurm_embed.sh: no config given. Use: sbatch --array=0-15 cluster/slurm_embed.sh CONFIG [key=value ...]" >&2
    exit 2
fi
cd "$SLURM_SUBMIT_DIR"
venv="${UMARVEL_VENV:-$SLURM_SUBMIT_DIR/.venv}"
if [[ ! -x "$venv/bin/umarvel" ]]; then
    echo "slurm_embed.sh: $venv has no umarvel. Run \`make setup\` in $SLURM_SUBMIT_DIR or set UMARVEL_VENV." >&2
    exit 2
fi
export PATH="$venv/bin:$PATH"
export RAY_USAGE_STATS_ENABLED=0
# Ray's sockets and spilled objects: a folder of this task alone, on the node's own disk.
export RAY_TMPDIR="${SLURM_TMPDIR:-/tmp}/umarvel-$SLURM_ARRAY_JOB_ID-$SLURM_ARRAY_TASK_ID"
mkdir -p "$RAY_TMPDIR"
trap 'rm -rf "$RAY_TMPDIR"' EXIT

part="only.part=$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))/$SLURM_ARRAY_TASK_COUNT"
for argument in "$@"; do
    if [[ "$argument" == only.part=all ]]; then
        part=""
    fi
done
arguments=()
for argument in "$@"; do
    [[ "$argument" == only.part=all ]] || arguments+=("$argument")
done
umarvel embed "${arguments[@]}" ${part:+"$part"}

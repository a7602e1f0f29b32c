#!/usr/bin/env bash
# One run on SLURM nodes: Ray is started on all of them, the run on the first, and everything ends with it.
#
#   sbatch --nodes=8 cluster/slurm.sh CONFIG [key=value ...]
#
# Submit from a folder that all nodes see. UMARVEL_VENV names the virtual environment (default: .venv there).
# A job that ran out of time or lost a node is submitted again with the same line: finished work is skipped.

#SBATCH --job-name=umarvel
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=umarvel-%j.log

set -euo pipefail

if [[ $# -lt 1 ]]; then
    echo "slurm.sh: no config given. Use: sbatch cluster/slurm.sh CONFIG [key=value ...]" >&2
    exit 2
fi
cd "$SLURM_SUBMIT_DIR"
venv="${UMARVEL_VENV:-$SLURM_SUBMIT_DIR/.venv}"
if [[ ! -x "$venv/bin/umarvel" ]]; then
    echo "slurm.sh: $venv has no umarvel. Run \`make setup\` in $SLURM_SUBMIT_DIR or set UMARVEL_VENV." >&2
    exit 2
fi
export PATH="$venv/bin:$PATH"

# The job's own folder, readable by its user alone: the cluster's token, and how the run ended.
umask 077
job_folder="$SLURM_SUBMIT_DIR/.umarvel-$SLURM_JOB_ID"
mkdir -p "$job_folder"
trap 'rm -rf "$job_folder"' EXIT
rm -f "$job_folder/status"
python -c 'import secrets; print(secrets.token_hex(32))' > "$job_folder/token"
umask 022

export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="$job_folder/token"
export RAY_USAGE_STATS_ENABLED=0
export RAY_ENABLE_UV_RUN_RUNTIME_ENV=0
# Ray gives the nodes 30 s to meet; a cold file system needs more to import Python on each.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600

# awk reads to the end, where `head` would leave scontrol with a broken pipe and end this script.
head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | awk 'NR == 1')"
# The first address that is not loopback; where nodes have several networks, set UMARVEL_HEAD_IP to the right one.
if [[ -z "${UMARVEL_HEAD_IP:-}" ]]; then
    UMARVEL_HEAD_IP="$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --all-ip-addresses | awk '{print $1}')"
fi
address="$UMARVEL_HEAD_IP:6379"

# `ray symmetric-run` ends with 0 where Ray itself could not start, so the run leaves its own status behind.
# shellcheck disable=SC2016
srun --ntasks-per-node=1 --kill-on-bad-exit=0 \
    ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" --disable-usage-stats \
    --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" -- \
    bash -c 'RAY_ADDRESS="$1" umarvel run "${@:3}"; echo $? > "$2"' run "$address" "$job_folder/status" "$@" ||
    true

if [[ ! -s "$job_folder/status" ]]; then
    echo "slurm.sh: the run never ended by itself: Ray did not start on all nodes, or was stopped. See above." >&2
    exit 1
fi
exit "$(cat "$job_folder/status")"

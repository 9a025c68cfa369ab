#!/bin/bash
# A worker as a Slurm job: sbatch slurm-worker.sh; four of them: sbatch --array=1-4 slurm-worker.sh
#SBATCH --job-name=tinkerapi-worker
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gres=gpu:1
#SBATCH --time=24:00:00
# Three minutes before the time is over, and at scancel, the worker leaves its runs to the others.
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=tinkerapi-worker-%A_%a.log

set -euo pipefail
set -a
. "${WORKER_SETTINGS:-/etc/tinkerapi/environment}"
set +a
# exec: Slurm sends its signal to this process.
exec "${WORKER_COMMAND:-/opt/tinkerapi/bin/tinkerapi}" worker --join

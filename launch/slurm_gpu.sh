#!/usr/bin/env bash
# Trains on the GPUs of one or several nodes of a SLURM cluster.
#
#   launch/slurm_gpu.sh [OPTION...] [OPTION OF SBATCH...] -- ARGUMENTS
#
# ARGUMENTS go unchanged to `python -m fluxvit_jax.main`, one process a node, which has all the GPUs
# of its node. Call it in the environment and the folder that the program is to run in:
#
#   launch/slurm_gpu.sh --nodes=2 --gpus-per-node=8 --cpus-per-task=64 --time=24:00:00 -- \
#     --config=configs/k400.py:base --workdir=/shared/runs/k400_base
#
# submits a job, unless one of its name (--job-name, default: fluxvit) waits or runs already.
# `sbatch --nodes=2 ... launch/slurm_gpu.sh -- ARGUMENTS` does the same; within an allocation
# (salloc) the script runs the program at once. All nodes must share the storage of the workdir.
#
# Pre-empted, or five minutes before its time is over, the job gets SIGTERM: the program writes a
# checkpoint and ends with status 143, the job is queued again and goes on from there. `scancel`
# ends it for good, and the same command goes on later.
#
# Options:
#   --dry-run  print the commands and run nothing
#   --help     print this
#SBATCH --job-name=fluxvit
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
[ -e "$here/common.sh" ] || here=${SLURM_SUBMIT_DIR-.}/launch # sbatch runs a copy from elsewhere
source "$here/common.sh"

name=fluxvit options=()

while (($#)); do
  case $1 in
    --dry-run) dry_run=true ;;
    --help) help && exit ;;
    --) shift && program=("$@") && break ;;
    --job-name=*) name=${1#*=} options+=("$1") ;;
    --*) options+=("$1") ;;
    *) die "$1: options of sbatch are written --name=value, what the program gets comes after --" ;;
  esac
  shift
done
need_program /shared/runs/k400

# submit: queues this script with the options, unless it is in the queue.
submit() {
  local queue=(squeue --me --name="$name" --noheader --format=%i) found=""
  need sbatch "call this where SLURM's commands are, on a login node"
  if $dry_run; then show "${queue[@]}"; else found=$("${queue[@]}" | head -n 1); fi
  if [ -n "$found" ]; then
    say "$name waits or runs already, as job $found: tail -F $name-$found.log, or scancel $found"
    return
  fi
  run sbatch "${options[@]}" "$ROOT/launch/slurm_gpu.sh" -- "${program[@]}"
}

# train: runs the program on all nodes of this allocation.
train() {
  local step=(srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1) status=0
  step+=(--kill-on-bad-exit=0 --wait=120) # when one ends, the others have a while for a checkpoint
  need srun "call this where SLURM's commands are"
  need python "activate the environment before you submit"
  # srun gives a task one core unless told, whatever sbatch was asked for, and decoding needs many.
  if [ -n "${SLURM_CPUS_PER_TASK-}" ]; then step+=(--cpus-per-task="$SLURM_CPUS_PER_TASK"); fi
  # JAX takes one GPU for each of SLURM's tasks unless told. Nothing else must be set.
  if [ -n "${SLURM_GPUS_ON_NODE-}" ]; then
    step=(env JAX_LOCAL_DEVICE_IDS="$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))" "${step[@]}")
  fi
  run "${step[@]}" python -m fluxvit_jax.main "${program[@]}" || status=$?
  if ((status == 143)); then # pre-empted jobs are queued again by SLURM, those out of time are not
    run scontrol requeue "$SLURM_JOB_ID" || true # an allocation of salloc cannot be
  fi
  exit "$status"
}

if [ -n "${SLURM_JOB_ID-}" ]; then train; else submit; fi

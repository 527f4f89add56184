#!/usr/bin/env bash
# Trains on this machine.
#
#   launch/local.sh [OPTION...] -- ARGUMENTS
#
# ARGUMENTS go unchanged to `python -m fluxvit_jax.main`, on all devices of this machine:
#
#   launch/local.sh -- --config=configs/k400.py:base --workdir=runs/k400_base
#
# A mesh can be tried without its devices, and several hosts without the hosts:
#
#   launch/local.sh --cpu-devices=8 -- --config=... --config.parallel.mesh.fsdp=4
#   launch/local.sh --cpu-devices=4 --hosts=2 -- --config=...
#
# Options:
#   --cpu-devices=N  N simulated CPU devices in place of what the machine has
#   --hosts=N        N processes, each with its --cpu-devices (default: 1)
#   --dry-run        print the commands and run nothing
#   --help           print this
#
# Exit status: the program's; of several hosts, that of the first to fail, which ends the others.
# Ctrl-C and SIGTERM go to all. The same command again goes on from the last checkpoint.
# Environment: PYTHON (default: python).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

python=${PYTHON:-python}
devices=0 hosts=1

while (($#)); do
  case $1 in
    --cpu-devices=*) devices=${1#*=} ;;
    --hosts=*) hosts=${1#*=} ;;
    --dry-run) dry_run=true ;;
    --help) help && exit ;;
    --) shift && program=("$@") && break ;;
    *) die "$1: no such option; see launch/local.sh --help" ;;
  esac
  shift
done

[[ $devices =~ ^[0-9]+$ ]] || die "--cpu-devices=$devices: not a number of devices"
[[ $hosts =~ ^[1-9][0-9]*$ ]] || die "--hosts=$hosts: not a number of hosts"
need_program runs/k400
need "$python" "activate your environment, or name one: PYTHON=.venv/bin/python launch/local.sh"
installed='import importlib.util, sys; sys.exit(importlib.util.find_spec("fluxvit_jax") is None)'
$dry_run || "$python" -c "$installed" ||
  die "fluxvit_jax is not installed for $python: pip install -r requirements.txt -e . --no-deps"

command=()
if ((devices == 0 && hosts > 1)); then
  devices=1 # processes would fight for accelerators
fi
if ((devices > 0)); then
  flags="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"
  command=(env JAX_PLATFORMS=cpu "XLA_FLAGS=$flags")
fi
command+=("$python" -m fluxvit_jax.main "${program[@]}")

if ((hosts == 1)); then
  $dry_run || exec "${command[@]}"
  show "${command[@]}"
  exit
fi

# stop SIGNAL: passes it on to all.
stop() {
  stopped=true
  kill "-$1" "${!pids[@]}" 2> /dev/null || true
}

declare -A pids=() # of the processes that run
stopped=false status=0
trap 'stop INT' INT
trap 'stop TERM' TERM
set -m # each process gets a group of its own, so that Ctrl-C reaches it by `stop` alone
port=$((20000 + $$ % 20000))
for ((host = 0; host < hosts; host++)); do
  each=("${command[@]}" --coordinator="127.0.0.1:$port" --hosts="$hosts" --host="$host")
  if $dry_run; then show "${each[@]}" && continue; fi
  "${each[@]}" < /dev/null &
  pids[$!]=$host
done

while ((${#pids[@]})); do
  code=0
  wait -n -p ended "${!pids[@]}" || code=$?
  [ -n "${ended-}" ] || continue # a signal came, and the trap has passed it on
  host=${pids[$ended]}
  unset "pids[$ended]"
  if ((code == 0 || status != 0)); then continue; fi
  status=$code
  if ! $stopped; then # a second signal would end the others without a checkpoint
    say "host $host ended with status $code: stopping the others"
    stop TERM
  fi
done
exit "$status"

#!/usr/bin/env bash
# Trains on a Cloud TPU, from any machine that has gcloud.
#
#   launch/tpu_vm.sh [STEP] --name=NAME --zone=ZONE [OPTION...] [-- ARGUMENTS]
#
# ARGUMENTS go unchanged to `python -m fluxvit_jax.main` on all workers:
#
#   launch/tpu_vm.sh watch --name=flux --zone=us-west4-a --type=v5litepod-16 --spot --queued -- \
#     --config=configs/k400.py:base --workdir=gs://BUCKET/k400_base \
#     --config.train.grad_accum_steps=2
#
# See first, on your own machine and for nothing, that the run compiles and fits (v5litepod-16 is
# v5e:4x4), and what it would take:
#
#   python -m fluxvit_jax.main --mode=preflight --config=configs/k400.py:base \
#     --config.train.grad_accum_steps=2 --config.preflight.topology=v5e:4x4 \
#     --config.preflight.videos=240000
#
# Steps (default: up). Each leaves alone what is there already, so the same command may be repeated:
#   up      start, then logs
#   watch   start, and again whenever the TPU was pre-empted, until the run ends with status 0
#   start   create, copy, check, setup, run
#   create  the TPU VM; a pre-empted one is deleted and created anew
#   copy    this folder's code and recipes to all workers, into ~/fluxvit_jax
#   check   that the TPU may write to the bucket of a gs:// workdir
#   setup   Python, packages and jax[tpu] on all workers, into ~/fluxvit_env
#   run     the program on all workers, in the background; it goes on from its last checkpoint
#   logs    follows the log of worker 0 (~/fluxvit_run/log); Ctrl-C leaves the run alone
#   status  of the TPU and of the run on its workers
#   stop    the run, after a checkpoint; end a watch first, which would start it again
#   delete  the TPU; what it costs ends here, and with nothing else
#
# Options:
#   --name=NAME        of the TPU, and of its request in the queue
#   --zone=ZONE        such as us-west4-a
#   --project=PROJECT  default: gcloud's
#   --type=TYPE        such as v4-8, v5litepod-16, v5p-16, v6e-8; what a zone has is told by
#                      gcloud compute tpus tpu-vm accelerator-types list --zone=ZONE
#   --version=VERSION  of the VM's software; default: what Google names for the type and JAX
#   --queued           ask by a queued resource, which waits for capacity; say so in every step
#   --spot             cheap, and may be pre-empted at any time
#   --poll=SECONDS     between looks at what one waits for (default: 60)
#   --dry-run          print the commands, as if there were no TPU yet, and run nothing
#   --help             print this
#
# With several workers gcloud wants its key in ssh-agent: ssh-add ~/.ssh/google_compute_engine
# Exit status: 2 for what you must change, said in one line; 75 for what may go by itself, such as
# no capacity; up and logs: that of the run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

worker=fluxvit_jax/launch/worker.sh # on the TPU, from the home folder
step=up name="" zone="" project="" type="" version="" queued=false spot=false poll=60
workdir=""

if [[ ${1-} == [a-z]* ]]; then step=$1 && shift; fi
given=("$@") # for `watch`, which calls this script again
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --poll=*) poll=${1#*=} ;;
    --queued) queued=true ;;
    --spot) spot=true ;;
    --dry-run) dry_run=true ;;
    --help) help && exit ;;
    --) shift && program=("$@") && break ;;
    *) die "$1: no such option; see launch/tpu_vm.sh --help" ;;
  esac
  shift
done
for argument in "${program[@]}"; do
  case $argument in --workdir=*) workdir=${argument#*=} ;; esac
done

where=(--zone="$zone")
if [ -n "$project" ]; then where+=(--project="$project"); fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# ssh_to WORKERS COMMAND: a shell's command on worker 0, or on all.
ssh_to() {
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"
}

# on WORKERS WORD...: calls worker.sh there.
on() {
  ssh_to "$1" "bash $worker$(quote "${@:2}")"
}

# ask_all: what worker.sh says of the run; nothing, before the code is there.
ask_all() {
  ssh_to all "[ ! -e $worker ] || bash $worker state"
}

# describe KIND FIELD: a field of what has the name; nothing if there is no such thing; UNKNOWN.
describe() {
  local command=(gcloud compute tpus "$1" describe "$name" "${where[@]}" --format="value($2)")
  if $dry_run; then
    show "${command[@]}"
  elif ! "${command[@]}" 2> "$scratch/said"; then
    grep -Eq 'NOT_FOUND|not found' "$scratch/said" || echo UNKNOWN
  fi
}

# state: of the TPU VM (READY, PREEMPTED, ...), else of its request in the queue, else ABSENT.
state() {
  local found
  found=$(describe tpu-vm state)
  if [ -z "$found" ] && $queued; then found=$(describe queued-resources state.state); fi
  echo "${found:-ABSENT}"
}

# job: what the run does, from what each worker says of it: running, finished, refused (bad input),
# stopped (to be started: never was, or was cut off), crashed; or unknown, if they do not answer.
job() {
  local said
  said=$(ask_all 2> "$scratch/said") || { echo unknown && return; }
  said=$(grep -o 'state=[a-z0-9]*' <<< "$said" | sort -u | tr '\n' ' ') || true
  case $said in
    *=running\ *) echo running ;;
    *=2\ *) echo refused ;;
    "state=0 ") echo finished ;;
    "" | *=none\ * | *=lost\ * | *=130\ * | *=143\ *) echo stopped ;;
    *) echo crashed ;;
  esac
}

# refused MESSAGE: explains why Google Cloud gave no TPU.
refused() {
  local kind="on-demand"
  if $spot; then kind=spot; fi
  case $1 in
    *[Qq]uota*exceeded* | *QUOTA_EXCEEDED* | *[Ii]nsufficient*quota*)
      die "no $kind quota for $type in $zone; what there is: gcloud beta quotas info list" \
        "--service=tpu.googleapis.com --project=${project:-PROJECT}; more is asked for at" \
        "https://console.cloud.google.com/iam-admin/quotas"
      ;;
    *capacity* | *RESOURCE_EXHAUSTED*)
      later "$zone has no $type to give now: --queued waits for one, or try another zone"
      ;;
    *) die "there is no TPU: $(tail -n 1 <<< "$1")" ;;
  esac
}

runtime() {
  case $type in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v4-*) echo tpu-ubuntu2204-base ;;
    *) die "--type=$type: not v4-N, v5litepod-N, v5p-N or v6e-N; give its --version as well" ;;
  esac
}

# ask_for_one: asks for a TPU; a request in the queue returns at once, a VM when it is there.
ask_for_one() {
  local command
  [ -n "$type" ] || die "which TPU? Add --type=v5litepod-16, for example"
  version=${version:-$(runtime)}
  if $queued; then
    command=(queued-resources create "$name" --node-id="$name" --runtime-version="$version")
  else
    command=(tpu-vm create "$name" --version="$version")
  fi
  command=(gcloud compute tpus "${command[@]}" --accelerator-type="$type" "${where[@]}")
  if $spot; then command+=(--spot); fi
  run "${command[@]}" 2>&1 | tee "$scratch/said" >&2 || refused "$(< "$scratch/said")"
}

create() {
  local now asked=false
  while :; do
    now=$(state)
    case $now in
      READY) return ;;
      ABSENT)
        ask_for_one
        asked=true
        ;;
      PREEMPTED | TERMINATED | SUSPENDED) say "$name is $now: deleting it" && delete ;;
      FAILED)
        ! $asked || refused "$(describe queued-resources state.failedData.error.message)"
        delete
        ;;
      STOPPED) die "$name is stopped: gcloud compute tpus tpu-vm start $name ${where[*]}" ;;
      UNKNOWN) later "gcloud does not say what $name is: $(tail -n 1 "$scratch/said")" ;;
      *) say "$name is $now: waiting" && sleep "$poll" ;;
    esac
    if $dry_run; then return; fi
  done
}

copy() {
  local parts=(configs fluxvit_jax launch LICENSE README.md pyproject.toml requirements.txt)
  run tar -czf "$scratch/code.tar.gz" -C "$ROOT" --exclude=__pycache__ "${parts[@]}"
  run gcloud compute tpus tpu-vm scp "$scratch/code.tar.gz" "$name:" "${where[@]}" --worker=all
  ssh_to all "mkdir -p fluxvit_jax && tar -xzf code.tar.gz -C fluxvit_jax"
}

check() {
  case $workdir in
    gs://*) on 0 check "${workdir%/}" ;;
    *) say "note: without --workdir=gs://... the run's checkpoints go when the TPU goes" ;;
  esac
}

# begin STEP...: starts the run, after these steps, unless it goes on already.
begin() {
  local prepare
  need_program gs://BUCKET/RUN
  case $(job) in
    running) say "the run goes on already; launch/tpu_vm.sh logs shows it" && return ;;
    unknown) later "$name does not answer: $(tail -n 1 "$scratch/said")" ;;
  esac
  for prepare; do "$prepare"; done
  on all start "${program[@]}"
}

setup() {
  on all setup
}

start() {
  need_program gs://BUCKET/RUN
  create
  begin copy check setup
}

# start_again: `start` as a process of its own, since it may be cut off anywhere.
start_again() {
  local code=0
  bash "${BASH_SOURCE[0]}" start "${given[@]}" || code=$?
  case $code in
    0 | 75) ;;
    2) exit 2 ;;
    *) if [ "$(state)" = READY ]; then count_failure; fi ;; # else the TPU was lost meanwhile
  esac
}

count_failure() {
  failures=$((failures + 1))
  ((failures < 3)) || die "$name has failed for the third time: launch/tpu_vm.sh logs shows why"
}

watch() {
  local now failures=0
  need_program gs://BUCKET/RUN
  [[ $workdir == gs://* ]] || die "to watch a run takes --workdir=gs://..., which outlives the TPU"
  start_again
  if $dry_run; then
    echo "# then, every $poll s:" >&3
    now=$(state) now=$(job)
    echo "# and when the TPU was pre-empted, before all this again:" >&3
    delete
    return
  fi
  while :; do
    sleep "$poll"
    now=$(state)
    if [ "$now" = READY ]; then now=$(job); fi
    case $now in
      running | unknown | UNKNOWN) ;;
      finished)
        say "the run has ended with status 0; launch/tpu_vm.sh delete ends the costs"
        return
        ;;
      refused) die "the program refuses its input: launch/tpu_vm.sh logs shows why" ;;
      crashed) count_failure && start_again ;;
      *) say "the run is not running ($now): starting it again" && start_again ;;
    esac
  done
}

delete() {
  if $queued; then
    run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  else
    run gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
  fi
}

delete_it() {
  local now
  now=$(state)
  if [ "$now" = ABSENT ] && ! $dry_run; then say "there is no $name" && return; fi
  delete
}

status() {
  local now
  now=$(state)
  say "$name is $now"
  if [ "$now" = READY ] || $dry_run; then ask_all; fi
}

need gcloud "https://cloud.google.com/sdk/docs/install"
[ -n "$name" ] || die "which TPU? Add --name=NAME"
[ -n "$zone" ] || die "where? Add --zone=us-west4-a, for example"
case $step in
  up)
    start
    on 0 logs
    ;;
  watch | start | create | copy | check | setup | status) "$step" ;;
  run) begin check ;;
  logs) on 0 logs ;;
  stop) on all stop ;;
  delete) delete_it ;;
  *) die "$step: not a step; see launch/tpu_vm.sh --help" ;;
esac

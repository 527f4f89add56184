#!/usr/bin/env bash
# What launch/tpu_vm.sh calls on every worker of a TPU; its files are in the home folder.
#
#   worker.sh setup             makes the environment, or completes it
#   worker.sh check gs://...    says in one line if this worker may not write there
#   worker.sh start ARGUMENT... starts `python -m fluxvit_jax.main` in the background
#   worker.sh state             prints state=none, =running, =lost (this VM has restarted since), or
#                               the exit status of the last run, such as state=0
#   worker.sh logs              follows the log to the end of the run; exit status of the run
#   worker.sh stop              sends SIGTERM: the program writes a checkpoint and ends
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
cd "$ROOT"

tools=$HOME/fluxvit_tools environment=$HOME/fluxvit_env files=$HOME/fluxvit_run
log=$files/log pid=$files/pid status=$files/status

setup() {
  # The images of Cloud TPU have Python 3.10; uv brings the one that the pre-flight compiled for.
  if [ ! -x "$tools/bin/uv" ]; then
    python3 -m pip install --quiet --target="$tools" uv
  fi
  if [ ! -x "$environment/bin/python" ]; then
    "$tools/bin/uv" venv --quiet --python=3.11 "$environment"
  fi
  # In one go, so that the libtpu is that of the jax in requirements.txt; gcs is for gs://.
  VIRTUAL_ENV=$environment "$tools/bin/uv" pip install --quiet --requirement=requirements.txt \
    "jax[tpu]" --editable=".[gcs]"
}

check() {
  local folder=$1 probe="$1/.may_write_$$" answer account
  command -v gcloud > /dev/null || return 0 # then the program finds out
  if answer=$(gcloud storage cp - "$probe" <<< "" 2>&1 && gcloud storage rm "$probe" 2>&1); then
    return
  fi
  account=$(gcloud config get-value account 2> /dev/null || echo "this VM's account")
  case $answer in
    *403* | *ermission*) ;;
    *) die "cannot write to $folder: $(tail -n 1 <<< "$answer")" ;;
  esac
  die "no permission to write to $folder: gcloud storage buckets add-iam-policy-binding" \
    "gs://$(cut -d/ -f3 <<< "$folder") --member=serviceAccount:$account" \
    "--role=roles/storage.objectUser"
}

running() {
  [ -e "$pid" ] && [ ! -e "$status" ] && grep -qsa fluxvit_jax.main "/proc/$(< "$pid")/cmdline"
}

state() {
  if running; then
    echo running
  elif [ -e "$status" ]; then
    cat "$status"
  elif [ -e "$pid" ]; then
    echo lost
  else
    echo none
  fi
}

start() {
  ! running || die "a run goes on here already: launch/tpu_vm.sh stop, or logs"
  mkdir -p "$files"
  rm -f "$status"
  # Nothing of it may hold on to the output of this script, or ssh would wait for the run to end.
  # shellcheck disable=SC2016 # the inner shell is to expand these
  nohup bash -c '"$@"; echo $? > "$0"' "$status" \
    "$environment/bin/python" -m fluxvit_jax.main "$@" < /dev/null >> "$log" 2>&1 3>&- &
  echo $! > "$pid"
}

logs() {
  local now
  [ -e "$pid" ] || die "nothing was started here"
  tail -n 100 -F --pid="$(< "$pid")" "$log"
  now=$(state)
  say "state=$now"
  if [[ $now =~ ^[0-9]+$ ]]; then exit "$now"; fi
}

stop() {
  running || die "no run goes on here"
  pkill -TERM -P "$(< "$pid")"
}

case ${1-} in
  state) echo "$HOSTNAME: state=$(state)" ;;
  setup | check | start | logs | stop) "$@" ;;
  --help) help ;;
  *) die "worker.sh is for launch/tpu_vm.sh; see launch/worker.sh --help" ;;
esac

#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster, as a workload of xpk; any machine with docker will do.
#
#   launch/gke_xpk.sh [STEP] --name=NAME --cluster=CLUSTER --zone=ZONE --project=PROJECT \
#     --type=TYPE --image=IMAGE [OPTION OF XPK...] [-- ARGUMENTS]
#
# ARGUMENTS go unchanged to `python -m fluxvit_jax.main` in every container; options that are not
# below go to `xpk workload create`:
#
#   launch/gke_xpk.sh --name=k400 --cluster=tpus --zone=us-west4-a --project=mine \
#     --type=v5litepod-16 --image=REGISTRY/PROJECT/fluxvit --priority=high -- \
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
# Steps (default: up). The same command may be repeated:
#   up      build, run, logs
#   build   the image of launch/Dockerfile, and its upload
#   run     the workload, unless one of the name goes on; one that has ended is replaced, and the
#           program goes on from its last checkpoint
#   logs    follows the log of the first host; Ctrl-C leaves the workload alone
#   list    the workload, and what it waits for
#   delete  the workload; the cluster stays, and so do its costs
#
# Options:
#   --name=NAME        of the workload: small letters, digits and hyphens
#   --cluster=CLUSTER  that `xpk cluster create` has made, with --zone and --project
#   --type=TYPE        of its TPUs, such as v5litepod-16
#   --image=IMAGE      where the image goes: REGISTRY/PROJECT/fluxvit
#   --dry-run          print the commands, as if there were no workload yet, and run nothing
#   --help             print this
#
# Pre-empted, or stopped for maintenance, the program gets SIGTERM, writes a checkpoint and ends
# with status 143, and the cluster starts it again, up to 100 times; not so after bad input.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

step=up name="" cluster="" zone="" project="" type="" image="" options=()

if [[ ${1-} == [a-z]* ]]; then step=$1 && shift; fi
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --cluster=*) cluster=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --dry-run) dry_run=true ;;
    --help) help && exit ;;
    --) shift && program=("$@") && break ;;
    --*) options+=("$1") ;;
    *) die "$1: options are written --name=value; see launch/gke_xpk.sh --help" ;;
  esac
  shift
done

first="jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"

# workload DOING WORD...: a command of xpk, which also turns kubectl to the cluster.
workload() {
  run xpk workload "$1" --cluster="$cluster" --zone="$zone" --project="$project" "${@:2}"
}

list() {
  workload list --filter-by-job="$name"
}

build() {
  need docker "https://docs.docker.com/engine/install"
  run docker build --platform=linux/amd64 --file="$ROOT/launch/Dockerfile" --tag="$image" "$ROOT"
  run docker push "$image" ||
    die "cannot upload $image: gcloud auth configure-docker ${image%%/*}, then once more"
}

# found: nothing; or of a workload that goes on "yes", of one that has ended "yes Failed" or such.
found() {
  list >&2
  run kubectl get jobset "$name" --ignore-not-found --output="jsonpath=yes {.status.terminalState}"
}

create() {
  local now pinned=$image inspect=(docker inspect --format='{{index .RepoDigests 0}}' "$image")
  [ -n "$type" ] || die "which TPUs? Add --type=v5litepod-16, for example"
  need_program gs://BUCKET/RUN
  now=$(found)
  case $now in
    "") ;;
    *Completed | *Failed) workload delete --workload="$name" ;;
    *) say "$name goes on already; launch/gke_xpk.sh logs shows it" && return ;;
  esac
  # By its digest, so that no node runs an older image of the same name.
  if $dry_run; then
    show "${inspect[@]}"
  else
    pinned=$("${inspect[@]}") || die "no $image on this machine: launch/gke_xpk.sh build"
  fi
  # `exec`, so that SIGTERM reaches the program.
  workload create --workload="$name" --tpu-type="$type" --num-slices=1 --docker-image="$pinned" \
    --max-restarts=100 --termination-grace-period-seconds=120 "${options[@]}" \
    --command="exec$(quote python -m fluxvit_jax.main "${program[@]}")" ||
    die "xpk did not take the workload; if for quota, GKE counts that of compute.googleapis.com:" \
      "https://console.cloud.google.com/iam-admin/quotas?project=$project"
}

# phase: of the first host: Pending, Running, Succeeded, Failed; nothing while it waits for TPUs.
phase() {
  run kubectl get pods --selector="$first" --output="jsonpath={.items[*].status.phase}"
}

logs() {
  local now
  now=$(found)
  [ -n "$now" ] || $dry_run || die "there is no workload $name: launch/gke_xpk.sh run"
  while now=$(phase) && ! $dry_run && [[ ! $now =~ Running|Succeeded|Failed ]]; do
    say "$name waits for its TPUs; launch/gke_xpk.sh list says why"
    sleep 30
  done
  run kubectl logs --follow --tail=-1 --selector="$first" --container=jax-tpu
}

need xpk "pip install xpk, in an environment of its own"
need gcloud "https://cloud.google.com/sdk/docs/install"
need kubectl "gcloud components install kubectl gke-gcloud-auth-plugin"
for option in name cluster zone project image; do
  [ -n "${!option}" ] || die "--$option=... is missing; see launch/gke_xpk.sh --help"
done
case $step in
  up)
    build
    create
    logs
    ;;
  run) create ;;
  build | logs | list) "$step" ;;
  delete) workload delete --workload="$name" ;;
  *) die "$step: not a step; see launch/gke_xpk.sh --help" ;;
esac

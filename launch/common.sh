# What the launch scripts share. They source it, and find here how to print, ask for tools and stop.
# shellcheck shell=bash

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then
  echo "error: bash $BASH_VERSION is older than 5.1: on a Mac, brew install bash" >&2
  exit 2
fi

shopt -s inherit_errexit
# shellcheck disable=SC2034 # the scripts use it
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=false
program=() # what comes after the -- of the command line
exec 3>&1 # where --dry-run prints, from within $(...) as well

# help: prints the comment at the head of the script.
help() {
  sed -nE '2,$ { /^#( |$)/!q; s/^# ?//p; }' "$0"
}

say() {
  echo "$*" >&2
}

# die MESSAGE: what the user must change, in one line. Exit status 2, as of the program itself.
die() {
  echo "error: $*" >&2
  exit 2
}

# later MESSAGE: what may go by itself. Exit status 75, as sysexits.h has it.
later() {
  echo "error: $*" >&2
  exit 75
}

# need TOOL HOW: stops if a tool is missing, and says how to install it.
need() {
  $dry_run || command -v "$1" > /dev/null || die "$1 is missing: $2"
}

# need_program WORKDIR: stops if nothing comes after a --, and gives an example with the workdir.
need_program() {
  ((${#program[@]})) || die "nothing to run: add -- --config=configs/k400.py --workdir=$1"
}

# quote WORD...: the words as one would type them into a shell, each after a space.
quote() {
  local word plain='^[A-Za-z0-9_@%+=:,./-]+$'
  for word; do
    [[ $word =~ $plain ]] || word=\'${word//\'/\'\\\'\'}\'
    printf ' %s' "$word"
  done
}

# show WORD...: prints a command.
show() {
  local line
  line=$(quote "$@")
  echo "${line# }" >&3
}

# run WORD...: runs a command; under --dry-run prints it instead.
run() {
  if $dry_run; then show "$@"; else "$@"; fi
}

# shellcheck shell=bash
# What the launchers share, to be sourced. It works in bash 3.2 too, which is what macOS has.

dry_run=false

# parse "OPTION ..." "FLAG ..." "$@": sets a variable for each option with a value and each flag (_ for -), and the array
# `command` to what follows --.
parse() {
  local valued=" $1 " flags=" $2 " key
  shift 2
  command=()
  while [ $# -gt 0 ]; do
    case $1 in
      --) command=("${@:2}") && break ;;
      -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit 0 ;;
      -n) set -- --processes "${@:2}" && continue ;;
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
    esac
    key=${1#--} key=${key//-/_}
    case $1$valued$flags in
      --*" $key "*) ;;
      *) fail "no option $1: see --help; what is to be run follows --" ;;
    esac
    if [[ $flags == *" $key "* ]]; then
      printf -v "$key" true
      shift
    else
      [ $# -ge 2 ] || fail "$1 needs a value"
      printf -v "$key" %s "$2"
      shift 2
    fi
  done
  [ ${#command[@]} -gt 0 ] || fail "nothing is to be run: end with -- train --config NAME --workdir DIR"
}

# require NAME ...: the options that must have been given.
require() {
  local name
  for name in "$@"; do
    [ -n "${!name}" ] || fail "--${name//_/-} is needed: see --help"
  done
}

# number LEAST NAME ...: the options that must be whole numbers of at least LEAST.
number() {
  local name least=$1
  for name in "${@:2}"; do
    if [[ ! ${!name} =~ ^[0-9]{1,9}$ ]] || ((10#${!name} < least)); then
      fail "--${name//_/-} is '${!name}': it must be a whole number, at least $least"
    fi
  done
}

# quoted WORD ...: as a shell reads them.
quoted() {
  local word line='' escaped="'\\''"
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_@%+=:,./-]*) word="'${word//\'/$escaped}'" ;;
    esac
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# run COMMAND ...: prints it and runs it; with --dry-run it is printed alone, to stdout, where a dry run's answer belongs.
run() {
  if $dry_run; then
    echo "+ $(quoted "$@")"
  else
    echo "+ $(quoted "$@")" >&2
    "$@"
  fi
}

# installation PACKAGE: the command that puts it and Python into ~/.tclip, whatever Python the machine has.
installation() {
  echo "curl -LsSf https://astral.sh/uv/install.sh | sh -s -- --quiet" \
    "&& ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 ~/.tclip" \
    "&& ~/.local/bin/uv pip install --quiet --python ~/.tclip/bin/python $(quoted "$1")"
}

say() { echo "launch/${0##*/}: $*" >&2; }

fail() {
  say "error: $*"
  exit 2
}

# shellcheck shell=bash
# Functions of all launchers, which source this file. Works in bash 3.2, the version of macOS.

dry_run=false

# parse "OPTION ..." "FLAG ..." "$@": parses the arguments "$@". Sets a variable for each option with a value and for
# each flag (with _ for -), and sets the array `command` to the words after --.
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
      *) fail "unknown option $1: --help lists the options; the command follows --" ;;
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
  [ ${#command[@]} -gt 0 ] || fail "no command: end with -- train --config NAME --workdir DIR"
}

# require NAME ...: fails unless each of these options is set.
require() {
  local name
  for name in "$@"; do
    [ -n "${!name}" ] || fail "--${name//_/-} is required: see --help"
  done
}

# number LEAST NAME ...: fails unless each of these options is an integer of at least LEAST.
number() {
  local name least=$1
  for name in "${@:2}"; do
    if [[ ! ${!name} =~ ^[0-9]{1,9}$ ]] || ((10#${!name} < least)); then
      fail "--${name//_/-} is '${!name}': it must be an integer, at least $least"
    fi
  done
}

# quoted WORD ...: prints the words, quoted for a shell.
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

# run COMMAND ...: prints the command to stderr and runs it. With --dry-run, only prints it, to stdout.
run() {
  if $dry_run; then
    echo "+ $(quoted "$@")"
  else
    echo "+ $(quoted "$@")" >&2
    "$@"
  fi
}

# installation PACKAGE: prints the command that installs the package in ~/.tclip, with a Python of its own.
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

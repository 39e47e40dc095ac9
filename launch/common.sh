# shellcheck shell=bash
# Functions that the launchers source. They also work in bash 3.2, the version of macOS.

dry_run=false missing=0
# Set by `check`.
wheel='' recipe='' extras='' buckets=()

# parse "OPTION ..." "FLAG ..." "$@": sets a variable for each option and each flag (with _ for -), and sets the array
# `command` to the words after --.
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
      *) fail "no option $1: see --help; the command follows --" ;;
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

# require NAME ...: fails unless all these options have values.
require() {
  local name
  for name in "$@"; do
    [ -n "${!name}" ] || fail "--${name//_/-} is needed: see --help"
  done
}

# number LEAST NAME ...: fails unless all these options are whole numbers of at least LEAST.
number() {
  local name least=$1
  for name in "${@:2}"; do
    if [[ ! ${!name} =~ ^[0-9]{1,9}$ ]] || ((10#${!name} < least)); then
      fail "--${name//_/-} is '${!name}': it must be a whole number, at least $least"
    fi
  done
}

# quoted WORD ...: prints the words quoted for a shell.
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

# run COMMAND ...: prints a command to stderr and runs it; with --dry-run only prints it, to stdout.
run() {
  if $dry_run; then
    echo "+ $(quoted "$@")"
  else
    echo "+ $(quoted "$@")" >&2
    "$@"
  fi
}

# check HOSTS PREFIX: fails unless hosts of a `cloud`, or of a `cluster` that shares this machine's folders, can run
# `command`. Sets `command` to what they run, `recipe` to a file that they need at PREFIX (or to nothing), `wheel` to the
# name of this installation's wheel, `extras` to those that its URLs need, and `buckets`. Counts data and models
# that are not on a cluster as missing.
check() {
  local checked each absent=()
  checked=$(tclip launch check --hosts "$1" --prefix "$2" --mounted "${mounted:-}" -- "${command[@]}") || exit 2
  eval "$checked"
  for each in ${absent[@]+"${absent[@]}"}; do lacks "$each"; done
}

# gather: puts into `files`, a new folder, what is sent to hosts: the recipe, and the wheel of this installation unless
# --package is another package.
gather() {
  [[ $name =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || fail "--name is '$name': it must be letters, digits, '.', '_' and '-'"
  files=${TCLIP_CACHE_DIR:-$HOME/.cache/tclip_jax}/launch/$name
  run rm -rf "$files"
  run mkdir -p "$files" || fail "nothing was started"
  if [ -z "${package:-}" ]; then
    run tclip launch wheel --out "$files" || fail "nothing was started: there is no wheel of this installation"
  elif [[ $package == *.whl && $package != *://* ]]; then
    wheel=${package##*/}
    run cp "$package" "$files/" || fail "nothing was started: --package names no file"
  else
    wheel=''
  fi
  [ -z "$recipe" ] || run cp "$recipe" "$files/"
}

# requirement FOLDER EXTRA: prints what hosts install where FOLDER has the files of `gather`.
requirement() {
  if [ -n "$wheel" ]; then echo "$1/${wheel}[$2${extras:+,$extras}]"; else echo "$package"; fi
}

# installation REQUIREMENT: prints the command that installs the package and its own Python into ~/.tclip.
installation() {
  echo "curl -LsSf https://astral.sh/uv/install.sh | sh -s -- --quiet" \
    "&& ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 ~/.tclip" \
    "&& ~/.local/bin/uv pip install --quiet --python ~/.tclip/bin/python --reinstall-package tclip-jax $(quoted "$1")"
}

# lacks TEXT: counts and prints something that must be there before anything is started.
lacks() {
  say "missing: $*"
  missing=$((missing + 1))
}

# program NAME HINT: whether a program is there; if not, it is missing.
program() { command -v "$1" > /dev/null || { lacks "$1: $2" && false; }; }

# asked COMMAND ...: runs a command that changes nothing, and sets `answer` to its output, or else to its first error.
asked() {
  answer=$("$@" 2>&1 < /dev/null) && return
  answer=$(grep -m 1 -E '^ERROR|[Ee]rror' <<< "$answer" || grep -m 1 . <<< "$answer")
  return 1
}

# google: whether gcloud has an account and a project.
google() {
  export CLOUDSDK_CORE_DISABLE_PROMPTS=1
  program gcloud "install it from https://cloud.google.com/sdk/docs/install" || return 1
  asked gcloud auth list --filter=status:ACTIVE '--format=value(account)' || true
  # It warns on stderr where there is no account.
  [[ $answer == *@* ]] || { lacks "a Google account: gcloud auth login" && return 1; }
  [ -n "${project:-}" ] || [ -n "$(gcloud config get-value project 2> /dev/null)" ] ||
    { lacks "a project: gcloud config set project PROJECT" && return 1; }
}

# readable: whether this machine's gcloud and aws can list `buckets`.
readable() {
  local bucket list
  for bucket in ${buckets[@]+"${buckets[@]}"}; do
    case $bucket in gs:*) list=(gcloud storage ls "$bucket") ;; *) list=(aws s3 ls "$bucket") ;; esac
    if command -v "${list[0]}" > /dev/null && ! asked "${list[@]}"; then
      case $answer in
        *"not have permission"* | *AccessDenied*) say "note: hosts need more rights than this account has: $answer" ;;
        *) lacks "$bucket: $answer" ;;
      esac
    fi
  done
}

# complete: ends the checks before a start. Fails if something is missing; a dry run goes on to print its commands.
complete() {
  $dry_run || [ "$missing" -eq 0 ] || fail "nothing was started: $missing missing"
}

# printed: ends a dry run, with exit code 1 if something is missing.
printed() {
  say "dry run: $([ "$missing" -eq 0 ] && echo "nothing is missing" || echo "$missing missing")"
  exit $((missing > 0))
}

say() { echo "launch/${0##*/}: $*" >&2; }

fail() {
  say "error: $*"
  exit 2
}

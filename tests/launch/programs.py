"""Stand-ins for the programs that the scripts of launch/ call, as bash, and what the real ones print when they fail.

The texts are those of gcloud 528, xpk 1.16, SkyPilot 0.14 and docker 28 where these could be called without an account,
and those of their documentation and issues otherwise.
"""

from __future__ import annotations

import sys

import tclip_jax

# What the programs answer to the questions of a preflight where nothing is missing. Other calls are logged in $CALLS.
GCLOUD = """
case $* in
  "auth list"*) echo me@example.com; exit ;;
  "config get-value project") echo mine; exit ;;
  "compute tpus accelerator-types describe "*) echo "name: $5"; exit ;;
  "storage ls gs://"*) echo "$3/cc12m/"; exit ;;
  "container clusters list --filter=name=pods "*) echo pods; exit ;;
  "container images describe "*) echo "image_summary:"; exit ;;
esac
echo "$*" >> $CALLS
"""
LOG = 'echo "$*" >> $CALLS'
READY = {
    "gcloud": GCLOUD,
    "ssh-add": "echo '256 SHA256:abc me (ED25519)'",
    "docker": f'[ "$1" != info ] || {{ echo 28.0.1; exit; }}; {LOG}',
    "xpk": LOG,
    "sbatch": '[ "$1" != --test-only ] || { echo "sbatch: Job 7 to start at 2026-01-01" >&2; exit; }; cat > job',
    "sky": f'[ "$1" != check ] || {{ echo "  GCP: enabled [compute]"; exit; }}; {LOG}; cp task.yaml $CALLS.yaml',
    "aws": 'echo "PRE cc12m/"',
    "date": "echo 20260101-000000",
}
# `tclip launch check` is the real one; a wheel is an empty file; anything else is a command that was launched.
TCLIP = f"""
case "$1 $2" in
  "launch check") exec {sys.executable} -m tclip_jax "$@" ;;
  "launch wheel")
    folder=${{!#}}
    echo "$*" >> $CALLS; mkdir -p "$folder"; touch "$folder/tclip_jax-{tclip_jax.__version__}-py3-none-any.whl"; exit ;;
esac
"""

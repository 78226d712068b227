#!/usr/bin/env bash
# What the tests of Slurm need (`make test-full`): Debian's slurm-wlm and munge, from which they start a cluster of
# their own. Where they cannot be installed the tests are skipped and say so, which is no reason for this script to fail.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
  if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    echo "installing slurm-wlm and munge for the tests of Slurm" >&2
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge; } \
      </dev/null >/dev/null \
      || echo "Slurm could not be installed; its tests will be skipped" >&2
  else
    echo "no Slurm found; its tests will be skipped. On Debian, as root: apt-get install slurm-wlm munge" >&2
  fi
fi

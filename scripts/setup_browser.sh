#!/usr/bin/env bash
# What the browser tests of the report need (`make test-full`): playwright and axe-core in .venv, and a Chromium.
# The browser is the system's own. Where there is none, apt-get installs Debian's if we are root; otherwise the
# tests are skipped and say so, which is no reason for this script to fail.
set -euo pipefail
cd "$(dirname "$0")/.."

.venv/bin/pip install --quiet --constraint constraints.txt axe-playwright-python playwright
if ! command -v chromium chromium-browser google-chrome >/dev/null; then
  if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    echo "installing chromium for the browser tests (about 100 MB)" >&2
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } >/dev/null \
      || echo "chromium could not be installed; the browser tests will be skipped" >&2
  else
    echo "no chromium found; the browser tests will be skipped. On Debian: apt-get install chromium" >&2
  fi
fi
touch .venv/browser

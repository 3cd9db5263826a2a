#!/usr/bin/env bash
# Installs m3jax and its test tools into a virtual environment where that has not been done, then
# runs the fast tests: all but the slow ones and the comparisons with foreign implementations.
#
#   bash launch/test.sh [--all | --bucket | --kills] [arguments of pytest]
#   bash launch/test.sh --all                           # the slow ones, too
#   bash launch/test.sh --bucket                        # all tests of gs://, the slow ones, too
#   bash launch/test.sh --kills                         # every command killed at every moment, every
#                                                       # file damaged or exchanged: hours
#   bash launch/test.sh -n 0                            # in one process, as a debugger needs it
#
# M3JAX_VENV=FOLDER puts the environment somewhere else than .venv of the repository.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
extras=test
[[ "${1:-}" != --bucket ]] || extras=test,gcs
prepare_environment "$extras"
cd "$root"
marks="not slow and not parity and not every"
if [[ "${1:-}" == --all ]]; then
  marks="not parity and not every"
  shift
elif [[ "${1:-}" == --bucket ]]; then
  marks="bucket and not every"
  shift
elif [[ "${1:-}" == --kills ]]; then
  marks="not parity"
  export M3JAX_KILLS=all
  shift
  set -- tests/kills tests/test_damage.py tests/train/test_ingredients.py "$@"
fi
exec "$python" -m pytest -m "$marks" -n auto --maxprocesses=8 --dist=worksteal "$@"

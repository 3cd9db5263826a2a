#!/usr/bin/env bash
# Installs m3jax into a virtual environment where that has not been done, then runs the quickstart.
#
#   bash launch/quickstart.sh [flags of launch/quickstart.py]
#
# M3JAX_VENV=FOLDER puts the environment somewhere else than .venv of the repository.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment ""
exec "$python" "$root/launch/quickstart.py" "$@"

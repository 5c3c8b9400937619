#!/usr/bin/env bash
# Make .venv and install the project with the extras that are named; quick where nothing changed.
#   bash deploy/install.sh tiny photos
set -euo pipefail
cd "$(dirname "$0")/.."
state=$(cat pyproject.toml deploy/constraints.txt deploy/install.sh | sha256sum | cut -c 1-16)
missing=()
for extra in "$@"; do
  grep -qsxF "$extra $state" .venv/installed || missing+=("$extra")
done
[ ${#missing[@]} -gt 0 ] || exit 0

python=$(command -v python3.11 || command -v python3 || true)
if ! { [ -n "$python" ] && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; }; then
  echo "install: Python 3.11 is needed (found: ${python:-none})" >&2
  exit 1
fi
echo "Installing into .venv (the first time: a few minutes, about 3 GB) ..." >&2
[ -x .venv/bin/python ] || "$python" -m venv .venv
log=$(mktemp)
trap 'rm -f "$log"' EXIT
install() {
  .venv/bin/python -m pip install --disable-pip-version-check -c deploy/constraints.txt "$@" > "$log" 2>&1 ||
    { tail -n 30 "$log" >&2; echo "install: pip failed; what it said is above" >&2; exit 1; }
}
extras=()
for extra in "${missing[@]}"; do
  if [ "$extra" = photos ]; then  # packages wanted for their pictures only, so without what they depend on
    install --no-deps imgaug scikit-image scikit-learn
  elif [ "$extra" = groundingdino ]; then  # torchvision and timm, which it asks for, are CUDA builds
    install --no-deps groundingdino-py addict yapf platformdirs
  else
    extras+=("$extra")
  fi
done
install -e ".[$(IFS=,; echo "${extras[*]}")]"
for extra in "${missing[@]}"; do echo "$extra $state" >> .venv/installed; done

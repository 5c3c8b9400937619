#!/usr/bin/env bash
# Lint, types and the test suite, from a fresh clone. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash deploy/install.sh dev s3 tiny models train ray beam groundingdino photos
export PYTHONDONTWRITEBYTECODE=1
.venv/bin/ruff check --quiet .
.venv/bin/ruff format --check --quiet . || { echo "test: run .venv/bin/ruff format ." >&2; exit 1; }
.venv/bin/mypy -p vesl.transforms -p vesl.models -p vesl.pipeline --no-error-summary
cores=$(.venv/bin/python -c "import os; print(len(os.sched_getaffinity(0)))" 2>/dev/null || echo 2)
.venv/bin/python -m pytest -n $((cores + (cores + 1) / 2)) --dist loadfile "$@"  # tests of whole runs often wait

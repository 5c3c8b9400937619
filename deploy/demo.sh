#!/usr/bin/env bash
# The whole line on real photographs, from a fresh clone, with Python 3.11 and nothing else.
# Arguments go to `vesl run`, as in: bash deploy/demo.sh --set steps.select.rule.score=0.4
set -euo pipefail
cd "$(dirname "$0")/.."
bash deploy/install.sh tiny train photos
out=build/demo
mkdir -p "$out"

sets=()  # report and show understand --set, but not run's other arguments
args=("$@")
for ((i = 0; i < $#; i++)); do
  case ${args[i]} in
    --set) sets+=(--set "${args[i + 1]:-}") ;;
    --set=*) sets+=("${args[i]}") ;;
  esac
done

exec 3< <(exec .venv/bin/python deploy/photos.py "$out")
server=$!
trap 'kill "$server" 2>/dev/null || true' EXIT
read -r -u 3 ready || true
[ "${ready:-}" = ready ] || exit 1

vesl=.venv/bin/vesl
recipe=deploy/recipes/demo.yaml
"$vesl" run "$recipe" "$@" > "$out/run.txt" || { code=$?; cat "$out/run.txt"; exit "$code"; }
echo
echo "The funnel:"
"$vesl" report "$recipe" "${sets[@]}" --out "$out/report.html" | sed '/^page: /d'
echo
echo "One sample:"
key=$("$vesl" show "$recipe" "${sets[@]}" 2> /dev/null | awk 'NR == 1 {print $1}') || true
if [ -n "$key" ]; then
  "$vesl" show "$recipe" "$key" "${sets[@]}"
  "$vesl" show "$recipe" --image "$out/sheet.jpg" "${sets[@]}" > /dev/null
fi
echo
results=$(sed -n 's/^results: //p' "$out/run.txt")
case $results in
  */pack/*)
    "$vesl" train "$recipe" "${sets[@]}" > "$out/train.txt" 2> "$out/train.log" ||
      { code=$?; cat "$out/train.log" >&2; exit "$code"; }
    if grep -q '^step' "$out/train.log"; then
      echo "A few steps of CLOC on these shards:"
      grep '^step' "$out/train.log"
    fi
    sed -n 's/^model: /Trained model:       /p' "$out/train.txt"
    echo "Shards (WebDataset): $results"
    ;;
  *) echo "Results: $results" ;;
esac
[ -z "$key" ] || echo "Drawn boxes:         $out/sheet.jpg"
echo "Report:              $out/report.html"

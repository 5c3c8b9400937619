#!/usr/bin/env bash
# A run on Google Cloud Dataflow. The store and the lists lie in buckets that the workers may use.
#   PROJECT=my-project REGION=europe-west4 BUCKET=my-bucket IMAGE=REGISTRY/vesl:dataflow \
#     bash deploy/dataflow.sh recipe.yaml
# More arguments go to `vesl run`. Accelerators: engine.<step>.accelerator in the recipe. Dataflow starts a process for
# each core of a machine, each with models of its own: ONE_PROCESS=1 for one, where a GPU has room for one model of a
# kind. MACHINE=n1-standard-8 and MAX_WORKERS=50 say which machines, and how many.
set -euo pipefail
recipe=${1:?usage: PROJECT=.. REGION=.. BUCKET=.. IMAGE=.. bash deploy/dataflow.sh RECIPE [arguments of vesl run]}
shift
for name in PROJECT REGION BUCKET IMAGE; do
  [ -n "${!name:-}" ] || { echo "dataflow.sh: set $name" >&2; exit 2; }
done
options="[\"--runner=DataflowRunner\", \"--project=$PROJECT\", \"--region=$REGION\", \
\"--temp_location=gs://$BUCKET/dataflow\", \"--sdk_container_image=$IMAGE\", \"--sdk_location=container\", \
\"--max_num_workers=${MAX_WORKERS:-50}\"\
${MACHINE:+, \"--machine_type=$MACHINE\"}${ONE_PROCESS:+, \"--experiments=no_use_multiple_sdk_containers\"}]"
exec "${VESL:-vesl}" run "$recipe" --set engine.kind=beam --set "engine.options=$options" "$@"

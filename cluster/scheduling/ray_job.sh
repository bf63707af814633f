#!/bin/bash
# One night as a job of a Ray cluster that is up already; for cron on any machine that reaches its dashboard:
#   0 3 * * * daybreak cd /opt/daybreak && RAY_API_SERVER_ADDRESS=http://head:8265 cluster/scheduling/ray_job.sh my.yaml
# The driver runs on the cluster's head, in a copy of this folder; logs, checkpoints and MLflow must lie where the nodes
# reach them. Shows what the night says, and ends with 0, or with 1 when it failed.
set -euo pipefail
export RAY_USAGE_STATS_ENABLED=0
exec ray job submit --working-dir . \
  --runtime-env-json '{"excludes": [".git", ".venv"], "env_vars": {"RAY_USAGE_STATS_ENABLED": "0"}}' \
  -- python -m cluster.cli nightly "$@"

#!/bin/sh
# The table and figure of README and docs/index.md: seeds 0, 1, 2, with all controls.
#
#   runs/quickstart.sh OUT          two CPU cores, nothing downloaded
set -eu
for seed in 0 1 2; do
  quietstar quickstart --controls --seed "$seed" --output_dir "$1/seed-$seed"
done
exec python "$(dirname "$0")/../docs/figures.py" "$1/seed-0/results.json"

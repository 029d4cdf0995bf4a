#!/bin/bash
# Runs the same command on every host of a TPU VM; JAX detects the hosts. /mnt/runs must be a folder
# that all hosts see, such as Filestore or a mounted bucket:
#   launch/tpu_vm.sh NAME ZONE /mnt/runs/mine --config=vjepa2_low_mem --config.mesh.fsdp=16 \
#     --config.data.root=/mnt/data/mine --config.data.batch_size=256
set -euo pipefail
name=$1 zone=$2 workdir=$3
shift 3

remote() {
    gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

built=$(mktemp -d)
uv build --quiet --wheel --out-dir "$built"
wheel=$(basename "$built"/*.whl)
gcloud compute tpus tpu-vm scp "$built/$wheel" "$name": --zone="$zone" --worker=all
# The Python of these machines is too old.
remote "pip install --quiet uv && python3 -m uv venv --allow-existing --python 3.12 wmjax &&
    python3 -m uv pip install --python wmjax --reinstall-package wmjax './${wheel}[tpu]'"
remote "wmjax/bin/python -m wmjax.main --workdir=$(printf '%q' "$workdir")$(printf ' %q' "$@")"

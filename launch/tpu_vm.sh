#!/bin/bash
# The same command on every host of a TPU VM, which find each other by themselves; /mnt/runs is a
# folder that all of them see, Filestore or a bucket that is mounted:
#   launch/tpu_vm.sh NAME ZONE /mnt/runs/mine --config=vjepa2_low_mem --config.mesh.fsdp=16 \
#     --config.data.root=/mnt/data/mine --config.data.batch_size=256
set -euo pipefail
name=$1 zone=$2 workdir=$3
shift 3

remote() {
    gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"
}

gcloud compute tpus tpu-vm scp --recurse . "$name":wmjax --zone="$zone" --worker=all
remote "pip install -e 'wmjax[tpu]'"
remote "cd wmjax && python3 -m wmjax.main --workdir=$(printf '%q' "$workdir")$(printf ' %q' "$@")"

#!/bin/bash
# A TPU pod slice: the same command on every host, through gcloud. JAX finds the other hosts by
# the slice's metadata. The workdir must be one that all hosts share: in a bucket, which needs
# `pip install ".[buckets]"`, or on a disk such as Filestore.
#
#     TPU=my-slice ZONE=us-central2-b WORKDIR=gs://my-bucket/run bash experiments/launch/tpu_pod.sh
#
# Rerun the same command after a preemption; the training resumes from the newest checkpoint.
set -euo pipefail

gcloud compute tpus tpu-vm ssh "${TPU:?name of the slice}" --zone "${ZONE:?its zone}" --worker=all \
    --command "cd paramshare && paramshare train experiments/recipes/imagenet_swrn50_2.py \
        --workdir ${WORKDIR:?a folder that all hosts share} \
        --model.bfloat16 --distributed --init-timeout 600"

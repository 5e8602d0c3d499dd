#!/bin/bash
# Without a cluster manager: run this on every host, with its number.
#
#     HOSTS=2 HOST=0 COORDINATOR=10.0.0.1:1234 WORKDIR=/mnt/shared/run bash experiments/launch/by_hand.sh
#
# COORDINATOR is the address of host 0, and a free port there.
set -euo pipefail

paramshare train experiments/recipes/imagenet_swrn50_2.py \
    --workdir "${WORKDIR:?a folder on a disk that all hosts share}" --distributed \
    --coordinator "${COORDINATOR:?address:port of host 0}" \
    --num-processes "${HOSTS:?number of hosts}" --process-id "${HOST:?number of this host, from 0}"

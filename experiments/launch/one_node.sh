#!/bin/bash
# One machine with several GPUs: a single process uses all of them, and needs no further option.
# The batch is divided over the devices, so --batch-size must be a multiple of their number.
#
#     WORKDIR=runs/imagenet bash experiments/launch/one_node.sh
set -euo pipefail

paramshare train experiments/recipes/imagenet_swrn50_2.py --workdir "${WORKDIR:?a folder}"

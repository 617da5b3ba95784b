#!/usr/bin/env bash
# The same run through torchrun. On each node: NODE_RANK=0 MASTER=node0 launch/torchrun.sh --checkpoint meditron --size 70 --run_name pubmedqa
set -euo pipefail

NODES="${NODES:-8}"
NODE_RANK="${NODE_RANK:?set NODE_RANK to the number of this node, from 0}"
MASTER="${MASTER:?set MASTER to the address of node 0}"
PORT="${PORT:-6020}"
PER_NODE="${PER_NODE:-8}"

exec torchrun --nnodes "$NODES" --node_rank "$NODE_RANK" --nproc_per_node "$PER_NODE" \
    --rdzv_backend static --master_addr "$MASTER" --master_port "$PORT" \
    -m sft "$@"

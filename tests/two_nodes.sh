#!/usr/bin/env bash
# Runs `python -m agro_lightning ARG ...` as one job of two torchrun agents, one process each, with gloo.
# Each agent has a network namespace and address of its own, joined by a veth pair; where namespaces cannot be
# made (no root, no ip), both share the loopback interface. RESTARTS: torchrun's --max-restarts (default 0).
set -u
id=$$
nodes=(agro-$id-0 agro-$id-1)
port=${PORT:-29600}
# by default torchrun keeps one store over restarts, in which two agents that count restarts differently meet
# the addresses of dead processes
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
cleanup() { for n in "${nodes[@]}"; do ip netns del "$n" 2>/dev/null; done; }

make_namespaces() {
  [ "${LOOPBACK:-}" = 1 ] && return 1
  for n in "${nodes[@]}"; do
    ip netns add "$n" 2>/dev/null && ip -n "$n" link set lo up || return 1
  done
  ip link add "va$id" netns "${nodes[0]}" type veth peer name "vb$id" netns "${nodes[1]}" || return 1
  ip -n "${nodes[0]}" addr add 10.9.0.1/24 dev "va$id" && ip -n "${nodes[0]}" link set "va$id" up || return 1
  ip -n "${nodes[1]}" addr add 10.9.0.2/24 dev "vb$id" && ip -n "${nodes[1]}" link set "vb$id" up
}

agent() {  # NODE INTERFACE ADDRESS HOSTS_THE_RENDEZVOUS [PREFIX ...]
  local interface=$2 address=$3 host=$4
  shift 4
  GLOO_SOCKET_IFNAME=$interface "$@" "${PYTHON:-python}" -m torch.distributed.run --nnodes 2 --nproc-per-node 1 \
    --rdzv-backend c10d --rdzv-endpoint "$head:$port" --rdzv-id "agro-$id" --rdzv-conf "is_host=$host" \
    --local-addr "$address" --max-restarts "${RESTARTS:-0}" --monitor-interval 0.2 -m agro_lightning "${command[@]}"
}

command=("$@")
trap cleanup EXIT
trap 'kill $(jobs -p) 2>/dev/null; wait; exit 143' TERM INT
if make_namespaces; then
  echo "two nodes: network namespaces ${nodes[*]}"
  head=10.9.0.1
  agent 0 "va$id" 10.9.0.1 true ip netns exec "${nodes[0]}" &
  pids[0]=$!
  agent 1 "vb$id" 10.9.0.2 false ip netns exec "${nodes[1]}" &
  pids[1]=$!
else
  cleanup
  echo "two nodes: two agents on the loopback interface"
  head=127.0.0.1
  agent 0 lo 127.0.0.1 true &
  pids[0]=$!
  agent 1 lo 127.0.0.1 false &
  pids[1]=$!
fi
code=0
for i in 0 1; do wait "${pids[i]}" || code=$?; done
exit $code

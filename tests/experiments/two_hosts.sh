#!/usr/bin/env bash
# Two hosts on one machine (network namespaces joined by a cable), two ranks each, one of them cut off in the middle of
# an epoch and joined again: torchrun's rendezvous, gloo and the run have to come back by themselves.
#
#   tests/experiments/two_hosts.sh FOLDER        (as root; FOLDER takes what both hosts share: runs and output)
#
# The weights of the run that was cut off are compared, bit for bit, with those of one that was not. Skips, with exit
# code 77, without the rights to make namespaces.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
shared=$(mkdir -p "$1" && cd "$1" && pwd)
export OMP_NUM_THREADS=1 PYTHONPATH=$root COLUMNS=200
a=cupss-a-$$ b=cupss-b-$$

if ! ip netns add "$a" 2>/dev/null; then
    echo "skipped: no right to make network namespaces"
    exit 77
fi
cleanup() {
    for pid in $(jobs -p); do kill -TERM "$pid" 2>/dev/null; done
    ip netns del "$a" 2>/dev/null
    ip netns del "$b" 2>/dev/null
}
trap cleanup EXIT
ip netns add "$b"
ip link add "va$$" netns "$a" type veth peer name "vb$$" netns "$b"
ip -n "$a" addr add 10.77.0.1/24 dev "va$$"
ip -n "$b" addr add 10.77.0.2/24 dev "vb$$"
for host in "$a va$$" "$b vb$$"; do
    read -r name device <<<"$host"
    ip -n "$name" link set lo up
    ip -n "$name" link set "$device" up
done

start() { # namespace, device, address, is_host, name of the run
    ip netns exec "$1" env GLOO_SOCKET_IFNAME="$2" python -m torch.distributed.run \
        --nnodes=2 --nproc-per-node=2 --max-restarts=5 --rdzv-backend=c10d --rdzv-endpoint=10.77.0.1:29517 \
        --rdzv-id="$5" --rdzv-conf="is_host=$4" --local-addr="$3" \
        "$root/launch/train.py" --config "$root/tests/helpers/tiny.yaml" --run.root "$shared" --run.name "$5" \
        --run.device cpu --run.timeout_minutes 0.25 --run.save_every_minutes 0.02 \
        --data.synthetic_images 6400 --optim.lr 0.01 --train.epochs 6 --prune.last_epoch 6 >>"$shared/$5-$3.txt" 2>&1
}

run() { # name; starts both hosts
    start "$a" "va$$" 10.77.0.1 1 "$1" &
    first=$!
    start "$b" "vb$$" 10.77.0.2 0 "$1" &
    second=$!
}

both() { # waits for them; whether both ended well
    wait "$first"
    local one=$?
    wait "$second"
    local other=$?
    echo "$1: exit codes $one and $other"
    [ "$one" = 0 ] && [ "$other" = 0 ]
}

epochs() { cat "$shared/$1/log.jsonl" 2>/dev/null | grep -c '"event": "epoch"' || true; }

run undisturbed
both undisturbed || exit 1

run cut
while [ "$(epochs cut)" -lt 2 ]; do # in the middle of the third
    kill -0 "$first" 2>/dev/null || exit 1
    sleep 0.05
done
sleep 0.3
echo "cut off after epoch $(epochs cut)"
ip -n "$b" link set "vb$$" down
sleep 25 # longer than the ranks wait for each other
echo "joined again, $(epochs cut) epochs in the log"
ip -n "$b" link set "vb$$" up
both cut || exit 1

python - "$shared" <<'PYTHON'
import sys
from pathlib import Path

import torch

from train.checkpoint.file import load_checkpoint
from train.log.rundir import read_log

shared = Path(sys.argv[1])
one, other = (load_checkpoint(shared / name / "last.pt")["model"] for name in ("undisturbed", "cut"))
log = read_log(shared / "cut" / "log.jsonl")
starts = [(event["first_epoch"], event["first_step"]) for event in log if event["event"] == "run"]
print(f"begun at (epoch, step) {starts}; seconds lost {log[-1]['seconds']['lost']:.1f} of {log[-1]['time_s']:.1f}")
equal = list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)
print("weights bit-equal to the undisturbed run's" if equal else "the weights DIFFER from the undisturbed run's")
sys.exit(0 if equal and len(starts) > 1 else 1)
PYTHON

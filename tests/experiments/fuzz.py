"""Random networks through trace and surgery, each compared with its twin; what fails is shrunk and kept.

python tests/experiments/fuzz.py --seeds 2000 --out results/fuzz.json

Goes on where an earlier run of the same file stopped. Exit code 1 where something failed.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0:1] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import torch  # noqa: E402
from random_networks import Program, check_program, failure_of, random_program, shrunk  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, required=True, metavar="N", help="networks 0 to N - 1")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON; an existing one is gone on with")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {"seeds": 0, "groups": 0, "free": 0, "failures": []}
    if options.out.exists():
        result = json.loads(options.out.read_text())
    for seed in range(result["seeds"], options.seeds):
        _try(seed, result)
        result["seeds"] = seed + 1
        if seed % 20 == 19 or seed + 1 == options.seeds:
            options.out.write_text(json.dumps(result, indent=2) + "\n")
            print(f"{seed + 1} networks, {len(result['failures'])} failures", flush=True)
    return 1 if result["failures"] else 0


def _try(seed: int, result: dict) -> None:
    program = random_program(seed)
    try:
        groups = check_program(program, seed)
    except Exception as error:
        _keep(program, seed, type(error).__name__, result)
    else:
        result["groups"] += len(groups)
        result["free"] += sum(not group.frozen for group in groups)


def _keep(program: Program, seed: int, kind: str, result: dict) -> None:
    smallest = shrunk(program, lambda shorter: failure_of(shorter, seed).startswith(kind))
    failure = {"seed": seed, "error": failure_of(smallest, seed), "program": [asdict(step) for step in smallest]}
    result["failures"].append(failure)
    steps = [step.operation for step in smallest if step.operation != "nothing"]
    print(f"seed {seed}: {failure['error']}: {steps}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

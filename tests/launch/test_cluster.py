"""launch/cluster/: what can be checked of a batch script and a manifest without a cluster."""

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from launching import ROOT
from torch.distributed.run import get_args_parser

from train.config import parse_config

CLUSTER = ROOT / "launch" / "cluster"


@pytest.fixture(scope="module")
def manifest() -> dict[str, dict]:
    """Kind -> object."""
    return {each["kind"]: each for each in yaml.safe_load_all((CLUSTER / "trainjob.yaml").read_text())}


@pytest.mark.parametrize(
    "script", [CLUSTER / "slurm.sh", ROOT / "tests/experiments/two_hosts.sh"], ids=lambda path: path.name
)
def test_the_scripts_are_sound_bash(script: Path):
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True).stderr == ""
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: only bash -n was asked")
    result = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def torchrun_options(words: list[str]) -> list[str]:
    return [word.split("=")[0] for word in words if word.startswith("--")]


def test_the_batch_script_asks_slurm_and_torchrun_for_what_they_know(tmp_path: Path):
    """With stand-ins for SLURM's commands: the one for srun shows the line that it was to start on every machine."""
    (tmp_path / "scontrol").write_text('#!/bin/sh\n[ "$1" = show ] && echo node-a && sleep 0.2 && echo node-b\n')
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    for name in ("scontrol", "srun"):
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2"}
    env |= {"SLURM_JOB_ID": "71", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "64"}
    shown = subprocess.run(
        ["bash", str(CLUSTER / "slurm.sh"), "--config", "recipe.yaml"], env=env, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    words = shown.stdout.split("\n")
    assert {"--nnodes=1:2", "--nproc-per-node=4", "--rdzv-endpoint=node-a:29500", "--rdzv-id=slurm-71"} <= set(words)
    assert "--cpus-per-task=64" in words[: words.index("torchrun")]
    script = words.index("launch/train.py")
    assert words[script + 1 : script + 5] == ["--run.timeout_minutes", "5", "--config", "recipe.yaml"]
    known = get_args_parser().format_help()
    asked = torchrun_options(words[words.index("torchrun") + 1 : script])
    assert asked and all(option in known or option.replace("-", "_") in known for option in asked)


def test_a_job_that_is_warned_stops_its_ranks_and_goes_back_into_the_queue(tmp_path: Path):
    (tmp_path / "scontrol").write_text('#!/bin/sh\n[ "$1" = show ] && echo node-a || echo "$@"\nexit 0\n')
    # srun ends with its tasks, which scancel reaches; SIGTERM to srun itself would be their SIGKILL.
    (tmp_path / "srun").write_text(
        '#!/bin/bash\nsleep 20 & task=$!\necho $task > "$TASK"\ntrap "kill -9 $task; exit 1" TERM\nkill -TERM $PPID\n'
        "wait $task\n"
    )
    (tmp_path / "scancel").write_text('#!/bin/sh\necho "$@"\nkill -TERM "$(cat "$TASK")"\n')
    for name in ("scontrol", "srun", "scancel"):
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "x", "SLURM_JOB_NUM_NODES": "1"}
    env |= {"SLURM_CPUS_PER_TASK": "8", "TASK": str(tmp_path / "task")}
    result = subprocess.run(
        ["bash", str(CLUSTER / "slurm.sh")], env=env | {"SLURM_JOB_ID": "71"}, capture_output=True, text=True
    )
    assert result.stdout.split("\n")[:2] == ["--signal=TERM 71.0", "requeue 71"]
    assert result.returncode == 0


FIELDS = {
    "TrainJob": {
        "runtimeRef": {"apiGroup": str, "kind": str, "name": str},
        "trainer": {"command": list, "args": list, "numNodes": int, "numProcPerNode": int, "resourcesPerNode": dict},
    },
    "TrainingRuntime": {"mlPolicy": {"numNodes": int, "torch": {"numProcPerNode": int | str}}, "template": dict},
}
"""Of `spec` in trainer.kubeflow.org/v1alpha1 (kubeflow/trainer, pkg/apis/trainer/v1alpha1, October 2026), those that we
may need; the API server refuses or drops what it does not know."""


def unknown(found: dict, fields: dict, path: str) -> list[str]:
    """What is no field of the API, or of another type."""
    wrong = []
    for key, value in found.items():
        field = fields.get(key, ())
        if isinstance(field, dict):
            wrong += unknown(value, field, f"{path}.{key}")
        elif not isinstance(value, field):
            wrong.append(f"{path}.{key}")
    return wrong


def test_the_objects_hold_fields_of_the_api_alone(manifest: dict[str, dict]):
    assert set(manifest) == set(FIELDS)
    for kind, each in manifest.items():
        assert set(each) == {"apiVersion", "kind", "metadata", "spec"}
        assert not unknown(each["spec"], FIELDS[kind], kind)
        assert re.fullmatch("[a-z]([-a-z0-9]{0,61}[a-z0-9])?", each["metadata"]["name"])
    trainer = manifest["TrainJob"]["spec"]["trainer"]
    assert all(isinstance(word, str) for word in trainer["command"] + trainer["args"])
    assert set(trainer["resourcesPerNode"]) <= {"limits", "requests"}


def test_the_job_names_the_runtime_and_the_group_of_the_api(manifest: dict[str, dict]):
    job, runtime = manifest["TrainJob"], manifest["TrainingRuntime"]
    assert {job["apiVersion"], runtime["apiVersion"]} == {"trainer.kubeflow.org/v1alpha1"}
    reference = job["spec"]["runtimeRef"]
    assert reference["kind"] == runtime["kind"] and reference["name"] == runtime["metadata"]["name"]
    assert reference["apiGroup"] == job["apiVersion"].split("/")[0]


def test_the_container_is_the_one_that_the_trainer_fills_in(manifest: dict[str, dict]):
    """Trainer v2 puts command, arguments and resources into the container `node` of the job `node`, so labelled."""
    (node,) = manifest["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"]
    labels = node["template"]["metadata"]["labels"]
    assert node["name"] == "node" and labels["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "node"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    policy, job = manifest["TrainingRuntime"]["spec"]["mlPolicy"], manifest["TrainJob"]["spec"]["trainer"]
    assert policy["numNodes"] == job["numNodes"]
    assert policy["torch"]["numProcPerNode"] == job["resourcesPerNode"]["limits"]["nvidia.com/gpu"]


def test_its_arguments_are_settings_that_there_are(manifest: dict[str, dict]):
    trainer = manifest["TrainJob"]["spec"]["trainer"]
    assert (ROOT / trainer["command"][-1]).exists()
    arguments = [word.replace("launch/configs", str(ROOT / "launch/configs")) for word in trainer["args"]]
    config = parse_config(arguments, "train.py", "")
    assert config.run.name == manifest["TrainJob"]["metadata"]["name"]


DOCKERFILE = (ROOT / "launch/cluster/Dockerfile").read_text()


def test_the_image_is_where_the_job_looks_for_it(manifest: dict[str, dict]):
    (node,) = manifest["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"]
    (container,) = node["template"]["spec"]["template"]["spec"]["containers"]
    assert f"WORKDIR {container['workingDir']}\n" in DOCKERFILE
    for mount in container["volumeMounts"]:
        if mount["name"] != "shared-memory":
            assert mount["mountPath"] == f"{container['workingDir']}/{mount['name']}"
            assert f" {mount['name']}" in re.search("mkdir -p (.*) &&", DOCKERFILE)[0]


def test_the_image_holds_what_the_installation_needs():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert all((ROOT / name).exists() for name in kept)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packages = setup["options"]["packages"].split()
    assert {package.partition(".")[0] for package in packages} <= kept
    rooms = [ROOT / name for name in ("cup", "data", "launch", "train")]
    folders = [file.parent.relative_to(ROOT) for room in rooms for file in room.rglob("__init__.py")]
    assert packages == sorted(".".join(folder.parts) for folder in folders)
    assert {"setup.cfg", "pyproject.toml", setup["metadata"]["license_files"]} <= kept
    assert setup["metadata"]["long_description"].removeprefix("file: ") in kept
    [extras] = re.findall(r'"\.\[(.*)\]"', DOCKERFILE)
    assert set(extras.split(",")) <= set(setup["options.extras_require"])


def test_the_image_needs_the_torch_that_setup_cfg_needs():
    setup = (ROOT / "setup.cfg").read_text()
    for requirement in re.findall(r'"(torch\S*>=\S+)"', DOCKERFILE):
        assert f"    {requirement}\n" in setup

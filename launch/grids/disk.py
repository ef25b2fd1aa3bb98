"""What lies in a grid's folder, and what it cost.

OUT/runs/NAME/            the run of a job
OUT/configs/NAME.yaml     the recipe that it was started with
OUT/origins/NAME.json     what it was made from: the ids of other runs, and how its network was cut or chosen
OUT/made/NAME.*           what a command made for it: a cut network, widths
OUT/commands/NAME.json    what that command cost
OUT/output/NAME.txt       what its processes said
OUT/lock                  held while a compare.py works on the grid
"""

import fcntl
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launch.grids.jobs import TO_A_TARGET, Job
from train.config import RunConfig, differing_keys
from train.config_file import read_config
from train.errors import TrainError
from train.files import why_unwritten, write_durably
from train.log.rundir import RunDir
from train.start import changed_settings


@dataclass(frozen=True)
class Cost:
    """What something cost: ranks x wall hours, and CPU hours, None where nobody counted them."""

    wall: float
    cpu: float | None

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.wall + other.wall, None if None in (self.cpu, other.cpu) else self.cpu + other.cpu)


NOTHING = Cost(0.0, 0.0)


@dataclass(frozen=True)
class Disk:
    """The folder of a grid; nothing is created by asking."""

    out: Path

    @property
    def lock(self) -> Path:
        return self.out / "lock"

    def run_dir(self, job: str) -> RunDir:
        return RunDir(self.out / "runs" / job)

    def config(self, job: str) -> Path:
        return self.out / "configs" / f"{job}.yaml"

    def output(self, job: str) -> Path:
        return self.out / "output" / f"{job}.txt"

    def made(self, job: str, suffix: str) -> Path:
        return self.out / "made" / f"{job}{suffix}"

    def origin(self, job: str) -> Path:
        return self.out / "origins" / f"{job}.json"

    def command(self, job: str) -> Path:
        return self.out / "commands" / f"{job}.json"

    def events(self, job: str) -> list[dict[str, Any]]:
        return self.run_dir(job).events()

    def done(self, job: str) -> dict[str, Any] | None:
        """The closing event of a finished run, else None."""
        return self.run_dir(job).closing_event()

    def why_not_ours(self, job: Job, config: RunConfig) -> str | None:
        """Why the run on the disk is not the one that the grid's file describes; None where it is, or there is none.

        config: the run's, with what follows from other runs. Raises TrainError for what is no run directory.
        """
        run_dir = self.run_dir(job.name)
        if not run_dir.config.exists():
            return None
        stored = read_config(run_dir).settings
        changed = changed_settings(run_dir, _as_placed(config, stored["model"]))
        path = stored["data"]["path"]
        if path != config.data.path:  # with which a run may go on, for images move; a comparison is of one data set
            changed.append(f"data.path ({path!r} there, {config.data.path!r} now)")
        if changed:
            return f"the grid has changed since {run_dir.path} was begun: {', '.join(changed)}"
        origin = read_json(self.origin(job.name))
        if origin is not None and (changed := differing_keys(self.origin_now(job), origin)):
            return f"what {run_dir.path} was made from has changed since: {', '.join(changed)}"
        return None

    def origin_now(self, job: Job) -> dict[str, Any]:
        """What the job's network is made from; plain data. The job's needs must be finished."""
        origin: dict[str, Any] = {"runs": {name: self.run_dir(name).run_id() for name in job.needs}}
        if job.entry.kind in TO_A_TARGET:
            options = asdict(job.options.plan_options()) | {"target_reduction": job.options.target_reduction}
            origin["prune"] = json.loads(json.dumps(options))
        if job.entry.command is not None:
            origin["command"] = job.entry.command
        return origin

    def own_cost(self, job: str) -> Cost:
        """Of a finished run, and of the commands before it."""
        done = self.done(job)
        cpu = done.get("cpu_seconds")
        command = read_json(self.command(job)) or {"wall_s": 0.0, "cpu_s": 0.0}
        own = Cost(done["gpu_hours"], None if cpu is None else cpu / 3600)
        return own + Cost(command["wall_s"] / 3600, command["cpu_s"] / 3600)


def _as_placed(config: RunConfig, stored: dict[str, Any]) -> RunConfig:
    """The configuration with the places of our own files as they were, for the folder may have been moved since.

    stored: the settings of `model`. What the files hold, `origin_now` tells.
    """
    paths = {name: (stored[name], getattr(config.model, name)) for name in ("checkpoint", "widths")}
    moved = {
        name: there
        for name, (there, now) in paths.items()
        if None not in (there, now) and Path(there).parts[-2:] == Path(now).parts[-2:]
    }
    return replace(config, model=replace(config.model, **moved))


def hold(path: Path) -> Any:
    """The open lock file; TrainError where another process holds it, or it cannot be made.

    It is let go when this process ends.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise TrainError(
            f"{path.parent}: another compare.py works on this comparison; wait for it, or stop it"
        ) from error
    except OSError as error:
        raise TrainError(f"cannot write {path}: {why_unwritten(error, path)}") from error
    return file


def read_json(path: Path) -> Any:
    """None where there is no such file. Raises TrainError for one that is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TrainError(f"cannot read {path}: {error}; delete it, and it is made again") from error


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, content: str) -> None:
    """The file and the folders above it; TrainError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, content.encode())
    except OSError as error:
        raise TrainError(f"cannot write {path}: {why_unwritten(error, path)}") from error

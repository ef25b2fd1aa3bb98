"""Runs the jobs of a grid that are missing, some at a time, each when what it needs is finished."""

import fcntl
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

import torch

from cup import CupError
from data import DataError
from launch.grids.disk import Disk, read_json, write_json
from launch.grids.jobs import Job
from launch.grids.processes import Child, last_words
from launch.grids.stages import Command, command_before, final_config, prepare, training
from train.errors import TrainError
from train.files import why_unwritten
from train.log.rundir import RunDir
from train.world import available_cores

POLL_EVERY_S = 0.2


class State(Enum):
    """What has become of a job. REFUSED: another run is in its place. BLOCKED: one that it needs has failed."""

    WAITING = "waiting"
    RUNNING = "running"
    ELSEWHERE = "another process trains it"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"
    REFUSED = "refused"
    BLOCKED = "not run"


ENDED_BADLY = (State.FAILED, State.REFUSED, State.BLOCKED)


@dataclass
class Status:
    """Where a job stands; `why` in a line, where it ended badly."""

    state: State = State.WAITING
    why: str = ""


@dataclass
class _Running:
    slot: int
    child: Child
    command: Command | None
    """The command that runs; None while the training does."""


Show = Callable[[Mapping[str, Status]], None]


class Runner:
    """Starts, watches and stops the processes."""

    def __init__(self, jobs: dict[str, Job], disk: Disk, at_a_time: int, ranks: int) -> None:
        """ranks: of each training."""
        self.jobs, self.disk = jobs, disk
        self._at_a_time, self._ranks = at_a_time, ranks
        self._running: dict[str, _Running] = {}
        self.statuses = {name: Status() for name in jobs}

    def look(self) -> None:
        """Find out what is there already. Raises TrainError where it cannot be read."""
        for name, job in self.jobs.items():
            self.statuses[name] = self._found(job)

    def run(self, show: Show, stop_wanted: Callable[[], bool]) -> None:
        """Run what is missing, until nothing more can run; show: called several times a second.

        Once `stop_wanted`, the processes are asked to stop, and this returns when they have.
        """
        stopping = False
        while True:
            if stop_wanted() and not stopping:
                stopping = True
                for running in self._running.values():
                    running.child.stop()
            self._reap(stopping)
            if not stopping:
                self._start_what_can()
            show(self.statuses)
            waits = any(status.state is State.ELSEWHERE for status in self.statuses.values()) and not stopping
            if not self._running and not waits:
                return
            time.sleep(POLL_EVERY_S)

    def _found(self, job: Job) -> Status:
        for name in job.needs:
            if self.statuses[name].state in ENDED_BADLY:
                return Status(State.BLOCKED, f"it needs {name}")
        if not all(self.statuses[name].state is State.DONE for name in job.needs):
            return Status()
        try:
            if why := self.disk.why_not_ours(job, final_config(job, self.jobs, self.disk)):
                return Status(State.REFUSED, f"{why}: move it away to run it anew, or give the new one another name")
            return Status(State.DONE) if self.disk.done(job.name) is not None else Status()
        except (TrainError, DataError, CupError) as error:
            return Status(State.FAILED, str(error))

    def _start_what_can(self) -> None:
        for name, job in self.jobs.items():
            if len(self._running) == self._at_a_time:
                return
            if self.statuses[name].state not in (State.WAITING, State.ELSEWHERE):
                continue
            found = self._found(job)
            is_ready = found.state is State.WAITING and all(self._is_done(need) for need in job.needs)
            if not is_ready:
                self.statuses[name] = found
            else:
                self._start(job)

    def _is_done(self, name: str) -> bool:
        return self.statuses[name].state is State.DONE

    def _start(self, job: Job) -> None:
        try:
            if is_held(self.disk.run_dir(job.name)):
                self.statuses[job.name] = Status(State.ELSEWHERE)
                return
            prepare(job, final_config(job, self.jobs, self.disk), self.disk)
            command = command_before(job, self.disk)
            if command is not None and self._has_run(job.name, command):
                command = None
        except (TrainError, DataError, CupError) as error:
            self.statuses[job.name] = Status(State.FAILED, str(error))
            return
        slots = {running.slot for running in self._running.values()}
        slot = next(number for number in range(self._at_a_time) if number not in slots)
        self._spawn(job, slot, command)

    def _has_run(self, name: str, command: Command) -> bool:
        finished = (read_json(self.disk.command(name)) or {}).get("finished", False)
        return finished and command.writes.exists()

    def _spawn(self, job: Job, slot: int, command: Command | None) -> None:
        argv = training(self.disk.config(job.name), self._ranks) if command is None else command.argv
        try:
            if command is not None:
                command.writes.parent.mkdir(parents=True, exist_ok=True)
            child = Child(argv, self.disk.output(job.name), self._environment(slot))
        except OSError as error:
            self.statuses[job.name] = Status(State.FAILED, f"cannot start {argv[0]}: {error.strerror}")
            return
        self._running[job.name] = _Running(slot, child, command)
        self.statuses[job.name] = Status(State.RUNNING)

    def _environment(self, slot: int) -> dict[str, str]:
        """Cores or GPUs shared out among the runs of a time."""
        count = torch.cuda.device_count()
        ours = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = [str(gpu) for gpu in range(count)] if ours is None else ours.split(",")[:count]
        if len(gpus) >= self._at_a_time * self._ranks:
            first = slot * self._ranks
            return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[first : first + self._ranks])}
        threads = threads_of_a_rank(self._at_a_time, self._ranks)
        return {} if threads is None else {"OMP_NUM_THREADS": str(threads)}

    def _reap(self, stopping: bool) -> None:
        for name, running in list(self._running.items()):
            code = running.child.poll()
            if code is None:
                continue
            del self._running[name]
            if running.command is not None:
                self._count(name, running, finished=code == 0 and running.command.writes.exists())
            if code == 0 and running.command is not None and not stopping:
                self._after_command(self.jobs[name], running)
            else:
                self.statuses[name] = self._ending(name, code, stopping)

    def _after_command(self, job: Job, running: _Running) -> None:
        if running.command.writes.exists():
            self._spawn(job, running.slot, None)
        else:
            self.statuses[job.name] = Status(
                State.FAILED, f"its command ended, but {running.command.writes} is not there"
            )

    def _count(self, name: str, running: _Running, finished: bool) -> None:
        """Write down what a command cost, with what attempts before it did."""
        before = read_json(self.disk.command(name)) or {"wall_s": 0.0, "cpu_s": 0.0}
        cost = {key: before[key] + getattr(running.child, key) for key in ("wall_s", "cpu_s")}
        write_json(self.disk.command(name), {**cost, "finished": finished})

    def _ending(self, name: str, code: int, stopping: bool) -> Status:
        if self.disk.done(name) is not None:
            return Status(State.DONE)
        if code == 0 or stopping:
            return Status(State.STOPPED, "a signal stopped it; the same command goes on")
        said = last_words(self.disk.output(name))
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return Status(State.FAILED, f"{how}{f', it said: {said}' if said else ''}; see {self.disk.output(name)}")


def threads_of_a_rank(at_a_time: int, ranks: int) -> int | None:
    """The cores shared out among the ranks of all runs of a time; None where OMP_NUM_THREADS says how many threads."""
    return None if "OMP_NUM_THREADS" in os.environ else max(1, available_cores() // (at_a_time * ranks))


def is_held(run_dir: RunDir) -> bool:
    """Whether some process trains this run: one that an earlier compare.py left, or a person started.

    Raises TrainError where its log cannot be opened.
    """
    try:
        with run_dir.log.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        raise TrainError(f"cannot open {run_dir.log}: {why_unwritten(error, run_dir.log)}") from error

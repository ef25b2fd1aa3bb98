"""config.yaml of a run directory: a recipe for the same run, and in a comment the run's id."""

import re
from dataclasses import dataclass
from typing import Any

import yaml

from train.config import RunConfig, config_from_dict
from train.errors import ConfigError, TrainError
from train.files import make_directory, read_bounded, why_unwritten, write_durably
from train.log.rundir import RunDir

ID = re.compile(r"^# id of the run: ([0-9a-f]{16})$", re.MULTILINE)
MAX_BYTES = 1 << 20


class ConfigDamagedError(TrainError):
    """A config.yaml that is not there, or is no configuration: the run may still be told from a checkpoint."""


@dataclass(frozen=True)
class StoredConfig:
    """What a run computes, as plain data, and its id; None for a run that an earlier version began."""

    settings: dict[str, Any]
    run_id: str | None


def create_run_dir(run_dir: RunDir, config: RunConfig, run_id: str | None) -> None:
    """Make the directory, with config.yaml in it, for good, unless a configuration is in it already. Rank 0 only.

    Raises TrainError where it cannot be written.
    """
    try:
        if run_dir.config.exists():
            return
        make_directory(run_dir.path)
        first_line = "" if run_id is None else f"# id of the run: {run_id}\n"
        write_durably(run_dir.config, (first_line + yaml.safe_dump(config.to_dict(), sort_keys=False)).encode())
    except OSError as error:
        raise TrainError(
            f"cannot write the run directory {run_dir.path}: {why_unwritten(error, run_dir.config)}; choose another "
            "--run.root or --run.name"
        ) from error


def read_config(run_dir: RunDir) -> StoredConfig:
    """Raises TrainError where the system does not let it be read, ConfigDamagedError for what is no configuration."""
    try:
        text = read_bounded(run_dir.config, MAX_BYTES).decode()
        settings = yaml.safe_load(text)
    except FileNotFoundError as error:
        raise ConfigDamagedError(f"{run_dir.config} is not there") from error
    except OSError as error:
        raise TrainError(f"cannot read {run_dir.config}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigDamagedError(f"{run_dir.config} is damaged: it is no YAML") from error
    try:
        with_defaults = with_todays_settings(settings)
    except ConfigError as error:
        raise ConfigDamagedError(f"{run_dir.config} is no configuration of this version: {error}") from error
    run_id = ID.search(text)
    return StoredConfig(with_defaults, run_id and run_id[1])


def with_todays_settings(stored: Any) -> dict[str, Any]:
    """A stored configuration with today's names, and defaults for what was not there yet. Raises ConfigError."""
    if not isinstance(stored, dict) or not all(isinstance(section, dict) for section in stored.values()):
        raise ConfigError("found no settings, each section a name and values")
    return config_from_dict(stored).to_dict()

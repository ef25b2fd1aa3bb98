"""From a `DataConfig` to the preparation that it names."""

from data.batch import DataConfig
from data.prepare.digits import prepare_digits


def prepare_data(config: DataConfig) -> None:
    """Make the data set that `config.prepare` names at `config.path`, if nothing is there yet.

    One rank calls it, the others wait. A finished set is left as it is; raises DataError if something else is in the
    way or the place cannot be written.
    """
    if config.prepare == "digits":
        prepare_digits(config.path)

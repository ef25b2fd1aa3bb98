"""The loaders of a rank, from a list of the images that one rank makes for all of them."""

from collections.abc import Mapping, Sequence

from data import DataConfig, Loader, build_loaders, list_images, one_list_serves_all, pack_lists, unpack_lists
from data.batch import Split
from data.images import SPLITS, ImageList
from train.config import RunConfig
from train.world import World

Listed = Mapping[Split, ImageList]


def list_once(
    config: DataConfig, world: World, splits: Sequence[Split] = SPLITS, classes: Sequence[str] | None = None
) -> Listed | None:
    """What rank 0 finds in the data set, on every rank: so a network file system is asked for a million names once.

    None where each rank has to look for itself, and where there is but one. classes: as of `build_split_loaders`.
    All ranks call it. Raises DataError, on rank 0, and RankFailed, on the others.
    """
    if world.size == 1 or not one_list_serves_all(config):
        return None
    packed = world.on_every_rank(lambda: pack_lists(list_images(config, splits, classes)) if world.is_main else None)
    return unpack_lists(world.broadcast_bytes(packed))


def build_split_loaders(
    config: RunConfig,
    world: World,
    splits: Sequence[Split],
    classes: Sequence[str] | None = None,
    listed: Listed | None = None,
) -> list[Loader]:
    """This rank's loaders of the splits, in their order. classes: names in the order of the logits; None: the data's.

    listed: by `list_once` with the same arguments; None: listed here. Raises DataError for a data set of other classes.
    """
    return build_loaders(
        config.data,
        rank=world.rank,
        world_size=world.size,
        local_world_size=world.local_size,
        device=world.device,
        seed=config.run.seed,
        splits=splits,
        classes=classes,
        listed=listed,
    )

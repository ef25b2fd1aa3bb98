"""Images into training: one contract (`Loader`, `Batch`), three loaders (DALI, image folder, synthetic), preparation.

    config = DataConfig(path="datasets/digits", prepare="digits", batch_size=64, image_size=32, resize_size=32)
    prepare_data(config)
    train, val = build_loaders(config, rank=0, world_size=1, device=torch.device("cpu"), seed=0)

`data.prepare` makes, fetches, packs and checks data sets. This room knows nothing of models. DALI is not imported
before it is asked for.
"""

from data.batch import Batch, DataConfig, DataError, Loader, Preprocessing, train_size
from data.build import build_loaders, build_search_loaders, list_images, one_list_serves_all
from data.packed import pack_lists, unpack_lists
from data.prepare import prepare_data

__all__ = [
    "Batch",
    "DataConfig",
    "DataError",
    "Loader",
    "Preprocessing",
    "build_loaders",
    "build_search_loaders",
    "list_images",
    "one_list_serves_all",
    "pack_lists",
    "prepare_data",
    "train_size",
    "unpack_lists",
]

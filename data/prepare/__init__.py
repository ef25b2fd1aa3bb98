"""Data sets made, fetched, packed and checked, one file for each. A data set is there whole or not at all."""

from data.prepare.check import CheckReport, check_data
from data.prepare.digits import prepare_digits
from data.prepare.dispatch import prepare_data
from data.prepare.downloads import prepare_cifar10, prepare_cifar100, prepare_imagenette, prepare_mnist
from data.prepare.imagenet import prepare_imagenet
from data.prepare.shards import index_shards, prepare_shards
from data.prepare.smaller import Smaller
from data.prepare.subset import prepare_subset

__all__ = [
    "CheckReport",
    "Smaller",
    "check_data",
    "index_shards",
    "prepare_cifar10",
    "prepare_cifar100",
    "prepare_data",
    "prepare_digits",
    "prepare_imagenet",
    "prepare_imagenette",
    "prepare_mnist",
    "prepare_shards",
    "prepare_subset",
]

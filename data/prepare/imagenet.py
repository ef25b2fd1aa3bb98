"""ImageNet (ILSVRC 2012) from its official archives to an image folder, resumable class by class."""

import hashlib
import shutil
import tarfile
from pathlib import Path

from torchvision.datasets.imagenet import ARCHIVE_META, load_meta_file, parse_devkit_archive

from data.batch import DataError
from data.prepare.atomic import write_data_set
from data.prepare.progress import opened, tracked


def prepare_imagenet(archives: str | Path, path: str | Path) -> bool:
    """Write PATH/{train,val}/WNID/*.JPEG: 1,281,167 and 50,000 images by WordNet id.

    archives: folder with ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, which is
    only read. What an interrupted or failed attempt unpacked is kept in `.NAME.preparing` beside PATH, and the same
    call goes on from there. Returns whether it wrote: a finished set is left as it is. Raises DataError if an archive
    is missing, cannot be read or has a wrong checksum, or if the place cannot be written.
    """
    return write_data_set(path, lambda root: _unpack(Path(archives), root), resumes=True)


def _unpack(archives: Path, root: Path) -> None:
    files = {kind: archives / name for kind, (name, _) in ARCHIVE_META.items()}
    for kind, (_, md5) in ARCHIVE_META.items():
        _verify(files[kind], md5)
    _unpack_train(files["train"], root / "train")
    _unpack_val(files["val"], root / "val", _val_wnids(files["devkit"], root / ".devkit"))


def _verify(archive: Path, md5: str) -> None:
    if not archive.is_file():
        raise DataError(f"{archive}: there is no such file; get it from image-net.org (ILSVRC 2012), after signing in")
    try:
        with opened(archive, f"checking {archive.name}") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:  # one in the middle of a file names none
        raise DataError(f"{archive}: cannot be read ({error.strerror})") from error
    if found != md5:
        raise DataError(f"{archive}: found MD5 {found}, expected {md5}: download it again")


def _val_wnids(devkit: Path, scratch: Path) -> list[str]:
    """WordNet id of every validation image, in the order of their numbers. `scratch` is made and removed."""
    shutil.rmtree(scratch, ignore_errors=True)  # a killed attempt may have left it
    scratch.mkdir()
    # torchvision reads the archive from the folder that it writes its result to.
    (scratch / devkit.name).symlink_to(devkit.absolute())
    parse_devkit_archive(scratch)
    wnids = load_meta_file(scratch)[1]
    shutil.rmtree(scratch)
    return wnids


def _unpack_train(archive: Path, train: Path) -> None:
    """The archive holds one archive a class; a class folder appears when it is complete."""
    with tarfile.open(archive, "r:") as classes:
        members = classes.getmembers()
        for member in tracked(members, "unpacking train", len(members)):
            folder = train / Path(member.name).stem
            if folder.is_dir():
                continue
            unfinished = train / f".{folder.name}.part"
            shutil.rmtree(unfinished, ignore_errors=True)
            with tarfile.open(fileobj=classes.extractfile(member), mode="r:") as images:
                images.extractall(unfinished, filter="data")
            unfinished.rename(folder)


def _unpack_val(archive: Path, val: Path, wnids: list[str]) -> None:
    """The archive holds the images in one folder; the development kit says whose class each is."""
    for wnid in set(wnids):
        (val / wnid).mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "r:") as images:
        members = sorted(images.getmembers(), key=lambda member: member.name)
        pairs = zip(members, wnids, strict=True)
        for member, wnid in tracked(pairs, "unpacking val", len(members)):
            file = val / wnid / Path(member.name).name
            if not file.exists():
                unfinished = file.with_name(f".{file.name}.part")
                with images.extractfile(member) as content, unfinished.open("wb") as target:
                    shutil.copyfileobj(content, target)
                unfinished.rename(file)

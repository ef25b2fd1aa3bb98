"""ImageNet (ILSVRC 2012) from its official archives to an image folder, resumable class by class."""

import gzip
import hashlib
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from torchvision.datasets.imagenet import ARCHIVE_META, load_meta_file, parse_devkit_archive

from data.batch import DataError
from data.files import refuse_link
from data.prepare.atomic import write_data_set
from data.prepare.progress import opened, tracked


def prepare_imagenet(archives: str | Path, path: str | Path) -> bool:
    """Write PATH/{train,val}/WNID/*.JPEG: 1,281,167 and 50,000 images by WordNet id.

    archives: folder with ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, which is
    only read. What an interrupted or failed attempt unpacked is kept in `.NAME.preparing` beside PATH, and the same
    call goes on from there. Returns whether it wrote: a finished set is left as it is. Raises DataError if an archive
    is missing, cannot be read, has a wrong checksum or holds something else, if a link is in the way, or if the place
    cannot be written.
    """
    return write_data_set(path, lambda root: _unpack(Path(archives), root), resumes=True)


def _unpack(archives: Path, root: Path) -> None:
    files = {kind: archives / name for kind, (name, _) in ARCHIVE_META.items()}
    for kind, (_, md5) in ARCHIVE_META.items():
        _verify(files[kind], md5)
    with _named_in_errors(files["train"]):
        _unpack_train(files["train"], root / "train")
    with _named_in_errors(files["devkit"]):
        wnids = _val_wnids(files["devkit"], root / ".devkit")
    with _named_in_errors(files["val"]):
        _unpack_val(files["val"], root / "val", wnids)


@contextmanager
def _named_in_errors(archive: Path) -> Iterator[None]:
    """What reading an archive of another content raises, inside torchvision and SciPy too, as a DataError."""
    try:
        yield
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, ValueError, LookupError, RuntimeError, EOFError) as error:
        raise DataError(f"{archive}: cannot be unpacked ({' '.join(str(error).split())}): download it again") from error


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
    refuse_link(scratch)
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
    refuse_link(train)
    with tarfile.open(archive, "r:") as classes:
        members = classes.getmembers()
        for member in tracked(members, "unpacking train", len(members)):
            folder = train / Path(member.name).stem
            unfinished = train / f".{folder.name}.part"
            for path in (folder, unfinished):
                refuse_link(path)
            if folder.is_dir():
                continue
            shutil.rmtree(unfinished, ignore_errors=True)
            with tarfile.open(fileobj=_content(classes, member), mode="r:") as images:
                images.extractall(unfinished, filter="data")
            unfinished.rename(folder)


def _unpack_val(archive: Path, val: Path, wnids: list[str]) -> None:
    """The archive holds the images in one folder; the development kit says whose class each is."""
    refuse_link(val)
    for wnid in set(wnids):
        refuse_link(val / wnid)
        (val / wnid).mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "r:") as images:
        members = sorted(images.getmembers(), key=lambda member: member.name)
        if len(members) != len(wnids):
            raise tarfile.ReadError(f"found {len(members):,} images, the development kit has {len(wnids):,}")
        pairs = zip(members, wnids, strict=True)
        for member, wnid in tracked(pairs, "unpacking val", len(members)):
            file = val / wnid / Path(member.name).name
            unfinished = file.with_name(f".{file.name}.part")
            for path in (file, unfinished):
                refuse_link(path)
            if not file.exists():
                unfinished.unlink(missing_ok=True)
                with _content(images, member) as content, unfinished.open("xb") as target:
                    shutil.copyfileobj(content, target)
                unfinished.rename(file)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = archive.extractfile(member)
    if content is None:
        raise tarfile.ReadError(f"{member.name} is no file")
    return content

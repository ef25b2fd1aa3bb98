"""Whether object storage answers, found out by a process of its own: DALI tries for minutes, deaf to signals."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable
from multiprocessing.connection import Connection

from data.batch import DataError
from data.images import ImageList, is_remote

ANSWER_S = 30.0
"""How long it may take; a process is ready for it after some seconds."""
CONTEXT = multiprocessing.get_context("spawn")
READY = b"ready"


def require_answer(images: ImageList) -> None:
    """Read one image from each bucket that the images lie in; DataError if one of them is not had within `ANSWER_S`."""
    names = _one_of_each_bucket(images.names)
    if not names:
        return
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_read, args=(names, sender), daemon=True)
    process.start()
    sender.close()
    try:
        receiver.recv_bytes()  # READY: imports can be slow, and are no fault of the storage
        failure = receiver.recv_bytes().decode() if receiver.poll(ANSWER_S) else f"no answer within {ANSWER_S:.0f} s"
    except EOFError:
        failure = "the process that reads it has ended"
    finally:
        process.kill()
        process.join()
        receiver.close()
    if failure:
        raise DataError(f"{', '.join(names)}: cannot be read ({failure}): look after network, name and credentials")


def _one_of_each_bucket(names: Iterable[str]) -> list[str]:
    """The first of the images in each bucket, such as s3://bucket/."""
    first: dict[str, str] = {}
    for name in filter(is_remote, names):
        scheme, _, place = name.partition("://")
        first.setdefault(f"{scheme}://{place.partition('/')[0]}", name)
    return list(first.values())


def _read(names: list[str], sender: Connection) -> None:
    """In the process of its own: send `READY`, then why the files cannot be read, or nothing if they can."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from data.dali import read_failure

    sender.send_bytes(READY)
    sender.send_bytes(read_failure(names).encode())


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)

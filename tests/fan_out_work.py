"""Work that tests send to Ray, and items that kill their worker on the first attempt; light, because every worker imports it."""

import os
import signal
from pathlib import Path

from lorag.errors import ConfigError


def die_once(mark, here):
    """Kills the process at its first call, which the file `mark` notes, unless it is the one that asked for the work."""
    if os.getpid() != here and not Path(mark).exists():
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def square(shared, item):
    """Work on a number; 7 is refused, and one that has a mark dies first."""
    import torch

    number, mark = item
    if mark:
        die_once(mark, shared)
    if number == 7:
        raise ConfigError("an unlucky number", got=number, remedy="Take another.")
    return {"square": number**2, "threads": torch.get_num_threads(), "pid": os.getpid()}


def always_dies(shared, item):
    """Work that no worker survives."""
    os.kill(os.getpid(), signal.SIGKILL)


def deadly(item, mark):
    """The item, as one of a subclass that dies when it first reaches a worker."""
    return Deadly(item, str(mark), os.getpid())


class Deadly:
    """Arrives on a worker as the item that it holds, or kills the worker."""

    def __init__(self, item, mark, here):
        self.item, self.mark, self.here = item, mark, here

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.item, name)

    def __reduce__(self):
        return arrive, (self.item, self.mark, self.here)


def arrive(item, mark, here):
    """What takes the place of a Deadly where it is unpacked."""
    die_once(mark, here)
    return item

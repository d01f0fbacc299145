"""The folders that a run writes to: can it write there, is it alone under its name, what has a killed run left?"""

import os
from contextlib import suppress
from pathlib import Path
from typing import IO
from uuid import uuid4

from model.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def make_writable(folder: Path) -> None:
    """An unwritable place is told now, not after an hour. Several machines may share the folder: each has its probe."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".{uuid4().hex}.probe"
    probe.touch()
    probe.unlink()


def claim(path: Path, name: str) -> IO | None:
    """Lock a file for the run called `name` -> the open file; None where the system or the file system has no locks.

    The lock ends with the process, killed or not. It is POSIX's: seen by other machines on NFS, and not inherited by
    the loader processes, which may outlive a killed run. A second run in the same process is let in.
    """
    if fcntl is None:
        return None
    for _ in range(3):
        file = path.open("a")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            raise InputError(
                f"another run is writing {name} in {path.parents[1]}: wait until it ends, or choose another --out_dir"
            ) from None
        except OSError:
            file.close()
            return None
        with suppress(FileNotFoundError):  # the run before released it, and so removed it, since it was opened here
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        file.close()
    return None


def release(file: IO | None) -> None:
    """Remove the file that claim() gave, and with it the lock."""
    if file:
        Path(file.name).unlink(missing_ok=True)
        file.close()


def remove_leftovers(folders: set[Path], name: str) -> None:
    """Remove what killed runs of this name were writing (write_files gives it its final name when it is whole)."""
    for folder in folders:
        for kind in ("", "_resume.pth", "_samples"):
            for path in folder.glob(f"{name}{kind}.*.tmp"):
                path.unlink(missing_ok=True)

"""The folders that a run writes to: can it write there, is it alone under its name, what has a killed run left?"""

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
    return file


def remove_leftovers(folders: set[Path], name: str) -> None:
    """Remove what killed runs of this name were writing (write_files gives it its final name when it is whole)."""
    for folder in folders:
        for kind in ("", "_resume.pth", "_samples"):
            for path in folder.glob(f"{name}{kind}.*.tmp"):
                path.unlink(missing_ok=True)

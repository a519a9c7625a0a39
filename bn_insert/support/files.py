"""Write files so that whoever looks, at any moment, finds the old file or the new one, whole."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from ..errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there, and nothing abandoned is removed
    fcntl = None  # type: ignore[assignment]

_STAGING = re.compile(r"\.bn-insert-[0-9a-f]{16}\.tmp")

StrPath = str | os.PathLike[str]


def write_atomically(path: StrPath, write: Callable[[Path], object], *, overwrite: bool = False) -> None:
    """Make a file appear at `path` complete, or not at all.

    write: called with the path of an empty file beside the target, which it fills.  overwrite: replace a file that is
    there; without it such a file is left alone even if it appears while `write` runs.  A symbolic link stays a link,
    and what it points to is written.  A new file has the mode that the umask gives, a replaced one keeps its own.

    Everything is staged in a folder `.bn-insert-*.tmp` beside the target.  It is removed whatever happens, except by
    a kill: then the target is the old file or the new one, and the next write beside it removes the folder.
    Raises CheckpointError with the path and the reason; then nothing has changed.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "note.txt")
    >>> write_atomically(path, lambda staged: staged.write_text("whole"))
    >>> path.read_text()
    'whole'
    """
    check_writable(path, overwrite=overwrite)
    target = real_path(path)
    with staging_folder(target) as folder:
        stage_file(target, write, folder, overwrite=overwrite)()


def check_writable(path: StrPath, *, overwrite: bool = False) -> None:
    """Raise CheckpointError if it is plain already that no file can be written there: before the work, not after.

    The rules are those of `write_atomically`.
    """
    target = real_path(path)
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        mode = None
    except OSError as error:
        raise _cannot_write(path, error) from error
    if mode is not None and stat.S_ISDIR(mode):
        raise CheckpointError(f"cannot write {path}: it is a folder; name a file in it")
    if mode is not None and not stat.S_ISREG(mode):
        raise CheckpointError(f"cannot write {path}: it is no regular file; choose another name")
    if mode is not None and not overwrite:
        raise _exists(path)
    folder = target.parent
    if not folder.is_dir():
        raise CheckpointError(f"cannot write {path}: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CheckpointError(f"cannot write {path}: the folder {folder} does not let you write; choose another one")


def real_path(path: StrPath) -> Path:
    """Return the file that a path means, with symbolic links followed; it need not exist."""
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{os.fspath(path)!r} is no usable path: {error}") from error


@contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Make a folder, and those above it, for files to be written into; check that they can be.

    What killed processes have left in it is removed.  When the block fails, those folders that were made here and are
    still empty are removed.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write(folder, error) from error
        check_writable(folder / "any file")
        _remove_abandoned(folder)
        yield
    except BaseException:
        for each in missing:
            with suppress(OSError):
                each.rmdir()
        raise


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """Yield a folder beside the target, on the same file system, that is removed with all in it at the end.

    Folders beside it that killed processes have left are removed too.
    """
    _remove_abandoned(target.parent)
    with ExitStack() as cleaning:
        try:
            folder = _new_staging_folder(target.parent, cleaning)
        except OSError as error:
            raise _cannot_write(target, error) from error
        yield folder


def _new_staging_folder(parent: Path, cleaning: ExitStack) -> Path:
    # A folder is locked as long as its process lives. Another process may take it for abandoned in the moment before,
    # so one that is not there and locked gives way to another; without any locks nobody removes anything.
    for _ in range(3):
        folder = parent / f".bn-insert-{secrets.token_hex(8)}.tmp"
        cleaning.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.mkdir()
        if _lock(folder, cleaning) and folder.exists():
            return folder
    folder.mkdir(exist_ok=True)
    return folder


def _remove_abandoned(parent: Path) -> None:
    with suppress(OSError):
        for folder in [each for each in parent.iterdir() if _STAGING.fullmatch(each.name)]:
            with ExitStack() as locks:
                if not folder.is_symlink() and _lock(folder, locks):
                    shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: Path, closing: ExitStack) -> bool:
    """Lock a folder until `closing` ends or the process does; say whether that went."""
    if fcntl is None:
        return False
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        closing.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # it is in use, gone, or on a file system without locks
        return False
    return True


def stage_file(
    target: Path, write: Callable[[Path], object], folder: Path, *, overwrite: bool = False
) -> Callable[[], None]:
    """Fill a file in a staging folder, and return the function that gives it its name.

    Several files that are staged before the first gets its name come all or, on a full disk, none.
    """
    return partial(publish, stage(folder / target.name, write, target), target, overwrite=overwrite)


def stage(path: Path, write: Callable[[Path], object], target: Path) -> Path:
    """Fill a file in a staging folder, give it the mode that it will have as `target`, and bring it to the disk."""
    try:
        path.touch(exist_ok=False)
        mode = (target if target.exists() else path).stat().st_mode
        write(path)
        path.chmod(stat.S_IMODE(mode))
        with path.open("r+b") as file:
            os.fsync(file.fileno())
    except CheckpointError:
        raise
    except Exception as error:  # whatever the writer of a format makes of a full disk is one fact to us
        raise _cannot_write(target, error) from error
    return path


def publish(staged: Path, target: Path, *, overwrite: bool) -> None:
    """Give a staged file its name, in one step that is seen whole or not at all, and bring the name to the disk."""
    try:
        if overwrite:
            staged.replace(target)
        else:
            _publish_as_new(staged, target)
    except FileExistsError as error:
        raise _exists(target) from error
    except OSError as error:
        raise _cannot_write(target, error) from error
    # The file is in place: a file system that cannot sync folders must not make that look like a failure.
    with suppress(OSError):
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _publish_as_new(staged: Path, target: Path) -> None:
    """Give a staged file a name that must be free: renaming would replace a file that has appeared meanwhile."""
    try:
        target.hardlink_to(staged)
    except FileExistsError:
        raise
    except OSError:
        # No hard links here (FAT, some network shares): an empty file claims the name until the rename.
        target.touch(exist_ok=False)
        try:
            staged.replace(target)
        except BaseException:
            target.unlink()
            raise


def _exists(path: StrPath) -> CheckpointError:
    return CheckpointError(f"{path} exists already: choose another name, or replace it with overwrite=True (--force)")


def _cannot_write(path: StrPath, error: BaseException) -> CheckpointError:
    return CheckpointError(f"cannot write {path}: {_reason(error)}")


def _reason(error: BaseException) -> str:
    """Return what the operating system said, which torch.save hides behind an exception of its own."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
        link = link.__cause__ or link.__context__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

"""Atomic writes: at any moment, a path holds either the old file or the new one, complete."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from enum import Enum, auto
from functools import partial
from pathlib import Path

from ..errors import CheckpointError, as_passed
from .near_names import did_you_mean
from .text import first_line

try:
    import fcntl
except ImportError:  # Windows: without locks, abandoned folders are not removed
    fcntl = None  # type: ignore[assignment]

_STAGING = re.compile(r"\.bn-insert-[0-9a-f]{16}\.tmp")

StrPath = str | os.PathLike[str]


class _Lock(Enum):
    """Whether a folder could be locked."""

    OURS = auto()
    TAKEN = auto()
    NONE = auto()


_locked: set[int] = set()  # descriptors of folders


def write_atomically(path: StrPath, write: Callable[[Path], object], *, overwrite: bool = False) -> None:
    """Write a file that appears at `path` complete, or not at all.

    The file is staged in a folder `.bn-insert-*.tmp` next to the target, which is always removed. Only if the process
    is killed does the folder remain: the target is then either the old file or the new one, and the next write into the
    same folder removes the staging folder.

    Args:
        path: The target. If it is a symbolic link, the link stays and the file that it points to is written. A new file
            gets the mode determined by the umask; a replaced file keeps its mode.
        write: Called with the path of an empty file, which it fills.
        overwrite: Replace an existing file. Otherwise an existing file is never changed, even if it appears while
            `write` runs.

    Raises:
        CheckpointError: If the file cannot be written; nothing has changed then.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "note.txt")
        >>> write_atomically(path, lambda staged: staged.write_text("complete"))
        >>> path.read_text()
        'complete'
    """
    check_writable(path, overwrite=overwrite)
    target = real_path(path)
    with staging_folder(target) as folder:
        stage_file(target, write, folder, overwrite=overwrite)()


def check_writable(path: StrPath, *, overwrite: bool = False, inputs: Iterable[StrPath] = ()) -> None:
    """Check that a file can be written, before any expensive work starts.

    Args:
        path: As for `write_atomically`.
        overwrite: As for `write_atomically`.
        inputs: Files that the work reads, which are never replaced.

    Raises:
        CheckpointError: If it is already certain that the file cannot be written, or if it is one of the inputs.
    """
    target = real_path(path)
    for each in inputs:
        if is_same_file(target, each):
            which = "the input" if os.fspath(path) == os.fspath(each) else f"the same file as the input {each}"
            raise CheckpointError(f"cannot write {path}: it is {which}; choose another name, so that the input is kept")
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        mode = None
    except OSError as error:
        raise _cannot_write(path, error) from error
    if mode is not None and stat.S_ISDIR(mode):
        raise CheckpointError(f"cannot write {path}: it is a folder; name a file inside it")
    if mode is not None and not stat.S_ISREG(mode):
        raise CheckpointError(f"cannot write {path}: it is not a regular file; choose another name")
    if mode is not None and not overwrite:
        raise _exists(path)
    folder = target.parent
    if not folder.is_dir():
        raise CheckpointError(
            f"cannot write {path}: the folder {folder} does not exist{did_you_mean(folder)}; create it first"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CheckpointError(f"cannot write {path}: no permission to write in the folder {folder}; choose another one")
    _check_takes_files(folder, path)


def check_folder(folder: Path) -> None:
    """Check that a folder is there or can be created, and that files can be written into it.

    Raises:
        CheckpointError: If it is already certain that they cannot.
    """
    try:
        there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    except OSError as error:
        raise _cannot_write(folder, error) from error
    if not there.is_dir():
        raise CheckpointError(f"cannot write {folder}: {there} is not a folder; choose another one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"cannot write {folder}: no permission to write in the folder {there}; choose another one"
        )
    _check_takes_files(there, folder)


def _check_takes_files(folder: Path, path: StrPath) -> None:
    """Raise CheckpointError if no file can be created in a folder, as in /proc, where permissions do not tell."""
    try:
        with tempfile.TemporaryFile(dir=folder):  # on Linux it has no name, so that nobody sees it
            pass
    except OSError as error:
        raise _cannot_write(path, error) from error


def is_same_file(path: StrPath, other: StrPath) -> bool:
    """Return whether two paths refer to the same file."""
    try:
        return Path(path).samefile(other)
    except (OSError, ValueError):  # one of them does not exist
        return False


def real_path(path: StrPath) -> Path:
    """Return the path with symbolic links resolved; it need not exist.

    Raises:
        CheckpointError: If it cannot be the path of a file.
    """
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{os.fspath(path)!r} is not a usable path: {error}") from error


@contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Create a folder and its parents, check that files can be written into it, and reserve it for this caller.

    Staging folders of killed processes in it are removed. If the block fails, folders that were created here and are
    still empty are removed.

    Raises:
        CheckpointError: If no file can be written into the folder, or another caller has reserved it.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write(folder, error) from error
        check_folder(folder)
        _remove_abandoned(folder)
        with ExitStack() as closing:
            if _lock(folder, closing) is _Lock.TAKEN:
                raise CheckpointError(
                    f"{folder} is in use: another run is writing its results there; wait until it has ended, or choose "
                    "another output folder"
                )
            yield
    except BaseException:
        for each in missing:
            with suppress(OSError):
                each.rmdir()
        raise


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """Yield a folder next to the target, on the same file system, that is removed with its contents at the end.

    Staging folders of killed processes in the same place are removed too.

    Raises:
        CheckpointError: If the folder cannot be created.
    """
    _remove_abandoned(target.parent)
    with ExitStack() as cleaning:
        try:
            folder = _new_staging_folder(target.parent, cleaning)
        except OSError as error:
            raise _cannot_write(target, error) from error
        yield folder


def _new_staging_folder(parent: Path, cleaning: ExitStack) -> Path:
    # A folder is locked for as long as its process lives. Before it is locked, another process may take it for an
    # abandoned one and remove it: then the next name is tried. On file systems without locks, nothing is ever removed.
    for _ in range(3):
        folder = parent / f".bn-insert-{secrets.token_hex(8)}.tmp"
        cleaning.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.mkdir()
        if _lock(folder, cleaning) is _Lock.OURS and folder.exists():
            return folder
    folder.mkdir(exist_ok=True)
    return folder


def _remove_abandoned(parent: Path) -> None:
    with suppress(OSError):
        for folder in [each for each in parent.iterdir() if _STAGING.fullmatch(each.name)]:
            with ExitStack() as locks:
                if not folder.is_symlink() and _lock(folder, locks) is _Lock.OURS:
                    shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: Path, closing: ExitStack) -> _Lock:
    """Lock a folder against other processes until `closing` is closed or the process ends."""
    if fcntl is None:
        return _Lock.NONE
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        _locked.add(descriptor)
        closing.callback(_unlock, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _Lock.TAKEN
    except OSError:  # the folder is gone or cannot be listed, or its file system has no locks
        return _Lock.NONE
    return _Lock.OURS


def _unlock(descriptor: int) -> None:
    if descriptor in _locked:
        _locked.remove(descriptor)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _close_copies() -> None:
    while _locked:
        os.close(_locked.pop())


if hasattr(os, "register_at_fork"):
    # A copy of a descriptor in a forked process would hold its lock for as long as that process lives: those that read
    # images live a few seconds longer than a process that is killed.
    os.register_at_fork(after_in_child=_close_copies)


def stage_file(
    target: Path, write: Callable[[Path], object], folder: Path, *, overwrite: bool = False
) -> Callable[[], None]:
    """Write a file into a staging folder, and return the function that moves it to its target.

    If several files are staged before the first is moved, then on a full disk none of them appears.

    Args:
        target: Path of the file to write.
        write: Called with the path of an empty file, which it fills.
        folder: From `staging_folder`.
        overwrite: Replace an existing file.

    Raises:
        CheckpointError: If the file cannot be written.
    """
    return partial(publish, stage(folder / target.name, write, target), target, overwrite=overwrite)


def stage(path: Path, write: Callable[[Path], object], target: Path) -> Path:
    """Write a file into a staging folder, with the mode that it will have as `target`, and flush it to disk.

    Args:
        path: The file in the staging folder; it must not exist.
        write: Called with `path`, an empty file by then, which it fills.
        target: Where the file will go.

    Raises:
        CheckpointError: If the file cannot be written.
    """
    try:
        path.touch(exist_ok=False)
        mode = (target if target.exists() else path).stat().st_mode
        write(path)
        path.chmod(stat.S_IMODE(mode))
        with path.open("r+b") as file:
            os.fsync(file.fileno())
    except CheckpointError:
        raise
    except Exception as error:  # writers of different formats raise different exceptions on a full disk
        raise _cannot_write(target, error) from error
    return path


def publish(staged: Path, target: Path, *, overwrite: bool) -> None:
    """Move a staged file to its target in one atomic step, and flush the target's folder to disk.

    Args:
        staged: From `stage`.
        target: Path of the file to write.
        overwrite: Replace an existing file.

    Raises:
        CheckpointError: If the target exists and is not to be replaced, or cannot be written.
    """
    try:
        if overwrite:
            staged.replace(target)
        else:
            _publish_as_new(staged, target)
    except FileExistsError as error:
        raise _exists(target) from error
    except OSError as error:
        raise _cannot_write(target, error) from error
    # The file is in place: that some file systems cannot sync folders is not a failure.
    with suppress(OSError):
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _publish_as_new(staged: Path, target: Path) -> None:
    """Move a staged file to a target that must not exist: renaming would replace a file that has appeared meanwhile."""
    try:
        target.hardlink_to(staged)
    except FileExistsError:
        raise
    except OSError:
        # Without hard links (FAT, some network shares), an empty file reserves the name until the rename.
        target.touch(exist_ok=False)
        try:
            staged.replace(target)
        except BaseException:
            target.unlink()
            raise


def _exists(path: StrPath) -> CheckpointError:
    return CheckpointError(
        f"{path} already exists: choose another name, or replace it with {as_passed('overwrite', True, '--force')}"
    )


def _cannot_write(path: StrPath, error: BaseException) -> CheckpointError:
    return CheckpointError(f"cannot write {path}: {_reason(error)}")


def _reason(error: BaseException) -> str:
    """Return the operating system's error message, which torch.save wraps in another exception."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
        link = link.__cause__ or link.__context__
    return first_line(error)

"""Write files whole or not at all: to a temporary name beside the target, then one rename."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from moeca_fx.errors import MoecaError


def prepare_folder(folder: Path) -> None:
    """Make sure files can be written into `folder`, creating it; call before long work.

    Raises:
        MoecaError: it cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MoecaError(
            f"cannot write into the folder {folder}: {error.strerror or error}; choose another one"
        ) from error


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then move it to `path`; on any failure `path` is left as it was.

    Args:
        path: where the file shall be; an existing one is replaced.
        write: writes the content to the path it is given, which has the suffix of `path`.

    Raises:
        MoecaError: the file system refused.
    """
    prepare_folder(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)  # mkstemp's 0600 would keep others from reading the result
        os.replace(temporary, path)
    except OSError as error:
        raise MoecaError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)

"""What predictors and policies learnt of a model, kept beside the model's store from one run to the next."""

from __future__ import annotations

import io
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from offload.errors import LearntFileWarning
from offload.store import files
from offload.store.names import learnt_file, store_key
from offload.store.store import ExpertStore
from prefetch.learning import Learner

VERSION = 2
"""Of the file and of what its tables mean."""

_VERSION, _IDENTITY = "version", "identity"

_DAMAGED = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)
"""What reading a file can end in that is not what `save_learnt` wrote."""

Tables = dict[str, npt.NDArray[Any]]


def learnt_path(store: ExpertStore) -> Path:
    """The file of a store: beside its directory, which is never written again."""
    return store.path.parent / learnt_file(store_key(store.identity, store.format))


def save_learnt(store: ExpertStore, learners: Mapping[str, Learner]) -> None:
    """Keep what `learners` learnt; the file is replaced as a whole. Warns where it cannot be written.

    Args:
        store: of the model.
        learners: by name; what others have in the file stays.
    """
    path = learnt_path(store)
    tables = {}
    with suppress(FileNotFoundError, *_DAMAGED):
        tables = _read(path, store)
    for name, learner in learners.items():
        tables = {key: table for key, table in tables.items() if not key.startswith(f"{name}/")}
        tables |= {f"{name}/{key}": table.astype(np.float32) for key, table in learner.state().items()}
    content = io.BytesIO()
    # A zip file: each array carries its own CRC-32.
    np.savez(content, allow_pickle=False, **_head(store), **tables)
    temporary = path.with_suffix(".tmp")
    try:
        with suppress(FileNotFoundError):
            files.unlink(temporary)
        files.write_file(temporary, content.getvalue())
        files.rename(temporary, path)
    except OSError as error:
        with suppress(OSError):
            files.unlink(temporary)
        _warn(f"what was learnt of {store.name} is not kept: writing {path}: {error.strerror or error}")


def restore_learnt(store: ExpertStore, learners: Mapping[str, Learner]) -> None:
    """Let `learners` go on from where the last run ended, those that the file knows.

    A file that is damaged, of another version, of another model or of other settings is left alone with a warning: what
    it held is learnt anew, and the next `save_learnt` replaces it.
    """
    path = learnt_path(store)
    try:
        tables = _read(path, store)
        for name, learner in learners.items():
            own = {key.partition("/")[2]: table for key, table in tables.items() if key.startswith(f"{name}/")}
            if own:
                learner.restore(own)
    except FileNotFoundError:
        return
    except _DAMAGED as error:
        _warn(f"{path} is ignored: {error}; what it held is learnt anew, and the next close() replaces it")


def _head(store: ExpertStore) -> Tables:
    return {_VERSION: np.array(VERSION), _IDENTITY: np.array(store.identity)}


def _read(path: Path, store: ExpertStore) -> Tables:
    # Of a path that is damaged, numpy would leave the file open.
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
        tables = {name: arrays[name] for name in arrays.files}
    version, identity = int(tables.pop(_VERSION)), str(tables.pop(_IDENTITY))
    if version != VERSION:
        raise ValueError(f"it is of version {version}, this reads version {VERSION}")
    if identity != store.identity:
        raise ValueError("it is of another model")
    return tables


def _warn(message: str) -> None:
    warnings.warn(message, LearntFileWarning, stacklevel=3)

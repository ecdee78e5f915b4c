"""A checkpoint on the Hub, by its headers alone: asked for by range requests, nothing is kept."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from offload.checkpoint.headers import checked_span
from offload.checkpoint.index import INDEX_FILE, SINGLE_FILE, read_weight_map
from offload.checkpoint.locate import hub_errors, refuse_without_safetensors
from offload.checkpoint.mismatch import mismatch
from offload.errors import CheckpointNotFoundError, HubUnreachableError, InvalidArgumentError
from placement.tensors import TensorSpan

if TYPE_CHECKING:
    from huggingface_hub.utils._safetensors import SafetensorsFileMetadata

_REQUESTS_AT_ONCE = 8
_CONFIG_FILES = ("config.json",)


@dataclass(frozen=True)
class RemoteCheckpoint:
    """What headers say of a repository.

    Attributes:
        repository: its id.
        commit: that was read.
        directory: with its config and, where that was asked for, its modeling code; gone after the block.
        tensors: by the checkpoint's key; files are named as in the repository, offsets count from their data.
        nbytes: of all tensors.
    """

    repository: str
    commit: str
    directory: Path
    tensors: Mapping[str, TensorSpan]
    nbytes: int


@contextmanager
def remote_checkpoint(
    repository: str, *, revision: str | None = None, with_code: bool = False
) -> Iterator[RemoteCheckpoint]:
    """Read the headers of a repository; no weights, and nothing stays on disk.

    The Hub is reached as the environment says: HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.

    Args:
        repository: "owner/name".
        revision: branch, tag or commit; the default branch if None.
        with_code: also fetch the repository's Python files, into the temporary directory.

    Raises:
        InvalidArgumentError: the name of a directory that is here.
        CheckpointNotFoundError: no such repository or revision, one that may not be read, or no safetensors in it.
        UnsupportedModelError: its weights are there as pickles only.
        CheckpointError: an index or a header is not sound.
        HubUnreachableError: no connection, or none allowed.
    """
    if Path(repository).expanduser().exists():
        raise InvalidArgumentError(f"{repository} is here: --remote is for repositories of the Hub; leave it out")
    with TemporaryDirectory(prefix="offload-remote-") as scratch, _answers(repository, revision):
        from huggingface_hub import HfApi

        # Asked for at each call: the client reads its environment once, when it is imported.
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
        info = api.model_info(repository, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size for file in info.siblings or []}
        refuse_without_safetensors(repository, sizes)
        commit = info.sha or revision or "main"
        files = [name for name in _CONFIG_FILES if name in sizes]
        if not files:
            raise CheckpointNotFoundError(f"{repository}: expected config.json in the repository, found none")
        files += [name for name in sizes if with_code and name.endswith(".py")]
        listed = None
        if SINGLE_FILE not in sizes and INDEX_FILE in sizes:
            files.append(INDEX_FILE)
        for name in files:
            api.hf_hub_download(repository, name, revision=commit, local_dir=scratch)
        if SINGLE_FILE not in sizes:
            if INDEX_FILE not in sizes:
                raise CheckpointNotFoundError(
                    f"{repository}: expected {SINGLE_FILE} or {INDEX_FILE} in the repository, found neither. Fix: pass "
                    "a repository of a transformers model"
                )
            listed = read_weight_map(Path(scratch) / INDEX_FILE)
        shards = [SINGLE_FILE] if listed is None else sorted(set(listed.values()))
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            headers = list(
                pool.map(lambda name: api.parse_safetensors_file_metadata(repository, name, revision=commit), shards)
            )
        tensors: dict[str, TensorSpan] = {}
        for name, header in zip(shards, headers, strict=True):
            tensors |= _spans(f"{repository}/{name}", header, sizes.get(name), listed, name)
        _check_listed(repository, listed, tensors)
        nbytes = sum(span.nbytes for span in tensors.values())
        yield RemoteCheckpoint(repository, commit, Path(scratch), tensors, nbytes)


@contextmanager
def _answers(repository: str, revision: str | None) -> Iterator[None]:
    """`hub_errors`, and errors of connections and of headers."""
    # Of whichever HTTP client the installed version has.
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        EntryNotFoundError,
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        OfflineModeIsEnabled,
        SafetensorsParsingError,
    )

    try:
        with hub_errors(repository, revision):
            try:
                yield
            except LocalEntryNotFoundError as error:
                raise _unreachable(repository, error) from error
            except EntryNotFoundError as error:
                raise CheckpointNotFoundError(
                    f"{repository}: expected a file that its index lists, found none: {error}"
                ) from error
            except OfflineModeIsEnabled as error:
                raise HubUnreachableError(
                    f"{repository}: the Hub may not be asked: {error}. Fix: unset HF_HUB_OFFLINE, or plan a copy that "
                    "is here without --remote"
                ) from error
            except HfHubHTTPError:
                raise
            except (HTTPError, ConnectionError) as error:
                raise _unreachable(repository, error) from error
    except (SafetensorsParsingError, NotASafetensorsRepoError) as error:
        raise mismatch(repository, expected="headers of safetensors files", found=f"{error}") from error


def _unreachable(repository: str, error: Exception) -> HubUnreachableError:
    return HubUnreachableError(
        f"{repository}: the Hub does not answer ({type(error).__name__}: {error}). Fix: check the connection and "
        "HF_ENDPOINT, or plan a copy that is here without --remote"
    )


def _spans(
    path: str, header: SafetensorsFileMetadata, size: int | None, listed: Mapping[str, str] | None, file: str
) -> dict[str, TensorSpan]:
    """The tensors of one file, checked as those of a file that is here, as far as its header says."""
    found = {}
    for key, tensor in header.tensors.items():
        entry = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": list(tensor.data_offsets)}
        found[key] = checked_span(key, entry, 0, path)
        if listed is not None and listed.get(key) != file:
            raise mismatch(path, tensor=key, expected=f"only tensors that {INDEX_FILE} lists for it", found="another")
    nbytes = sum(span.nbytes for span in found.values())
    if size is not None and nbytes >= size:
        raise mismatch(path, expected=f"a file of more than {nbytes} bytes", found=f"{size} bytes")
    return found


def _check_listed(repository: str, listed: Mapping[str, str] | None, tensors: Mapping[str, TensorSpan]) -> None:
    for key, name in (listed or {}).items():
        if key not in tensors:
            raise mismatch(
                f"{repository}/{name}", tensor=key, expected=f"the tensor, which {INDEX_FILE} says is here",
                found="a file without it",
            )  # fmt: skip

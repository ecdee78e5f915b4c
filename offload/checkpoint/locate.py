"""From what the user calls a model to a directory on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from offload.errors import CheckpointNotFoundError, OffloadError, StorageError, UnsupportedModelError

ALLOWED_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
# Second copies of the weights, in layouts of other programs.
IGNORED_FILES = ("original/*", "metal/*", "onnx/*", "consolidated*.safetensors")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def locate_checkpoint(
    name: str | os.PathLike[str], *, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """The directory of a checkpoint, downloaded first where that is needed.

    Args:
        name: a directory, or the id of a Hub repository such as "mistralai/Mixtral-8x7B-v0.1". A directory of that
            name takes precedence. The Hub is reached as the environment says: HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE,
            HF_TOKEN, HF_ENDPOINT.
        revision: branch, tag or commit of a Hub repository; its default branch if None.
        local_files_only: take what is in the Hub cache and open no connection.

    Returns:
        an existing directory with config.json and safetensors files.

    Raises:
        CheckpointNotFoundError: no such directory or repository, or nothing cached and no connection.
        UnsupportedModelError: the weights are there as pickles only.
        StorageError: the download cannot be written.
    """
    text = os.fspath(name)
    path = Path(text).expanduser()
    if path.is_dir():
        return _checked(path)
    if path.exists():
        raise CheckpointNotFoundError(
            f"{text}: expected a directory or a Hub id, found a file. Fix: pass the directory that holds it, "
            f"{str(path.parent)!r}, if it has a config.json."
        )
    if not isinstance(name, str) or _looks_like_path(text):
        raise CheckpointNotFoundError(
            f"{text}: expected a directory, found nothing there. Fix: check the path; a Hub id has the form owner/name."
        )
    return _checked(_download(text, revision, local_files_only))


def _looks_like_path(text: str) -> bool:
    return text.startswith(("/", ".", "~")) or text.count("/") > 1 or "\\" in text or text.endswith("/") or not text


def _download(repository: str, revision: str | None, local_files_only: bool) -> Path:
    # Imported here: it reads the environment when imported, and half a second is not due before it is needed.
    from huggingface_hub import snapshot_download

    with hub_errors(repository, revision):
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                local_files_only=local_files_only,
                allow_patterns=list(ALLOWED_FILES),
                ignore_patterns=list(IGNORED_FILES),
            )
        )


@contextmanager
def hub_errors(repository: str, revision: str | None) -> Iterator[None]:
    """Turn what the Hub's client raises in the body into errors of ours that name the repository and a fix.

    Raises:
        CheckpointNotFoundError: no such repository or revision, or one that may not be read, or nothing cached and no
            connection.
        StorageError: a download cannot be written.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def not_found(found: str, fix: str) -> CheckpointNotFoundError:
        at = f" (revision {revision!r})" if revision else ""
        return CheckpointNotFoundError(
            f"{repository}{at}: expected a directory or a Hub repository, found {found}. Fix: {fix}."
        )

    try:
        yield
    except OffloadError:
        raise
    except HFValidationError as error:
        raise not_found("neither", f"pass an existing directory or an id of the form owner/name ({error})") from error
    except GatedRepoError as error:
        raise not_found("a gated one", "accept its terms on the Hub, then set HF_TOKEN to your token") from error
    except RepositoryNotFoundError as error:
        raise not_found("neither", "check the spelling; if it is private, set HF_TOKEN to your token") from error
    except RevisionNotFoundError as error:
        raise not_found("no such revision", "pass a branch, a tag or a full commit hash of it") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise not_found(
            "no complete copy in the Hub cache, and the Hub was not asked or did not answer",
            "connect and unset HF_HUB_OFFLINE to download it, or pass the directory of a copy",
        ) from error
    except HfHubHTTPError as error:
        raise not_found(f"an error of the Hub ({error})", "try again later, or pass the directory of a copy") from error
    except OSError as error:
        raise StorageError(error.errno, f"downloading {repository} failed: {error}") from error


def _checked(directory: Path) -> Path:
    if not (directory / "config.json").is_file():
        raise CheckpointNotFoundError(
            f"{directory}: expected a model's directory with config.json, found none in it. Fix: pass the directory "
            "that `save_pretrained` wrote or that the Hub repository was downloaded to."
        )
    refuse_without_safetensors(str(directory), (entry.name for entry in directory.iterdir()))
    return directory


def refuse_without_safetensors(where: str, names: Iterable[str]) -> None:
    """Raise unless one of a checkpoint's files holds weights as safetensors.

    Raises:
        UnsupportedModelError: the weights are there as pickles only.
        CheckpointNotFoundError: there are none.
    """
    names = sorted(names)
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise UnsupportedModelError(
            f"{where}/{pickles[0]}: expected weights as *.safetensors, found pickles, which can run any code when "
            "read and are refused. Fix: load the model once with transformers where you trust it and write it with "
            "`save_pretrained(directory)`, which writes safetensors."
        )
    raise CheckpointNotFoundError(
        f"{where}: expected weights as *.safetensors, found none. Fix: finish the download; where the repository "
        "has pickles only, convert them with `save_pretrained` of transformers."
    )

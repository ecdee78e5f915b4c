import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors

from offload.checkpoint.checkpoint import Checkpoint
from offload.checkpoint.locate import locate_checkpoint
from offload.errors import CheckpointNotFoundError, StorageError, UnsupportedModelError
from tests.checkpoint.test_checkpoint import hub_layout


def model_directory(directory):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").touch()
    return directory


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A Hub cache of this test's own, and no connection."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.mark.parametrize("kind", [str, Path])
def test_directory(tmp_path, kind):
    assert locate_checkpoint(kind(model_directory(tmp_path / "m"))) == tmp_path / "m"


def test_relative_directory_that_looks_like_a_hub_id(tmp_path, monkeypatch, cache):
    model_directory(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert locate_checkpoint("owner/name") == Path("owner/name")


def test_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model_directory(tmp_path / "m")
    assert locate_checkpoint("~/m") == tmp_path / "m"


def test_sharded_directory(tmp_path):
    directory = model_directory(tmp_path)
    (directory / "model.safetensors").rename(directory / "model.safetensors.index.json")
    assert locate_checkpoint(directory) == directory


def test_file_instead_of_directory(tmp_path):
    directory = model_directory(tmp_path / "m")
    with pytest.raises(CheckpointNotFoundError, match="found a file") as caught:
        locate_checkpoint(directory / "model.safetensors")
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize("name", ["./absent", "/absent", "~/absent", "a/b/c", "absent/", "..", "", Path("owner/name")])
def test_path_to_nothing_is_not_asked_of_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(CheckpointNotFoundError):
        locate_checkpoint(name)


def test_directory_without_config(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointNotFoundError, match=r"config\.json"):
        locate_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth"])
def test_pickles_are_refused(tmp_path, name):
    (model_directory(tmp_path) / "model.safetensors").unlink()
    (tmp_path / name).touch()
    with pytest.raises(UnsupportedModelError, match="save_pretrained") as caught:
        locate_checkpoint(tmp_path)
    assert name in str(caught.value)


def test_directory_without_weights(tmp_path):
    (model_directory(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"found none\. Fix: finish the download"):
        locate_checkpoint(tmp_path)


def test_cached_repository_without_a_connection(cache):
    snapshot = hub_layout(cache, {"a": torch.arange(3)})
    (snapshot / "config.json").write_text("{}")
    found = locate_checkpoint("someone/tiny")
    assert found.samefile(snapshot)
    assert locate_checkpoint("someone/tiny", revision="c" * 40, local_files_only=True).samefile(snapshot)
    with Checkpoint.open(found) as checkpoint:
        assert torch.equal(checkpoint.read(checkpoint.tensors["a"]), torch.arange(3))


@pytest.mark.parametrize("local_files_only", [False, True])
def test_repository_that_is_not_cached(cache, local_files_only):
    with pytest.raises(CheckpointNotFoundError, match="HF_HUB_OFFLINE") as caught:
        locate_checkpoint("someone/absent", local_files_only=local_files_only)
    assert "someone/absent" in str(caught.value)


def test_revision_that_is_not_cached(cache):
    hub_layout(cache, {"a": torch.arange(3)})
    with pytest.raises(CheckpointNotFoundError, match="revision 'v2'"):
        locate_checkpoint("someone/tiny", revision="v2")


@pytest.mark.parametrize("name", ["no such name", "-owner/name", "a" * 200])
def test_name_that_is_no_id(cache, name):
    with pytest.raises(CheckpointNotFoundError, match="owner/name"):
        locate_checkpoint(name)


def answer(status):
    # Which HTTP library the response belongs to has changed between releases of huggingface_hub.
    return SimpleNamespace(status_code=status, headers={}, request=None)


ANSWERS = {
    "gated": (errors.GatedRepoError("gated", response=answer(403)), CheckpointNotFoundError, "accept its terms"),
    "absent": (errors.RepositoryNotFoundError("no", response=answer(404)), CheckpointNotFoundError, "HF_TOKEN"),
    "revision": (errors.RevisionNotFoundError("no", response=answer(404)), CheckpointNotFoundError, "branch"),
    "down": (errors.HfHubHTTPError("down", response=answer(503)), CheckpointNotFoundError, "try again"),
    "full disk": (OSError(28, "No space left on device"), StorageError, "No space left"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_answers_of_the_hub(monkeypatch, case):
    error, expected, words = ANSWERS[case]

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(expected, match=words) as caught:
        locate_checkpoint("someone/tiny")
    assert "someone/tiny" in str(caught.value)


def test_download_asks_for_no_pickle(monkeypatch, tmp_path):
    asked = {}

    def download(repository, **options):
        asked.update(options, repository=repository)
        return str(model_directory(tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate_checkpoint("someone/tiny", revision="v1") == tmp_path
    assert (asked["repository"], asked["revision"], asked["local_files_only"]) == ("someone/tiny", "v1", False)
    files = ["model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.model", "original/model.safetensors"]
    wanted = huggingface_hub.utils.filter_repo_objects(
        files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(wanted) == ["model.safetensors", "config.json", "tokenizer.model"]


def test_the_hub_client_is_not_imported_before_it_is_needed():
    code = "import sys; import offload.checkpoint.locate; assert 'huggingface_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

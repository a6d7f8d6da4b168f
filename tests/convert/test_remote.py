"""Hub ids and gs:// paths, with the hub and the bucket in memory: there is no network in a test."""

import importlib.machinery
import importlib.util
import inspect
import pathlib
import shutil
import sys
import types

import huggingface_hub
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from huggingface_hub import errors

import convert
from convert import chunks, converter, source, target
from ernie_jax import checkpoint
from ernie_jax.errors import UserError
from tests.convert.foreign import MOE, Model

REPOSITORY = "baidu/ERNIE-4.5-tiny"
COMMIT = "0123abcd"


class Bucket(MemoryFileSystem):
    """Objects in memory under hf:// and gs://."""

    cachable = False

    def __init__(self):
        super().__init__()
        self.store, self.pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).split("://")[-1].strip("/")

    def add(self, folder: pathlib.Path, where: str) -> None:
        for file in folder.rglob("*"):
            if file.is_file():
                self.pipe_file(f"{where}/{file.relative_to(folder)}", file.read_bytes())

    def take(self, where: str, folder: pathlib.Path) -> pathlib.Path:
        for path in self.find(where):
            file = folder / path.removeprefix(self._strip_protocol(where) + "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(self.cat_file(path))
        return folder


@pytest.fixture
def bucket(monkeypatch):
    bucket = Bucket()
    monkeypatch.setattr(backend._FileSystemSpecBackend, "_get_filesystem", lambda self, name: bucket)
    gcsfs = types.ModuleType("gcsfs")
    gcsfs.__spec__ = importlib.machinery.ModuleSpec("gcsfs", None)
    monkeypatch.setitem(sys.modules, "gcsfs", gcsfs)
    return bucket


class Hub:
    """A hub with one model: what it was asked for, and how many shards lay on the disk at most."""

    def __init__(self, files: pathlib.Path):
        self.files, self.downloads, self.most = files, [], 0
        self.failing: Exception | None = None

    def model_info(self, repository, revision=None):
        response = types.SimpleNamespace(headers={}, request=None, status_code=404)
        if repository != REPOSITORY:
            raise errors.RepositoryNotFoundError("404", response=response)
        if revision not in (None, "main", COMMIT):
            raise errors.RevisionNotFoundError("404", response=response)
        return types.SimpleNamespace(sha=COMMIT)

    def download(self, repository, file, revision, local_dir):
        if self.failing and len(self.downloads) == 2:
            raise self.failing
        assert (repository, revision) == (REPOSITORY, COMMIT)
        self.downloads.append(file)
        folder = pathlib.Path(local_dir or self.cache)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.files / file, folder / file)
        self.most = max(self.most, len(list(folder.glob("*.safetensors"))))
        return str(folder / file)


@pytest.fixture
def hub(rng, tmp_path, bucket, monkeypatch):
    hub = Hub(Model(MOE, rng, mtp=1).save(tmp_path / "hf", 6, shuffled=False))
    hub.cache = tmp_path / "cache"
    bucket.add(hub.files, f"hf://{REPOSITORY}@{COMMIT}")
    monkeypatch.setattr(source, "HfApi", lambda: hub)
    monkeypatch.setattr(source, "hf_hub_download", hub.download)
    monkeypatch.setattr(source, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(converter, "GROUP_BYTES", 8000)
    return hub


def test_the_hub_api_is_what_we_call():
    assert {"revision"} <= set(inspect.signature(huggingface_hub.HfApi.model_info).parameters)
    assert {"revision", "local_dir"} <= set(inspect.signature(huggingface_hub.hf_hub_download).parameters)


@pytest.mark.parametrize("name, is_one", [("baidu/ERNIE-4.5-0.3B-PT", True), ("gs://a/b", False), ("a", False)])
def test_hub_ids(name, is_one):
    assert convert.is_hub_id(name) is is_one


def test_a_path_that_looks_like_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/mine").mkdir(parents=True)
    assert not convert.is_hub_id("models/mine")


def test_hub(hub, tmp_path):
    convert.convert(REPOSITORY, str(tmp_path / "ours"))
    assert convert.verify(str(hub.files), str(tmp_path / "ours")) == []
    assert hub.downloads == sorted(path.name for path in hub.files.glob("*.safetensors"))
    assert hub.most <= 2
    assert not (tmp_path / "ours/.conversion").exists()
    manifest = checkpoint.read_manifest(tmp_path / "ours")
    assert (manifest["source"], manifest["revision"]) == (REPOSITORY, COMMIT)
    assert convert.verify(REPOSITORY, str(tmp_path / "ours"), revision="main") == []


def test_keep_download(hub, tmp_path):
    convert.convert(REPOSITORY, str(tmp_path / "ours"), revision=COMMIT, keep_download=True)
    assert sorted(path.name for path in hub.cache.iterdir()) == hub.downloads


def test_shards_in_the_cache_are_used_and_kept(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "try_to_load_from_cache", lambda _, file, revision: str(hub.files / file))
    convert.convert(REPOSITORY, str(tmp_path / "ours"))
    assert hub.downloads == []
    assert len(list(hub.files.glob("*.safetensors"))) == 6


def test_resume_downloads_only_what_is_left(hub, tmp_path, monkeypatch):
    ours = tmp_path / "ours"
    with monkeypatch.context() as broken:
        commit = target.Target.commit

        def failing(self, written):
            if len(hub.downloads) == 4:
                raise KeyboardInterrupt
            commit(self, written)

        broken.setattr(target.Target, "commit", failing)
        with pytest.raises(KeyboardInterrupt):
            convert.convert(REPOSITORY, str(ours))
    first, hub.downloads = hub.downloads, []
    convert.convert(REPOSITORY, str(ours))
    assert first[0] not in hub.downloads and hub.downloads[-1] not in first
    assert convert.verify(str(hub.files), str(ours)) == []


def test_network_failure(hub, tmp_path):
    ours = tmp_path / "ours"
    hub.failing = errors.HTTPError("connection reset\nlots of detail")
    with pytest.raises(UserError, match=r"tiny: the Hugging Face hub does not answer \(connection reset\)$"):
        convert.convert(REPOSITORY, str(ours))
    assert not checkpoint.is_checkpoint(ours)
    hub.failing = None
    convert.convert(REPOSITORY, str(ours))
    assert convert.verify(str(hub.files), str(ours)) == []


def test_no_such_model(hub, tmp_path):
    with pytest.raises(UserError, match="baidu/nothing: no such directory, and no such model on the Hugging Face hub"):
        convert.convert("baidu/nothing", str(tmp_path / "ours"))
    with pytest.raises(UserError, match="no such revision"):
        convert.convert(REPOSITORY, str(tmp_path / "ours"), revision="v2")
    assert not (tmp_path / "ours").exists()


def test_no_network(hub, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise errors.HTTPError("no route")

    monkeypatch.setattr(hub, "model_info", unreachable)
    with pytest.raises(
        UserError, match=r"typo: no such directory, and the Hugging Face hub does not answer \(no route"
    ):
        convert.convert("models/typo", str(tmp_path / "ours"))


def test_disk_for_two_shards(hub, tmp_path, monkeypatch):
    """Free space must hold the checkpoint and two shards, not the checkpoint twice."""
    shards = sum(file.stat().st_size for file in hub.files.glob("*.safetensors"))
    monkeypatch.setattr(converter, "_SPARE_DISK_BYTES", 0)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(1.2 * shards)))
    with pytest.raises(UserError, match="GB are free"):
        convert.convert(REPOSITORY, str(tmp_path / "ours"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(1.8 * shards)))
    convert.convert(REPOSITORY, str(tmp_path / "ours"))


@pytest.mark.parametrize("remote_source", [False, True])
def test_gs(rng, tmp_path, bucket, remote_source):
    local = Model(MOE, rng, mtp=1).save(tmp_path / "hf", 3)
    bucket.add(local, "gs://models/hf")
    convert.convert("gs://models/hf" if remote_source else str(local), "gs://models/ours")
    ours = bucket.take("gs://models/ours", tmp_path / "ours")
    assert {entry.name for entry in ours.iterdir()} == {"config.json", "tokenizer.model", "manifest.json", "params"}
    assert convert.verify("gs://models/hf" if remote_source else str(local), str(ours)) == []
    with pytest.raises(UserError, match="gs://models/ours: exists, a finished checkpoint"):
        convert.convert(str(local), "gs://models/ours")
    convert.convert(str(local), "gs://models/ours", dtype="float32", overwrite=True)
    assert checkpoint.read_manifest("gs://models/ours")["dtype"] == "float32"


def test_gs_resume(rng, tmp_path, bucket, monkeypatch):
    local = Model(MOE, rng).save(tmp_path / "hf")
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(converter, "GROUP_BYTES", 8000)
    with monkeypatch.context() as broken:
        commit, done = target.Target.commit, []

        def failing(self, written):
            commit(self, written)
            done.append(written)
            if len(done) == 3:
                raise KeyboardInterrupt

        broken.setattr(target.Target, "commit", failing)
        with pytest.raises(KeyboardInterrupt):
            convert.convert(str(local), "gs://models/ours")
    name = done[0][0][0]
    written = bucket.created(f"/models/ours/{name}")
    convert.convert(str(local), "gs://models/ours")
    assert bucket.created(f"/models/ours/{name}") == written
    assert convert.verify(str(local), str(bucket.take("gs://models/ours", tmp_path / "ours"))) == []


def test_gs_export(rng, tmp_path, bucket):
    local = Model(MOE, rng).save(tmp_path / "hf", 3)
    convert.convert(str(local), str(tmp_path / "ours"))
    convert.export(str(tmp_path / "ours"), "gs://models/exported")
    exported = bucket.take("gs://models/exported", tmp_path / "exported")
    assert {file.name for file in exported.iterdir()} == {file.name for file in local.iterdir()}
    assert not bucket.find("gs://models/.exported.partial")


def test_gs_without_gcsfs(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    absent = ("gcsfs", "tensorflow")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    with pytest.raises(UserError, match="gs://models/hf: gs:// paths need the package gcsfs: pip install gcsfs"):
        convert.convert("gs://models/hf", str(tmp_path / "ours"))

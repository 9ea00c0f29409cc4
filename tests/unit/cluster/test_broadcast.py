"""Sending a model in memory to the workers: once per host, and cleaned up afterwards."""

from __future__ import annotations

import contextlib
import os
import pickle
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import Client

import daskinfer as di
from daskinfer.cluster import broadcast, plugin
from daskinfer.cluster.preflight import build_requirements, check_workers
from daskinfer.models.loaders import BroadcastLoader, ModelLoader
from daskinfer.models.model import Model
from daskinfer.models.shared_files import get_broadcast_path, remove_broadcast_file
from daskinfer.worker.loaded_models import model_cache
from tests.conftest import FREE_PORT, wait_until

X = np.ones((64, 4), np.float32)


def big_model(seed: int) -> torch.nn.Module:
    """Make a model of about 4 MB."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 1000), torch.nn.Linear(1000, 1000))


def list_model_files() -> list[str]:
    """List the model files on this host, as a worker sees them."""
    folder = Path(get_broadcast_path("x")).parent
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("model-")) if folder.is_dir() else []


def folders_and_loaded(client: Client, loader: ModelLoader) -> tuple[dict[str, str], set[str]]:
    """Return each worker's folder, and the workers that have loaded the model."""
    workers = check_workers(client, build_requirements(loader, (), (), None))
    return {address: info.scratch_path for address, info in workers.items()}, {
        address for address, info in workers.items() if info.model_loaded
    }


def test_a_managed_cluster_keeps_one_file_per_host(cluster_client: Client) -> None:
    """A model in memory is one file per host, which a restarted worker and the next call find again."""
    loader = Model(big_model(1)).make_loader()
    for _ in range(2):
        with broadcast.broadcast_model(cluster_client, loader, *folders_and_loaded(cluster_client, loader)) as sent:
            assert isinstance(sent.loader, BroadcastLoader)
            assert len(pickle.dumps(sent.loader)) < 500  # whatever the model's size
    seen = cluster_client.run(list_model_files).values()
    assert all(files.count(sent.loader.file_name) == 1 for files in seen)


def test_the_models_used_last_are_kept(tmp_path: Path) -> None:
    """A managed cluster's folder holds a few models; the least recently used one is removed first."""
    loaders = [Model(torch.nn.Linear(1, n)).make_loader() for n in range(1, broadcast.MAX_BROADCAST_FILES + 2)]
    for n, loader in enumerate(loaders):
        broadcast._cache_model_file(str(tmp_path), f"model-{n}.safetensors", loader)
        os.utime(tmp_path / f"model-{n}.safetensors", ns=(n, n))
        broadcast._cache_model_file(str(tmp_path), "model-0.safetensors", loaders[0])  # used again
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == broadcast.MAX_BROADCAST_FILES
    assert "model-0.safetensors" in names
    assert "model-1.safetensors" not in names


def test_not_sent_again(cluster_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is on the host is not sent by the next call."""
    model = big_model(2)
    first = di.predict(model, X, client=cluster_client)
    monkeypatch.setattr(broadcast, "_write_model_file", None)  # sending would fail
    np.testing.assert_array_equal(di.predict(model, X, client=cluster_client), first)


def test_files_and_factories_travel_by_reference(cluster_client: Client) -> None:
    """A model that every worker can read or import is not sent."""
    loader = Model("torch.nn:Identity").make_loader()
    with broadcast.broadcast_model(cluster_client, loader, {}, set()) as sent:
        assert sent.loader is loader
    np.testing.assert_array_equal(di.predict("torch.nn:Identity", X, client=cluster_client), X)


def test_on_external_clusters_a_file_lasts_for_its_call(plain_client: Client) -> None:
    """The file exists while it may be needed, is not sent to workers that have the model, and is removed afterwards."""
    model = big_model(3)
    assert di.predict(model, X, client=plain_client).shape == (64, 1000)
    loader = Model(model).make_loader()
    folders, loaded = folders_and_loaded(plain_client, loader)
    assert loaded == set(folders)
    with broadcast.broadcast_model(plain_client, loader, folders, loaded) as sent:
        assert not list_model_files()
        for address in ("tcp://gone", *folders):  # of workers that join during the call
            sent.send_to(address)
            assert len(list_model_files()) == (address in folders)
    assert not list_model_files()
    with broadcast.broadcast_model(plain_client, loader, folders, set()):
        assert len(list_model_files()) == 1
    assert not list_model_files()


def test_a_client_that_leaves_during_a_call_leaves_no_file(plain_client: Client) -> None:
    """Workers remove a client's file once the client is gone; files of other clients stay."""
    loader = Model(big_model(5)).make_loader()
    folders, _ = folders_and_loaded(plain_client, loader)
    with contextlib.ExitStack() as stack, broadcast.broadcast_model(plain_client, loader, folders, set()):
        with Client(plain_client.scheduler.address, set_as_default=False) as other:
            plugin.register_plugins(other)
            stack.enter_context(broadcast.broadcast_model(other, loader, folders, set()))
            assert len(list_model_files()) == 2
        wait_until(lambda: len(list_model_files()) == 1)
        assert plain_client.id in list_model_files()[0]
    assert not list_model_files()


def test_on_external_hosts_the_file_is_in_a_folder_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On external clusters the file is in the temporary folder, private to its user, and is removed with its folder."""
    monkeypatch.delenv("DASKINFER_SCRATCH", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    broadcast._write_model_file(None, "model-x", b"content")
    path = Path(get_broadcast_path("model-x"))
    assert path.read_bytes() == b"content"
    assert path.parent.stat().st_mode & 0o077 == 0
    remove_broadcast_file("model-x")
    assert not list(tmp_path.iterdir())


def test_models_are_closed_when_the_client_leaves() -> None:
    """The workers close the models that they loaded for the client."""
    with Client(
        processes=False, n_workers=1, dashboard_address=None, scheduler_kwargs=FREE_PORT, set_as_default=False
    ) as client:
        di.predict(big_model(4), X, client=client)
        assert any(key[0] == Model(big_model(4)).make_loader().key for key in model_cache._models)
    assert not model_cache._models


def test_two_threads_send_one_model(tmp_path: Path) -> None:
    """Each writes a file of its own and renames it: no reader sees half a file, and no other file remains."""
    content = os.urandom(1 << 20)

    def write_and_read() -> None:
        for _ in range(20):
            broadcast._write_model_file(str(tmp_path), "model-x", content)
            assert (tmp_path / "model-x").read_bytes() == content

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(write_and_read) for _ in range(4)]:
            done.result()
    assert [path.name for path in tmp_path.iterdir()] == ["model-x"]


def test_a_full_disk_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the file cannot be written, nothing of it remains."""

    def raise_disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", raise_disk_full)
    with pytest.raises(OSError, match="No space left"):
        broadcast._write_model_file(str(tmp_path), "model-x", b"content")
    assert list(tmp_path.iterdir()) == []

"""Shipping a network in memory to the workers: once per host, and what is left of it."""

from __future__ import annotations

import contextlib
import os
import pickle
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import Client

import daskinfer as di
from daskinfer.cluster import broadcast, plugin
from daskinfer.cluster.preflight import build_requirements, check_workers
from daskinfer.models.model import BroadcastLoader, Model, ModelLoader
from daskinfer.models.shared_files import get_broadcast_path, remove_broadcast_file
from daskinfer.worker.loaded_models import model_cache
from tests.conftest import wait_until

X = np.ones((64, 4), np.float32)


def big_net(seed: int) -> torch.nn.Module:
    """A network of about 4 MB."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 1000), torch.nn.Linear(1000, 1000))


def shipped_files() -> list[str]:
    """Files of networks on this host, as a worker sees them."""
    folder = Path(get_broadcast_path("x")).parent
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("model-")) if folder.is_dir() else []


def folders_and_loaded(client: Client, recipe: ModelLoader) -> tuple[dict[str, str], set[str]]:
    """What the preflight says of every worker."""
    answers = check_workers(client, build_requirements(recipe, (), (), None))
    return {address: a.scratch_path for address, a in answers.items()}, {
        address for address, a in answers.items() if a.model_loaded
    }


@pytest.fixture
def plain_client() -> Iterator[Client]:
    """A client of a Dask cluster in this process, none of ours."""
    with Client(processes=False, n_workers=2, threads_per_worker=1, dashboard_address=None, set_as_default=False) as client:
        yield client


def test_one_file_per_host_stays_with_our_cluster(cluster_client: Client) -> None:
    """A network in memory lies in one file per host, which a restarted worker and the next call find again."""
    recipe = Model(big_net(1)).make_loader()
    for _ in range(2):
        with broadcast.broadcast_model(cluster_client, recipe, *folders_and_loaded(cluster_client, recipe)) as shipment:
            travelling = shipment.loader
            assert isinstance(travelling, BroadcastLoader)
            assert len(pickle.dumps(travelling)) < 500  # whatever the network's size
    seen = cluster_client.run(shipped_files).values()
    assert all(files.count(travelling.file_name) == 1 for files in seen)


def test_the_networks_used_last_are_kept(tmp_path: Path) -> None:
    """Our cluster's folder holds a few networks; the one that was not used for longest goes first."""
    recipes = [Model(torch.nn.Linear(1, n)).make_loader() for n in range(1, broadcast.MAX_BROADCAST_FILES + 2)]
    for n, recipe in enumerate(recipes):
        broadcast._cache_model_file(str(tmp_path), f"model-{n}.safetensors", recipe)
        os.utime(tmp_path / f"model-{n}.safetensors", ns=(n, n))
        broadcast._cache_model_file(str(tmp_path), "model-0.safetensors", recipes[0])  # used again
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == broadcast.MAX_BROADCAST_FILES
    assert "model-0.safetensors" in names
    assert "model-1.safetensors" not in names


def test_not_sent_again(cluster_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that lies on the host is not sent by the next call."""
    net = big_net(2)
    first = di.predict(net, X, client=cluster_client)
    monkeypatch.setattr(broadcast, "_write_model_file", None)  # sending would fail
    np.testing.assert_array_equal(di.predict(net, X, client=cluster_client), first)


def test_files_and_factories_travel_by_reference(cluster_client: Client) -> None:
    """What every worker can read or import by itself is not shipped."""
    recipe = Model("torch.nn:Identity").make_loader()
    with broadcast.broadcast_model(cluster_client, recipe, {}, set()) as shipment:
        assert shipment.loader is recipe
    np.testing.assert_array_equal(di.predict("torch.nn:Identity", X, client=cluster_client), X)


def test_on_clusters_of_others_a_file_goes_with_its_call(plain_client: Client) -> None:
    """The file lies there while it may be loaded, is not sent where the network is loaded, and is gone afterwards."""
    net = big_net(3)
    assert di.predict(net, X, client=plain_client).shape == (64, 1000)
    recipe = Model(net).make_loader()
    folders, loaded = folders_and_loaded(plain_client, recipe)
    assert loaded == set(folders)
    with broadcast.broadcast_model(plain_client, recipe, folders, loaded) as shipment:
        assert not shipped_files()
        for address in ("tcp://gone", *folders):  # of workers that come while the call goes on
            shipment.send_to(address)
            assert len(shipped_files()) == (address in folders)
    assert not shipped_files()
    with broadcast.broadcast_model(plain_client, recipe, folders, set()):
        assert len(shipped_files()) == 1
    assert not shipped_files()


def test_a_client_that_goes_in_the_middle_leaves_no_file(plain_client: Client) -> None:
    """What a client could not remove itself, its workers remove once it is gone; what others shipped stays."""
    recipe = Model(big_net(5)).make_loader()
    folders, _ = folders_and_loaded(plain_client, recipe)
    with contextlib.ExitStack() as going, broadcast.broadcast_model(plain_client, recipe, folders, set()):
        with Client(plain_client.scheduler.address, set_as_default=False) as other:
            plugin.register_plugins(other)
            going.enter_context(broadcast.broadcast_model(other, recipe, folders, set()))
            assert len(shipped_files()) == 2
        wait_until(lambda: len(shipped_files()) == 1)
        assert plain_client.id in shipped_files()[0]
    assert not shipped_files()


def test_without_our_scratch_folder_a_file_lies_per_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On clusters of others a shipped file lies in the temporary folder, for its user only, and goes with its folder."""
    monkeypatch.delenv("DASKINFER_SCRATCH", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    broadcast._write_model_file(None, "model-x", b"content")
    path = Path(get_broadcast_path("model-x"))
    assert path.read_bytes() == b"content"
    assert path.parent.stat().st_mode & 0o077 == 0
    remove_broadcast_file("model-x")
    assert not list(tmp_path.iterdir())


def test_models_go_with_the_client() -> None:
    """When the client leaves, the workers close what they loaded for it."""
    with Client(processes=False, n_workers=1, dashboard_address=None, set_as_default=False) as client:
        di.predict(big_net(4), X, client=client)
        assert any(key[0] == Model(big_net(4)).make_loader().key for key in model_cache._models)
    assert not model_cache._models


def test_two_threads_ship_one_network(tmp_path: Path) -> None:
    """Each writes a file of its own and renames it: no one gets half of one, and nothing else is left."""
    content = os.urandom(1 << 20)

    def receive() -> None:
        for _ in range(20):
            broadcast._write_model_file(str(tmp_path), "model-x", content)
            assert (tmp_path / "model-x").read_bytes() == content

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(receive) for _ in range(4)]:
            done.result()
    assert [path.name for path in tmp_path.iterdir()] == ["model-x"]


def test_a_full_disk_keeps_no_half_of_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a shipped file cannot be written, none of it stays."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        broadcast._write_model_file(str(tmp_path), "model-x", b"content")
    assert list(tmp_path.iterdir()) == []

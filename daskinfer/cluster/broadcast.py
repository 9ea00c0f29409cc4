"""Getting a network in memory to the workers: one file per host, mapped by every worker there, so it rides in no task.

Where a folder of our own cluster lies on this machine, the client writes the file itself and leaves it there, by the
network's key: a worker that is restarted finds it, and the next call with the same network sends nothing. The last
``MAX_BROADCAST_FILES`` are kept; the folder goes with its cluster. On clusters of others the file goes through a worker of each
host, into a folder of this user's. It is removed when the call ends, or by the workers once its client is gone. There it
goes to hosts where a worker lacks the network; and to one where all had it once a worker comes, in place of one that died,
that has not.
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from distributed import Client

from daskinfer.cluster.placement import fetch_workers
from daskinfer.models.files import check_folder_is_private
from daskinfer.models.model import BroadcastLoader, InMemoryLoader, ModelLoader
from daskinfer.models.shared_files import get_broadcast_path, make_client_suffix, remove_broadcast_file
from daskinfer.worker.loaded_models import MAX_MODELS

logger = logging.getLogger(__name__)

MAX_BROADCAST_FILES = MAX_MODELS  # what a worker keeps loaded


class ModelBroadcast:
    """A network that was shipped: ``loader`` is what travels in tasks.

    Parameters
    ----------
    client
        Whose workers are meant.
    recipe
        What travels.
    content
        The bytes of the file, made when they are needed; None where no file was, or need be, shipped to hosts of others.
    hosts
        Hosts of others that have the file; more come with :meth:`send_to`.
    """

    def __init__(
        self, client: Client, loader: ModelLoader, serialize: Callable[[], bytes] | None = None, hosts: Collection[str] = ()
    ) -> None:
        self.loader, self.hosts = loader, set(hosts)
        self._client, self._serialize = client, serialize

    def send_to(self, address: str) -> None:
        """See that the host of a worker that came meanwhile has the file."""
        host = fetch_workers(self._client).get(address, {}).get("host")
        if self._serialize is None or host is None or host in self.hosts:
            return
        assert isinstance(self.loader, BroadcastLoader)  # all that has a content
        self.hosts.add(host)
        try:
            self._client.run(_write_model_file, None, self.loader.file_name, self._serialize(), workers=[address])
        except OSError as error:  # it died, too: the next one in its place gets the file
            self.hosts.discard(host)
            logger.warning("the network did not reach %s (%r)", address, error)


@contextlib.contextmanager
def broadcast_model(
    client: Client, loader: ModelLoader, folders: Mapping[str, str], loaded_workers: Collection[str]
) -> Iterator[ModelBroadcast]:
    """While inside, every host of the cluster where a worker lacks the network has its file.

    Parameters
    ----------
    client
        Whose workers are meant.
    recipe
        The network; what is not packed travels by reference, and is yielded as it is.
    folders
        By worker, the folder of our own cluster that it has; empty where the cluster is somebody else's.
    loaded
        Workers that have loaded the network already.
    """
    if not isinstance(loader, InMemoryLoader):
        yield ModelBroadcast(client, loader)
        return
    here = {folder for folder in folders.values() if folder and os.path.isdir(folder)}
    others = [address for address, folder in folders.items() if folder not in here]
    # Ours stays, by its key; on a host of others another call with the same network may end first.
    name = f"model-{loader.key}{f'-{uuid.uuid4().hex}{make_client_suffix(client.id)}' if others else '.safetensors'}"
    for folder in here:
        _cache_model_file(folder, name, loader)
    elsewhere = _choose_receivers(client, others, loaded_workers)
    travelling = BroadcastLoader(loader.key, name, loader.nbytes)
    shipment = ModelBroadcast(client, travelling, loader.serialized.to_bytes if others else None, elsewhere.values())
    try:
        if elsewhere:
            client.run(_write_model_file, None, name, loader.serialized.to_bytes(), workers=list(elsewhere))
        yield shipment
    finally:
        if shipment.hosts and client.status == "running":
            # By whatever worker is on the host now: the one that received it may have died.
            client.run(remove_broadcast_file, name, workers=_pick_worker_per_host(client, shipment.hosts), on_error="ignore")
        elif shipment.hosts:
            remove_broadcast_file(name)  # the scheduler is lost: of all hosts this one is reached still


def _choose_receivers(client: Client, addresses: Sequence[str], loaded_workers: Collection[str]) -> dict[str, str]:
    """One worker, and its host, of each host where a worker has not loaded the model yet."""
    if not (lacking := [address for address in addresses if address not in loaded_workers]):
        return {}
    hosts = {address: info["host"] for address, info in fetch_workers(client).items()}
    by_host = {hosts[address]: address for address in lacking if address in hosts}
    return {address: host for host, address in by_host.items()}


def _pick_worker_per_host(client: Client, hosts: Collection[str]) -> list[str]:
    """A worker on each of these hosts, where there is one."""
    return list({info["host"]: address for address, info in fetch_workers(client).items() if info["host"] in hosts}.values())


def _write_model_file(folder: str | None, name: str, content: bytes) -> None:
    """Write a shipped file: into the folder of our own cluster where the client can, else where a worker looks for it."""
    path = get_broadcast_path(name) if folder is None else os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    check_folder_is_private(path)
    temporary = f"{path}.{uuid.uuid4().hex}"  # another thread may write the same
    try:
        with open(temporary, "wb") as file:
            file.write(content)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _cache_model_file(folder: str, name: str, loader: InMemoryLoader) -> None:
    """Have the file in a folder of ours, and the ``MAX_BROADCAST_FILES`` used last; a worker that has one mapped keeps its bytes."""
    path = Path(folder, name)
    if path.exists():
        os.utime(path)
        return
    _write_model_file(folder, name, loader.serialized.to_bytes())
    files = sorted(Path(folder).glob("model-*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
    for file in files[:-MAX_BROADCAST_FILES]:
        file.unlink(missing_ok=True)

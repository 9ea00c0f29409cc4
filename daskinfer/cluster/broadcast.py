"""Send a model in memory to the workers as one file per host, which every worker there maps; it travels in no task.

If the folder of a managed cluster is on this machine, the client writes the file there itself, named by the model's key: a
restarted worker finds it, and the next call with the same model sends nothing. The last ``MAX_BROADCAST_FILES`` are kept;
the folder is removed with its cluster.

On external clusters, a worker of each host receives the file and stores it in a folder of this user. The file is removed
when the call ends, or by the workers once its client is gone. It is sent to hosts where a worker lacks the model, and later
to a host where all workers had it, if a worker without the model replaces one that died.
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
from daskinfer.models.loaders import BroadcastLoader, InMemoryLoader, ModelLoader
from daskinfer.models.shared_files import get_broadcast_path, make_client_suffix, remove_broadcast_file
from daskinfer.worker.loaded_models import MAX_MODELS

logger = logging.getLogger(__name__)

MAX_BROADCAST_FILES = MAX_MODELS  # as many as a worker keeps loaded


class ModelBroadcast:
    """A model that was sent to the workers; its ``loader`` travels in tasks.

    Parameters
    ----------
    client
        Client of the workers' cluster.
    loader
        Loader that travels in tasks.
    serialize
        Makes the content of the file when it is needed; None if no external host needs a file.
    hosts
        External hosts that have the file; :meth:`send_to` adds more.
    """

    def __init__(
        self, client: Client, loader: ModelLoader, serialize: Callable[[], bytes] | None = None, hosts: Collection[str] = ()
    ) -> None:
        self.loader, self.hosts = loader, set(hosts)
        self._client, self._serialize = client, serialize

    def send_to(self, address: str) -> None:
        """Send the file to the host of a worker that has joined since, unless the host has it."""
        host = fetch_workers(self._client).get(address, {}).get("host")
        if self._serialize is None or host is None or host in self.hosts:
            return
        assert isinstance(self.loader, BroadcastLoader)  # only these have a file
        self.hosts.add(host)
        try:
            self._client.run(_write_model_file, None, self.loader.file_name, self._serialize(), workers=[address])
        except OSError as error:  # this worker died too: its replacement gets the file
            self.hosts.discard(host)
            logger.warning("could not send the model to %s: %r", address, error)


@contextlib.contextmanager
def broadcast_model(
    client: Client, loader: ModelLoader, folders: Mapping[str, str], loaded_workers: Collection[str]
) -> Iterator[ModelBroadcast]:
    """Provide the model's file, within the context, on each host where a worker lacks the model.

    Parameters
    ----------
    client
        Client of the workers' cluster.
    loader
        Loader of the model; only a model in memory is sent, all others travel by reference and are yielded unchanged.
    folders
        Folder of the managed cluster by worker; empty for workers of an external cluster.
    loaded_workers
        Workers that have already loaded the model.
    """
    if not isinstance(loader, InMemoryLoader):
        yield ModelBroadcast(client, loader)
        return
    local_folders = {folder for folder in folders.values() if folder and os.path.isdir(folder)}
    external = [address for address, folder in folders.items() if folder not in local_folders]
    # A managed cluster keeps the file by its key. On an external host, another call with the same model may end first.
    name = f"model-{loader.key}{f'-{uuid.uuid4().hex}{make_client_suffix(client.id)}' if external else '.safetensors'}"
    for folder in local_folders:
        _cache_model_file(folder, name, loader)
    receivers = _choose_receivers(client, external, loaded_workers)
    sent_loader = BroadcastLoader(loader.key, name, loader.nbytes)
    broadcast = ModelBroadcast(client, sent_loader, loader.serialized.to_bytes if external else None, receivers.values())
    try:
        if receivers:
            client.run(_write_model_file, None, name, loader.serialized.to_bytes(), workers=list(receivers))
        yield broadcast
    finally:
        if broadcast.hosts and client.status == "running":
            # By any worker that is on the host now: the receiver may have died.
            client.run(
                remove_broadcast_file, name, workers=_pick_worker_per_host(client, broadcast.hosts), on_error="ignore"
            )
        elif broadcast.hosts:
            remove_broadcast_file(name)  # the scheduler is lost, so only this host can be reached


def _choose_receivers(client: Client, addresses: Sequence[str], loaded_workers: Collection[str]) -> dict[str, str]:
    """Choose one worker on each host where a worker has not loaded the model; return the hosts by worker."""
    if not (lacking := [address for address in addresses if address not in loaded_workers]):
        return {}
    hosts = {address: info["host"] for address, info in fetch_workers(client).items()}
    by_host = {hosts[address]: address for address in lacking if address in hosts}
    return {address: host for host, address in by_host.items()}


def _pick_worker_per_host(client: Client, hosts: Collection[str]) -> list[str]:
    """Pick a worker on each of these hosts, if there is one."""
    return list({info["host"]: address for address, info in fetch_workers(client).items() if info["host"] in hosts}.values())


def _write_model_file(folder: str | None, name: str, content: bytes) -> None:
    """Write a model file into the folder of a managed cluster; if that is None, where an external worker looks for it."""
    path = get_broadcast_path(name) if folder is None else os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    check_folder_is_private(path)
    temporary = f"{path}.{uuid.uuid4().hex}"  # another thread may write the same file
    try:
        with open(temporary, "wb") as file:
            file.write(content)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _cache_model_file(folder: str, name: str, loader: InMemoryLoader) -> None:
    """Store the file in a managed cluster's folder, and keep only the ``MAX_BROADCAST_FILES`` used last.

    A worker that has mapped a removed file keeps its bytes.
    """
    path = Path(folder, name)
    if path.exists():
        os.utime(path)
        return
    _write_model_file(folder, name, loader.serialized.to_bytes())
    files = sorted(Path(folder).glob("model-*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
    for file in files[:-MAX_BROADCAST_FILES]:
        file.unlink(missing_ok=True)

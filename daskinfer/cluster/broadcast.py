"""Getting a network in memory to the workers: one file per host, mapped by every worker there, so it rides in no task.

Where a folder of our own cluster lies on this machine, the client writes the file itself and leaves it there, by the
network's key: a worker that is restarted finds it, and the next call with the same network sends nothing. The last
``MAX_SHIPPED`` are kept; the folder goes with its cluster. On clusters of others the file goes through a worker of each
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

from daskinfer.cluster.placement import workers_of
from daskinfer.models.files import check_private
from daskinfer.models.model import PackedModel, Recipe, ShippedModel
from daskinfer.models.shared_files import ending_of, forget, shipped_path
from daskinfer.worker.loaded_models import MAX_MODELS

logger = logging.getLogger(__name__)

MAX_SHIPPED = MAX_MODELS  # what a worker keeps loaded


class Shipment:
    """A network that was shipped: ``recipe`` is what travels in tasks.

    Parameters
    ----------
    client
        Whose workers are meant.
    recipe
        What travels.
    content
        The bytes of the file, made when they are needed; None where no file was, or need be, shipped to hosts of others.
    hosts
        Hosts of others that have the file; more come with :meth:`to`.
    """

    def __init__(
        self, client: Client, recipe: Recipe, content: Callable[[], bytes] | None = None, hosts: Collection[str] = ()
    ) -> None:
        self.recipe, self.hosts = recipe, set(hosts)
        self._client, self._content = client, content

    def to(self, address: str) -> None:
        """See that the host of a worker that came meanwhile has the file."""
        host = workers_of(self._client).get(address, {}).get("host")
        if self._content is None or host is None or host in self.hosts:
            return
        assert isinstance(self.recipe, ShippedModel)  # all that has a content
        self.hosts.add(host)
        try:
            self._client.run(_receive, None, self.recipe.name, self._content(), workers=[address])
        except OSError as error:  # it died, too: the next one in its place gets the file
            self.hosts.discard(host)
            logger.warning("the network did not reach %s (%r)", address, error)


@contextlib.contextmanager
def shipped(client: Client, recipe: Recipe, folders: Mapping[str, str], loaded: Collection[str]) -> Iterator[Shipment]:
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
    if not isinstance(recipe, PackedModel):
        yield Shipment(client, recipe)
        return
    here = {folder for folder in folders.values() if folder and os.path.isdir(folder)}
    others = [address for address, folder in folders.items() if folder not in here]
    # Ours stays, by its key; on a host of others another call with the same network may end first.
    name = f"model-{recipe.key}{f'-{uuid.uuid4().hex}{ending_of(client.id)}' if others else '.safetensors'}"
    for folder in here:
        _keep(folder, name, recipe)
    elsewhere = _receivers(client, others, loaded)
    travelling = ShippedModel(recipe.key, name, recipe.nbytes)
    shipment = Shipment(client, travelling, recipe.packed.to_bytes if others else None, elsewhere.values())
    try:
        if elsewhere:
            client.run(_receive, None, name, recipe.packed.to_bytes(), workers=list(elsewhere))
        yield shipment
    finally:
        if shipment.hosts and client.status == "running":
            # By whatever worker is on the host now: the one that received it may have died.
            client.run(forget, name, workers=_one_each(client, shipment.hosts), on_error="ignore")
        elif shipment.hosts:
            forget(name)  # the scheduler is lost: of all hosts this one is reached still


def _receivers(client: Client, addresses: Sequence[str], loaded: Collection[str]) -> dict[str, str]:
    """One worker, and its host, of each host where a worker has not loaded the model yet."""
    if not (lacking := [address for address in addresses if address not in loaded]):
        return {}
    hosts = {address: info["host"] for address, info in workers_of(client).items()}
    by_host = {hosts[address]: address for address in lacking if address in hosts}
    return {address: host for host, address in by_host.items()}


def _one_each(client: Client, hosts: Collection[str]) -> list[str]:
    """A worker on each of these hosts, where there is one."""
    return list({info["host"]: address for address, info in workers_of(client).items() if info["host"] in hosts}.values())


def _receive(folder: str | None, name: str, content: bytes) -> None:
    """Write a shipped file: into the folder of our own cluster where the client can, else where a worker looks for it."""
    path = shipped_path(name) if folder is None else os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    check_private(path)
    temporary = f"{path}.{uuid.uuid4().hex}"  # another thread may write the same
    try:
        with open(temporary, "wb") as file:
            file.write(content)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _keep(folder: str, name: str, recipe: PackedModel) -> None:
    """Have the file in a folder of ours, and the ``MAX_SHIPPED`` used last; a worker that has one mapped keeps its bytes."""
    path = Path(folder, name)
    if path.exists():
        os.utime(path)
        return
    _receive(folder, name, recipe.packed.to_bytes())
    files = sorted(Path(folder).glob("model-*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
    for file in files[:-MAX_SHIPPED]:
        file.unlink(missing_ok=True)

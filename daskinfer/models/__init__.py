"""Models: where a model comes from, how it travels to a worker, and how to recognise it later.

This package owns the public ``Model``, the loaders behind it, the checks of model files, serialization and the fingerprint.
It knows torch, but neither Dask nor any worker, device list, chunk or option: ``cluster`` broadcasts what is serialized
here, and ``worker`` caches and calls what is loaded here. ``LoadedModel`` is therefore defined here (``loaded_model``) and
not beside the cache in ``worker.loaded_models``: loaders return it, and this package must not import the one above it.

**A model never travels inside a task.** A 100 MB module passed as a keyword to 64 tasks took 28 s, as one node of the graph
1 s. So ``map_blocks`` puts a module in memory into exactly one graph node; ``predict``, ``stream`` and ``run`` send it once
to each host, as a file that the host's CPU workers map, and once to each worker. Models from files and factories travel by
reference, a few words in each task.

**A model has two identities.** The *key* serves caches within one client process: it depends on the class object and the
tensors' content. The *fingerprint* is stored in outputs, so that a later process continues one only with the same model: it
hashes the tensors in sorted order with non-persistent buffers, plain attributes, qualified names, and the code of classes
that are pickled by value; what has no reproducible hash needs ``Model(…, version=)``. ``sha256(cloudpickle)``,
``dask.tokenize`` and ``torch.save`` differ between processes or between two saves, and a state dict alone does not notice
an edited ``forward``.
"""

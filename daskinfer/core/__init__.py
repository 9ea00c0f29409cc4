"""The vocabulary of daskinfer: records and helpers that every other package may use.

Core owns the records of a chunk (``chunks``), the arithmetic of row ranges (``row_ranges``), nested inputs and outputs
(``pytree``), what counts as an array (``arrays``), crash-safe files and locks (``files``), text for people
(``formatting``), what an option's declaration says (``declarations``), and the names that client and workers share
(``env``). It imports only ``daskinfer.errors``; it must not know torch, Dask or Zarr, nor what a device, a cluster or a
model is. A word that several packages use is defined here once: a *chunk* is a range of rows that one task computes, a
*part* is stored bytes with a checksum, a *port* is one input of a model.
"""

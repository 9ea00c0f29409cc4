"""What ``daskinfer demo`` runs on: handwritten digits (``digits``) and a small model trained on them (``net``).

The demo owns its data, how its weights were made (``train``), what it prints (``show``) and draws (``contact_sheet``). It
uses daskinfer's public names, the model loaders, and the hardware's description; only ``cli`` imports it.

- The images are as many as give each device a second of work: a device without rows would be the first thing one sees.
- Both times are those of whole calls, also if the plain loop is faster: its images are read once, in batches that suit it.
- The files stay in ``./daskinfer-demo``: ``/tmp`` is gone at the next boot, and with it what people are told to open.
"""

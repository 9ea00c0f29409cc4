"""What ``daskinfer demo`` runs on: handwritten digits (``digits``) and a small model trained on them (``net``).

The demo owns its data, how its weights were made (``train``), and what it prints (``show``). It uses daskinfer's public
names and the model loaders, and knows nothing of devices, clusters or chunks; only ``cli`` imports it.
"""

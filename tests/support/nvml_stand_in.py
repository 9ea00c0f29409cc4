"""A stand-in for NVIDIA's management library (NVML), which makes machines without a GPU report some.

Environment variables set what it reports; see the head of ``nvml_stand_in.c``.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

LIBRARY = "libnvidia-ml.so.1"


def build(directory: Path) -> dict[str, str]:
    """Compile the library into ``directory``; return an environment in which a new process loads it before the real one."""
    source = Path(__file__).with_suffix(".c")
    target = directory / LIBRARY
    command = ["gcc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o", str(target), str(source)]
    subprocess.run(command, check=True)
    before = os.environ.get("LD_LIBRARY_PATH")
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join([str(directory), *([before] if before else [])])}

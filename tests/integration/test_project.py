"""What users install, what CI runs and what the README says agree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()
CONDA_NAMES = {"torch": "pytorch-gpu", "cupy-cuda13x": "cupy"}  # PyPI's name -> conda's


def requirements(*extras: str) -> dict[str, Requirement]:
    """Return the base requirements and those of some extras, by name."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return {r.name: r for r in map(Requirement, lines)}


def constraints() -> dict[str, Version]:
    """Return the versions that CI installs."""
    lines = [line for line in (ROOT / "tests/constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    return {name.lower().replace("_", "-"): Version(version) for name, _, version in (x.partition("==") for x in lines)}


def test_top_level() -> None:
    """The top level holds the agreed six entries and nothing else."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    tops = {path.split("/")[0] for path in listed}
    agreed = {"pyproject.toml", "README.md", "daskinfer", "tests", "notebooks", "environment.yml"}
    assert {top for top in tops if not top.startswith(".")} == agreed


def test_pyproject_has_lower_bounds_only() -> None:
    """Only dask-cuda, which pins Dask itself, is tied to a release."""
    bounds = {name: str(r.specifier) for name, r in requirements("cuda12", "cuda13", "test", "bench").items()}
    assert bounds.pop("dask-cuda") == "==26.10.*"
    assert all(re.fullmatch(r">=[\d.]+", bound) for bound in bounds.values()), bounds


def test_constraints_satisfy_the_bounds() -> None:
    """What CI installs is what pyproject allows, torch as agreed."""
    tested = constraints()
    wrong = {n: r for n, r in requirements("cuda13", "test", "bench").items() if tested[n.lower()] not in r.specifier}
    assert not wrong
    assert tested["torch"] == Version("2.13.0")


def test_conda_environment_agrees_with_pyproject() -> None:
    """environment.yml requires the same as pyproject, under conda's names, from the two agreed channels."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["rapidsai", "conda-forge"]
    conda = dict(re.match(r"([\w-]+)(.*)", line).groups() for line in environment["dependencies"])
    assert {name: conda.pop(name) for name in ("python", "pip", "cuda-version")} == {
        "python": PROJECT["requires-python"],
        "pip": "",
        "cuda-version": "=13",
    }
    expected = {CONDA_NAMES.get(n, n): str(r.specifier) for n, r in requirements("cuda13").items()}
    expected["distributed"] = expected["dask"]  # one package with extras on PyPI, two on conda
    expected["dask-cuda"] = "=26.10"
    assert conda == expected


def test_ci_runs_the_readme_command() -> None:
    """CI runs the README's test command, to the letter."""
    (command,) = re.findall(r"^python3 -m venv .*pytest -n 2 --dist loadfile$", join_lines(README), re.MULTILINE)
    assert command in join_lines((ROOT / ".ci/run").read_text()).splitlines()


def join_lines(shell: str) -> str:
    r"""Join what a shell reads as one line.

    Examples
    --------
    >>> join_lines("a && \\\n    b")
    'a && b'
    """
    return re.sub(r"\\\n *", "", shell)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "named", "expected"),
    [
        (None, [], {"torch": ">=2.13"}),
        ("cuda13", [], {"torch": ">=2.13", "cuda-bindings": ">=13,<14", "dask": "==2026.7.1", "cupy-cuda13x": ">=13.6"}),
        ("cuda12", ["torch==2.10.*"], {"torch": "==2.10.*", "cuda-bindings": ">=12,<13", "cupy-cuda12x": ">=13.4"}),
    ],
)
def test_pip_recipes_resolve_for_users(
    tmp_path: Path, extra: str | None, named: list[str], expected: dict[str, str]
) -> None:
    """Each pip recipe of the README resolves from the public index alone, as on a user's Linux machine."""
    recipe = f'pip install ".[{extra}]"' if extra else "pip install ."
    assert f"`{' '.join([recipe, *(f'{chr(34)}{n}{chr(34)}' for n in named)])}`" in README
    (tmp_path / "named.in").write_text("\n".join(named))
    resolved = subprocess.run(
        [
            *(sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", str(tmp_path / "named.in"), "--no-config"),
            *("--quiet", "--no-header", "--no-annotate", "--cache-dir", str(tmp_path / "cache")),
            *("--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"),
            *(("--extra", extra) if extra else ()),
        ],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert resolved.returncode == 0, resolved.stderr
    versions = dict(line.split("==") for line in resolved.stdout.splitlines() if "==" in line)
    wrong = {n: versions[n] for n, bound in expected.items() if versions[n] not in Requirement(f"x{bound}").specifier}
    assert not wrong

"""What a message tells users to install exists, and can be installed from where they are."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import daskinfer
from daskinfer.core import installation
from daskinfer.core.installation import describe_cuda_install, describe_install

ROOT = Path(daskinfer.__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A function that makes daskinfer an installed package, outside of a checkout, of which pip recorded this origin."""

    class Distribution:
        """What pip installed."""

        text: str | None = None

        def read_text(self, name: str) -> str | None:
            return self.text if name == "direct_url.json" else None

    def record_origin(origin: dict[str, Any] | None) -> None:
        Distribution.text = json.dumps(origin) if origin is not None else None

    monkeypatch.setattr(installation, "distribution", lambda name: Distribution())
    monkeypatch.setattr(installation, "__file__", str(tmp_path / "site-packages/daskinfer/core/installation.py"))
    return record_origin


def test_the_checkout_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the checkout that the package runs from, its folder is a dot."""
    monkeypatch.chdir(ROOT)
    assert re.fullmatch(r'pip install (-e )?"\.\[plot\]"', describe_install("plot"))


def test_another_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From elsewhere the command names the checkout's folder, and the shell reads it as one word."""
    monkeypatch.chdir(tmp_path)
    assert shlex.split(describe_install("plot"))[-1] == f"{ROOT}[plot]"


@pytest.mark.parametrize(("editable", "flag"), [(True, "-e "), (False, "")])
def test_the_checkout_that_pip_installed(
    record: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, editable: bool, flag: str
) -> None:
    """The folder is the one that pip recorded, and an editable installation stays one."""
    checkout = tmp_path / "my files"
    checkout.mkdir()
    (checkout / "pyproject.toml").touch()
    record({"url": checkout.as_uri(), "dir_info": {"editable": editable}})
    assert describe_install("tls") == f'pip install {flag}"{checkout}[tls]"'
    monkeypatch.chdir(checkout)
    assert describe_install("tls") == f'pip install {flag}".[tls]"'


def test_a_repository(record: Any) -> None:
    """What was installed from a repository is installed from the same commit of it."""
    record({"url": "https://host.invalid/daskinfer.git", "vcs_info": {"vcs": "git", "commit_id": "abc123"}})
    requirement = Requirement(shlex.split(describe_install("cuda13"))[-1])
    assert (requirement.name, requirement.extras) == ("daskinfer", {"cuda13"})
    assert requirement.url == "git+https://host.invalid/daskinfer.git@abc123"


@pytest.mark.parametrize("origin", [None, {"url": "file:///nowhere/at/all", "dir_info": {}}])
def test_an_unknown_origin(record: Any, origin: Any) -> None:
    """If nothing is recorded, or the checkout is gone, the command is the one for a checkout as working directory."""
    record(origin)
    assert describe_install("plot") == 'pip install ".[plot]"'


def test_extras_of_messages_exist() -> None:
    """Every extra that a message names is one of the project's, whatever CUDA torch was built for."""
    sources = "".join(path.read_text() for path in (ROOT / "daskinfer").rglob("*.py"))
    named = set(re.findall(r"""describe_install\(["'](\w+)["']\)""", sources))
    assert {"cuda13", "tls", "plot"} <= named <= set(EXTRAS)
    assert {re.findall(r"\[(\w+)\]", describe_cuda_install(major))[0] for major in range(10, 16)} <= set(EXTRAS)


def test_no_message_names_an_index() -> None:
    """No source file tells users to install daskinfer by its name, which no package index has, or an extra by hand."""
    for path in [*(ROOT / "daskinfer").rglob("*.py"), *(ROOT / "tests/gpu").rglob("*.py")]:
        if path.stem != "installation":
            assert not re.search(r"daskinfer\[|pip install [\"']?(daskinfer|\.\[)", path.read_text()), path

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch import nn

import daskinfer as di
from daskinfer.errors import ModelError
from daskinfer.models.model import Model, as_model

X = torch.ones(2, 3)
LINEAR = {"in_features": 3, "out_features": 2}


def linear() -> nn.Linear:
    """Make a small model with weights of its own."""
    return nn.Linear(3, 2)


# --- sources that are refused


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (3, "model must be an nn.Module, a function of arrays, .* or 'pkg.mod:make', got int$"),
        (None, "model must be .*, got NoneType$"),
        (b"net.pt", "model must be .*, got bytes$"),
        ({"weight": torch.ones(3)}, r"got its weights \(dict\)\. Pass the module after module\.load_state_dict\(…\)\.$"),
        ({"weight": 1}, "model must be .*, got dict$"),
        (nn.Linear, "model must be .*, got class Linear$"),
        (Model("a:b"), "model must be .*, got Model$"),
        (threading.Lock().acquire, "the model .* cannot be pickled for the workers"),
        ("", "model must be a file ending in .safetensors, .pt2, .ts, .pt, .pth or a factory 'pkg.mod:make', got ''"),
        ("resnet18", "model must be a file .*, got 'resnet18'"),
        ("net.onnx", "model must be a file .*, got 'net.onnx'"),
        ("net.safetensors", r"net.safetensors holds only weights.* Pass Model\('net.safetensors', factory='pkg.mod:make'\)"),
        ("net.pt", "model file 'net.pt' does not exist; correct the path"),
        (Path("net.PTH"), "model file 'net.PTH' does not exist; correct the path"),
        ("gone.pt2", "model file 'gone.pt2' does not exist; correct the path"),
    ],
)
def test_invalid_sources(in_folder: Path, source: Any, message: str) -> None:
    """A source that is not understood is refused before anything travels."""
    with pytest.raises(ModelError, match=message):
        Model(source).make_loader()


def test_an_estimator() -> None:
    """An estimator of scikit-learn is refused: each of the methods in the message, typed in, is a model."""
    x, labels = np.arange(12.0).reshape(6, 2), [0, 0, 0, 1, 1, 1]
    model = LogisticRegression().fit(x, labels)
    message = r"^model must be a function of arrays, got the object LogisticRegression\. Pass its method (.*) or (.*)\.$"
    with pytest.raises(ModelError, match=message) as refused:
        Model(model).make_loader()
    methods = re.findall(message, str(refused.value))[0]
    assert methods == ("model.predict_proba", "model.predict")
    for method in methods:
        output = di.predict(eval(method, {"model": model}), x, devices="inline")
        np.testing.assert_array_equal(output, eval(method, {"model": model})(x))


def test_an_estimator_without_probabilities() -> None:
    """Only methods that the object has are named, and a class is no object."""
    with pytest.raises(ModelError, match=r"got the object PCA\. Pass its method model\.transform\.$"):
        Model(PCA()).make_loader()
    with pytest.raises(ModelError, match=r"got class PCA$"):
        Model(PCA).make_loader()


def test_a_program_in_memory() -> None:
    """An exported program that was not saved is refused, and the message names the file that is needed."""
    exported = torch.export.export(linear(), (X,))
    with pytest.raises(ModelError, match=r"a path \(\.pt2 for an exported program\) .* got ExportedProgram"):
        Model(exported).make_loader()


@pytest.mark.parametrize(
    ("source", "keywords", "message"),
    [
        (
            linear(),
            {"kwargs": LINEAR},
            r"kwargs= goes only with a factory, got the model Linear\. Remove kwargs= \(--kwargs\)",
        ),
        (linear(), {"factory": "torch.nn:Linear"}, "factory= goes only with a weights file, got the model Linear"),
        (
            "torch.nn:Linear",
            {"factory": "torch.nn:Linear"},
            "factory= goes only with a weights file, got the model torch.nn:Linear",
        ),
        ("net.pt2", {"kwargs": LINEAR}, "kwargs= goes only with a factory, got the model net.pt2"),
        (
            "net.ts",
            {"factory": "torch.nn:Linear"},
            r"factory= goes only with .*, got the model net.ts\. Remove factory= .--factory.",
        ),
        ("torch.nn:Linear", {"sha256": "0" * 64}, "sha256= goes only with a model file, got the model torch.nn:Linear"),
        (
            linear(),
            {"sha256": "0" * 64},
            r"sha256= goes only with .*, got the model Linear\. Remove sha256= .--model-sha256.",
        ),
        (linear(), {"trust": "yes"}, "trust must be True or False, got 'yes'"),
    ],
)
def test_what_a_source_has_no_use_for(source: Any, keywords: dict[str, Any], message: str) -> None:
    """Arguments that would have no effect on this source are refused, not ignored."""
    with pytest.raises(ModelError, match=message):
        Model(source, **keywords).make_loader()


# --- the Model record


@pytest.mark.parametrize(
    "model",
    [
        Model("pkg.mod:make"),
        Model("w.pt", factory="pkg.mod:make"),
        Model("w.safetensors", factory="pkg.mod:make", kwargs={"depth": 18, "act": "relu"}, version="2", sha256="ab" * 32),
        Model("net.pt2", trust=True),
    ],
)
def test_repr_is_the_call(model: Model) -> None:
    """A Model prints as the call that would make it."""
    assert eval(repr(model)) == model


def test_a_notebook_shows_what_a_model_was_made_with() -> None:
    """Each argument is a row; a module's repr keeps its lines, and everything is escaped."""
    page = Model("<b>.pt", factory="pkg.mod:make", trust=True)._repr_html_()
    assert "<b>" not in page
    assert page.count("<tr>") == 4
    assert "<td>trust</td><td>True</td>" in page
    assert '<td style="white-space:pre-wrap">Sequential(' in Model(nn.Sequential(linear()))._repr_html_()


@pytest.mark.parametrize(
    ("source", "name"),
    [("a/w.pt", "w.pt"), (Path("a/w.pt"), "w.pt"), ("pkg.mod:make", "pkg.mod:make"), (linear(), "Linear"), (abs, "abs")],
)
def test_name(source: Any, name: str) -> None:
    """A model has a short name."""
    assert Model(source).name == name


def test_making_a_model_touches_nothing() -> None:
    """Neither file nor factory need exist before the model is used."""
    assert Model("/no/such/w.pt", factory="no_such:make").version is None


def test_as_model() -> None:
    """A Model is returned as it is, everything else becomes one."""
    model = Model(abs)
    assert as_model(model) is model
    assert as_model(abs) == model
    assert as_model(model, trust=True) == as_model(Model(abs, trust=True)) == Model(abs, trust=True)

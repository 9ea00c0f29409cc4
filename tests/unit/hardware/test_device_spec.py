from __future__ import annotations

import contextlib
import json
import pickle
import re
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from daskinfer.errors import DeviceError
from daskinfer.hardware.device_spec import MAX_CPU_WORKERS, DeviceTable, check_drivable, find_local_devices, parse_devices
from daskinfer.hardware.discovery import Device, Machine

MIG_UUID = "MIG-aaaa"


def make_machine(n_gpus: int = 2, **fields: object) -> Machine:
    """Make an imaginary machine with GPUs named GPU-0000 and up, and 4 cores."""
    gpus = tuple(
        Device(f"cuda:{i}", "cuda", i, uuid=f"GPU-{i:04d}", label="Fast One", memory_nbytes=16 << 30) for i in range(n_gpus)
    )
    defaults = {"n_cores": 4, "cpu_label": "Slow One", "memory_nbytes": 8 << 30, "driver": "580.65.06"}
    return Machine(gpus=gpus, **{**defaults, "driver_cuda": (13, 0), **fields})


def parse_names(spec: object, machine: Machine) -> list[str]:
    """Return the names of the requested devices."""
    return [device.name for device in parse_devices(spec, machine)]


def list_spellings(request: tuple[str, int]) -> list[str]:
    """List all the ways to write one request."""
    kind, n = request
    return {
        "auto": ["auto"],
        "every": ["cuda", "gpu"],
        "one": [f"cuda:{n}", f"gpu: {n}", f"GPU-{n:04d}", f"cuda : {n}"],
        "cpu": [f"cpu*{n}", f"cpu * {n}", *(["cpu"] if n == 1 else [])],
    }[kind]


def expect_names(requests: list[tuple[str, int]], n_gpus: int, n_cores: int) -> list[str] | None:
    """Return the expected names, None for an error; independent of the code under test."""
    every = [f"cuda:{i}" for i in range(n_gpus)]
    select = {
        "auto": lambda n: every or ["cpu"] * n_cores,
        "every": lambda n: every or ["absent"],
        "one": lambda n: every[n : n + 1] or ["absent"],
        "cpu": lambda n: ["cpu"] * n,
    }
    names = [name for kind, n in requests for name in select[kind](n)]
    gpus = [name for name in names if name != "cpu"]
    if "absent" in gpus or len(gpus) != len(set(gpus)):
        return None
    return [f"cpu:{names[:i].count('cpu')}" if name == "cpu" else name for i, name in enumerate(names)]


@st.composite
def spell(draw: st.DrawFn, requests: list[tuple[str, int]]) -> str | list[str]:
    """Spell the requests at random, as one string or as a list of strings."""
    entries = []
    for request in requests:
        text = draw(st.sampled_from(list_spellings(request)))
        upper = draw(st.booleans())
        entries.append(draw(st.sampled_from(["", " ", "\t"])) + (text.upper() if upper else text) + " ")
    cut = draw(st.integers(0, len(entries)))
    parts = [",".join(part) for part in (entries[:cut], entries[cut:]) if part]
    return ",".join(parts) if draw(st.booleans()) else parts


@settings(deadline=None)
@given(data=st.data(), n_gpus=st.integers(0, 3), n_cores=st.integers(1, 5))
def test_parse_agrees_with_an_oracle(data: st.DataObject, n_gpus: int, n_cores: int) -> None:
    """Any mixture, however spelled, gives the requested devices in the order requested, or an error."""
    one_request = st.tuples(st.sampled_from(["auto", "every", "one", "one", "cpu", "cpu"]), st.integers(1, 3))
    requests = data.draw(st.lists(one_request, min_size=1, max_size=5))
    spec, expected = data.draw(spell(requests)), expect_names(requests, n_gpus, n_cores)
    machine = make_machine(n_gpus, n_cores=n_cores)
    if expected is None:
        with pytest.raises(DeviceError, match=r"not found|is requested"):
            parse_devices(spec, machine)
    else:
        assert parse_names(spec, machine) == expected


@settings(deadline=None)
@given(spec=st.one_of(st.text("acdgipu:*-, 0123\n", max_size=12), st.lists(st.text(max_size=8), max_size=3)))
def test_any_text_gives_devices_or_a_device_error(spec: str | list[str]) -> None:
    """Any text gives at least one device or a DeviceError."""
    with contextlib.suppress(DeviceError):
        assert len(parse_devices(spec, make_machine())) >= 1


@settings(deadline=None)
@given(
    n_gpus=st.integers(0, 3),
    n_migs=st.integers(0, 2),
    spec=st.sampled_from(["auto", "cuda", "cpu", "cpu*3", "cuda,cpu*2", "cpu,cuda:0,cpu", "MIG-1", "cpu:0"]),
    as_list=st.booleans(),
)
def test_every_name_that_is_shown_can_be_typed(n_gpus: int, n_migs: int, spec: str, as_list: bool) -> None:
    """What ``daskinfer devices`` lists, alone or together, and what a report lists, asks for the same devices."""
    migs = [Device(f"cuda:{n_gpus + i}", "cuda", n_gpus + i, uuid=f"MIG-{i}", label="Slice") for i in range(n_migs)]
    machine = make_machine(n_gpus)
    machine = replace(machine, gpus=(*machine.gpus, *migs))
    with mock.patch("daskinfer.hardware.device_spec.inspect_machine", return_value=machine):
        listed = find_local_devices()
    for device in listed:
        assert parse_names(device.name, machine) == [device.name]
        assert not device.uuid or parse_names(device.uuid, machine) == [device.name]
    names = [device.name for device in listed]
    assert parse_names(names if as_list else ",".join(names), machine) == names
    with contextlib.suppress(DeviceError):
        devices = parse_devices(spec, machine)
        reported = [device.name for device in devices]
        assert parse_devices(reported if as_list else ",".join(reported), machine) == devices


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        (torch.device("cpu"), ["cpu:0"]),
        (torch.device("cuda", 1), ["cuda:1"]),
        (torch.device("cuda"), ["cuda:0", "cuda:1"]),
        ([torch.device("cuda:0"), "cpu"], ["cuda:0", "cpu:0"]),
        (["cuda:0", "cpu"], ["cuda:0", "cpu:0"]),
        ("cpu:0,cpu:1", ["cpu:0", "cpu:1"]),
        ("cpu, cpu:1", ["cpu:0", "cpu:1"]),
    ],
    ids=repr,
)
def test_devices_of_torch_and_numbered_cpu_workers(spec: object, names: list[str]) -> None:
    """A ``torch.device`` is what its text is, alone or in a list; ``cpu:0,cpu:1`` are two CPU workers."""
    assert parse_names(spec, make_machine()) == names


@pytest.mark.parametrize("number", [0, 1, 2, 3, 9])
def test_the_spellings_for_a_number_work(number: int) -> None:
    """A number alone is refused, as a number and as text, with spellings that do what they say."""
    for spec in (number, str(number)):
        with pytest.raises(DeviceError, match=rf"got {number}: |'{number}' does not name a device: ") as error:
            parse_devices(spec, make_machine(10))
        one, *several = re.findall(r"'((?:cuda:|cpu)[^']*)'", str(error.value))
        assert parse_names(one, make_machine(10)) == [f"cuda:{number}"]
        assert {len(parse_names(way, make_machine(10))) for way in several} == {max(1, number)}


def test_two_devices_are_spelled_out() -> None:
    """The number that torch people type first has both spellings, GPUs and CPU workers."""
    with pytest.raises(DeviceError, match=r"got 2: 'cuda:2' is one GPU, 'cuda:0,cuda:1' or 'cpu\*2' are two devices"):
        parse_devices(2, make_machine())


def test_auto_takes_every_gpu_else_one_cpu_worker_per_core() -> None:
    """ "auto" means the GPUs, and CPU workers only without a GPU."""
    assert parse_names("auto", make_machine(2)) == ["cuda:0", "cuda:1"]
    assert parse_names("auto", make_machine(0)) == ["cpu:0", "cpu:1", "cpu:2", "cpu:3"]


def test_cpu_workers_carry_the_machines_label_and_memory() -> None:
    """A CPU worker knows the processor's name and the host's memory, and its own number."""
    expected = Device("cpu:1", "cpu", 1, label="Slow One", memory_nbytes=8 << 30)
    assert parse_devices(["cpu", "cpu"], make_machine())[1] == expected


def test_inline_is_one_device_of_its_own() -> None:
    """ "inline" gives one device that stands for this process."""
    assert parse_devices([" Inline "], make_machine()) == (Device("inline", "inline", 0),)


def test_a_mig_instance_is_found_by_its_uuid_and_its_number() -> None:
    """An instance of a divided GPU is a device like any other."""
    machine = Machine(gpus=(Device(MIG_UUID, "cuda", 0, uuid=MIG_UUID),))
    assert parse_devices("mig-AAAA", machine) == parse_devices("cuda:0", machine) == machine.gpus


REFUSED = {
    "tpu": r"unknown device 'tpu'; allowed are \"auto\".*This process sees cuda:0 = GPU-0000 \(Fast One\).*4 CPU cores\.",
    "cpu*x": r"unknown device 'cpu\*x'",
    "cuda:-1": r"unknown device 'cuda:-1'",
    "cpu*0": r"'cpu\*0' requests 0 CPU workers; allowed are 1 to 1,024\. Use \"cpu\*4\" for one worker per core",
    f"cpu*{MAX_CPU_WORKERS + 1}": r"requests 1,025 CPU workers",
    "": r"devices='' has an empty entry.*devices=\"auto\" \(--devices auto\)\. Allowed are \"auto\"",
    "cpu,,cuda": r"has an empty entry",
    "inline,cpu": r"\"inline\" computes in this process and must be the only device, got 2 devices\. Use",
    "cuda,cuda:0": r"cuda:0 \(Fast One\) is requested 2 times, as 'cuda' and 'cuda:0'; each GPU has one worker\. Keep one",
    "gpu:1,GPU-0001": r"cuda:1 .* is requested 2 times, as 'gpu:1' and 'GPU-0001'",
    "cuda:7": r"device 'cuda:7' not found; this process sees cuda:0.*cuda:1.*4 CPU cores\. Request one of those",
    "cpu:3": r"'cpu:3' is not the next CPU worker, which is cpu:0: .* Use 'cpu' for one worker, 'cpu\*2'",
    "cpu:0,cpu:0": r"'cpu:0' is not the next CPU worker, which is cpu:1:",
    "gpu:7": r"device 'gpu:7' \(same as 'cuda:7'\) not found; this process sees cuda:0",
    "GPU-9999": r"device 'GPU-9999' not found",
}


@pytest.mark.parametrize("spec", REFUSED)
def test_errors_say_what_was_got_what_is_allowed_and_what_to_change(spec: str) -> None:
    """Each error names the device, what is allowed or available, and the change to make."""
    with pytest.raises(DeviceError, match=REFUSED[spec]):
        parse_devices(spec, make_machine())


WRONG_TYPES = [
    (-3, r"devices must be a string or a list of strings, such as \"cpu\*2\".*got -3 \(int\)"),
    (True, r"devices must be .*got True \(bool\)"),
    (None, r"devices must be .*got None \(NoneType\)"),
    (b"cpu", r"devices must be .*got b'cpu' \(bytes\)"),
    ({"cpu"}, r"devices must be .*got \{'cpu'\} \(set\)"),
    ([], r"devices=\[\] has an empty entry"),
    (["cpu", 1], r"devices\[1\] must be a string such as \"cuda:1\".*got 1 \(int\)"),
]


@pytest.mark.parametrize(("spec", "message"), WRONG_TYPES)
def test_a_spec_that_is_not_text_is_an_error(spec: object, message: str) -> None:
    """The error names the type of a number, None, bytes or a set, and the position of a number in a list."""
    with pytest.raises(DeviceError, match=message):
        parse_devices(spec, make_machine())


MISSING = [
    (
        {"n_hidden_gpus": 2},
        r"sees no GPU and 4 CPU cores\. CUDA_VISIBLE_DEVICES hides 2 more: unset it, add them to it, or use",
    ),
    ({"driver": ""}, r"NVML finds no NVIDIA driver: install it, start the container with its GPUs.*devices=\"cpu\""),
    ({}, r"Driver 580\.65\.06 finds no GPU: check nvidia-smi"),
]


@pytest.mark.parametrize(("fields", "message"), MISSING)
def test_a_missing_gpu_is_explained_by_its_likeliest_reason(fields: dict[str, object], message: str) -> None:
    """Hidden by the environment, no driver, or a driver without GPUs: the error suggests a fix for each."""
    with pytest.raises(DeviceError, match=message):
        parse_devices("cuda", make_machine(0, **fields))


def test_cpus_need_no_cuda_in_torch() -> None:
    """Without a GPU among the devices, any build of torch passes."""
    check_drivable(parse_devices("cpu*2", make_machine(0)), None, make_machine(0))


@pytest.mark.parametrize("driver_cuda", [(13, 0), (13, 2), (14, 0), None])
def test_a_driver_of_the_same_major_version_or_newer_or_unknown_passes(driver_cuda: tuple[int, int] | None) -> None:
    """CUDA's minor versions are compatible, and an unknown version is no error."""
    machine = make_machine(driver_cuda=driver_cuda)
    check_drivable(machine.gpus, "13.1", machine)


@pytest.mark.parametrize(("driver_cuda", "major"), [((13, 0), 13), ((12, 8), 12), (None, 13)])
def test_a_cpu_build_of_torch_is_refused_with_the_build_to_install(driver_cuda: tuple[int, int] | None, major: int) -> None:
    """GPUs are never ignored silently: the message names them and the build that fits the driver."""
    machine = make_machine(driver_cuda=driver_cuda)
    message = rf"cannot use cuda:0 \(Fast One\), cuda:1 .*CPU-only.*CUDA {major} build.*\[cuda{major}\].*devices=\"cpu\""
    with pytest.raises(DeviceError, match=message):
        check_drivable(machine.gpus, None, machine)


@pytest.mark.parametrize(
    ("torch_cuda", "needs"), [("12.8", "525 or newer"), ("13.0", "580 or newer"), ("15.0", "a newer driver")]
)
def test_a_driver_older_than_torch_is_refused(torch_cuda: str, needs: str) -> None:
    """The message names the driver, the CUDA version that it supports, and the driver that this torch needs."""
    machine = make_machine(driver="470.1", driver_cuda=(11, 4))
    with pytest.raises(DeviceError, match=rf"driver 470\.1 supports CUDA 11\.4.*CUDA {torch_cuda}.*{needs}"):
        check_drivable(machine.gpus, torch_cuda, machine)


def test_a_device_table_displays_as_text_and_html() -> None:
    """Terminals show aligned columns, notebooks a table; unknown sizes stay empty."""
    table = DeviceTable((*make_machine(1).gpus, *parse_devices("cpu", make_machine())))
    lines = str(table).splitlines()
    assert lines[0].split() == ["device", "name", "memory", "free", "uuid"]
    assert lines[1].split() == ["cuda:0", "Fast", "One", "16.0", "GiB", "GPU-0000"]
    assert lines[2].split() == ["cpu:0", "Slow", "One", "8.0", "GiB"]
    assert "<td>cuda:0</td>" in table._repr_html_()


def test_a_device_displays_in_one_line() -> None:
    """Text and notebooks show the known fields of a device; its repr is the expression that makes it."""
    gpu = Device("cuda:0", "cuda", 0, uuid="GPU-1", label="Fast <One>", memory_nbytes=16 << 30, free_nbytes=3 << 29)
    assert str(gpu) == "cuda:0: Fast <One>, 16.0 GiB, 1.5 GiB free, GPU-1"
    assert gpu._repr_html_() == "<b>cuda:0</b>: Fast &lt;One&gt;, 16.0 GiB, 1.5 GiB free, GPU-1"
    assert str(Device("inline", "inline", 0)) == "inline: inline"
    assert eval(repr(gpu)) == gpu


def test_a_device_table_survives_json_and_pickle() -> None:
    """Every field survives JSON, and the table survives a trip between processes."""
    table = DeviceTable(make_machine(2).gpus)
    assert [Device(**fields) for fields in json.loads(json.dumps(table.to_dicts()))] == list(table)
    copy = pickle.loads(pickle.dumps(table))
    assert copy == table
    assert isinstance(copy, DeviceTable)

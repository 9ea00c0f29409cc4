from __future__ import annotations

import contextlib
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daskinfer.errors import DeviceError
from daskinfer.hardware.device_spec import MAX_CPU_WORKERS, Device, DeviceTable, Machine, check_drivable, parse_devices

MIG_UUID = "MIG-aaaa"


def made_up(n_gpus: int = 2, **fields: object) -> Machine:
    """A machine that is nowhere, with GPUs named GPU-0000 and up, and 4 cores."""
    gpus = tuple(
        Device(f"cuda:{i}", "cuda", i, uuid=f"GPU-{i:04d}", label="Fast One", memory_nbytes=16 << 30) for i in range(n_gpus)
    )
    known = {"n_cores": 4, "cpu_label": "Slow One", "memory_nbytes": 8 << 30, "driver": "580.65.06"}
    return Machine(gpus=gpus, **{**known, "driver_cuda": (13, 0), **fields})


def names(spec: object, machine: Machine) -> list[str]:
    """The names of what is asked for."""
    return [device.name for device in parse_devices(spec, machine)]


def spellings(ask: tuple[str, int]) -> list[str]:
    """All the ways to write one thing that is asked for."""
    what, n = ask
    return {
        "auto": ["auto"],
        "every": ["cuda", "gpu"],
        "one": [f"cuda:{n}", f"gpu: {n}", f"GPU-{n:04d}", f"cuda : {n}"],
        "cpu": [f"cpu*{n}", f"cpu * {n}", *(["cpu"] if n == 1 else [])],
    }[what]


def oracle(asks: list[tuple[str, int]], n_gpus: int, n_cores: int) -> list[str] | None:
    """The names that must come out, None for a refusal; written apart from the code under test."""
    every = [f"cuda:{i}" for i in range(n_gpus)]
    given_by = {
        "auto": lambda n: every or ["cpu"] * n_cores,
        "every": lambda n: every or ["absent"],
        "one": lambda n: every[n : n + 1] or ["absent"],
        "cpu": lambda n: ["cpu"] * n,
    }
    flat = [name for what, n in asks for name in given_by[what](n)]
    gpus = [name for name in flat if name != "cpu"]
    if "absent" in gpus or len(gpus) != len(set(gpus)):
        return None
    return [f"cpu:{flat[:i].count('cpu')}" if name == "cpu" else name for i, name in enumerate(flat)]


@st.composite
def written(draw: st.DrawFn, asks: list[tuple[str, int]]) -> str | list[str]:
    """The same, spelled at random, as one text or as a list of texts."""
    entries = []
    for ask in asks:
        letters = draw(st.sampled_from(spellings(ask)))
        upper = draw(st.booleans())
        entries.append(draw(st.sampled_from(["", " ", "\t"])) + (letters.upper() if upper else letters) + " ")
    cut = draw(st.integers(0, len(entries)))
    parts = [",".join(part) for part in (entries[:cut], entries[cut:]) if part]
    return ",".join(parts) if draw(st.booleans()) else parts


@settings(deadline=None)
@given(data=st.data(), n_gpus=st.integers(0, 3), n_cores=st.integers(1, 5))
def test_parse_agrees_with_an_oracle(data: st.DataObject, n_gpus: int, n_cores: int) -> None:
    """Any mixture, however spelled, gives what was asked for in the order asked, or is refused."""
    one_ask = st.tuples(st.sampled_from(["auto", "every", "one", "one", "cpu", "cpu"]), st.integers(1, 3))
    asks = data.draw(st.lists(one_ask, min_size=1, max_size=5))
    spec, expected = data.draw(written(asks)), oracle(asks, n_gpus, n_cores)
    machine = made_up(n_gpus, n_cores=n_cores)
    if expected is None:
        with pytest.raises(DeviceError, match=r"is not there|is asked for"):
            parse_devices(spec, machine)
    else:
        assert names(spec, machine) == expected


@settings(deadline=None)
@given(spec=st.one_of(st.text("acdgipu:*-, 0123\n", max_size=12), st.lists(st.text(max_size=8), max_size=3)))
def test_any_text_gives_devices_or_a_device_error(spec: str | list[str]) -> None:
    """Whatever the text, the answer is at least one device or a DeviceError."""
    with contextlib.suppress(DeviceError):
        assert len(parse_devices(spec, made_up())) >= 1


def test_auto_takes_every_gpu_else_one_cpu_worker_per_core() -> None:
    """ "auto" means the GPUs, and CPU workers only where there is none."""
    assert names("auto", made_up(2)) == ["cuda:0", "cuda:1"]
    assert names("auto", made_up(0)) == ["cpu:0", "cpu:1", "cpu:2", "cpu:3"]


def test_cpu_workers_carry_the_machines_label_and_memory() -> None:
    """A CPU worker knows the processor's name and the host's memory, and its own number."""
    expected = Device("cpu:1", "cpu", 1, label="Slow One", memory_nbytes=8 << 30)
    assert parse_devices(["cpu", "cpu"], made_up())[1] == expected


def test_inline_is_one_device_of_its_own() -> None:
    """ "inline" gives one device that stands for this process."""
    assert parse_devices([" Inline "], made_up()) == (Device("inline", "inline", 0),)


def test_a_mig_instance_is_found_by_its_uuid_and_its_number() -> None:
    """An instance of a divided GPU is a device like any other."""
    machine = Machine(gpus=(Device(MIG_UUID, "cuda", 0, uuid=MIG_UUID),))
    assert parse_devices("mig-AAAA", machine) == parse_devices("cuda:0", machine) == machine.gpus


REFUSED = {
    "tpu": r"device 'tpu' is unknown; allowed are \"auto\".*sees cuda:0 = GPU-0000 \(Fast One\).*Use one of them",
    "cpu*x": r"device 'cpu\*x' is unknown",
    "cuda:-1": r"device 'cuda:-1' is unknown",
    "cpu*0": r"'cpu\*0' asks for 0 CPU workers; 1 to 1,024 are allowed\. This machine has 4 cores: \"cpu\*4\"",
    f"cpu*{MAX_CPU_WORKERS + 1}": r"asks for 1,025 CPU workers",
    "": r"devices='' has an empty place.*devices=\"auto\"",
    "cpu,,cuda": r"has an empty place",
    "inline,cpu": r"\"inline\" stands among 2 devices.*only alone",
    "cuda,cuda:0": r"cuda:0 \(Fast One\) is asked for 2 times, as 'cuda' and as 'cuda:0'.*Leave all but one",
    "gpu:1,GPU-0001": r"cuda:1 .* is asked for 2 times, as 'gpu:1' and as 'GPU-0001'",
    "cuda:7": r"device 'cuda:7' is not there\. This process sees cuda:0.*cuda:1.*Ask for one of these",
    "gpu:7": r"device 'gpu:7' \(which means \"cuda\"\) is not there\. This process sees cuda:0",
    "GPU-9999": r"device 'GPU-9999' is not there",
}


@pytest.mark.parametrize("spec", REFUSED)
def test_refusals_say_what_was_got_what_is_allowed_and_what_to_change(spec: str) -> None:
    """Each refusal names the device, what is allowed or there, and the change to make."""
    with pytest.raises(DeviceError, match=REFUSED[spec]):
        parse_devices(spec, made_up())


WRONG_TYPES = [
    (3, r"devices=3 is of type int; allowed is a string or a list"),
    (None, r"devices=None is of type NoneType"),
    (b"cpu", r"devices=b'cpu' is of type bytes"),
    ({"cpu"}, r"devices=\{'cpu'\} is of type set"),
    ([], r"devices=\[\] has an empty place"),
    (["cpu", 1], r"devices\[1\] is 1, of type int; allowed is text.*\"cuda:1\""),
]


@pytest.mark.parametrize(("spec", "message"), WRONG_TYPES)
def test_what_is_not_text_is_refused(spec: object, message: str) -> None:
    """A number, None, bytes or a set is refused by its type, a number in a list by its place."""
    with pytest.raises(DeviceError, match=message):
        parse_devices(spec, made_up())


MISSING = [
    ({"n_hidden_gpus": 2}, r"sees no GPU and 4 CPU cores\. CUDA_VISIBLE_DEVICES hides 2 more: unset it"),
    ({"driver": ""}, r"NVML finds no NVIDIA driver: install it, or give the container its GPUs.*devices=\"cpu\""),
    ({}, r"The driver \(580\.65\.06\) finds no GPU: see what nvidia-smi says"),
]


@pytest.mark.parametrize(("fields", "message"), MISSING)
def test_a_missing_gpu_is_explained_by_its_likeliest_reason(fields: dict[str, object], message: str) -> None:
    """Hidden by the environment, no driver, or a driver without GPUs: each has its own cure."""
    with pytest.raises(DeviceError, match=message):
        parse_devices("cuda", made_up(0, **fields))


def test_cpus_need_no_cuda_in_torch() -> None:
    """Without a GPU among the devices, any build of torch will do."""
    check_drivable(parse_devices("cpu*2", made_up(0)), None, made_up(0))


@pytest.mark.parametrize("driver_cuda", [(13, 0), (13, 2), (14, 0), None])
def test_a_driver_of_the_same_major_version_or_newer_or_unknown_passes(driver_cuda: tuple[int, int] | None) -> None:
    """CUDA's minor versions are compatible, and what is unknown is not refused."""
    machine = made_up(driver_cuda=driver_cuda)
    check_drivable(machine.gpus, "13.1", machine)


@pytest.mark.parametrize(("driver_cuda", "major"), [((13, 0), 13), ((12, 8), 12), (None, 13)])
def test_a_cpu_build_of_torch_is_refused_with_the_build_to_install(driver_cuda: tuple[int, int] | None, major: int) -> None:
    """GPUs are never left idle in silence: the message names them and the build that suits the driver."""
    machine = made_up(driver_cuda=driver_cuda)
    message = rf"cuda:0 \(Fast One\), cuda:1 .*CPUs only.*CUDA {major} build.*\[cuda{major}\].*devices=\"cpu\""
    with pytest.raises(DeviceError, match=message):
        check_drivable(machine.gpus, None, machine)


@pytest.mark.parametrize(
    ("torch_cuda", "needs"), [("12.8", "525 or newer"), ("13.0", "580 or newer"), ("15.0", "a newer driver")]
)
def test_a_driver_older_than_torch_is_refused(torch_cuda: str, needs: str) -> None:
    """The message holds the driver, the CUDA that it speaks, and the driver that this torch needs."""
    machine = made_up(driver="470.1", driver_cuda=(11, 4))
    with pytest.raises(DeviceError, match=rf"driver 470\.1 speaks CUDA 11\.4.*CUDA {torch_cuda}.*{needs}"):
        check_drivable(machine.gpus, torch_cuda, machine)


def test_a_table_of_devices_shows_itself_as_text_and_html() -> None:
    """People see aligned columns, notebooks a table; unknown sizes stay empty."""
    table = DeviceTable((*made_up(1).gpus, *parse_devices("cpu", made_up())))
    lines = str(table).splitlines()
    assert lines[0].split() == ["device", "name", "memory", "free", "uuid"]
    assert lines[1].split() == ["cuda:0", "Fast", "One", "16.0", "GiB", "GPU-0000"]
    assert lines[2].split() == ["cpu:0", "Slow", "One", "8.0", "GiB"]
    assert "<td>cuda:0</td>" in table._repr_html_()


def test_a_device_shows_itself_in_a_line() -> None:
    """What is known of one device, in text and in notebooks; at the prompt it is what makes it again."""
    gpu = Device("cuda:0", "cuda", 0, uuid="GPU-1", label="Fast <One>", memory_nbytes=16 << 30, free_nbytes=3 << 29)
    assert str(gpu) == "cuda:0: Fast <One>, 16.0 GiB, 1.5 GiB free, GPU-1"
    assert gpu._repr_html_() == "<b>cuda:0</b>: Fast &lt;One&gt;, 16.0 GiB, 1.5 GiB free, GPU-1"
    assert str(Device("inline", "inline", 0)) == "inline: inline"
    assert eval(repr(gpu)) == gpu


def test_a_table_of_devices_is_plain_data_for_json_and_pickle() -> None:
    """Every field survives JSON, and the table survives a trip between processes."""
    table = DeviceTable(made_up(2).gpus)
    assert [Device(**fields) for fields in json.loads(json.dumps(table.to_dicts()))] == list(table)
    again = pickle.loads(pickle.dumps(table))
    assert again == table
    assert isinstance(again, DeviceTable)

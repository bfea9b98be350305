"""Files that attack whoever loads them, given to gdpo.convert: nothing is executed, nothing is left behind.

An attack, run, creates a file named "owned". The EXECUTING ones are shown to do so when loaded without care, so that
the test has teeth; the DAMAGING ones (huge, truncated, no pickle) are shown to be refused in bounded memory.
"""

import contextlib
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import warnings
import zipfile

import pytest
import torch

from gdpo.convert import convert


class Call:
    """Pickles as a call of function(*arguments); the function may be a Call itself."""

    def __init__(self, function, *arguments):
        self.reduction = (function, arguments)

    def __reduce__(self):
        return self.reduction

    def __call__(self):
        raise AssertionError("pickle asks only whether a function is callable")


def touch(marker) -> Call:
    return Call(os.system, f"touch {marker}")


def archive(file, program: bytes, entry="archive/data.pkl", compression=zipfile.ZIP_STORED, more=()) -> None:
    """A torch archive with a hand-made pickle."""
    with zipfile.ZipFile(file, "w", compression) as out, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Duplicate name")
        for name, data in ((entry, program), ("archive/version", b"3\n"), ("archive/byteorder", b"little"), *more):
            out.writestr(name, data)


def text(value: str) -> bytes:
    """BINUNICODE."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def system(marker) -> bytes:
    """GLOBAL os.system, its argument, REDUCE."""
    return b"cos\nsystem\n" + text(f"touch {marker}") + b"\x85R"


def stack_global(module: str, name: str) -> bytes:
    """A function by STACK_GLOBAL, so that no GLOBAL opcode names it."""
    return text(module) + text(name) + b"\x93"


def second_pickle_wins(file, marker) -> None:
    """Two entries of one name: a harmless one for whoever reads the last, an attack for whoever reads the first."""
    archive(file, b"\x80\x02" + system(marker) + b".", more=[("archive/data.pkl", b"\x80\x02}.")])


def tar_of_old(file, marker) -> None:
    """The tar form of PyTorch before 0.1.10, whose parts are pickles."""
    folder = file.parent / "parts"
    folder.mkdir()
    for name in ("sys_info", "pickle", "tensors", "storages"):
        (folder / name).write_bytes(pickle.dumps(touch(marker)))
    with tarfile.open(file, "w") as out:
        for part in sorted(folder.iterdir()):
            out.add(part, part.name)
    shutil.rmtree(folder)


def by_hand(program):
    """An attack whose pickle is program(call), where call is GLOBAL os.system, its argument, REDUCE."""
    return lambda file, marker: archive(file, program(system(marker), text(f"touch {marker}")))


# How to write the file of each attack, given its path and the marker's.
EXECUTING = {
    "os.system": lambda f, m: torch.save(touch(m), f),
    "eval": lambda f, m: torch.save(Call(eval, f"open({str(m)!r}, 'w').close()"), f),
    "exec": lambda f, m: torch.save(Call(exec, f"open({str(m)!r}, 'w').close()"), f),
    "subprocess": lambda f, m: torch.save(Call(subprocess.check_call, ["touch", str(m)]), f),
    "open for writing": lambda f, m: torch.save(Call(shutil.copyfile, os.devnull, str(m)), f),
    "getattr chain": lambda f, m: torch.save(Call(Call(getattr, Call(__import__, "os"), "system"), f"touch {m}"), f),
    "deep in a state dict": lambda f, m: torch.save({"rank_unet": 4, "state_dict_unet": {"a": [({1: touch(m)},)]}}, f),
    "pickle in a pickle": lambda f, m: torch.save(Call(pickle.loads, pickle.dumps(touch(m))), f),
    "protocol 4": lambda f, m: torch.save(touch(m), f, pickle_protocol=4),
    "legacy format": lambda f, m: torch.save(touch(m), f, _use_new_zipfile_serialization=False),
    "plain pickle": lambda f, m: f.write_bytes(pickle.dumps(touch(m), protocol=5)),
    "tar of old": tar_of_old,
    "GLOBAL by hand": by_hand(lambda call, word: b"\x80\x02" + call + b"."),
    "STACK_GLOBAL": by_hand(lambda call, word: b"\x80\x04" + stack_global("os", "system") + word + b"\x85R."),
    "dotted name": by_hand(lambda call, word: b"\x80\x04" + stack_global("shutil", "os.system") + word + b"\x85R."),
    "OBJ": by_hand(lambda call, word: b"\x80\x02(csubprocess\nPopen\n" + stack_of_touch(word) + b"o."),
    "memo juggling": by_hand(lambda call, word: b"\x80\x02cos\nsystem\nq\x070h\x07" + word + b"\x85R."),
    "then a harmless dict": by_hand(lambda call, word: b"\x80\x02" + call + b"0}."),
    "persistent id": by_hand(lambda call, word: b"\x80\x02" + call + b"Q."),
    "argument of a tensor": by_hand(lambda call, word: b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + call + b"tR."),
    "key of a dict": by_hand(lambda call, word: b"\x80\x02}" + call + b"K\x01s."),
}


def stack_of_touch(word: bytes) -> bytes:
    """The list ["sh", "-c", word] as a pickle's stack."""
    return b"](" + text("sh") + text("-c") + word + b"e"


def patched(file, old: bytes, new: bytes) -> None:
    """A harmless tensor's file with some bytes of its pickle replaced."""
    torch.save({"state_dict_unet": torch.arange(5.0)}, file)
    with zipfile.ZipFile(file) as source:
        entries = {name: source.read(name) for name in source.namelist()}
    program = next(name for name in entries if name.endswith("data.pkl"))
    assert entries[program].count(old) == 1, entries[program]
    entries[program] = entries[program].replace(old, new)
    with zipfile.ZipFile(file, "w") as out:
        for name, data in entries.items():
            out.writestr(name, data)


def cut(file, keep) -> None:
    torch.save({"rank_unet": torch.arange(5000.0)}, file)
    raw = file.read_bytes()
    file.write_bytes(raw[: keep(len(raw))])


ENORMOUS = b"\x8a\x05" + (2**36).to_bytes(5, "little")  # LONG1: 2^36 elements of 4 bytes
DAMAGING = {
    "empty file": lambda f, m: f.write_bytes(b""),
    "a photo": lambda f, m: f.write_bytes(b"\xff\xd8\xff\xe0" + bytes(range(256)) * 40),
    "text": lambda f, m: f.write_text("rank_unet: 4\n" * 100),
    "cut in half": lambda f, m: cut(f, lambda n: n // 2),
    "last byte missing": lambda f, m: cut(f, lambda n: n - 1),
    "no pickle inside": lambda f, m: archive(f, b"rank_unet: 4"),
    "cut pickle inside": lambda f, m: archive(f, b"\x80\x02}q\x00(X"),
    "compressed bomb": lambda f, m: archive(f, b"\x80\x02" + b"N0" * 2**26 + b"}.", compression=zipfile.ZIP_DEFLATED),
    "string of 4 GiB": lambda f, m: archive(f, b"\x80\x02X\xff\xff\xff\xffabc."),
    "tensor beyond its storage": lambda f, m: patched(f, b"K\x05\x85q", ENORMOUS + b"\x85q"),
    "storage beyond its file": lambda f, m: patched(f, b"K\x05tq", ENORMOUS + b"tq"),
    "nested lists": lambda f, m: archive(f, b"\x80\x02" + b"]" * 50000 + b"a" * 49999 + b"."),
    "stack underflow": lambda f, m: archive(f, b"\x80\x02tttR."),
    "two pickles of one name": second_pickle_wins,
    "a TorchScript archive": lambda f, m: archive(f, b"\x80\x02}.", more=[("archive/constants.pkl", b"\x80\x02}.")]),
}


@pytest.fixture
def attack(tmp_path):
    """write(attacks, name) -> (its file, the marker that it would create)."""

    def write(attacks, name):
        (tmp_path / "in").mkdir()
        file, marker = tmp_path / "in" / "model_1001.pkl", tmp_path / "owned"
        attacks[name](file, marker)
        return file, marker

    return write


def refuse(file, base, out) -> str:
    with pytest.raises(ValueError) as caught:
        convert(file, out, base)
    message = str(caught.value)
    assert message.startswith(f"{file}: ") and "\n" not in message and len(message) < 600
    assert "weights_only=False" not in message  # torch's own advice would execute the file
    return message


@pytest.mark.parametrize("name", EXECUTING)
def test_nothing_is_executed(name, attack, mini_sd, tmp_path, monkeypatch):
    file, marker = attack(EXECUTING, name)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    message = refuse(file, mini_sd, tmp_path / "out")
    assert "refused" in message
    assert [p.name for p in tmp_path.iterdir()] == ["in"], "executed, or left something behind"

    with warnings.catch_warnings():  # teeth: the same file, loaded without care
        warnings.simplefilter("ignore")
        with contextlib.suppress(Exception):
            torch.load(file, weights_only=False)
        if not marker.exists():
            with open(file, "rb") as f, contextlib.suppress(Exception):
                pickle.load(f)
    for _ in range(100):
        if marker.exists():
            break
        time.sleep(0.02)  # Popen does not wait
    assert marker.exists(), "this attack does nothing, so it proves nothing"


@pytest.mark.parametrize("name", DAMAGING)
def test_broken_and_huge_files_are_refused_in_bounded_memory(name, attack, mini_sd, tmp_path):
    file, _ = attack(DAMAGING, name)
    tracemalloc.start()
    try:
        refuse(file, mini_sd, tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 * 2**20
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_released_folder_with_pickled_weights_executes_nothing(mini_sd, tmp_path):
    shutil.copytree(mini_sd, tmp_path / "released")
    (tmp_path / "released" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(touch(tmp_path / "owned"), tmp_path / "released" / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises((ValueError, OSError)):
        convert(tmp_path / "released", tmp_path / "out", mini_sd)
    assert [p.name for p in tmp_path.iterdir()] == ["released"]


def test_the_command_says_so_in_one_line(attack, mini_sd, tmp_path):
    file, _ = attack(EXECUTING, "os.system")
    command = [sys.executable, "-m", "gdpo.convert", file, "--base", mini_sd, "--out", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"error: {file}: refused: it names 'posix.system', which no LoRA file needs; nothing of it was executed"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["in"]

"""A save that dies at any fsync, rename or write leaves the previous checkpoint as the newest valid one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from gdpo.train import checkpoint as ck


def make(step: int) -> ck.Checkpoint:
    tensors = {"trainable": {"w": torch.full((64,), float(step))}, "optimizer": {"w/exp_avg": torch.ones(64) * step}}
    return ck.Checkpoint(tensors, ck.Facts(step, {"seed": 0}, data="crops", samples_per_step=1))


def test_round_trip_and_retention(tmp_path):
    for step in (1, 2, 3, 4):
        ck.save(tmp_path, make(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-0000003", "checkpoint-0000004"]
    _, found, passed_over = ck.newest_valid(tmp_path)
    assert found.state.step == 4 and passed_over == []
    assert torch.equal(found.tensors["trainable"]["w"], torch.full((64,), 4.0))


def dying(real, deadly: int):
    """`real`, but the process is gone at the call of that number, as after SIGKILL."""
    count = iter(range(1, deadly + 1))

    def call(*a, **k):
        if next(count) == deadly:
            os._exit(9)
        return real(*a, **k)

    return call


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_dying_at_every_fsync_and_rename(tmp_path, monkeypatch, operation):
    """Count the calls of a whole save, then die at each of them in turn, in a forked child."""
    real = getattr(os, operation)
    calls = [0]
    monkeypatch.setattr(os, operation, lambda *a, **k: (calls.__setitem__(0, calls[0] + 1), real(*a, **k))[1])
    ck.save(tmp_path / "count", make(1), keep=2)
    ck.save(tmp_path / "count", make(2), keep=2)
    ck.save(tmp_path / "count", make(3), keep=2)
    monkeypatch.setattr(os, operation, real)
    assert calls[0] >= 3
    for deadly in range(1, calls[0] + 1):
        root = tmp_path / f"{operation}{deadly}"
        pid = os.fork()
        if pid == 0:
            setattr(os, operation, dying(real, deadly))
            for step in (1, 2, 3):
                ck.save(root, make(step), keep=2)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 9
        ck.clean(root)
        visible = list(root.iterdir()) if root.is_dir() else []
        assert all(p.name.startswith("checkpoint-") for p in visible)
        for folder in visible:
            ck.load(folder)  # whatever is visible is whole
        if len(visible) == 0:
            with pytest.raises(FileNotFoundError, match="no valid checkpoint"):
                ck.newest_valid(root)


def test_full_disk_at_any_write(tmp_path, monkeypatch):
    ck.save(tmp_path, make(1), keep=2)
    real_save, real_write = ck.save_file, Path.write_bytes
    for failing in ("trainable.safetensors", "optimizer.safetensors", "state.json", "manifest.json"):

        def save_file(tensors, path, header, failing=failing):
            if path.name == failing:
                path.write_bytes(b"half")
                raise SafetensorError("I/O error: No space left on device (os error 28)")
            real_save(tensors, path, header)

        def write_bytes(self, content, *a, failing=failing, **k):
            if self.name == failing:
                raise OSError(errno.ENOSPC, "No space left on device", str(self))
            return real_write(self, content)

        with monkeypatch.context() as patch:
            patch.setattr(ck, "save_file", save_file)
            patch.setattr("pathlib.Path.write_bytes", write_bytes)
            with pytest.raises(OSError, match="No space left"):
                ck.save(tmp_path, make(2), keep=2)
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-0000001"]
    assert ck.newest_valid(tmp_path)[1].state.step == 1


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damage_is_found_and_named(tmp_path, name, damage):
    ck.save(tmp_path, make(1), keep=2)
    newest = ck.save(tmp_path, make(2), keep=2)
    content = bytearray((newest / name).read_bytes())
    if damage == "truncate":
        (newest / name).write_bytes(content[: len(content) // 2])
    elif damage == "remove":
        (newest / name).unlink()
    else:
        content[len(content) // 2] ^= 0x10
        (newest / name).write_bytes(content)
    folder, found, passed_over = ck.newest_valid(tmp_path)
    assert found.state.step == 1 and folder.name == "checkpoint-0000001"
    assert len(passed_over) == 1 and "checkpoint-0000002" in passed_over[0]


def test_damaged_ones_do_not_count_among_those_kept(tmp_path):
    for step in (1, 2, 3):
        ck.save(tmp_path, make(step), keep=3)
    for step in (2, 3):
        (tmp_path / f"checkpoint-{step:07d}" / "state.json").unlink()
    _, found, passed_over = ck.newest_valid(tmp_path)
    assert found.state.step == 1 and len(passed_over) == 2
    ck.remove_after(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-0000001"]


def test_a_checkpoint_that_cannot_be_read_just_now_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch):
    for step in (1, 2):
        ck.save(tmp_path, make(step), keep=3)

    def hiccup(path, *a, **k):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(ck.Path, "read_bytes", hiccup)
    with pytest.raises(PermissionError, match=r"checkpoint-0000002/manifest\.json"):
        ck.newest_valid(tmp_path)


def test_going_back_sets_the_later_ones_aside(tmp_path):
    for _ in range(2):  # the second time replaces what the first set aside
        for step in (1, 2, 3):
            ck.save(tmp_path, make(step), keep=3)
        moved = ck.set_aside_after(tmp_path, 1)
        assert [p.name for p in moved] == ["set-aside-checkpoint-0000002", "set-aside-checkpoint-0000003"]
        assert [ck.load(p).state.step for p in moved] == [2, 3]
        assert ck.newest_valid(tmp_path)[1].state.step == 1
    assert len(list(tmp_path.iterdir())) == 3


def test_a_step_saved_again_is_whole_or_absent(tmp_path, monkeypatch):
    """Dying at any rename or removal, while a checkpoint of the same step is replaced."""
    ck.save(tmp_path, make(1), keep=2)
    ck.save(tmp_path, make(2), keep=2)
    half = ck.shutil.rmtree

    def cut_short(folder, *a, **k):
        if folder.exists():
            next(folder.iterdir()).unlink()
            raise KeyboardInterrupt
        half(folder, *a, **k)

    monkeypatch.setattr(ck.shutil, "rmtree", cut_short)
    with pytest.raises(KeyboardInterrupt):
        ck.save(tmp_path, make(2), keep=2)
    monkeypatch.undo()
    ck.clean(tmp_path)
    for folder in tmp_path.iterdir():
        ck.load(folder)


def test_a_path_in_the_manifest_cannot_leave_the_folder(tmp_path):
    folder = ck.save(tmp_path, make(1), keep=2)
    (tmp_path / "outside").write_text("x")
    manifest = (folder / "manifest.json").read_text().replace('"state.json"', '"../outside"')
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(ck.Damaged, match="missing"):
        ck.load(folder)


# ---- damage that the hashes do not tell, as each file's own is in the manifest


def rehash(folder: Path) -> None:
    files = [p for p in folder.iterdir() if p.name != "manifest.json" and p.is_file()]
    facts = {p.name: {"bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for p in files}
    (folder / "manifest.json").write_text(json.dumps(facts))


def replaced(name: str, content: bytes):
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)
        if name != "manifest.json":
            rehash(folder)

    return damage


def changed(**values):
    def damage(folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps({k: v for k, v in (state | values).items() if v is not ...}))
        for name in ("trainable", "optimizer"):  # and tensors that belong to it
            tensors = ck.load_file(folder / f"{name}.safetensors")
            ck.save_file(tensors, folder / f"{name}.safetensors", {"state": ck.sha256(folder / "state.json")})
        rehash(folder)

    return damage


def folder_in_place_of(name: str):
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def of_another_step(*names: str):
    def damage(folder: Path) -> None:
        for name in names:
            shutil.copy(folder.parent / "checkpoint-0000001" / name, folder / name)
        rehash(folder)

    return damage


def not_listed(name: str):
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest[name]
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return damage


DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
HUGE = b'{"state.json": {"bytes": 1' + b"0" * 400 + b', "sha256": "' + b"0" * 64 + b'"}}'
DAMAGES = {
    "manifest nested deeply": replaced("manifest.json", DEEP),
    "manifest with a huge integer": replaced("manifest.json", HUGE),
    "manifest with an infinity": replaced("manifest.json", HUGE.replace(b"10", b"1e999", 1)),
    "manifest is a list": replaced("manifest.json", b"[]"),
    "manifest is not UTF-8": replaced("manifest.json", b'{"\xff": 1}'),
    "manifest is empty": replaced("manifest.json", b""),
    "manifest is large": replaced("manifest.json", b" " * (17 << 20)),
    "folder in place of the manifest": folder_in_place_of("manifest.json"),
    "folder in place of the state": folder_in_place_of("state.json"),
    "folder in place of tensors": folder_in_place_of("optimizer.safetensors"),
    **{f"{n} not listed": not_listed(n) for n in ("state.json", "trainable.safetensors", "optimizer.safetensors")},
    "header is no JSON": replaced("trainable.safetensors", b"\x08\0\0\0\0\0\0\0notjson!"),
    "header longer than the file": replaced("trainable.safetensors", b"\xff" * 8 + b"{}"),
    "tensors are empty": replaced("optimizer.safetensors", b""),
    "state is a list": replaced("state.json", b"[1, 2]"),
    "state is nested deeply": replaced("state.json", DEEP),
    "state is a model's configuration": replaced("state.json", b'{"_class_name": "UNet2DConditionModel"}'),
    "state without options": changed(identity=...),
    "state with text for options": changed(identity="all"),
    "options nested deeply": changed(identity={"a": json.loads("[" * 40 + "]" * 40)}),
    "step is text": changed(step="2"),
    "step is true": changed(step=True),
    "step is huge": changed(step=10**30),
    "step is another": changed(step=1),
    "scaler is a list": changed(scaler=[1.0]),
    "all of another step": of_another_step("state.json", "trainable.safetensors", "optimizer.safetensors"),
    "state of another step": of_another_step("state.json"),
    "weights of another step": of_another_step("trainable.safetensors"),
    "moments of another step": of_another_step("optimizer.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_under_right_hashes_is_skipped_with_a_line(tmp_path, damage):
    ck.save(tmp_path, make(1), keep=2)
    newest = ck.save(tmp_path, make(2), keep=2)
    damage(newest)
    folder, found, skipped = ck.newest_valid(tmp_path)
    assert found.state.step == 1 and folder.name == "checkpoint-0000001"
    assert len(skipped) == 1 and skipped[0].startswith(str(newest)) and "\n" not in skipped[0] and len(skipped[0]) < 400


def test_a_checkpoint_from_before_the_files_were_bound_together_is_read(tmp_path):
    folder = ck.save(tmp_path, make(1), keep=2)
    for name in ("trainable", "optimizer"):
        ck.save_file(ck.load_file(folder / f"{name}.safetensors"), folder / f"{name}.safetensors")
    rehash(folder)
    assert ck.newest_valid(tmp_path)[1].state.step == 1


def test_a_checkpoint_under_a_name_of_the_users_own_is_read(tmp_path):
    shutil.copytree(ck.save(tmp_path, make(3), keep=2), tmp_path / "before the holidays")
    assert ck.load(tmp_path / "before the holidays").state.step == 3

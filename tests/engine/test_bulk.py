"""engine.bulk without Ray: keys, the ledger, the claim on an output, and the bytes of a picture."""

import errno
import io
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fsspec", reason="engine.bulk needs fsspec (extra cluster)")
pq = pytest.importorskip("pyarrow.parquet", reason="engine.bulk needs pyarrow (extra cluster)")

import pyarrow as pa  # noqa: E402

from engine.bulk import __main__ as command  # noqa: E402
from engine.bulk import claim as claims  # noqa: E402
from engine.bulk import ledger as ledgers  # noqa: E402
from engine.bulk.board import Board  # noqa: E402
from engine.bulk.enlarger import Enlarger, Stop, Work  # noqa: E402
from engine.bulk.keys import check_key, output_key, source_of, spool, spooled  # noqa: E402
from engine.bulk.notes import Notes  # noqa: E402
from engine.bulk.storage import Storage  # noqa: E402
from engine.io.cli import Failed  # noqa: E402
from engine.io.files import atomic_path, remove_leftovers, sha256  # noqa: E402
from engine.io.images import read_image  # noqa: E402
from engine.runtime import manifest as manifests  # noqa: E402
from engine.runtime.upscaler import default_model, model_folder  # noqa: E402
from engine.settings import Settings  # noqa: E402
from engine.worker import model_identity  # noqa: E402

IDENTITY = model_identity(default_model())


def test_no_two_keys_share_an_output():
    keys = ["a.png", "a.heic", "a.heic.png", "a.heic.png.png", "a.jpg", "b/a.png", "A.JPG"]
    for extension in (None, ".png", ".jpg"):
        assert len({output_key(key, extension) for key in keys}) == len(keys)
    assert output_key("b/a.png", None) == "b/a.png"
    for key in ("../a.png", "/a.png", "a//b.png", "", "a.txt"):
        with pytest.raises(ValueError, match=r"must be a path below|suffix of a picture"):
            check_key(key)


@pytest.fixture()
def work(tmp_path):
    """Work on a folder of one picture and one bad file, from and to local folders."""
    (tmp_path / "in").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"no picture")

    def of(source=tmp_path / "in", out=tmp_path / "out", **more) -> Work:
        return Work(str(source), str(out), Settings.of(seed=3), identity=IDENTITY, load={"threads": 1}, **more)

    return of


@pytest.fixture()
def wanted(tmp_path, work):
    """What `python -m engine.upscale --seed 3` makes of the picture."""
    job = work()
    job.settings.make(job.open(), read_image(tmp_path / "in" / "a.png"), tmp_path / "wanted.png")
    return (tmp_path / "wanted.png").read_bytes()


@pytest.mark.parametrize("out", ["local", "memory"])
@pytest.mark.parametrize("source", ["local", "memory"])
def test_a_result_has_the_bytes_of_the_command_line(tmp_path, work, wanted, source, out):
    places = {"source": tmp_path / "in", "out": tmp_path / "out"}
    if source == "memory":
        places["source"] = f"memory://{tmp_path.name}/in"
        for path in (tmp_path / "in").iterdir():
            Storage(places["source"]).write(path.name, path.read_bytes())
    if out == "memory":
        places["out"] = f"memory://{tmp_path.name}/out"
    enlarger = Enlarger(work(**places), None)
    row = enlarger.make("a.png")
    assert (row["status"], row["sha256"], row["size"]) == ("done", sha256(tmp_path / "wanted.png"), len(wanted))
    assert Storage(str(places["out"])).read("a.png") == wanted
    assert enlarger.make("a.png")["status"] == "done"  # again, over its own result
    bad, absent, outside = (enlarger.make(key) for key in ("bad.png", "absent.png", "../a.png"))
    assert {row["status"] for row in (bad, absent, outside)} == {"failed"}
    assert bad["error"].startswith("not a picture of a kind that is read") and "\n" not in bad["error"]
    assert "No such file" in absent["error"] and "must be a path below" in outside["error"]
    if source == "local":
        os.mkfifo(tmp_path / "in" / "pipe.png")  # which would never end
        assert "not a regular file" in enlarger.make("pipe.png")["error"]


def test_a_result_whose_row_was_lost_is_taken_as_it_is_where_a_note_proves_it(tmp_path, work, monkeypatch):
    source, target = tmp_path / "in" / "a.png", tmp_path / "out" / "a.png"
    row = Enlarger(work(), None).make("a.png")
    resumed, make, made = Enlarger(work(), None), Settings.make, []
    monkeypatch.setattr(Settings, "make", lambda self, *a, **k: made.append(1) or make(self, *a, **k))
    with open(next((tmp_path / "out" / ledgers.NOTES).iterdir()), "a") as notes:
        notes.write('{"version": ')  # of a picture that a kill came into
    assert resumed.make("a.png") == row and not made

    monkeypatch.setattr("engine.bulk.notes.version", lambda: "another")  # of the program: it may make other bytes
    assert resumed.make("a.png") | {"seconds": 0} == row | {"seconds": 0} and made.pop()
    monkeypatch.undo()
    monkeypatch.setattr(Settings, "make", lambda self, *a, **k: made.append(1) or make(self, *a, **k))
    content = source.read_bytes()
    Image.open(source).transpose(Image.Transpose.ROTATE_180).save(source)  # another picture
    assert "is there already with other content" in resumed.make("a.png")["error"] and made.pop()
    source.write_bytes(content)
    target.write_bytes(b"somebody's")
    assert "is there already with other content" in resumed.make("a.png")["error"] and made.pop()


def test_notes_are_read_once_however_many_keys_are_looked_up(tmp_path, monkeypatch):
    out, opened = Storage(str(tmp_path / "out")), []

    def counted(path, *mode, **more):
        opened.append(path)
        return open(path, *mode, **more)

    monkeypatch.setattr("engine.bulk.notes.open", counted, raising=False)
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda path: counted(path, "rb").read())
    writers, reader = [Notes(out), Notes(out)], Notes(out)
    rows = [dict.fromkeys(ledgers.COLUMNS) | {"key": f"{i}.png", "sha256": f"sum of {i}"} for i in range(60)]
    for i, row in enumerate(rows[:50]):
        writers[i % 2].add(row, f"source of {i}")
    opened.clear()
    for _ in range(2):
        assert [reader.find(f"{i}.png", f"sum of {i}", f"source of {i}") for i in range(50)] == rows[:50]
    assert len(opened) == 2
    writers.append(Notes(out))
    for i in range(50, 60):  # by others, meanwhile, in files old and new
        assert reader.find(f"{i}.png", f"sum of {i}", f"source of {i}") is None
        writers[i % 3].add(rows[i], f"source of {i}")
        assert reader.find(f"{i}.png", f"sum of {i}", f"source of {i}") == rows[i]
    assert reader.find("0.png", "sum of 1", "source of 0") is reader.find("0.png", "sum of 0", "source of 1") is None
    monkeypatch.undo()
    file = next((tmp_path / "out" / ledgers.NOTES).iterdir())
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:20])  # a line under way
    assert Notes(out).find("0.png", "sum of 0", "source of 0") == rows[0]


def test_a_file_that_is_not_ours_is_kept(tmp_path, work):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").write_bytes(b"somebody's")
    row = Enlarger(work(), None).make("a.png")
    assert row["status"] == "failed" and "is there already with other content" in row["error"]
    assert (tmp_path / "out" / "a.png").read_bytes() == b"somebody's"


def test_what_is_no_fault_of_a_picture_stops_the_run(tmp_path, work, monkeypatch):
    enlarger = Enlarger(work(), None)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "out" / "a.png"))

    with monkeypatch.context() as patch, pytest.raises(Stop, match=r"a\.png: No space left on device"):
        patch.setattr(Settings, "make", full)
        enlarger.make("a.png")
    with monkeypatch.context() as patch, pytest.raises(Stop, match="No space left"):
        patch.setattr("tempfile.mkdtemp", full)
        enlarger.make("a.png")
    (tmp_path / "in").rename(tmp_path / "gone")  # as when a network folder goes away
    with pytest.raises(Stop, match="No such file"):
        enlarger.make("a.png")
    with pytest.raises(Stop, match="another model"):
        Enlarger(Work(str(tmp_path), str(tmp_path / "out"), Settings(), identity="other"), None)


def write_rows(out: Storage, name: str, **states: str) -> None:
    rows = [dict.fromkeys(ledgers.COLUMNS) | {"key": k, "status": s} for k, s in states.items()]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=ledgers.schema()), file)
    out.write(name, file.getvalue())


def test_a_key_that_is_done_stays_done_and_torn_files_do_not_count(tmp_path):
    out = Storage(str(tmp_path))
    ledger = ledgers.Ledger(out)
    assert ledger.settled().of(["a"]) == [None]
    write_rows(out, f"{ledgers.LEDGER}/1.parquet", a="failed", b="done", c="failed")
    write_rows(out, f"{ledgers.PARTS}/2/x.parquet", a="done", b="failed")
    out.write(f"{ledgers.PARTS}/2/y.parquet", b"torn")
    for _ in range(2):
        assert ledger.settled().of(["d", "c", "b", "a"]) == [None, "failed", "done", "done"]
        ledger.gather()
    assert out.names(ledgers.PARTS) == [] and {k: r["status"] for k, r in ledger.rows().items()} == {
        "a": "done", "b": "done", "c": "failed"
    }  # fmt: skip


def test_a_kill_while_parts_are_removed_loses_no_row(tmp_path):
    out = Storage(str(tmp_path))
    ledger = ledgers.Ledger(out)
    write_rows(out, f"{ledgers.PARTS}/2/x.parquet", a="done")
    write_rows(out, f"{ledgers.LEDGER}/2.parquet", a="done", b="done")  # of x and y, which is removed already
    ledger.gather()
    assert ledger.rows().keys() == {"a", "b"}


def test_many_keys_are_found_again_by_their_hashes():
    keys = [f"{i}.png" for i in range(20_000)]
    settled = ledgers.Settled(ledgers._hashes(keys[:15_000]), ledgers._hashes(keys[10_000:16_000]))
    assert settled.of(keys) == ["done"] * 15_000 + ["failed"] * 1_000 + [None] * 4_000


def test_one_output_is_of_one_run_with_one_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.2)
    out = Storage(str(tmp_path))
    with claims.claimed(out, "claim") as claim:
        with pytest.raises(ValueError, match="another run"), claims.claimed(out, "claim"):
            pass
        claim.check()
        out.write("claim", b'{"run": "other"}')
        with pytest.raises(Failed, match="took this output over"):
            claim.check()
    with claims.claimed(out, "claim"):  # nobody renews the other one
        ledgers.Ledger(out).check_recipe({"seed": 0})
        ledgers.Ledger(out).keep_recipe({"seed": 0})
        ledgers.Ledger(out).check_recipe({"seed": 0})
        with pytest.raises(ValueError, match="seed 0 -> 1"):
            ledgers.Ledger(out).check_recipe({"seed": 1})
    assert not out.exists("claim")


@pytest.mark.parametrize(
    "backend, precision, expected",
    [
        ("auto", "auto", "onnx"),
        ("auto", "bf16", "openvino"),
        ("auto", "fp32", "onnx"),
        ("onnxruntime", "bf16", "onnxruntime"),
    ],
)
def test_the_backend_is_the_same_on_every_machine(backend, precision, expected):
    options = SimpleNamespace(backend=backend, precision=precision)
    assert command._backend(options, manifests.load(model_folder("quality"))) == expected
    of_tiny = command._backend(options, manifests.load(model_folder("tiny")))
    assert of_tiny == ("onnx" if backend == "auto" else backend)


def test_a_recipe_has_what_bytes_depend_on(work):
    first = work().recipe()
    assert (
        Work("s", "o", Settings.of(seed=3, max_pixels=9, batch=2)).recipe()
        == Work("s", "o", Settings.of(seed=3)).recipe()
    )
    for change in ({"seed": 4}, {"scale": 2}, {"color": "none"}, {"tile": 64}, {"quality": 9}):
        assert Work(first["source"], "o", Settings.of(**{"seed": 3, **change}), identity=IDENTITY).recipe() != first


def test_keys_of_folders_and_files(tmp_path):
    for name in ("in/b/c.png", "in/a.jpg", "in/notes.txt", "in/out/a.jpg", "in/.hidden/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    root, out = tmp_path / "in", Storage(str(tmp_path / "in" / "out"))

    def keys(text, root=None):
        return sorted(source_of(str(text), root)[1](out))

    assert keys(root) == ["a.jpg", "b/c.png"]
    assert keys(root / "*.jpg") == ["a.jpg"] and keys(root / "**" / "*.png") == ["b/c.png"]
    (root / "keys.csv").write_text(f"key\nfile://{root}/a.jpg\n{root}/b/c.png\n")
    pq.write_table(pa.table({"key": ["a.jpg", "b/c.png"]}), root / "keys.parquet")
    pq.write_table(pa.table({"key": ["c.png"]}), tmp_path / "keys.parquet")
    assert keys(root / "keys.csv") == keys(root / "keys.parquet") == ["a.jpg", "b/c.png"]
    assert keys(tmp_path / "keys.parquet", str(root / "b")) == ["c.png"]
    root.rename(tmp_path / "in [1]")  # a folder rather than a pattern
    assert keys(tmp_path / "in [1]") == ["a.jpg", "b/c.png", "out/a.jpg"]
    spool(iter(["a", "ü\n"]), tmp_path / "spooled")
    assert list(spooled(tmp_path / "spooled")) == ["a", "ü\n"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", b"name\na.jpg\n", "no column key; its columns: name"),
        ("empty.csv", b"", "no column key"),
        ("binary.csv", b"key\n\xff\xfe\n", "not a text file in UTF-8"),
        ("long.csv", b'key\n"' + bytes(200_000), "not a CSV file"),
        ("none.parquet", b"PAR1 no", "not a parquet file"),
    ],
)
def test_a_file_of_keys_that_is_none(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(source_of(str(tmp_path / name))[1](Storage(str(tmp_path / "out"))))


def test_places_that_cannot_be_reached(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere://x: .*nowhere"):
        source_of("nowhere://x")
    with pytest.raises(FileNotFoundError, match=r"no such folder.*absent"):
        list(source_of(str(tmp_path / "absent"))[1](Storage(str(tmp_path))))
    (tmp_path / "a.png").touch()
    with pytest.raises(NotADirectoryError, match="is a file; give a folder"):
        list(source_of(str(tmp_path / "a.png"))[1](Storage(str(tmp_path / "out"))))
    with pytest.raises(ValueError, match="--root goes with"):
        source_of(str(tmp_path), str(tmp_path))


def test_a_storage_that_fails_for_a_while_is_asked_again(tmp_path, monkeypatch):
    storage = Storage(f"memory://{tmp_path.name}")
    storage.write("a", b"1")
    answers = [TimeoutError("slow"), ConnectionError("away"), b"1"]

    def answer(path):
        found = answers.pop(0)
        if isinstance(found, bytes):
            return found
        raise found

    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(type(storage.fs), "cat_file", lambda self, path: answer(path))
    assert storage.read("a") == b"1"
    answers = [RuntimeError("broken")] * 3
    with pytest.raises(OSError, match=f"broken.*memory://{tmp_path.name}/a"):
        storage.read("a")


def test_the_board_counts_deaths_and_keeps_rows():
    board = Board()
    board.begin("a")
    board.begin("a")
    assert board.known(["a", "b"]) == ({}, {"a": 2}) and board.broken() == ["a"]
    for _ in range(2):  # made twice: counted once
        board.end({"key": "a", "status": "done"})
    assert board.counts() == {"done": 1} and board.known(["a", "b"])[0].keys() == {"a"}
    board.end({"key": "b", "status": "failed", "error": "bad"})
    assert board.failures() == [("b", "bad")]


def test_what_a_killed_process_left_is_removed(tmp_path):
    (left := tmp_path / ".gdpo-sr-01234567.partial.png").write_bytes(b"half")
    with atomic_path(tmp_path / "b.png") as staged:
        remove_leftovers(tmp_path, time.time() + 1)
        assert staged.exists() and not left.exists()

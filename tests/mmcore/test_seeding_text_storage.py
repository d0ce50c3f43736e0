"""Keyed random numbers, the vocabulary, and storage with atomic writes."""

import errno
import os
import pickle
import signal
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.fs
import pytest
import torch

from mmcore.errors import InputError
from mmcore.seeding import MAX_IMAGE_SEED, derive_seed, generator, permutation, uniform
from mmcore.storage import Storage
from mmcore.text import BOS_ID, EOS_ID, PAD_ID, UNK_ID, WordVocabulary

# -- seeding -------------------------------------------------------------------------------------------------------


def test_golden_seeds_and_orders() -> None:
    """If one of these values changed, a release could not resume the runs of the previous one."""
    assert derive_seed(2024, "step", 7, 0, 1) == 5495089542592738664
    assert derive_seed(0) == 2033344993903900207
    assert permutation(10, 2024, 0).tolist() == [4, 6, 2, 3, 7, 8, 5, 9, 1, 0]
    assert permutation(10, 2024, 1).tolist() == [3, 6, 1, 5, 2, 0, 8, 7, 4, 9]
    assert torch.rand(2, generator=generator(2024, "x")).tolist() == pytest.approx([0.02276027, 0.13245928], rel=1e-6)
    assert uniform(2024, "flip", 3, "image-1") == pytest.approx(0.3951015039418506, rel=1e-15)


def test_seeds_are_keyed_by_every_part() -> None:
    keys = [(0,), (1,), (0, "a"), (0, "a", "b"), (0, "ab"), (0, "a", 1), (0, "a1")]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
    assert all(0 <= derive_seed(seed, "x") < 2**63 for seed in range(100))
    # The reason for the limit: a larger seed is another number with the same noise.
    first, second = (torch.Generator().manual_seed(seed) for seed in (7, MAX_IMAGE_SEED + 1 + 7))
    assert torch.equal(torch.randn(3, generator=first), torch.randn(3, generator=second))
    draws = np.array([uniform(5, "flip", epoch, f"image-{row}") for epoch in range(4) for row in range(2500)])
    # 10,000 draws: the standard error of the mean is 0.0029.
    assert abs(draws.mean() - 0.5) < 0.012
    assert (draws >= 0).all()
    assert (draws < 1).all()


def test_permutations_hold_every_row_once() -> None:
    orders = [permutation(1000, 3, epoch) for epoch in range(3)]
    assert all(np.array_equal(np.sort(order), np.arange(1000)) for order in orders)
    assert not np.array_equal(orders[0], orders[1])
    assert orders[0].dtype == np.int64


# -- words ---------------------------------------------------------------------------------------------------------


def test_vocabulary_round_trip() -> None:
    captions = ["A red dog runs", "a red cat", "the dog 犬", "a <unk> <pad> cat"]
    words = WordVocabulary.build(captions, min_count=2, lowercase=True)
    assert words.words == ("a", "cat", "dog", "red")
    assert len(words) == 8
    assert words.encode("A red bird", 10) == [BOS_ID, 4, 7, UNK_ID, EOS_ID]
    assert words.encode("a red dog", 3) == [BOS_ID, 4, 7]
    assert words.decode([BOS_ID, 4, UNK_ID, 7, PAD_ID, 6, EOS_ID, 4]) == "a red dog"
    everything = WordVocabulary.build(captions, min_count=1, lowercase=False)
    assert everything.words[:3] == ("a", "cat", "dog")
    assert {"A", "犬", "red"} <= set(everything.words)
    assert not {"<pad>", "<unk>"} & set(everything.words)
    for vocabulary in (words, everything):
        again = WordVocabulary.from_json(vocabulary.to_json())
        assert again == vocabulary
        for caption in captions[:3]:
            assert again.encode(caption, 20) == vocabulary.encode(caption, 20)
    for caption in captions[:3]:
        assert everything.decode(everything.encode(caption, 20)) == caption


# -- storage -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "root") if request.param == "local" else request.getfixturevalue("s3_server"))


def test_storage_reads_writes_lists_and_deletes(storage: Storage, tmp_path: Path) -> None:
    run = storage / "runs" / "x"
    assert not run.exists()
    assert not run.exists("a.json")
    assert run.list() == []
    assert run.folders() == []
    with pytest.raises(FileNotFoundError):
        run.read("a.json")
    run.write("a.json", b"1")
    run.write("a.json", b"22")
    run.write("deep/er/b.bin", b"3")
    run.write("c.txt", b"")
    assert run.read("a.json") == b"22"
    assert run.exists()
    assert run.exists("a.json")
    assert run.list() == ["a.json", "c.txt"]
    assert run.list(".json") == ["a.json"]
    assert run.folders() == ["deep"]
    assert (run / "deep" / "er").list() == ["b.bin"]
    local = tmp_path / "file"
    local.write_bytes(b"file")
    run.upload(local, "up/file")
    run.download("up/file", tmp_path / "new" / "back")
    assert (tmp_path / "new" / "back").read_bytes() == b"file"
    with pytest.raises(FileNotFoundError):
        run.download("nothing", tmp_path / "nothing")
    run.delete("a.json")
    run.delete("a.json")
    assert not run.exists("a.json")
    (storage / "runs").write("xy/other", b"stays")
    run.delete_tree()
    run.delete_tree()
    assert not run.exists()
    assert (storage / "runs").read("xy/other") == b"stays"


def test_storage_through_arrow(storage: Storage) -> None:
    folder = storage / "a"
    for filesystem, path in (folder.arrow(), folder.arrow_whole_files()):
        # As Ray pickles it for its workers.
        filesystem = pickle.loads(pickle.dumps(filesystem))
        filesystem.create_dir(path)
        with filesystem.open_output_stream(f"{path}/file") as stream:
            stream.write(b"one")
            stream.write(b"two")
        assert folder.read("file") == b"onetwo"
        with filesystem.open_input_file(f"{path}/file") as stream:
            assert stream.read() == b"onetwo"
        assert folder.list() == ["file"]


@pytest.mark.parametrize("same", [False, True], ids=["other-bytes", "same-bytes"])
def test_of_eight_creators_exactly_one_succeeds(storage: Storage, same: bool) -> None:
    for name in (f"part-{k}" for k in range(5)):
        barrier = threading.Barrier(8)

        def create(writer: int, name: str = name, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return storage.create(name, b"same" if same else b"%d" % writer * 1000)

        with ThreadPoolExecutor(8) as pool:
            created = list(pool.map(create, range(8)))
        assert sum(created) == 1
        assert storage.read(name) == (b"same" if same else b"%d" % created.index(True) * 1000)
        assert not storage.create(name, b"late")
    assert storage.list() == [f"part-{k}" for k in range(5)]


def test_a_file_system_without_hard_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted", str(source), None, str(target))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(InputError, match=rf"^{tmp_path}: this file system has no hard links .*; name a folder"):
        Storage(str(tmp_path)).create("a", b"a")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_parts_of_a_file_are_read(storage: Storage) -> None:
    storage.write("a.bin", bytes(range(100)))
    with storage.open("a.bin") as file:
        assert file.seek(-30, os.SEEK_END) == 70
        assert file.read(5) == bytes(range(70, 75))
        assert file.seek(5, os.SEEK_CUR) == file.tell() == 80
        assert file.read() == bytes(range(80, 100))
        assert file.read(1) == b""
        file.seek(0)
        assert file.read(200) == bytes(range(100))
    with pytest.raises(FileNotFoundError):
        storage.open("nothing")


WRITER = """
import resource, signal, sys
from mmcore.storage import Storage
storage = Storage(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
def by_arrow():
    filesystem, path = storage.arrow_whole_files()
    with filesystem.open_output_stream(f"{path}/file") as stream:
        for _ in range(1000):
            stream.write(b"n" * 1000)
writers = {"write": lambda: storage.write("file", b"n" * 10**6),
           "create": lambda: storage.create("new", b"n" * 10**6), "arrow": by_arrow}
try:
    writers[sys.argv[2]]()
except OSError as error:
    print(error.strerror)
"""


@pytest.mark.process
@pytest.mark.parametrize("writer", ["write", "create", "arrow"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, writer: str) -> None:
    """The kernel refuses to write more than 1,000 bytes, as on a full disk."""
    storage = Storage(str(tmp_path))
    storage.write("file", b"old")
    command = [sys.executable, "-c", WRITER, str(tmp_path), writer]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == os.strerror(27)
    assert storage.list() == ["file"]
    assert storage.read("file") == b"old"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "file"], "temporary files are gone"


@pytest.mark.process
def test_a_killed_write_leaves_what_was_there(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write("file", b"old")
    # It waits for the kill and stops filling the disk meanwhile.
    twice_then_wait = "(k if k < 2000 else signal.pause() for k in range(2001))"
    program = WRITER.replace("range(1000)", twice_then_wait).replace("(1000, 1000)", "(-1, -1)")
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path), "arrow"])
    try:
        while not any(path.stat().st_size > 10**6 for path in tmp_path.iterdir() if path.is_file()):
            assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert storage.read("file") == b"old"


@pytest.mark.parametrize(
    "uri",
    [
        *("", "gs://bucket/x", "S3://bucket/x", "http://key:secret@host/x"),
        *("s3://", "s3:///x", "s3://key:secret@bucket/x", "s3://bucket/x?a=b"),
        *("s3:/bucket", "s3:bucket", "S3:/bucket", "gs:/bucket", "hf:/name/data"),
        *("s3:/key:secret@bucket", "s3://bucket/x?aws_secret_access_key=secret", "gs://bucket/x?id=me@host&key=secret"),
        "gs:/bucket?key=secret",
    ],
)
def test_other_uris_are_refused(uri: str) -> None:
    with pytest.raises(InputError, match=r"^storage '.*s3://bucket/prefix") as caught:
        Storage(uri)
    assert "secret" not in str(caught.value)


def test_a_refusal_shows_the_place_and_that_more_was_given() -> None:
    with pytest.raises(InputError, match=r"^storage 's3://bucket/x\?\.\.\.': write s3://bucket/prefix; keys come from"):
        Storage("s3://bucket/x?aws_secret_access_key=secret")


@pytest.mark.parametrize("uri", ["file:/tmp/x", "file:///tmp/x", "FILE:/tmp/x"])
def test_a_path_needs_no_scheme(uri: str) -> None:
    with pytest.raises(InputError, match=f"^storage '{uri}': write the path alone, without file:$"):
        Storage(uri)


def test_a_folder_may_be_called_like_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Storage("./s3:/bucket").uri == str(tmp_path / "s3:" / "bucket")
    assert Storage("of-12:30").uri == str(tmp_path / "of-12:30")


def test_storage_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage("out")
    assert storage.uri == str(tmp_path / "out")
    assert (storage / "a" / "b").name == "b"
    assert (storage / "a" / "b").parent == storage / "a"
    assert not (tmp_path / "out").exists(), "naming a folder makes none"
    assert Storage("s3://bucket/a/").uri == "s3://bucket/a"
    assert pickle.loads(pickle.dumps(storage)) == storage
    assert isinstance(storage.arrow()[0], pyarrow.fs.LocalFileSystem)


def test_a_whole_bucket_is_not_emptied(s3_server: str) -> None:
    bucket = Storage(s3_server.rpartition("/")[0])
    bucket.write("a", b"1")
    with pytest.raises(InputError, match="whole bucket"):
        bucket.delete_tree()
    assert bucket.read("a") == b"1"


def test_links_open_what_they_name_until_they_expire(s3_server: str, tmp_path: Path) -> None:
    storage = Storage(s3_server)
    # Characters that end the path of a URL.
    names = [f"{folder}/a b#c?d&e=%20.png" for folder in "xyz"]
    for name in names:
        storage.write(name, name.encode())
    with ThreadPoolExecutor(8) as threads:
        links = list(threads.map(lambda name: storage.presigned_url(name, 77.9), names * 20))
    for name, link in zip(names, links[:3], strict=True):
        with urllib.request.urlopen(link, timeout=300) as answer:
            assert answer.read() == name.encode()
            assert answer.headers["content-type"] == "image/png"
        assert "X-Amz-Expires=77&" in link
        assert "X-Amz-Algorithm=AWS4-HMAC-SHA256" in link, "the old signature, which new regions refuse"
    with pytest.raises(InputError, match="only files in S3 have links"):
        Storage(str(tmp_path)).presigned_url("a.png", 60)


def test_what_killed_writes_left_is_removed(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write("run/kept", b"1")
    # The last one is of an earlier version.
    for name in ("part.parquet.0123.tmp", ".0123.tmp", ".tmp/kept.4567"):
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).touch()
    storage.remove_temporary()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["run", "run/kept"]
    assert storage.read("run/kept") == b"1"

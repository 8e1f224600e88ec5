"""Tar shards from a real HTTP server and from a command: fetched once, read by ranks and workers; and their faults."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from midge.runtime import shard_download
from midge.runtime.errors import UserError
from midge.runtime.images import UnreadableImageError, fingerprint, list_images
from midge.runtime.shard_download import without_secret
from midge.runtime.shard_index import INDEX_FILE
from midge.train.data_config import FetchConfig, PackConfig
from midge.train.fetch import fetch
from midge.train.fetch_shards import has_secret, is_address, name_shards
from midge.train.pack import pack
from midge.train.sampling import epoch_order

pytest.importorskip("webdataset")


@pytest.fixture
def packed(labelled_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """Four shards of 600 images in a folder that can be served; their index is not among them."""
    folder = labelled_folder(each=200, px=40)
    assert pack(PackConfig(folder, tmp_path / "packed", shard_mib=1)) == 0
    (tmp_path / "packed" / INDEX_FILE).rename(tmp_path / "index")
    return tmp_path / "packed"


@pytest.fixture
def fetched(packed: Path, serve, tmp_path: Path):
    """The folder that was fetched from the server, and the server."""
    server = serve(packed)
    address = server.address + "shard-{000000..000003}.tar"
    assert fetch(FetchConfig(address, tmp_path / "fetched")) == 0
    return tmp_path / "fetched", server


def test_fetched_shards_are_those_of_the_server(fetched, packed: Path, tmp_path: Path) -> None:
    out, server = fetched
    assert Counter(server.requests) == {f"/shard-00000{i}.tar": 1 for i in range(4)}
    assert sorted(path.name for path in out.iterdir()) == [INDEX_FILE, *(f"shard-00000{i}.tar" for i in range(4))]
    for path in packed.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert fingerprint(list_images(out)) == fingerprint(list_images(tmp_path / "train"))
    assert not (tmp_path / ".fetched.fetching").exists()


RANK = """
import json, sys
from pathlib import Path
from midge.runtime.images import content_hash, list_images
from midge.train.datasets import Share, ViewDataset, load_batches
from midge.train.sampling import ViewSampler
from midge.train.views import AUGMENTATIONS, blur_range_px, view_policy

class Recorded(ViewDataset):
    def __getitem__(self, step):
        self.read = []
        super().__getitem__(step)
        return self.read

    def _read(self, index, unreadable):
        image = super()._read(index, unreadable)
        self.read.append((index, image.shape[0], content_hash(self.images.source(index)), len(unreadable)))
        return image

if __name__ == "__main__":
    root, rank, first, end = Path(sys.argv[1]), *map(int, sys.argv[2:])
    policy = view_policy("lowcompute", "cnn", 32)
    sampler = ViewSampler(policy, AUGMENTATIONS["dino"], blur_range_px(32), 5)
    data = Recorded(list_images(root), policy, sampler, 20, 5, Share(rank, 2))
    print(json.dumps(list(load_batches(data, first, end, workers=2, pin_memory=False))))
"""


def read_by_ranks(folder: Path, first: int, end: int, script: Path) -> list[list[tuple[int, int, str, int]]]:
    """What two processes of two workers each read, by step."""
    script.write_text(RANK)
    ranks = [
        subprocess.Popen(
            [sys.executable, script, folder, str(rank), str(first), str(end)], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    return [[tuple(read) for part in step for read in part] for step in zip(*map(json.loads, outputs), strict=True)]


@pytest.mark.slow
def test_ranks_and_workers_read_each_image_once_per_epoch_and_download_each_shard_once(fetched, tmp_path: Path) -> None:
    out, server = fetched
    for path in out.glob("*.tar"):
        path.unlink()  # as on another machine, to which the index alone has come
    server.requests.clear()
    files = list_images(tmp_path / "train")
    hashes = [hashlib.sha256((files.root / path).read_bytes()).hexdigest() for path in files.paths]
    expected = [(index, 40, sha256, 0) for index, sha256 in enumerate(hashes)]
    steps = read_by_ranks(out, 0, 47, tmp_path / "rank.py")  # 30 batches of 20 are an epoch of 600 images
    steps += read_by_ranks(out, 47, 60, tmp_path / "rank.py")  # resumed in the second one
    for epoch in range(2):
        assert sorted(read for step in steps[30 * epoch : 30 * (epoch + 1)] for read in step) == expected
    for step in (0, 29, 30, 46, 47, 59):
        order = epoch_order(5, step // 30, 600)[step % 30 * 20 : step % 30 * 20 + 20]
        assert [read[0] for read in steps[step]] == order.tolist()
    assert Counter(server.requests) == {f"/shard-00000{i}.tar": 1 for i in range(4)}


def test_a_shard_that_the_server_has_changed_is_refused(fetched, packed: Path) -> None:
    out, _ = fetched
    (out / "shard-000001.tar").unlink()
    images = list_images(out)
    index = images.paths.index("bee/100.png")
    content = bytearray((packed / "shard-000001.tar").read_bytes())
    for change, message in (
        (content[:-512], "is not the shard that was indexed: index it again"),
        (content + bytes(512), rf"has more than the {len(content)} bytes that were indexed"),
        (content[:-1] + b"x", "is not the shard that was indexed"),
        (None, r"failed \(the server refuses it\): try again"),
    ):
        if change is None:
            (packed / "shard-000001.tar").unlink()
        else:
            (packed / "shard-000001.tar").write_bytes(change)
        with pytest.raises(UnreadableImageError, match=message) as error:
            images.source(index)
        assert "\n" not in str(error.value)
        assert sorted(path.name for path in out.iterdir() if "000001" in path.name) == []
    (packed / "shard-000001.tar").write_bytes(content)
    assert images.load(index).shape == (40, 40, 3)


@contextlib.contextmanager
def raw_server(answer: bytes, wait: threading.Event | None = None) -> Iterator[str]:
    """A server that sends the same bytes to all who connect, and then hangs up, or waits first."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve_all() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(1 << 16)
                        connection.sendall(answer)
                        if wait is not None:
                            wait.wait()

        threading.Thread(target=serve_all, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/x.tar"
        listener.shutdown(socket.SHUT_RDWR)


def test_a_stream_that_ends_early_leaves_nothing(tmp_path: Path) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + bytes(1000)
    with raw_server(answer) as address, pytest.raises(UserError, match=r"failed \(it ended early\): try again"):
        shard_download.save_stream(address, tmp_path / "x.tar")
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_falls_silent_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_download, "SILENCE_S", 1.0)
    release = threading.Event()
    with raw_server(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + bytes(1000), release) as address:
        with pytest.raises(UserError, match=r"failed \(nothing came for 1 s\)"):
            shard_download.save_stream(address, tmp_path / "x.tar")
        release.set()
    assert list(tmp_path.iterdir()) == []


def test_no_server(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'http://127.0.0.1:9/x.tar' failed \(no connection\): try again"):
        fetch(FetchConfig("http://127.0.0.1:9/x.tar", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_interrupted_fetch_goes_on_where_it_was(packed: Path, serve, tmp_path: Path) -> None:
    server = serve(packed)
    address = server.address + "shard-{000000..000003}.tar"
    missing = packed / "shard-000002.tar"
    missing.rename(tmp_path / "kept")
    with pytest.raises(UserError, match=r"shard-000002.tar' failed \(the server refuses it\)"):
        fetch(FetchConfig(address, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "kept").rename(missing)
    assert fetch(FetchConfig(address, tmp_path / "out")) == 0
    assert Counter(server.requests) == {f"/shard-00000{i}.tar": 1 + (i == 2) for i in range(4)}
    assert len(list_images(tmp_path / "out")) == 600


def test_a_command_is_not_kept_in_the_index(packed: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = f"pipe:echo x >> {log}; cat {packed}/shard-00000{{0..3}}.tar"
    assert fetch(FetchConfig(command, tmp_path / "out")) == 0
    images = list_images(tmp_path / "out")
    assert fingerprint(images) == fingerprint(list_images(tmp_path / "train"))
    assert images.shards is not None and {shard.url for shard in images.shards.shards} == {None}
    assert log.read_text() == "x\n" * 4
    with pytest.raises(UserError, match=r"failed \(it ends with 3\)"):
        fetch(FetchConfig("pipe:echo half; exit 3", tmp_path / "other"))


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        (["http://h/a/x.tar", "http://h/b/x.tar"], "end in the same name: fetch them apart"),
        (["http://h/a/"], "does not end in the name of a tar"),
        (["http://h/x.tar.gz"], "does not end in the name of a tar"),
        (["http://h/%2e%2e%2fx.tar"], ""),
        (["http://h/a/.x.tar"], "does not end in the name of a tar"),
        (["http://h/a%0ab.tar"], "does not end in the name of a tar"),
    ],
)
def test_names_of_shards(urls: list[str], message: str) -> None:
    if not message:
        assert list(name_shards(urls)) == ["x.tar"]
        return
    with pytest.raises(UserError, match=message):
        name_shards(urls)


def test_an_address_with_a_key_is_not_kept_in_the_index(packed: Path, serve, tmp_path: Path) -> None:
    address = serve(packed).address + "shard-000000.tar?key=secret"
    assert fetch(FetchConfig(address, tmp_path / "out")) == 0
    assert "secret" not in (tmp_path / "out" / INDEX_FILE).read_text()
    with pytest.raises(UserError, match=r"127\.0\.0\.1.*/absent\.tar\?…' failed") as caught:
        fetch(FetchConfig(address.replace("shard-000000", "absent"), tmp_path / "failed"))
    assert "secret" not in str(caught.value)
    left = [path.read_text() for path in (tmp_path / ".failed.fetching").iterdir()]
    assert len(left) == 1 and "secret" not in left[0]
    assert has_secret("http://me:secret@host/x.tar") and not has_secret("http://host/x.tar")


def test_addresses(tmp_path: Path) -> None:
    assert is_address("http://x") and is_address("pipe:cat x") and not is_address("cifar10")
    with pytest.raises(UserError, match="name the folder for its shards with --out"):
        fetch(FetchConfig("http://127.0.0.1:9/x.tar"))
    with pytest.raises(UserError, match=r"Unknown kind of address 'nfs': choose one of .*http"):
        fetch(FetchConfig("nfs://127.0.0.1/x.tar", tmp_path / "out"))
    with pytest.raises(UserError, match="exists already"):
        shutil.copytree(Path(__file__).parent, tmp_path / "taken", ignore=shutil.ignore_patterns("*.pyc"))
        fetch(FetchConfig("http://127.0.0.1:9/x.tar", tmp_path / "taken"))


def test_addresses_in_messages_have_no_secret() -> None:
    assert without_secret("http://me:pass@host/x.tar?sig=1") == "http://…@host/x.tar?…"
    assert without_secret("http://host/a@b.tar") == "http://host/a@b.tar"
    assert without_secret("pipe:cat x?y") == "pipe:cat x?y"

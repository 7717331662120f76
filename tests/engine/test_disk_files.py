"""KV blocks as files: whole, of this model and this layout, or not there."""

import errno
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from disagg.base.errors import ConfigurationError, TransferError
from disagg.base.ids import BlockHash
from disagg.cache.layout import KvDtype, KvFormat, KvLayout
from disagg.engine import disk_files
from disagg.engine.disk_files import BlockFiles

LAYOUT = KvLayout(
    num_layers=3,
    num_blocks=4,
    num_kv_heads=2,
    block_size=16,
    head_dim=8,
    dtype=KvDtype.BFLOAT16,
    format=KvFormat.TOKEN_MAJOR,
)
NAMES = tuple(BlockHash(bytes([number]) * 16) for number in range(5))
MODEL = b"m" * 32


def block(seed: int) -> np.ndarray:
    words = LAYOUT.layer_block_bytes // 8
    return np.random.default_rng(seed).integers(0, 2**63, (LAYOUT.num_layers, words), dtype=np.uint64)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[BlockFiles]:
    files = BlockFiles(tmp_path, "decode-0", MODEL, LAYOUT)
    yield files
    files.close()


def path_of(files: BlockFiles, name: BlockHash) -> Path:
    (path,) = files.folder.glob(f"*/{name.hex()}.kv")
    return path


def test_what_is_written_is_read_by_the_next_life(files: BlockFiles, tmp_path: Path) -> None:
    for seed, name in enumerate(NAMES[:3]):
        files.write(name, block(seed))
    files.close()
    again = BlockFiles(tmp_path, "decode-0", MODEL, structs.replace(LAYOUT, num_blocks=99))
    assert set(again.scan(10)) == set(NAMES[:3])
    target = np.zeros_like(block(0))
    again.read(NAMES[1], target)
    assert (target == block(1)).all()
    again.close()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "harm",
    [
        _cut,
        _lengthen,
        lambda path: _flip(path, 0),
        lambda path: _flip(path, 20),
        lambda path: _flip(path, disk_files.HEADER_BYTES),
        lambda path: _flip(path, -1),
        lambda path: path.unlink(),
    ],
    ids=["cut", "longer", "magic", "version", "first byte", "last byte", "gone"],
)
def test_a_damaged_block_is_refused_and_writes_nothing(files: BlockFiles, harm) -> None:
    files.write(NAMES[0], block(0))
    harm(path_of(files, NAMES[0]))
    target = block(7)
    with pytest.raises(TransferError, match=NAMES[0].hex()):
        files.read(NAMES[0], target)
    assert (target == block(7)).all()


def test_a_block_under_another_name_is_refused(files: BlockFiles) -> None:
    files.write(NAMES[0], block(0))
    other = files.folder / NAMES[1].hex()[:2] / (NAMES[1].hex() + ".kv")
    other.parent.mkdir()
    path_of(files, NAMES[0]).rename(other)
    with pytest.raises(TransferError, match="damaged"):
        files.read(NAMES[1], block(0))


@pytest.mark.parametrize(
    ("model", "layout"), [(b"n" * 32, LAYOUT), (MODEL, structs.replace(LAYOUT, num_kv_heads=LAYOUT.num_kv_heads + 1))]
)
def test_blocks_of_another_model_or_layout_are_not_found_and_make_room(
    files: BlockFiles, tmp_path: Path, model: bytes, layout
) -> None:
    files.write(NAMES[0], block(0))
    files.close()
    other = BlockFiles(tmp_path, "decode-0", model, layout)
    assert other.scan(10) == ()
    assert not files.folder.exists()
    other.close()


def test_two_servers_do_not_share_a_folder(files: BlockFiles, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="another server keeps blocks of decode-0 there"):
        BlockFiles(tmp_path, "decode-0", MODEL, LAYOUT)
    BlockFiles(tmp_path, "decode-1", MODEL, LAYOUT).close()


def test_unfinished_and_surplus_files_are_removed_at_the_start(files: BlockFiles) -> None:
    for number, name in enumerate(NAMES[:4]):
        files.write(name, block(0))
        disk_files.os.utime(path_of(files, name), (number, number))
    (path_of(files, NAMES[0]).with_suffix(".tmp")).write_bytes(b"half")
    _cut(path_of(files, NAMES[1]))
    assert files.scan(2) == NAMES[2:4]
    assert len(list(files.folder.glob("*/*"))) == 2


def test_the_disk_is_never_filled(files: BlockFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_files, "MIN_FREE_BYTES", 1 << 60)
    with pytest.raises(OSError, match="left free") as refused:
        files.write(NAMES[0], block(0))
    assert refused.value.errno == errno.ENOSPC
    assert list(files.folder.glob("*/*")) == []


@pytest.mark.parametrize("is_direct", [True, False])
def test_files_are_whole_pages_past_the_page_cache_or_through_it(
    tmp_path: Path, is_direct: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    if not is_direct:
        monkeypatch.setattr(disk_files.os, "O_DIRECT", disk_files.os.O_DIRECTORY)  # which no file takes
    odd = structs.replace(LAYOUT, block_size=LAYOUT.block_size + 2)
    files = BlockFiles(tmp_path, "decode-0", MODEL, odd)
    if is_direct and not files.is_direct:
        pytest.skip("this file system has no direct I/O")
    data = np.arange(odd.block_bytes // 8, dtype=np.uint64).reshape(odd.num_layers, -1)
    files.write(NAMES[0], data)
    assert files.file_bytes % disk_files.PAGE_BYTES == path_of(files, NAMES[0]).stat().st_size % files.file_bytes == 0
    target = np.zeros_like(data)
    files.read(NAMES[0], target)
    assert (target == data).all()
    assert files.scan(10) == NAMES[:1]
    assert files.is_direct is is_direct
    assert ("no direct I/O" in caplog.text) is not is_direct
    files.close()

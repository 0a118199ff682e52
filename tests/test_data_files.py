"""Files of data sets: what happens when one is missing, broken or late."""

import dataclasses
import gzip
import hashlib
import io
import sys
from pathlib import Path

import pytest

import zoo.data
from tests.file_server import Server, nowhere, serving
from zoo.data import files
from zoo.data.files import RemoteFile, fetch

CONTENT = b"rows of a data set" * 50
SHA256 = hashlib.sha256(CONTENT).hexdigest()

pytestmark = pytest.mark.usefixtures("cache_folder")


def remote(*servers: Server, **options) -> RemoteFile:
    urls = tuple(f"{server.url}/rows.gz" for server in servers)
    return RemoteFile(path="set/rows.gz", sha256=SHA256, urls=urls, **options)


def kept(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_downloads_once_and_then_reads_the_cache(server, cache_folder) -> None:
    (server.folder / "rows.gz").write_bytes(gzip.compress(CONTENT))
    assert fetch(remote(server)) == CONTENT
    assert kept(cache_folder) == ["set/rows.gz"]
    assert fetch(remote(server)) == CONTENT
    assert server.requests == ["/rows.gz"]


@pytest.mark.parametrize("wrapper", ["named", "fast", "plain"])
def test_the_checksum_is_that_of_the_content(server, wrapper) -> None:
    """Mirrors compress the same bytes differently, some not at all."""
    named = io.BytesIO()
    with gzip.GzipFile("other-name", "wb", fileobj=named, mtime=1) as stream:
        stream.write(CONTENT)
    raw = {"named": named.getvalue(), "fast": gzip.compress(CONTENT, 1), "plain": CONTENT}
    (server.folder / "rows.gz").write_bytes(raw[wrapper])
    assert fetch(remote(server)) == CONTENT


def test_a_mirror_of_ones_own(server, monkeypatch) -> None:
    path = server.folder / "set" / "rows.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(CONTENT))
    assert fetch(RemoteFile("set/rows.gz", SHA256, (nowhere(),)), mirror=server.url) == CONTENT
    other = RemoteFile("set/rows.gz", hashlib.sha256(b"").hexdigest(), ())
    monkeypatch.setenv("PYRO_ZOO_MIRROR", server.url + "/")
    with pytest.raises(FileNotFoundError, match="the content has a wrong checksum"):
        fetch(other)
    assert server.requests == ["/set/rows.gz"] * 2


def test_mirrors_are_tried_in_turn(tmp_path, server, cache_folder) -> None:
    (server.folder / "rows.gz").write_bytes(gzip.compress(CONTENT))
    with serving(tmp_path / "broken") as broken, serving(tmp_path / "empty") as empty:
        (broken.folder / "rows.gz").write_bytes(gzip.compress(b"something else"))
        assert fetch(remote(broken, empty, server)) == CONTENT
        assert broken.requests == empty.requests == ["/rows.gz"]
    assert kept(cache_folder) == ["set/rows.gz"]


def test_one_error_names_every_failure_and_the_place_for_the_file(
    tmp_path, server, cache_folder
) -> None:
    (server.folder / "rows.gz").write_bytes(gzip.compress(b"something else"))
    with serving(tmp_path / "empty") as empty:
        file = remote(server, empty)
        file = dataclasses.replace(file, urls=(*file.urls, nowhere()))
        with pytest.raises(FileNotFoundError) as caught:
            fetch(file)
    message = str(caught.value)
    assert "wrong checksum" in message
    assert "HTTPError (HTTP status 404)" in message
    assert "ConnectionError" in message
    assert f"Put the file at {cache_folder / 'set' / 'rows.gz'}" in message
    assert "PYRO_ZOO_DATA" in message
    assert SHA256 in message
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert kept(cache_folder) == []


def test_a_file_put_where_the_error_says_is_found(cache_folder) -> None:
    file = RemoteFile("set/rows.gz", SHA256, (nowhere(),))
    with pytest.raises(FileNotFoundError, match="Put the file at"):
        fetch(file)
    (cache_folder / "set" / "rows.gz").write_bytes(gzip.compress(CONTENT))
    assert fetch(file) == CONTENT


def test_an_interrupted_download_leaves_nothing(server, cache_folder) -> None:
    (server.folder / "rows.gz.cut").write_bytes(gzip.compress(CONTENT))
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        fetch(remote(server))
    assert kept(cache_folder) == []
    (server.folder / "rows.gz.cut").rename(server.folder / "rows.gz")
    assert fetch(remote(server)) == CONTENT


def test_ctrl_c_leaves_nothing(server, cache_folder, monkeypatch) -> None:
    import pooch

    def interrupted(self, url, output_file, *_):
        Path(output_file).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pooch.HTTPDownloader, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(remote(server))
    assert kept(cache_folder) == []
    (server.folder / "rows.gz").write_bytes(gzip.compress(CONTENT))
    assert fetch(remote(server)) == CONTENT


def test_a_broken_file_in_the_cache_is_replaced(server, cache_folder) -> None:
    (cache_folder / "set").mkdir(parents=True)
    (cache_folder / "set" / "rows.gz").write_bytes(gzip.compress(CONTENT)[:40])
    (server.folder / "rows.gz").write_bytes(gzip.compress(CONTENT))
    assert fetch(remote(server)) == CONTENT
    assert gzip.decompress((cache_folder / "set" / "rows.gz").read_bytes()) == CONTENT


@pytest.mark.parametrize("name", ["rows.gz", "rows"])
def test_a_data_folder_is_read_first(tmp_path, cache_folder, monkeypatch, name) -> None:
    folder = tmp_path / "data"
    (folder / "set").mkdir(parents=True)
    raw = gzip.compress(CONTENT) if name.endswith(".gz") else CONTENT
    (folder / "set" / name).write_bytes(raw)
    monkeypatch.setenv("PYRO_ZOO_DATA", str(folder))
    assert fetch(remote()) == CONTENT
    assert kept(cache_folder) == []


def test_a_data_folder_without_the_file_is_passed_over(tmp_path, server, monkeypatch) -> None:
    (server.folder / "rows.gz").write_bytes(gzip.compress(CONTENT))
    monkeypatch.setenv("PYRO_ZOO_DATA", str(tmp_path / "absent"))
    assert fetch(remote(server)) == CONTENT


def test_a_wrong_file_in_a_data_folder_is_an_error(tmp_path, server, monkeypatch) -> None:
    """The folder was named on purpose, so nothing is downloaded in its stead."""
    path = tmp_path / "set" / "rows.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress(b"other"))
    (server.folder / "rows.gz").write_bytes(gzip.compress(CONTENT))
    monkeypatch.setenv("PYRO_ZOO_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=f"rows.gz is not the file .* {SHA256}. Replace it, or"):
        fetch(remote(server))
    assert server.requests == []


def test_files_of_a_distribution_and_other_formats(tmp_path, cache_folder) -> None:
    path = tmp_path / "packaged.gz"
    path.write_bytes(gzip.compress(CONTENT))
    assert fetch(remote(system=(str(path),))) == CONTENT
    (cache_folder / "set").mkdir(parents=True)
    (cache_folder / "set" / "reversed").write_bytes(CONTENT[::-1])
    alternatives = {"set/reversed": lambda raw: raw[::-1]}
    assert fetch(remote(alternatives=alternatives)) == CONTENT


def test_the_default_cache_is_poochs(monkeypatch) -> None:
    import pooch

    monkeypatch.delenv("PYRO_ZOO_CACHE")
    assert files.cache_folder() == Path(pooch.os_cache("pyro-zoo"))


@pytest.mark.parametrize(
    ("absent", "call"),
    [
        ("pooch", lambda: fetch(RemoteFile("set/rows.gz", SHA256, (nowhere(),)))),
        ("sklearn.datasets", lambda: zoo.data.load("digits")),
    ],
)
def test_a_missing_extra_is_named(monkeypatch, absent, call) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "pyro-zoo\[data\]"'):
        call()

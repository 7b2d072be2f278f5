"""The download command: the table, the layout, archives, and where a person must act."""

import argparse
import errno
import gzip
import io
import json
import multiprocessing
import signal
import tarfile
import time
import zipfile
from dataclasses import replace
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from servers import FileServer

from sqllava.data import download as command
from sqllava.data import sources
from sqllava.data.cli import build_parser, main
from sqllava.data.download import Options, download, listing, summary
from sqllava.data.fetch import Patience, WriteError
from sqllava.data.sources import SOURCES, Part, Source, choose, image_folders
from sqllava.data.unpack import DamagedError, UnpackError, unpack

HURRIED = Patience(timeout=0.5, tries=3, pause=0.01)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = FileServer({})
    yield server
    server.close()


def jpeg(color="red", size=(8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "JPEG")
    return buffer.getvalue()


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(members: dict[str, bytes | tarfile.TarInfo]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


# The table


def test_every_url_is_well_formed_and_has_its_size():
    for source in SOURCES.values():
        assert source.terms and source.page.startswith("https://")
        for part in source.parts:
            if part.url:
                found = urlsplit(part.url)
                assert found.scheme in ("http", "https") and "." in found.netloc
                assert found.path.endswith((".zip", ".json")) and not found.query
                assert part.path.rsplit(".", 1)[1] == found.path.rsplit(".", 1)[1]
                assert part.size > 1e8
            else:
                assert source.by_hand
    urls = [part.url for source in SOURCES.values() for part in source.parts if part.url]
    assert len(urls) == len(set(urls)) == 11
    paths = [part.path for source in SOURCES.values() for part in source.parts]
    assert len(paths) == len(set(paths))


def test_the_layout_is_the_recipes():
    assert set(image_folders()) == {
        "llava/llava_pretrain/images",
        "coco/train2017",
        "sam/images",
        "gqa/images",
        "ocr_vqa/images",
        "textvqa/train_images",
        "vg/VG_100K",
        "vg/VG_100K_2",
        "share_textvqa/images",
        "web-celebrity/images",
        "web-landmark/images",
        "wikiart/images",
    }
    assert {part.path for s in choose(["annotations"]) for part in s.parts} == {
        "share-captioner_coco_lcs_sam_1246k_1107.json",
        "sharegpt4v_instruct_gpt4-vision_cap100k.json",
        "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json",
        "blip_laion_cc_sbu_558k.json",
        "llava_v1_5_mix665k.json",
    }
    assert image_folders()["sam/images"] == (51 * 11_186, True)
    assert [s.name for s in choose(["coco", "images", "coco"])][0] == "coco"


def test_an_unknown_set_is_refused_with_the_known_ones():
    with pytest.raises(SystemExit, match="unknown sets .*'cocoo'.*choose from.*'coco'"):
        main(["download", "cocoo"])


def test_the_list_says_what_from_where_how_big_and_under_which_terms(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["download", "--list"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in SOURCES)
    assert "19.3 GB" in shown and "http://images.cocodataset.org/zips/train2017.zip" in shown
    assert "form: SA-1B research licence" in shown and "by hand: accept the licence" in shown
    assert "CC BY-NC 4.0" in listing(choose(["sharegpt4v-pt"]))


# Archives


MEMBERS = {
    "data/set/a.jpg": b"aa",
    "data/set/b.PNG": b"bbb",
    "data/set/a.json": b"{}",
    "__MACOSX/data/._a.jpg": b"x",
    "data/.hidden/c.jpg": b"x",
}


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_images_come_out_flat_and_nothing_else_does(tmp_path, pack):
    (tmp_path / "x").write_bytes(pack(MEMBERS))
    assert unpack(tmp_path / "x", tmp_path / "out") == 2
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert found == {"a.jpg": b"aa", "b.PNG": b"bbb"}


@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize("top", ["", "images/"])
def test_folders_are_kept_where_they_count(tmp_path, pack, top):
    (tmp_path / "x").write_bytes(pack({f"{top}00453/1.jpg": b"1", f"{top}00454/1.jpg": b"22"}))
    assert unpack(tmp_path / "x", tmp_path / "out", keep_folders=True) == 2
    assert (tmp_path / "out/00453/1.jpg").read_bytes() == b"1"
    assert (tmp_path / "out/00454/1.jpg").read_bytes() == b"22"


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zip_link(name: str) -> bytes:
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(info, "/etc/passwd")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (zipped({"../evil.jpg": b"x"}), "leads out"),
        (zipped({"/tmp/evil.jpg": b"x"}), "leads out"),
        (zipped({"a/../../evil.jpg": b"x"}), "leads out"),
        (zipped({"..\\evil.jpg": b"x"}), "leads out"),
        (zipped({"C:\\evil.jpg": b"x"}), "leads out"),
        (zip_link("a.jpg"), "is a link"),
        (tarred({"../evil.jpg": b"x"}), "leads out"),
        (tarred({"/evil.jpg": b"x"}), "leads out"),
        (tarred({"a.jpg": link("a.jpg", "/etc/passwd", tarfile.SYMTYPE)}), "is a link"),
        (tarred({"a.jpg": link("a.jpg", "b.jpg", tarfile.LNKTYPE)}), "is a link"),
        (tarred({"a.jpg": link("a.jpg", "", tarfile.CHRTYPE)}), "is a link"),
        (zipped({"x/a.jpg": b"1", "y/a.jpg": b"2"}), "two members for 'a.jpg'"),
        (b"<html>Sign in to continue</html>", "cannot be unpacked"),
        (zipped({"a.jpg": b"x" * 1000})[:-40], "cannot be unpacked"),
        (tarred({"a.jpg": b"x" * 5000})[:3000], "cannot be unpacked"),
    ],
)
@pytest.mark.parametrize("keep_folders", [False, True])
def test_archives_that_cannot_be_trusted_are_refused(tmp_path, archive, message, keep_folders):
    if "two members" in message and keep_folders:
        return
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x").write_bytes(archive)
    with pytest.raises(UnpackError, match=message):
        unpack(tmp_path / "in/x", tmp_path / "in/out", keep_folders)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


def test_a_damaged_member_is_found_by_its_checksum(tmp_path):
    archive = bytearray(zipped({"a.jpg": b"x" * 1000}))
    archive[archive.index(b"xxxx") + 500] = 0
    (tmp_path / "x").write_bytes(archive)
    with pytest.raises(UnpackError, match="Bad CRC"):
        unpack(tmp_path / "x", tmp_path / "out")
    assert not (tmp_path / "out/a.jpg").exists()


def noise(number: int) -> bytes:
    """Bytes of a member, with no two blocks of an archive alike."""
    return bytes((number * 7 + i * i) % 251 + 1 for i in range(1300))


TAR = tarred({f"{number:02}.jpg": noise(number) for number in range(20)})


def compressed(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


@pytest.mark.parametrize("block", range(1, len(TAR) // 512))
def test_a_broken_block_of_a_tar_is_found_wherever_names_and_sizes_stand(tmp_path, block):
    headers = [at for at in range(0, len(TAR), 512) if TAR[at + 257 : at + 262] == b"ustar"]
    for filling in (b"\0", b"\xa5"):
        spoilt = bytearray(TAR)
        spoilt[block * 512 : (block + 1) * 512] = filling * 512
        (tmp_path / "x").write_bytes(spoilt)
        if block * 512 in headers or (block * 512 > headers[-1] + 512 * 3 and filling != b"\0"):
            with pytest.raises(DamagedError, match="x: cannot be unpacked: what stands at byte"):
                unpack(tmp_path / "x", tmp_path / f"out{filling}")
        else:  # a tar has no checksum for what is in its members
            assert unpack(tmp_path / "x", tmp_path / f"out{filling}") == 20


@pytest.mark.parametrize("pack", [bytes, compressed], ids=["tar", "tar.gz"])
def test_a_tar_that_is_cut_is_found_at_any_byte(tmp_path, pack):
    members_end = 20 * (512 + 1536)
    whole = pack(TAR)
    for share in (0.0, 0.3, 0.5, 0.75):
        (tmp_path / "x").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(DamagedError, match="x: .*cannot be unpacked"):
            unpack(tmp_path / "x", tmp_path / "out")
    # Cut where a member ends: nothing is missing but the mark of the end.
    (tmp_path / "x").write_bytes(pack(TAR[:members_end]))
    with pytest.raises(DamagedError, match=f"cut short at byte {members_end}"):
        unpack(tmp_path / "x", tmp_path / "out")
    (tmp_path / "x").write_bytes(pack(TAR + TAR))
    with pytest.raises(DamagedError, match=r"what stands at byte .*\(after 20 members\)"):
        unpack(tmp_path / "x", tmp_path / "out")


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from(["tar", "tar.gz", "zip", "deflated"]))
def test_any_damage_of_an_archive_is_named_or_harmless(tmp_path_factory, data, kind):
    folder = tmp_path_factory.mktemp("damage")
    members = {f"{number}.jpg": noise(number) for number in range(5)}
    whole = {
        "tar": lambda: tarred(members),
        "tar.gz": lambda: compressed(tarred(members)),
        "zip": lambda: zipped(members),
        "deflated": lambda: zipped(members, zipfile.ZIP_DEFLATED),
    }[kind]()
    spoilt = bytearray(whole)
    at = data.draw(st.integers(0, len(spoilt) - 1))
    length = data.draw(st.sampled_from([1, 8, 512]))
    spoilt[at : at + length] = data.draw(st.binary(min_size=length, max_size=length))
    (folder / "x").write_bytes(spoilt[: data.draw(st.sampled_from([len(spoilt), at + 1]))])
    try:
        unpack(folder / "x", folder / "out")
    except UnpackError as error:
        assert str(error).startswith(f"{folder}/x: ")
    left = list((folder / "out").rglob("*"))
    assert not any(path.name.endswith(".part") for path in left)
    if kind in ("zip", "deflated"):  # each member has a checksum
        assert all(path.read_bytes() in members.values() for path in left if path.is_file())
    assert [path.name for path in folder.iterdir() if path.name not in ("x", "out")] == []


def test_what_is_no_archive_is_named(tmp_path):
    for content, found in {
        b"<!doctype html><html>Quota exceeded": "it is an HTML page",
        b"version https://git-lfs.github.com/spec/v1\n": "it is a Git LFS pointer",
        b"": "it is neither a zip nor a tar archive",
        b"hello " * 1000: "it is neither a zip nor a tar archive",
        bytes(10_000): "it holds no images",
        zipped({}): "it holds no images",
        tarred({"notes.txt": b"x"}): "it holds no images",
        gzip.compress(b"hello"): "it is compressed by gzip",
    }.items():
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(DamagedError, match=f"x: cannot be unpacked: {found}"):
            unpack(tmp_path / "x", tmp_path / "out")


def test_an_encrypted_zip_is_named_with_its_member(tmp_path):
    archive = bytearray(zipped({"a.jpg": b"x" * 100}))
    archive[6] |= 1
    archive[archive.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "x").write_bytes(archive)
    with pytest.raises(UnpackError, match="member 'a.jpg' cannot be unpacked: .*encrypted"):
        unpack(tmp_path / "x", tmp_path / "out")


def test_a_tar_may_end_with_a_zip(tmp_path):
    (tmp_path / "x").write_bytes(tarred({"a.jpg": b"aa", "masks.zip": zipped({"b.jpg": b"b"})}))
    assert unpack(tmp_path / "x", tmp_path / "out") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.jpg"]


def test_names_that_differ_by_case_are_kept_apart_or_refused(tmp_path):
    members = {"a.jpg": b"11", "A.jpg": b"22", "b.jpg": b"33"}
    (tmp_path / "x").write_bytes(zipped(members))
    assert unpack(tmp_path / "x", tmp_path / "out") == 3
    assert (tmp_path / "out/A.jpg").read_bytes() == b"22"
    # A file system without capitals, where both names are one file.
    (tmp_path / "out/A.jpg").unlink()
    (tmp_path / "out/A.jpg").hardlink_to(tmp_path / "out/a.jpg")
    with pytest.raises(UnpackError, match="two members for 'a.jpg', one is 'A.jpg'"):
        unpack(tmp_path / "x", tmp_path / "out")


def test_a_full_disk_is_no_damage_of_the_archive(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(zipped({"a.jpg": b"x" * 100}))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(UnpackError, match="member 'a.jpg': .*cannot be written: No space") as found:
        unpack(tmp_path / "x", tmp_path / "out")
    assert not isinstance(found.value, DamagedError)
    assert not list((tmp_path / "out").iterdir())


# The command, over a small table


@pytest.fixture
def table(monkeypatch, server):
    """Two sources like the real ones, on the local server."""
    server.files["/notes.json"] = b'[{"id": 1}]'
    server.files["/images.zip"] = zipped({f"train/{i}.jpg": jpeg() for i in range(5)})
    notes, images = server.files["/notes.json"], server.files["/images.zip"]
    small = {
        "notes": Source(
            "notes",
            "records",
            "free",
            "https://example.org",
            (Part("notes.json", len(notes), server.url("/notes.json")),),
        ),
        "pictures": Source(
            "pictures",
            "images",
            "free",
            "https://example.org",
            (
                Part(
                    "pictures/images.zip",
                    len(images),
                    server.url("/images.zip"),
                    unpack_to="pictures/train",
                    images=5,
                ),
            ),
        ),
    }
    monkeypatch.setattr(sources, "SOURCES", small)
    monkeypatch.setattr(command, "SOURCES", {**SOURCES, **small})
    monkeypatch.setattr(sources, "GROUPS", {"all": tuple(small)})
    return small


def options(tmp_path, **changes):
    return Options(tmp_path / "mix", patience=HURRIED, quiet=True, **changes)


def test_sets_are_fetched_and_unpacked_once(table, server, tmp_path):
    outcomes = download(list(table.values()), options(tmp_path))
    assert [(o.path, o.state, o.note) for o in outcomes] == [
        ("notes.json", "complete", ""),
        ("pictures/images.zip", "complete", "5 images"),
    ]
    assert len(list((tmp_path / "mix/pictures/train").glob("*.jpg"))) == 5
    before = len(server.requests)
    (tmp_path / "mix/pictures/train/0.jpg").unlink()
    download(list(table.values()), options(tmp_path))
    assert len(server.requests) == before
    assert len(list((tmp_path / "mix/pictures/train").glob("*.jpg"))) == 4


def test_archives_can_go_and_are_not_fetched_again(table, server, tmp_path):
    download([table["pictures"]], options(tmp_path, delete_archives=True))
    assert not (tmp_path / "mix/pictures/images.zip").exists()
    (outcome,) = download([table["pictures"]], options(tmp_path))
    assert outcome.state == "complete" and server.counts()["/images.zip"] == 1


def test_a_failure_is_named_and_stops_nothing_else(table, server, tmp_path):
    server.faults["/images.zip"] = [404]
    outcomes = download(list(table.values()), options(tmp_path))
    assert [outcome.state for outcome in outcomes] == ["complete", "failed"]
    shown = summary(outcomes, tmp_path)
    assert "notes              1 of 1 complete" in shown
    assert "failed: pictures/images.zip: http" in shown and "HTTP 404" in shown


def test_a_damaged_archive_is_put_aside_noted_and_fetched_anew(table, server, tmp_path):
    good = server.files["/images.zip"]
    spoilt = bytearray(good)
    spoilt[good.index(b"\xff\xd8") + 300] ^= 255
    server.files["/images.zip"] = bytes(spoilt)
    folder = tmp_path / "mix/pictures"
    (outcome,) = download([table["pictures"]], options(tmp_path))
    assert outcome.state == "failed" and "kept as images.zip.damaged" in outcome.note
    assert "member 'train/0.jpg' cannot be unpacked: Bad CRC-32" in outcome.note
    assert (folder / "images.zip.failed").read_text().strip() == outcome.note
    assert (folder / "images.zip.damaged").read_bytes() == spoilt
    assert not (folder / "images.zip.unpacked").exists()
    server.files["/images.zip"] = good
    (outcome,) = download([table["pictures"]], options(tmp_path))
    assert (outcome.state, outcome.note) == ("complete", "5 images")
    assert not (folder / "images.zip.failed").exists()


def test_a_damaged_archive_brought_by_hand_stays_and_is_looked_at_again(tmp_path):
    archive = tmp_path / "mix/wikiart/wikiart.zip"
    archive.parent.mkdir(parents=True)
    spoilt = bytearray(TAR)
    spoilt[20480:20992] = bytes(512)
    archive.write_bytes(spoilt)
    for _ in range(2):
        (outcome,) = download(choose(["wikiart"]), options(tmp_path))
        assert outcome.state == "failed" and "(after 10 members)" in outcome.note
        assert "fetch it again, and save it in its place" in outcome.note
    archive.write_bytes(TAR)
    (outcome,) = download(choose(["wikiart"]), options(tmp_path))
    assert (outcome.state, outcome.note) == ("complete", "20 images")


def test_an_archive_with_fewer_images_than_known_is_not_complete(table, server, tmp_path):
    (part,) = table["pictures"].parts
    more = Source("pictures", "images", "free", "https://x.org", (replace(part, images=6),))
    folder = tmp_path / "mix/pictures"
    # As an earlier version left it.
    assert download([table["pictures"]], options(tmp_path))[0].state == "complete"
    for _ in range(2):
        (outcome,) = download([more], options(tmp_path))
        assert outcome.state == "failed" and "holds 5 images; expected 6" in outcome.note
        assert not (folder / "images.zip.unpacked").exists()
    rough = Source("pictures", "", "", "", (replace(part, images=6, rough_images=True),))
    assert download([rough], options(tmp_path))[0].state == "complete"


def test_the_exit_code_tells_if_all_is_there(table, server, tmp_path, capsys):
    words = ["download", "--root", str(tmp_path / "mix")]
    assert command.run(build_parser().parse_args(words)) == 0
    server.files["/notes.json"] = b"[]"
    (tmp_path / "mix/notes.json").unlink()
    assert command.run(build_parser().parse_args(words)) == 1
    assert "expected 11; deleted" in capsys.readouterr().out


def test_a_killed_run_completes_the_next_time(table, server, tmp_path):
    images = {f"train/{i}.jpg": jpeg(size=(64, 64)) * 30 for i in range(300)}
    server.files["/images.zip"] = zipped(images)
    part = table["pictures"].parts[0]
    size = len(server.files["/images.zip"])
    bigger = Part(part.path, size, part.url, unpack_to=part.unpack_to)
    source = Source("pictures", "images", "free", "https://example.org", (bigger,))
    folder = tmp_path / "mix/pictures/train"
    server.speed = 20e6
    for wait in (
        lambda: (tmp_path / "mix/pictures/images.zip.part").exists(),
        lambda: len(list(folder.glob("*.jpg"))) > 20,
    ):
        child = multiprocessing.get_context("fork").Process(
            target=download, args=([source], options(tmp_path))
        )
        child.start()
        while not wait():
            assert child.is_alive()
            time.sleep(0.001)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert not (tmp_path / "mix/pictures/images.zip.unpacked").exists()
    (outcome,) = download([source], options(tmp_path))
    assert outcome.state == "complete"
    assert {f"train/{path.name}": path.read_bytes() for path in folder.iterdir()} == images


# Where a person must act


def test_what_needs_a_person_says_what_to_do(tmp_path):
    outcomes = download(choose(["wikiart", "sam", "ocr_vqa"]), options(tmp_path))
    assert {outcome.state for outcome in outcomes} == {"by hand"}
    shown = summary(outcomes, tmp_path)
    assert "sam                0 of 51 complete" in shown
    assert "accept the licence at https://ai.meta.com/" in shown and "sam/links.txt" in shown
    assert "save it as wikiart/wikiart.zip" in shown and "dataset.json" in shown


def test_an_archive_brought_by_hand_is_unpacked(tmp_path):
    archive = tmp_path / "mix/wikiart/wikiart.zip"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(zipped({"data/wikiart/images/a.jpg": jpeg()}))
    (outcome,) = download(choose(["wikiart"]), options(tmp_path))
    assert outcome.state == "complete"
    assert (tmp_path / "mix/wikiart/images/a.jpg").exists()


def test_sam_comes_from_its_file_of_links(server, tmp_path):
    folder = tmp_path / "mix/sam"
    folder.mkdir(parents=True)
    server.files |= {
        f"/{i}": tarred({f"./sa_{i}.jpg": jpeg(), f"./sa_{i}.json": b"{}"}) for i in range(2)
    }
    lines = ["file_name\tcdn_link"]
    lines += [f"sa_00000{i}.tar\t{server.url(f'/{i}')}" for i in range(2)]
    (folder / "links.txt").write_text("\n".join(lines))
    rough = [Part(p.path, 0, unpack_to=p.unpack_to) for p in SOURCES["sam"].parts[:3]]
    sam = Source("sam", "images", "form", "https://ai.meta.com", tuple(rough), "get the links")
    outcomes = download([sam], options(tmp_path))
    assert [outcome.state for outcome in outcomes] == ["complete", "complete", "failed"]
    assert "no line for sa_000002.tar" in outcomes[2].note
    assert sorted(path.name for path in (folder / "images").iterdir()) == ["sa_0.jpg", "sa_1.jpg"]


def test_covers_are_saved_as_jpg_and_dead_links_counted_and_listed(server, tmp_path):
    png = io.BytesIO()
    Image.new("RGB", (5, 5)).save(png, "PNG")
    pixel = io.BytesIO()
    Image.new("P", (1, 1)).save(pixel, "GIF")
    server.files |= {
        "/a.jpg": jpeg(),
        "/b.png": png.getvalue(),
        "/gone.gif": pixel.getvalue(),
        "/page.jpg": b"<html>",
    }
    names = {"1": "/a.jpg", "2": "/b.png", "3": "/gone.gif", "4": "/page.jpg", "5": "/none.jpg"}
    dataset = tmp_path / "mix/ocr_vqa/dataset.json"
    dataset.parent.mkdir(parents=True)
    entries = {key: {"imageURL": server.url(name)} for key, name in names.items()}
    dataset.write_text(json.dumps(entries))
    (outcome,) = download(choose(["ocr_vqa"]), options(tmp_path))
    assert (outcome.state, outcome.note) == ("complete", "2 images, 3 dead links")
    images = dataset.parent / "images"
    assert sorted(path.name for path in images.iterdir()) == ["1.jpg", "2.jpg"]
    assert (images / "2.jpg").read_bytes() == png.getvalue()
    listed = (dataset.parent / "dead_links.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == ["3", "4", "5"]
    assert "one pixel" in listed[0] and "not an image" in listed[1] and "HTTP 404" in listed[2]


def covers(tmp_path, entries) -> tuple:
    """The outcome of fetching those entries, and what is listed as dead."""
    dataset = tmp_path / "mix/ocr_vqa/dataset.json"
    dataset.parent.mkdir(parents=True)
    dataset.write_text(json.dumps(entries))
    (outcome,) = download(choose(["ocr_vqa"]), options(tmp_path))
    dead = dataset.parent / "dead_links.txt"
    return outcome, dead.read_text().splitlines() if dead.exists() else None


def test_odd_links_and_entries_are_listed_and_the_set_goes_on(server, tmp_path):
    server.files["/a.jpg"] = jpeg()
    server.faults |= {"/long.jpg": ["bad-length"], "/loop.jpg": ["loop"] * 50}
    server.faults |= {"/stuck.jpg": [500] * 9, "/nothing.jpg": ["drop"] * 9}
    server.files |= {"/long.jpg": jpeg(), "/cut-unsaid.jpg": jpeg()[:-200]}
    odd = {
        "ipv6": "http://[::1",
        "label": f"http://{'a' * 64}.org/a.jpg",
        "port": "http://127.0.0.1:99999/a.jpg",
        "loop": server.url("/loop.jpg"),
        "stuck": server.url("/stuck.jpg"),
        "unsaid": server.url("/cut-unsaid.jpg"),
        "nothing": server.url("/nothing.jpg"),
        "tls": server.url("/a.jpg").replace("http", "https"),
        "u": server.url("/ü.jpg"),
        "file": "file:///etc/passwd",
        "line": server.url("/a\nb\t.jpg"),
        "half": server.url("/\ud800.jpg"),
        "a" * 300: server.url("/a.jpg"),
        "../1": server.url("/a.jpg"),
        "number": 7,
    }
    good = {"good": server.url("/a.jpg"), "length": server.url("/long.jpg")}
    entries = {key: {"imageURL": url} for key, url in {**odd, **good}.items()}
    outcome, listed = covers(tmp_path, {**entries, "list": ["x"], "none": None, "keys": {}})
    assert (outcome.state, outcome.note) == ("complete", "2 images, 18 dead links")
    images = tmp_path / "mix/ocr_vqa/images"
    assert sorted(path.name for path in images.iterdir()) == ["good.jpg", "length.jpg"]
    names = [line.split("\t")[0] for line in listed]
    assert names == [key[:200] for key in odd] + ["list", "none", "keys"]
    reasons = dict(zip(names, listed, strict=True))
    for name, reason in {
        "label": "label",
        "loop": "infinite loop",
        "stuck": "gave up after 3 tries: HTTP 500",
        "unsaid": "not an image: ",
        "tls": "SSL",
        "u": "HTTP 404",
        "../1": "cannot be a file's name",
        "list": "has no 'imageURL'",
    }.items():
        assert reason in reasons[name], name
    assert server.counts()["/stuck.jpg"] == 3


def test_a_disk_that_is_full_ends_the_covers_with_its_name(server, tmp_path, monkeypatch):
    server.files["/a.jpg"] = jpeg()

    def full(self, chunk):
        raise WriteError(f"{self._handle.name}: cannot be written: No space left on device")

    monkeypatch.setattr("sqllava.data.fetch._Transfer._write", full)
    entries = {str(number): {"imageURL": server.url("/a.jpg")} for number in range(500)}
    outcome, listed = covers(tmp_path, entries)
    assert outcome.state == "failed" and "No space left on device" in outcome.note
    assert listed is None and len(server.requests) < 500


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(
        st.text(max_size=6),
        st.dictionaries(
            st.sampled_from(["imageURL", "x"]),
            st.text(max_size=8) | st.text(max_size=8).map("http://".__add__) | st.none(),
        )
        | st.none()
        | st.text(max_size=3),
        max_size=4,
    )
)
def test_any_dataset_json_is_fetched_or_named(tmp_path_factory, entries):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.create_connection", _refuse)
        outcome, _ = covers(tmp_path_factory.mktemp("any"), entries)
    assert outcome.state == "failed" if entries else outcome.note == "0 images, 0 dead links"


def _refuse(*_, **__):
    raise ConnectionRefusedError("refused")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("<!DOCTYPE html><html>", "an HTML page"),
        ("[]", "expected an object"),
        ('{"1": {"url": "x"}}', "no 'imageURL'"),
        ('{"1": {"imageURL": "file:///etc/passwd"}}', "no 'imageURL'"),
        ('{"../1": {"imageURL": "http://127.0.0.1:1/"}}', "cannot be a file's name"),
    ],
)
def test_a_wrong_dataset_json_is_named(tmp_path, text, message):
    dataset = tmp_path / "mix/ocr_vqa/dataset.json"
    dataset.parent.mkdir(parents=True)
    dataset.write_text(text)
    (outcome,) = download(choose(["ocr_vqa"]), options(tmp_path))
    assert outcome.state == "failed" and message in outcome.note


def test_little_space_is_said_first(tmp_path, caplog, monkeypatch):
    usage = argparse.Namespace(free=10**9)
    monkeypatch.setattr(command.shutil, "disk_usage", lambda _: usage)
    command._warn_of_little_space(choose(["coco"]), tmp_path)
    assert "1.0 GB free, but what is missing needs up to 38.7 GB" in caplog.text

"""The download command: the table, the layout, archives, and where a person must act."""

import argparse
import io
import json
import multiprocessing
import signal
import tarfile
import time
import zipfile
from urllib.parse import urlsplit

import pytest
from PIL import Image
from servers import FileServer

from sqllava.data import download as command
from sqllava.data import sources
from sqllava.data.cli import build_parser, main
from sqllava.data.download import Options, download, listing, summary
from sqllava.data.fetch import Patience
from sqllava.data.sources import SOURCES, Part, Source, choose, image_folders
from sqllava.data.unpack import UnpackError, unpack

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


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
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

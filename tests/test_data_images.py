"""Image files: what is read from each kind, and what is refused."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from sqllava.data import images as reading
from sqllava.data.images import load_image, read_image, resolve_image
from sqllava.pixels import MAX_PIXELS, MAX_SIDE, ImageError, ImagePreparer, to_rgb


def colours(size=(8, 6)) -> Image.Image:
    return Image.fromarray(np.arange(size[0] * size[1] * 3, dtype=np.uint8).reshape(*size[::-1], 3))


def save(path, image, **options):
    image.save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.webp", "wrong.txt"])
def test_rgb_files_come_as_they_are(tmp_path, name):
    kind = None if "a" in name else "JPEG"
    path = save(tmp_path / name, colours(), **({"format": kind} if kind else {}))
    image = load_image(path)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(path).convert("RGB")))


def test_what_prepares_a_picture_is_had_where_it_is_read():
    assert reading.ImagePreparer is ImagePreparer
    assert reading.ImageError is ImageError


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_other_modes_are_converted(tmp_path, mode):
    image = load_image(save(tmp_path / "a.png", colours().convert(mode)))
    assert image.mode == "RGB" and image.size == (8, 6)


def test_cmyk(tmp_path):
    path = save(tmp_path / "a.jpg", Image.new("CMYK", (8, 6), (255, 0, 0, 0)), quality=95)
    red, green, blue = load_image(path).getpixel((3, 3))
    assert red < 10 and green > 245 and blue > 245


def test_transparency_leaves_the_colour_beneath(tmp_path):
    path = save(tmp_path / "a.png", Image.new("RGBA", (2, 2), (200, 100, 50, 0)))
    assert load_image(path).getpixel((0, 0)) == (200, 100, 50)


def test_sixteen_bit_greys_are_scaled(tmp_path):
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        image = load_image(save(tmp_path / name, Image.fromarray(values)))
        assert [image.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]
    wide = load_image(save(tmp_path / "b.tif", Image.fromarray(values.astype(np.int32))))
    assert [wide.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]
    dark = load_image(save(tmp_path / "c.tif", Image.fromarray(np.array([[7]], dtype=np.int32))))
    assert dark.getpixel((0, 0)) == (7, 7, 7)


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("name", ["a.png", "a.tif", "int32.tif", "big-endian.tif", "float.tif"])
def test_a_grey_scan_of_any_depth_looks_like_itself(tmp_path, bits, name):
    values = GREY.astype(np.uint16) << (bits - 8)
    image = Image.fromarray(values)
    if name.startswith("big"):
        image = Image.frombytes("I;16B", (16, 16), values.astype(">u2").tobytes())
    elif name.startswith("int"):
        image = Image.fromarray(values.astype(np.int32))
    elif name.startswith("float"):
        image = Image.fromarray(values.astype(np.float32))
    loaded = read_image(save(tmp_path / name, image))
    assert np.array_equal(np.asarray(loaded.image)[..., 1], GREY)
    assert loaded.scaled == ("" if bits == 8 else f"{bits} bits")
    if bits == 8:  # then the published code saw it right
        assert np.array_equal(np.asarray(Image.open(tmp_path / name).convert("RGB"))[..., 1], GREY)


def test_floats_of_zero_to_one_and_values_of_no_known_range_are_stretched(tmp_path):
    floats = (GREY / 255).astype(np.float32)
    loaded = read_image(save(tmp_path / "a.tif", Image.fromarray(floats)))
    assert np.array_equal(np.asarray(loaded.image)[..., 0], GREY)
    assert loaded.scaled == "floats of 0 to 1"
    others = {
        "past 1": floats * 7,
        "around 0": floats - 0.5,
        "hounsfield": (GREY.astype(np.int32) * 16) - 1024,
        "long": GREY.astype(np.int32) * 8_000_000,
        "tiny": floats * 1e5 - 3e4,
    }
    for name, values in others.items():
        loaded = read_image(save(tmp_path / "b.tif", Image.fromarray(values)))
        difference = np.abs(np.asarray(loaded.image)[..., 0].astype(int) - GREY)
        assert difference.max() <= 1, name
        assert loaded.scaled == "from the darkest to the brightest value"


def test_floats_that_are_no_numbers_do_not_spoil_the_others(tmp_path):
    values = np.array([[0.0, 0.5, 1.0, np.nan, np.inf, -np.inf]], dtype=np.float32)
    image = load_image(save(tmp_path / "a.tif", Image.fromarray(values)))
    assert [image.getpixel((x, 0))[0] for x in range(6)] == [0, 128, 255, 0, 255, 0]
    nothing = Image.fromarray(np.full((2, 2), np.nan, np.float32))
    with pytest.raises(ImageError, match=r"a\.tif: .*without a single finite value"):
        load_image(save(tmp_path / "a.tif", nothing))
    for flat in (0.0, 1.0, 300.0, -5.0):
        load_image(save(tmp_path / "a.tif", Image.fromarray(np.full((2, 2), flat, np.float32))))


def deep_png(values: np.ndarray, color: int) -> bytes:
    """A PNG of 16 bits a channel, which Pillow reads but does not write; values [H, W, C]."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


@pytest.mark.parametrize(("color", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_deep_colours_are_read_as_published_and_refused_where_that_is_black(
    tmp_path, color, channels
):
    path = tmp_path / "a.png"
    values = np.repeat(GREY.astype(np.uint16)[..., None], channels, axis=2)
    path.write_bytes(deep_png(values << 8, color))
    assert np.array_equal(np.asarray(load_image(path))[..., 0], GREY)
    for shift in (0, 4):
        spoilt = values << shift
        if channels != 3:
            spoilt[..., -1] = 65535
        path.write_bytes(deep_png(spoilt, color))
        with pytest.raises(ImageError, match=r"a\.png: 16 bits a channel, .*save it with 8 bits"):
            load_image(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGB", "CMYK", "YCbCr"])
def test_pictures_of_8_bits_keep_their_published_pixels(mode):
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    image = image.convert("LA").convert("PA") if mode == "PA" else image.convert(mode)
    loaded = to_rgb(image)
    assert np.array_equal(np.asarray(loaded.image), np.asarray(image.convert("RGB")))
    assert not loaded.scaled


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_the_first_frame_counts(tmp_path, name):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    path = save(tmp_path / name, frames[0], save_all=True, append_images=frames[1:])
    red, _, blue = load_image(path).getpixel((0, 0))
    assert red > 240 and blue < 15


def test_exif_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "a.jpg", colours((8, 6)), exif=exif)
    assert load_image(path).size == (8, 6)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF"])
def test_truncated_files_are_refused(tmp_path, kind):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    data = buffer.getvalue()
    path = tmp_path / "cut.img"
    for share in (0.001, 0.1, 0.5, 0.8):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ImageError, match=r"cut\.img: ."):
            load_image(path)


def test_what_is_no_image_is_refused(tmp_path):
    path = tmp_path / "page.jpg"
    path.write_text("<html>404</html>")
    with pytest.raises(ImageError, match=r"page\.jpg: cannot identify"):
        load_image(path)
    with pytest.raises(ImageError, match="nowhere"):
        load_image(tmp_path / "nowhere.png")


def test_bombs_are_refused_before_they_are_decoded(tmp_path):
    path = save(tmp_path / "a.png", Image.new("L", (100, 100)))
    assert load_image(path, max_pixels=10_000).size == (100, 100)
    with pytest.raises(ImageError, match="100x100 is more than 9999 pixels"):
        load_image(path, max_pixels=9_999)


def test_long_sides_are_refused_before_they_are_decoded(tmp_path):
    assert load_image(save(tmp_path / "a.png", Image.new("1", (MAX_SIDE, 2)))).width == MAX_SIDE
    path = save(tmp_path / "b.png", Image.new("1", (1, MAX_SIDE + 1)))
    with pytest.raises(ImageError, match=r"b\.png: 1x65536 has a side of more than 65535 pixels"):
        load_image(path)


def test_names_in_the_folder_are_found(tmp_path):
    root = tmp_path / "images"
    (root / "coco").mkdir(parents=True)
    file = save(root / "coco" / "a.png", colours())
    for name in ("coco/a.png", "./coco/../coco/a.png", str(file)):
        assert resolve_image(root, name) == file
    assert resolve_image(os.path.relpath(root), "coco/a.png") == file


def test_linked_folders_are_followed(tmp_path):
    root, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    save(elsewhere / "a.png", colours())
    (root / "coco").symlink_to(elsewhere)
    assert resolve_image(root, "coco/a.png").is_file()
    with pytest.raises(ImageError, match="not found"):
        resolve_image(root, "coco/../elsewhere/a.png")


def test_names_that_leave_the_folder_are_refused(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    outside = save(tmp_path / "secret.png", colours())
    (tmp_path / "images2").mkdir()
    save(tmp_path / "images2" / "a.png", colours())
    for name in ("../secret.png", "x/../../secret.png", str(outside), "../images2/a.png"):
        with pytest.raises(ImageError, match="leads out of the image folder"):
            resolve_image(root, name)


@pytest.mark.parametrize("name", ["no.png", ".", "a" * 5000, "a\0b", "\ud800.png"])
def test_missing_files_are_named(tmp_path, name):
    with pytest.raises(ImageError, match="not found in the image folder") as caught:
        resolve_image(tmp_path, name)
    str(caught.value).encode()
    with pytest.raises(ImageError, match="which does not exist"):
        resolve_image(tmp_path / "gone", name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://example.org/a.png", "is an address; only files are read: save it"),
        ("data:image/png;base64," + "A" * 10_000, "is the picture itself .*only files are read"),
        ("/coco/a.png", "leads out of the image folder .*; 'coco/a.png' is there"),
        ("coco\\a.png", "not found in the image folder .*; 'coco/a.png' is there"),
        ("coco", "is a folder, a file was not found"),
        ("pipe", "is no regular file"),
    ],
)
def test_names_that_are_meant_otherwise_say_what_would_be_right(tmp_path, name, message):
    (tmp_path / "coco").mkdir()
    save(tmp_path / "coco" / "a.png", colours())
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match=message) as caught:
        resolve_image(tmp_path, name)
    assert len(str(caught.value)) < 700


def test_a_picture_that_may_not_be_read_is_told_from_one_that_is_missing(tmp_path, monkeypatch):
    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.stat", denied)
    with pytest.raises(ImageError, match=r"'a\.png' may not be read \(permission denied\)"):
        resolve_image(tmp_path, "a.png")


def clip_settings(edge: int) -> dict:
    return {"size": {"shortest_edge": edge}, "crop_size": {"height": edge, "width": edge}}


SIDES = st.integers(1, 90)


@settings(deadline=None, max_examples=60)
@given(SIDES, SIDES, st.booleans(), st.integers(0, 2**32 - 1))
def test_pixel_values_are_those_of_the_image_processor_bit_for_bit(width, height, pad, seed):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    processor = LlavaImageProcessorPil(**clip_settings(28), do_pad=pad)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    prepared = ImagePreparer(processor)(image)
    assert prepared.dtype == torch.float32 and torch.equal(prepared, expected)


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 900),
    st.integers(1, 60),
    st.booleans(),
    st.sampled_from([28, 37, 224, 336, 384]),
    st.sampled_from([Image.Resampling.BICUBIC, Image.Resampling.BILINEAR]),
    st.integers(0, 2**32 - 1),
)
def test_strips_prepared_in_bands_have_the_published_pixels(
    long, short, tall, edge, resample, seed
):
    width, height = (short, long) if tall else (long, short)
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    processor = LlavaImageProcessorPil(**clip_settings(edge), do_pad=True, resample=resample)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sqllava.pixels.MAX_PIXELS", long * short)  # in several bands
        preparer = ImagePreparer(processor)
        assert preparer.is_large(image) == (long != short)
        assert torch.equal(preparer(image), expected)


@pytest.mark.parametrize("size", [(30_000, 1), (1, 20_000), (65_000, 100)])
def test_a_long_strip_takes_little_memory(size, monkeypatch):
    largest = 0
    real = Image.new

    def counted(mode, size, *color):
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return real(mode, size, *color)

    preparer = ImagePreparer(LlavaImageProcessorPil(**clip_settings(336), do_pad=True))
    strip = Image.new("RGB", size, (255, 0, 0))
    monkeypatch.setattr("sqllava.pixels.Image.new", counted)
    pixels = np.asarray(preparer.view(strip))
    assert largest < MAX_PIXELS / 3
    middle, edge = pixels[168, 168].tolist(), pixels[0, 0].tolist()
    assert edge == [122, 116, 104] and middle[0] >= edge[0]


def test_a_strip_whose_middle_would_be_blown_up_is_refused():
    preparer = ImagePreparer(LlavaImageProcessorPil(**clip_settings(336)))
    with pytest.raises(ImageError, match="30000x1 is too thin to be cropped: .* 10080000x336"):
        preparer.view(Image.new("RGB", (30_000, 1)))
    assert preparer.view(Image.new("RGB", (300, 1))).size == (336, 336)


def test_cropping_is_that_of_clips_own_processor():
    image = colours((31, 22)).resize((310, 220))
    expected = CLIPImageProcessorPil(**clip_settings(56))(image, return_tensors="pt")
    prepared = ImagePreparer(LlavaImageProcessorPil(**clip_settings(56)))(image)
    assert torch.equal(prepared, expected["pixel_values"][0])


def test_pixel_values_are_those_of_the_published_code(golden):
    preparer = ImagePreparer(LlavaImageProcessorPil(**clip_settings(56), do_pad=True))
    images = [load_image(golden / "images" / f"{i}.png") for i in range(4)]
    published = load_file(golden / "numbers.safetensors")["pixel_values_pad"]
    assert torch.allclose(torch.stack([preparer(i) for i in images]), published, atol=1e-6)


def test_every_level_is_scaled_and_normalised():
    preparer = ImagePreparer(LlavaImageProcessorPil(**clip_settings(16)))
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([levels, levels.T, 255 - levels], axis=-1))
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    values = preparer(image).numpy()
    for channel in range(3):
        exact = (np.asarray(image)[:, :, channel] / 255 - mean[channel]) / std[channel]
        assert np.abs(values[channel] - exact).max() < 1e-6


def test_draft_decoding_is_off_by_default_and_never_below_what_is_asked(tmp_path):
    path = save(tmp_path / "a.jpg", colours((100, 80)).resize((1000, 800)), quality=90)
    whole = load_image(path)
    assert whole.size == (1000, 800)
    drafted = load_image(path, draft=336)
    assert drafted.size == (500, 400)
    assert load_image(path, draft=900).size == (1000, 800)
    difference = np.abs(np.asarray(drafted, float) - np.asarray(whole.reduce(2), float))
    assert 0 < difference.mean() < 5
    png = save(tmp_path / "a.png", whole)
    assert load_image(png, draft=100).size == (1000, 800)

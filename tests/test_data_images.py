"""Image files: what is read from each kind, and what is refused."""

import io
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from sqllava.data.images import ImageError, ImagePreparer, load_image, resolve_image


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


def test_the_first_frame_counts(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    path = save(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert load_image(path).getpixel((0, 0)) == (255, 0, 0)


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

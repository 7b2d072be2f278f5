"""Images a second on one core, from JPEG file to pixel values: the published way beside ours.

    python tests/bench/bench_decode.py [--check]

Prints one JSON object last: images per second of processor time for 640x480 JPEGs and for larger
ones, the parts that remain, the largest difference in pixel values (0: the same bits), and what
--jpeg_draft gains and costs. With --check it exits 1 when ours feeds less than 1.3 times the
images of the published way. `METHOD` says how it measures.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from sqllava.data.images import load_image
from sqllava.pixels import ImagePreparer

LIMITS = {"images_per_second": 1.3}
METHOD = (
    "seconds of processor time of one thread, the least of --repeats rounds over --images files "
    "that lie in the system's cache, forms taken in turn; published: Image.open, convert, paste on "
    "a square of the mean color, then the steps of transformers 4.31's CLIPImageProcessor in order "
    "(array, image, resize, array, crop, rescale, normalise, channels first), written as arrays"
)
EDGE = 336
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def published(path: Path) -> torch.Tensor:
    """What the published dataset and image processor do with one file -> [3, 336, 336]."""
    image = Image.open(path).convert("RGB")
    side = max(image.size)
    if image.width != image.height:
        square = Image.new("RGB", (side, side), tuple(int(x * 255) for x in MEAN))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    pixels = np.array(image)
    resized = np.array(Image.fromarray(pixels).resize((EDGE, EDGE), Image.Resampling.BICUBIC))
    cropped = resized[:EDGE, :EDGE]
    scaled = (cropped * (1 / 255)).astype(np.float32)
    normalized = (scaled - MEAN.astype(np.float32)) / STD.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(normalized.transpose(2, 0, 1)))


def photograph(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """A picture with the detail of a photograph: smooth shapes, and grain."""
    width, height = size
    smooth = rng.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    grain = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(smooth).resize(size, Image.Resampling.BICUBIC)
    return Image.blend(picture, Image.fromarray(grain), 0.08)


def seconds(form: Callable[[Path], torch.Tensor], paths: list[Path]) -> float:
    """Processor time of one image."""
    start = time.process_time()
    for path in paths:
        form(path)
    return (time.process_time() - start) / len(paths)


def parts(path: Path, repeats: int) -> dict[str, float]:
    """Milliseconds of the steps that no way around the published pixels avoids."""
    image = load_image(path)
    square = Image.new("RGB", (max(image.size),) * 2)
    steps = {"decode": lambda: load_image(path), "resize": lambda: square.resize((EDGE, EDGE), 3)}
    found = {}
    for name, step in steps.items():
        times = []
        for _ in range(repeats):
            start = time.process_time()
            for _ in range(10):
                step()
            times.append((time.process_time() - start) * 100)
        found[name] = round(min(times), 2)
    return found


def measure(size: tuple[int, int], args: argparse.Namespace) -> dict:
    """All forms on images of one size."""
    rng = np.random.default_rng(0)
    processor = LlavaImageProcessorPil(
        size={"shortest_edge": EDGE}, crop_size={"height": EDGE, "width": EDGE}, do_pad=True
    )
    preparer = ImagePreparer(processor)
    forms: dict[str, Callable[[Path], torch.Tensor]] = {
        "published": published,
        "transformers": lambda path: processor(
            Image.open(path).convert("RGB"), return_tensors="pt"
        )["pixel_values"][0],
        "ours": lambda path: preparer(load_image(path)),
        "ours_draft": lambda path: preparer(load_image(path, draft=EDGE)),
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{i}.jpg") for i in range(args.images)]
        for path in paths:
            photograph(size, rng).save(path, quality=90)
        times: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(args.repeats + 1):  # the first round warms up
            for name, form in forms.items():
                times[name].append(seconds(form, paths))
        best = {name: min(times[name][1:]) for name in forms}
        values = {name: torch.stack([form(path) for path in paths]) for name, form in forms.items()}
        levels = torch.tensor(STD * 255, dtype=torch.float32)[:, None, None]
        draft = (values["ours_draft"] - values["ours"]).abs() * levels
        return {
            "images_per_second": {name: round(1 / best[name], 1) for name in forms},
            "ratio": round(best["published"] / best["ours"], 2),
            "ratio_draft": round(best["published"] / best["ours_draft"], 2),
            "milliseconds": parts(paths[0], args.repeats),
            "largest_difference": {
                name: float((values["ours"] - values[name]).abs().max())
                for name in ("published", "transformers")
            },
            "draft_levels": {"mean": round(float(draft.mean()), 2), "most": float(draft.max())},
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="exit 1 below the limit")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {
        f"{width}x{height}": measure((width, height), args)
        for width, height in ((640, 480), (1280, 960), (2560, 1920))
    }
    ratio = results["640x480"]["ratio"]
    report = {
        "bench": "decode",
        "settings": {"images": args.images, "repeats": args.repeats},
        "method": METHOD,
        "results": results,
        "ratios": {"images_per_second": ratio},
        "limits": LIMITS,
    }
    print(json.dumps(report))
    if args.check and ratio < LIMITS["images_per_second"]:
        print(f"below the limit: {ratio}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

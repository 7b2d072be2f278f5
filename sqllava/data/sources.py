"""The one table of what the recipe trains on: where files come from, how big, under which terms.

Stands at the very start of the data's path: `download.py` fetches by it, `check.py` counts by it.
"""

from dataclasses import dataclass

_HUB = "https://huggingface.co/datasets"
_SHAREGPT4V = f"{_HUB}/Lin-Chen/ShareGPT4V/resolve/main"
_LLAVA_PRETRAIN = f"{_HUB}/liuhaotian/LLaVA-Pretrain/resolve/main"
_DRIVE = "https://drive.google.com"

SAM_SHARDS = tuple(f"sa_{number:06d}.tar" for number in range(51))


@dataclass(frozen=True)
class Part:
    """One file of a source.

    Attributes:
        path: where it is saved, from the root.
        size: bytes; known to two digits only if `rough`. 0 if nobody says.
        url: where it comes from; "" where a person must fetch it.
        checksum: "md5:..." or "sha256:...", if one is published. The hub publishes one for every
            big file when it is asked, so none is written down here for those.
        unpack_to: the folder that the archive's images belong in.
        keep_folders: whether the archive's own folders are kept; else the images lie flat.
        images: how many images are in the folder then; known roughly only if `rough_images`.
    """

    path: str
    size: int
    url: str = ""
    rough: bool = False
    checksum: str = ""
    unpack_to: str = ""
    keep_folders: bool = False
    images: int = 0
    rough_images: bool = False


@dataclass(frozen=True)
class Source:
    """Something to fetch by name.

    Attributes:
        terms: its licence, or the form to fill in.
        page: where a person reads about it, or gets it.
        by_hand: what a person has to do, where a program may not.
    """

    name: str
    what: str
    terms: str
    page: str
    parts: tuple[Part, ...]
    by_hand: str = ""


def _annotations(name: str, what: str, folder: str, file: str, size: int, terms: str) -> Source:
    rough = size % 1_000_000 == 0
    page = folder.removesuffix("/resolve/main")
    return Source(name, what, terms, page, (Part(file, size, f"{folder}/{file}", rough),))


def _archive_by_hand(name: str, what: str, drive_id: str) -> Source:
    archive = f"{name}/{name}.zip"
    page = f"{_DRIVE}/file/d/{drive_id}/view"
    return Source(
        name,
        what,
        "academic use only",
        page,
        # About 500 images each, by the ShareGPT4V paper (section 3.1).
        (Part(archive, 0, unpack_to=f"{name}/images", images=500, rough_images=True),),
        f"download the archive from {page} and save it as {archive}",
    )


_CC_BY_NC = "CC BY-NC 4.0, and OpenAI's terms"

SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        _annotations(
            "sharegpt4v-cap100k",
            "100K captions by GPT4-Vision",
            _SHAREGPT4V,
            "sharegpt4v_instruct_gpt4-vision_cap100k.json",
            133_866_626,
            _CC_BY_NC,
        ),
        _annotations(
            "sharegpt4v-pt",
            "stage 1: 1246K captions by ShareCaptioner",
            _SHAREGPT4V,
            "share-captioner_coco_lcs_sam_1246k_1107.json",
            1_500_000_000,
            _CC_BY_NC,
        ),
        _annotations(
            "sharegpt4v-mix665k",
            "stage 2: 665K conversations",
            _SHAREGPT4V,
            "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json",
            1_200_000_000,
            _CC_BY_NC,
        ),
        _annotations(
            "llava-558k",
            "stage 1, smaller: 558K captions by BLIP",
            _LLAVA_PRETRAIN,
            "blip_laion_cc_sbu_558k.json",
            181_000_000,
            "as CC-3M and BLIP",
        ),
        _annotations(
            "llava-mix665k",
            "stage 2, LLaVA's own: 665K conversations",
            f"{_HUB}/liuhaotian/LLaVA-Instruct-150K/resolve/main",
            "llava_v1_5_mix665k.json",
            1_030_000_000,
            "CC BY 4.0, and OpenAI's terms",
        ),
        Source(
            "lcs",
            "images of LAION-CC-SBU-558K",
            "as CC-3M; research",
            f"{_HUB}/liuhaotian/LLaVA-Pretrain",
            (
                Part(
                    "llava/llava_pretrain/images.zip",
                    27_000_000_000,
                    f"{_LLAVA_PRETRAIN}/images.zip",
                    rough=True,
                    unpack_to="llava/llava_pretrain/images",
                    keep_folders=True,
                    images=558_128,
                ),
            ),
        ),
        Source(
            "coco",
            "COCO train2017",
            "Flickr's terms of use",
            "https://cocodataset.org/#download",
            (
                Part(
                    "coco/train2017.zip",
                    19_336_861_798,
                    "http://images.cocodataset.org/zips/train2017.zip",
                    checksum="md5:cced6f7f71b7629ddf16f17bbcfab6b2",
                    unpack_to="coco/train2017",
                    images=118_287,
                ),
            ),
        ),
        Source(
            "sam",
            "SA-1B, shards 000000 to 000050 (images only)",
            "form: SA-1B research licence",
            "https://ai.meta.com/datasets/segment-anything-downloads/",
            tuple(
                Part(
                    f"sam/{shard}",
                    11_000_000_000,
                    rough=True,
                    unpack_to="sam/images",
                    images=11_186,
                    rough_images=True,
                )
                for shard in SAM_SHARDS
            ),
            "accept the licence at https://ai.meta.com/datasets/segment-anything-downloads/ and "
            "save the file of links (file_name, tab, cdn_link on each line) as sam/links.txt",
        ),
        Source(
            "gqa",
            "GQA images",
            "CC BY 4.0",
            "https://cs.stanford.edu/people/dorarad/gqa/download.html",
            (
                Part(
                    "gqa/images.zip",
                    21_800_000_000,
                    "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
                    rough=True,
                    unpack_to="gqa/images",
                    images=148_854,
                ),
            ),
        ),
        Source(
            "ocr_vqa",
            "OCR-VQA book covers, one by one from their shop's links",
            "research; covers belong to their publishers",
            f"{_DRIVE}/drive/folders/1_GYPY5UkUy7HIcR0zq3ZCFgeZN7BAfm_",
            (Part("ocr_vqa/dataset.json", 0, unpack_to="ocr_vqa/images", images=207_572),),
            "download dataset.json from "
            f"{_DRIVE}/drive/folders/1_GYPY5UkUy7HIcR0zq3ZCFgeZN7BAfm_ and save it as "
            "ocr_vqa/dataset.json",
        ),
        Source(
            "textvqa",
            "TextVQA train and val",
            "CC BY 4.0",
            "https://textvqa.org/dataset/",
            (
                Part(
                    "textvqa/train_val_images.zip",
                    7_072_297_970,
                    "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
                    unpack_to="textvqa/train_images",
                    images=25_119,
                ),
            ),
        ),
        Source(
            "vg",
            "Visual Genome, parts 1 and 2",
            "CC BY 4.0",
            "https://homes.cs.washington.edu/~ranjay/visualgenome/api.html",
            (
                Part(
                    "vg/images.zip",
                    9_731_705_982,
                    "https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip",
                    unpack_to="vg/VG_100K",
                    images=64_346,
                ),
                Part(
                    "vg/images2.zip",
                    5_471_658_058,
                    "https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip",
                    unpack_to="vg/VG_100K_2",
                    images=43_903,
                ),
            ),
        ),
        _archive_by_hand(
            "share_textvqa", "TextVQA images of ShareGPT4V", "1f4v_3e1OJtyYqam1CEp6RenCNTU5_mG2"
        ),
        _archive_by_hand(
            "web-celebrity", "web images: celebrities", "1-SB71C3j1mVg0kDDXwj2IWGEoBoRUD-J"
        ),
        _archive_by_hand(
            "web-landmark", "web images: landmarks", "1JpJkN7ZMA50xAhMx9O-rVb5yLhfGm3_o"
        ),
        _archive_by_hand("wikiart", "web images: WikiArt", "1FxB2Nw-vWUcTUSI_dBpPIykb-uGYoEqV"),
    )
}

# What may be asked for by one word.
GROUPS: dict[str, tuple[str, ...]] = {
    "annotations": tuple(name for name, s in SOURCES.items() if not s.parts[0].unpack_to),
    "images": tuple(name for name, s in SOURCES.items() if s.parts[0].unpack_to),
    "all": tuple(SOURCES),
}


def choose(names: list[str]) -> list[Source]:
    """The sources and groups of those names, each once; ValueError names the known ones."""
    unknown = [name for name in names if name not in SOURCES and name not in GROUPS]
    if unknown:
        raise ValueError(f"unknown sets {unknown}; choose from {[*SOURCES, *GROUPS]}")
    wanted = [one for name in names for one in GROUPS.get(name, (name,))]
    return [SOURCES[name] for name in dict.fromkeys(wanted)]


def image_folders() -> dict[str, tuple[int, bool]]:
    """Every image folder of the layout: how many images belong in it, and if that is a rough
    number."""
    folders: dict[str, tuple[int, bool]] = {}
    for source in SOURCES.values():
        for part in source.parts:
            if part.unpack_to:
                count, rough = folders.get(part.unpack_to, (0, False))
                folders[part.unpack_to] = (count + part.images, rough or part.rough_images)
    return folders

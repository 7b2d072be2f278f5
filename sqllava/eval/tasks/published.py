"""Published figures to compare with, in the papers' units.

Sources: the model zoos of LLaVA and SQ-LLaVA, and SQ-LLaVA's paper for the 558K + 665K data.
"""

_TASKS = (
    *("vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mme"),
    *("mmbench", "mmbench_cn", "seed", "llavabench", "mmvet"),
)
_ROWS: dict[str, tuple[float | None, ...]] = {
    "LLaVA-1.5-7B": (78.5, 62.0, 50.0, 66.8, 58.2, 85.9, 1510.7, 64.3, 58.3, 58.6, 65.4, 31.1),
    "LLaVA-1.5-13B": (80.0, 63.3, 53.6, 71.6, 61.3, 85.9, 1531.3, 67.7, 63.6, 61.6, 72.5, 36.1),
    "LLaVA-1.5-7B-lora": (79.1, 63.0, 47.8, 68.4, 58.2, 86.4, 1476.9, 66.1, 58.9, 60.1, 67.9, 30.2),
    "LLaVA-1.5-13B-lora": (
        *(80.0, 63.3, 58.9, 71.2, 60.2, 86.7, 1541.7),
        *(68.5, 61.5, 61.3, 69.5, 38.3),
    ),
    "SQ-LLaVA-7B": (80.3, 63.7, 55.3, 70.5, 60.5, 87.2, None, 66.6, 60.0, None, 74.3, 37.6),
    "SQ-LLaVA-13B": (81.3, 65.0, 58.2, 71.5, 61.9, 87.4, None, 68.5, 62.5, None, 80.7, 39.7),
    "SQ-LLaVA-7B (558K+665K)": (
        *(79.2, 62.8, 54.0, 68.9, 58.6, 87.7, None),
        *(66.2, 58.1, None, 66.3, 32.5),
    ),
}
# An unofficial LLaVA-1.5-7B row on COCO, for orientation: CIDEr as papers print it.
_CAPTIONS = {"coco": {"LLaVA-1.5-7B (unofficial)": 108.8}}

PUBLISHED: dict[str, dict[str, float]] = _CAPTIONS | {
    task: {
        model: figure for model, figures in _ROWS.items() if (figure := figures[column]) is not None
    }
    for column, task in enumerate(_TASKS)
}

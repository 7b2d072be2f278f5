"""The model in lmms-eval: `lmms-eval --model sqllava --model_args pretrained=DIR --tasks ...`.

lmms-eval brings its own prompts, decoding and scores, and finds this by the package's entry point;
here its requests go to our engine in batches.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from sqllava.conversation import IMAGE
from sqllava.eval.answers import shard_of_environment
from sqllava.eval.engine import Engine, ImagePreparation, open_engine
from sqllava.generation.decoding import Decoding

DEFAULT_TOKENS = 1024


class SQLlavaLmms(lmms):
    """An SQ-LLaVA model, or any that the engine opens, as lmms-eval's model "sqllava".

    Args:
        pretrained: folder of the model.
        base: the language model under an adapter, if it has moved.
        template: conversation template, in place of `v1`, or of the model's own where that writes
            turns otherwise.
        image_preparation: "pad" or "crop".
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        base: str | None = None,
        template: str | None = None,
        image_preparation: ImagePreparation = "pad",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
    ) -> None:
        super().__init__()
        shard = shard_of_environment()
        self._rank, self._world_size = shard.index, shard.count
        if device and device.startswith("cuda") and not torch.cuda.is_available():
            device = None  # lmms-eval asks for a GPU when nobody did
        engine = open_engine(pretrained, base, dtype=dtype, device=device)
        self.engine: Engine = engine.for_task("v1", image_preparation, template)
        self.batch_size = int(batch_size)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers requests, those with the same decoding in batches of prompts of like length."""
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        with tqdm(total=len(requests), desc="sqllava", disable=self.rank != 0) as bar:
            for members in groups.values():
                members.sort(key=lambda number: -len(requests[number].args[0]))
                for start in range(0, len(members), self.batch_size):
                    batch = members[start : start + self.batch_size]
                    texts = self._answer([requests[number] for number in batch])
                    answers.update(zip(batch, texts, strict=True))
                    bar.update(len(batch))
        return [answers[number] for number in range(len(requests))]

    def _answer(self, requests: Sequence[Instance]) -> list[str]:
        settings: Mapping[str, Any] = requests[0].args[1]
        texts, images = [], []
        for context, _, to_visual, doc_id, task, split in (r.args for r in requests):
            visuals = to_visual(self.task_dict[task][split][doc_id]) or []
            texts.append(context.replace(IMAGE, "").strip())
            images.append(_only_image(visuals, task, doc_id))
        written = self.engine.answer(self.engine.prompter.batch(texts, images), decoding(settings))
        return [_until(text, settings.get("until")) for text in written]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("sqllava answers generation tasks; this one wants likelihoods")

    def generate_until_multi_round(self, requests: Any) -> list[str]:
        raise NotImplementedError("sqllava answers tasks of one round")


def decoding(settings: Mapping[str, Any]) -> Decoding:
    """A task's generation settings as ours; a temperature alone does not mean sampling."""
    sampled = bool(settings.get("do_sample")) and bool(settings.get("temperature"))
    return Decoding(
        int(settings.get("max_new_tokens", DEFAULT_TOKENS)),
        temperature=settings.get("temperature") if sampled else None,
        top_p=settings.get("top_p") if sampled else None,
    )


def _only_image(visuals: Sequence[Any], task: str, doc_id: Any) -> Image.Image | None:
    if len(visuals) > 1 or visuals and not isinstance(visuals[0], Image.Image):
        raise ValueError(f"{task}, document {doc_id}: sqllava takes one picture, no video or sound")
    return cast(Image.Image, visuals[0]).convert("RGB") if visuals else None


def _until(text: str, marks: str | Sequence[str] | None) -> str:
    """Cuts a text where a task says that it ends; a mark at its start ends nothing."""
    for mark in [marks] if isinstance(marks, str) else marks or ():
        if mark and mark in text.lstrip()[1:]:
            text = text[: text.index(mark, 1)]
    return text.strip()

"""The model card (README.md) that goes with a whole model: base, data, recipe and figures."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from sqllava.model.config import SQLlavaConfig

RUN_FILE = "sqllava_run.json"
# Of a run's flags, those that make its recipe.
_RECIPE = (
    "version",
    "sq_r",
    "num_train_epochs",
    "learning_rate",
    "mm_projector_lr",
    "vision_tower_lr",
    "lora_r",
    "lora_alpha",
    "lora_r_vit",
    "lora_alpha_vit",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "model_max_length",
    "seed",
)


def training_facts(folder: Path) -> dict[str, Any]:
    """What a folder's sqllava_run.json says about data and recipe; empty where there is none."""
    file = folder / RUN_FILE
    if not file.is_file():
        return {}
    run = json.loads(file.read_text())
    flags = run["model"] | run["data"] | run["training"]
    facts = {name: flags[name] for name in _RECIPE if flags.get(name) is not None}
    return {"stage": run["stage"], "data": Path(flags["data_path"]).name} | facts


def model_card(config: SQLlavaConfig) -> str:
    """The card of a model, from its configuration.

    `config.training_facts` and `config.figures` are those of the training run and of an evaluation;
    what is not known is said not to be.
    """
    facts: Mapping[str, Any] = config.training_facts or {}
    bases = [name for name in (config.base_language_model, config.base_vision_tower) if name]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["sqllava", "visual-question-generation"],
    )
    options = ", ".join(f"{name} {n}" for name, n in (config.projector_options or {}).items())
    lines = [
        f"---\n{data.to_yaml()}\n---\n",
        "# SQ-LLaVA model\n",
        "A vision-language model that asks about an image as well as it answers. It loads with",
        "transformers and the `sqllava` package:\n",
        "```python",
        "import sqllava",
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n",
        "model = AutoModelForImageTextToText.from_pretrained(PATH)",
        "processor = AutoProcessor.from_pretrained(PATH)",
        "```\n",
        "## Base\n",
        *(f"- `{name}`" for name in bases),
        f"- projector: {config.projector_type}" + (f" ({options})" if options else ""),
        f"- conversation template: {config.conversation_template}\n",
        "## Data and recipe\n",
        *_table(facts, "Not recorded."),
        "\n## Figures\n",
        *_table(config.figures or {}, "None recorded with this model."),
    ]
    return str(ModelCard("\n".join(lines) + "\n"))


def _table(values: Mapping[str, Any], otherwise: str) -> list[str]:
    if not values:
        return [otherwise]
    rows = [f"| {name} | {value} |" for name, value in values.items()]
    return ["| | |", "|---|---|", *rows]

"""SQ-LLaVA: a vision-language model that learns to ask about images as well as to answer.

Importing the package makes its model known to transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from sqllava.ask.questioner import SelfQuestioner
from sqllava.checkpoint.load import load
from sqllava.model.config import SQLlavaConfig
from sqllava.model.model import SQLlavaForConditionalGeneration, SQLlavaModel
from sqllava.model.processor import SQLlavaProcessor


def register() -> None:
    """Makes the model known to transformers' Auto classes.

    Importing the package does so; vLLM calls it as a plugin, in each of its processes.
    """
    AutoConfig.register("sqllava", SQLlavaConfig, exist_ok=True)
    AutoModel.register(SQLlavaConfig, SQLlavaModel, exist_ok=True)
    AutoModelForImageTextToText.register(
        SQLlavaConfig, SQLlavaForConditionalGeneration, exist_ok=True
    )
    AutoProcessor.register(SQLlavaConfig, SQLlavaProcessor, exist_ok=True)


register()

__version__ = "0.1.0"
__all__ = [
    "SQLlavaConfig",
    "SQLlavaForConditionalGeneration",
    "SQLlavaModel",
    "SQLlavaProcessor",
    "SelfQuestioner",
    "load",
    "register",
]

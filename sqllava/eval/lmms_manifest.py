"""What lmms-eval reads to find the model "sqllava", before it imports anything heavy."""

from typing import Any


def manifest() -> Any:
    """The model's entry in lmms-eval's registry."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("sqllava", simple_class_path="sqllava.eval.lmms.SQLlavaLmms")

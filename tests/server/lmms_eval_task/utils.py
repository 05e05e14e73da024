"""What lmms-eval calls for the task beside this file."""

from typing import Any

from PIL import Image


def image(doc: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(doc["image"]).convert("RGB")]


def question(doc: dict[str, Any], lmms_eval_specific_kwargs: object = None) -> str:
    text: str = doc["question"]
    return text


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"accuracy": float(results[0].strip().lower() == doc["answer"])}

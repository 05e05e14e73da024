"""Question sets: JSONL files with one question about an image per line."""

import json
import re
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from eadaprune_vllm.tools.images import check, is_url

_SHOWN = 5  # invalid lines


class Question(BaseModel):
    """One line of a question set.

    Attributes:
        image: path, relative to the file, or URL.
        answers: the accepted answers; compared without case, articles, punctuation and white space.
        category, group: results are also reported by these.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    image: str
    question: str
    answers: tuple[str, ...]
    category: str = "all"
    group: str = "all"


def read_questions(path: Path) -> list[Question]:
    """Raises:
    ValueError: naming the first lines that are invalid, or whose image file cannot be read.
    """
    questions: list[Question] = []
    wrong: list[str] = []
    look = cache(check)  # questions share images
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            question = _question(line, path.parent)
            if not is_url(question.image):
                look(question.image)
            questions.append(question)
        except ValueError as error:
            wrong.append(f"{path}:{number}: {error}")
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more lines" if len(wrong) > _SHOWN else ""
        raise ValueError("; ".join(wrong[:_SHOWN]) + more)
    if not questions:
        raise ValueError(f"{path} holds no questions")
    return questions


def _question(line: str, folder: Path) -> Question:
    """The question in a line of a file in ``folder``.

    Raises:
        ValueError: if the line holds none.
    """
    try:
        entry = json.loads(line)
        if isinstance(entry, dict) and "answer" in entry:
            entry["answers"] = [entry.pop("answer")]
        question = Question.model_validate(entry)
    except ValidationError as error:
        wrong = (": ".join(filter(None, (".".join(map(str, one["loc"])), one["msg"]))) for one in error.errors())
        raise ValueError(", ".join(wrong)) from None
    except ValueError:
        raise ValueError("not JSON") from None
    if is_url(question.image):
        return question
    return question.model_copy(update={"image": str((folder / question.image).resolve())})


def normalized(text: str) -> str:
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))

"""Question sets: JSONL files with one question about an image per line."""

import json
import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from eadaprune_vllm.tools.images import is_url


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
    ValueError: naming the first invalid line.
    """
    questions = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
            if isinstance(entry, dict) and "answer" in entry:
                entry["answers"] = [entry.pop("answer")]
            question = Question.model_validate(entry)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            raise ValueError(f"{path}:{number}: {wrong}") from None
        except ValueError:
            raise ValueError(f"{path}:{number}: not JSON") from None
        if not is_url(question.image):
            question = question.model_copy(update={"image": str((path.parent / question.image).resolve())})
        questions.append(question)
    if not questions:
        raise ValueError(f"{path} holds no questions")
    return questions


def normalized(text: str) -> str:
    words = re.sub(r"[^\w\s]", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))

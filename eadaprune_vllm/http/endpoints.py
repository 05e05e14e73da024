"""vLLM's endpoints that take images and videos."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Endpoint:
    """One of vLLM's endpoints that take images and videos, and so the field ``eadaprune``. All others reject it.

    Attributes:
        fields: of the request body that may have images and videos.
        reports: whether the response body gets the report. The response of a render endpoint is itself a request, so it
            is not changed.
    """

    fields: tuple[str, ...] = ("messages",)
    reports: bool = True


_CHATS, _RERANK = ("messages", "input"), ("query", "documents")
_SCORE = ("queries", "documents", "items", "data_1", "data_2", "text_1", "text_2")
ENDPOINTS = {
    "/v1/chat/completions": Endpoint(),
    "/v1/chat/completions/batch": Endpoint(),
    "/v1/chat/completions/render": Endpoint(reports=False),
    "/v1/responses": Endpoint(("input",)),
    "/v1/responses/render": Endpoint(("input",), reports=False),
    "/v1/messages": Endpoint(("messages", "system")),
    "/v1/messages/count_tokens": Endpoint(("messages", "system")),
    "/v1/messages/render": Endpoint(("messages", "system"), reports=False),
    "/v1/embeddings": Endpoint(_CHATS),
    "/v2/embed": Endpoint(("inputs", "images")),
    "/pooling": Endpoint(),
    "/classify": Endpoint(),
    "/score": Endpoint(_SCORE),
    "/v1/score": Endpoint(_SCORE),
    "/rerank": Endpoint(_RERANK),
    "/v1/rerank": Endpoint(_RERANK),
    "/v2/rerank": Endpoint(_RERANK),
    "/v1/systemone": Endpoint(("images", "videos")),
    "/tokenize": Endpoint(),
    "/invocations": Endpoint((*_CHATS, *_RERANK, *_SCORE)),
}

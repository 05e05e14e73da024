"""What stands behind the commands: choosing a threshold, looking at decisions, measuring answers."""


def is_url(where: str) -> bool:
    """Whether this is a URL, and not the path of a file."""
    return where.startswith(("http://", "https://", "file://", "data:"))

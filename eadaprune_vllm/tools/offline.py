"""A model's front end without a server: what ``vllm serve`` would do with images, up to the engine."""

from pathlib import Path

from PIL import Image
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.media import MediaConnector

from eadaprune_vllm import startup
from eadaprune_vllm.naming import NAME, name_plugins
from eadaprune_vllm.options import KEY, PruneOptions
from eadaprune_vllm.preview import Examined, examine
from eadaprune_vllm.tools import is_url


class OfflineModel:
    """The vision encoder of a model that vLLM can serve with this plugin.

    Args:
        model: folder or hub id.
        device: ``auto``, ``cpu`` or ``cuda[:n]``.
        dtype: vLLM's ``--dtype``; ``auto`` is the checkpoint's. Budgets may depend on it.
        revision: of the hub's model.

    Raises:
        StartupError: if the server would not start either.
    """

    def __init__(self, model: str, device: str = "cpu", dtype: str = "auto", revision: str | None = None) -> None:
        name_plugins([NAME])
        given = EngineArgs(model=model, dtype=dtype, revision=revision, mm_processor_kwargs={KEY: {"device": device}})
        config = given.create_engine_config()
        self._processor = MULTIMODAL_REGISTRY.create_processor(config.model_config)
        self._processor.front_end = startup.front_end(config)

    def examine(self, image: Image.Image, options: PruneOptions) -> Examined:
        """Raises:
        VLLMServerError: if its features are not finite.
        """
        return examine(self._processor, self._processor.info.parse_mm_data({"image": [image]}), "image", 0, options)


def load_image(where: str) -> Image.Image:
    """The image at a path or URL, in RGB, as a server would fetch it.

    Raises:
        Exception: of many kinds, if there is none.
    """
    url = where if is_url(where) else Path(where).resolve().as_uri()
    image: Image.Image = MediaConnector(allowed_local_media_path="/").fetch_image(url)
    return image

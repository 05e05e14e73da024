"""Reads a vision encoder, and nothing else, from the checkpoint that vLLM serves."""

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers.initialization import no_init_weights

from eadaprune_vllm.device import CPU
from eadaprune_vllm.encoder import VisionEncoder
from eadaprune_vllm.errors import StartupError

logger = logging.getLogger("vllm." + __name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = ("F64", "F32", "F16", "BF16")
LOAD_FORMATS = ("auto", "hf", "safetensors", "dummy")


@dataclass(frozen=True)
class Checkpoint:
    """Where the weights are, in the terms of vLLM's flags.

    Attributes:
        model: local folder or hub id.
        revision: ``--revision``.
        download_dir: ``--download-dir``.
        load_format: ``--load-format``; one of ``LOAD_FORMATS``.
        dtype: what the tower is cast to.
        token: ``--hf-token``.
        device: where the tower will compute, once it was moved there.
    """

    model: str
    revision: str | None
    download_dir: str | None
    load_format: str
    dtype: torch.dtype
    token: str | bool | None = None
    device: torch.device = CPU

    def check(self, build: Callable[[], VisionEncoder]) -> None:
        """Make sure that the encoder's weights are all there, reading headers only.

        Args:
            build: makes the encoder with fresh weights on the default device.

        Raises:
            StartupError: in the words of ``load``.
        """
        self._locate(build)

    def load(self, build: Callable[[], VisionEncoder]) -> VisionEncoder:
        """The encoder on the CPU, in ``dtype``; its weights are random, the same everywhere, if they are dummies.

        Raises:
            StartupError: if a weight is missing, misshapen or unreadable.
        """
        files = self._locate(build)
        if self.load_format == "dummy":
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(0)
                encoder = build()
        else:
            with no_init_weights():
                encoder = build()
            encoder.load_state_dict(self._read(files), assign=True)
        logger.info("Vision tower loaded: %s, %s", type(encoder).__name__, self.dtype)
        for weight in encoder.parameters():  # not its buffers: rotary frequencies stay in float32, as in vLLM
            weight.data = weight.data.to(self.dtype)
        encoder.eval().requires_grad_(False)
        if self.device == CPU:
            encoder.pack()
        return encoder

    def nbytes(self, build: Callable[[], VisionEncoder]) -> int:
        """Memory that the encoder's weights take in ``dtype``. Arguments are those of ``check``."""
        with torch.device("meta"):
            return sum(weight.numel() for weight in build().parameters()) * self.dtype.itemsize

    def _locate(self, build: Callable[[], VisionEncoder]) -> dict[Path, dict[str, str]]:
        """For each file that holds weights of the encoder, the encoder's name of a weight -> the file's name of it."""
        if self.load_format not in LOAD_FORMATS:
            raise StartupError(
                f"--load-format {self.load_format} is not supported; supported are {', '.join(LOAD_FORMATS)}"
            )
        if self.load_format == "dummy":
            return {}
        with torch.device("meta"):
            expected = {name: tuple(weight.shape) for name, weight in build().state_dict().items()}
        files: dict[Path, dict[str, str]] = defaultdict(dict)
        for stored, file in self._stored_names(expected).items():
            files[file][_encoder_name(stored)] = stored
        missing = sorted(set(expected).difference(*files.values()))
        if missing:
            raise StartupError(
                f"{self.model} lacks {len(missing)} of the {len(expected)} weights of its vision encoder, "
                f"such as {missing[0]}"
            )
        for file, names in files.items():
            with _open(file) as reader:
                for name, stored in names.items():
                    found = reader.get_slice(stored)
                    if found.get_dtype() not in DTYPES:
                        raise StartupError(
                            f"{self.model} stores {stored} as {found.get_dtype()}; quantized vision encoders are not "
                            "supported"
                        )
                    shape = tuple(found.get_shape())
                    if shape != expected[name]:
                        raise StartupError(
                            f"{self.model} stores {stored} in shape {shape}, where its configuration says "
                            f"{expected[name]}"
                        )
        return files

    def _read(self, files: dict[Path, dict[str, str]]) -> dict[str, torch.Tensor]:
        weights: dict[str, torch.Tensor] = {}
        for file, names in files.items():
            with _open(file) as reader:
                weights |= {name: reader.get_tensor(stored) for name, stored in names.items()}
        return weights

    def _stored_names(self, expected: Collection[str]) -> dict[str, Path]:
        """The stored name of every ``expected`` weight -> its file; only these files are downloaded."""
        index = self._file(INDEX)
        if index is not None:
            try:
                shards = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError):
                raise StartupError(f"{index} is not an index of safetensors files") from None
            ours = {name: shard for name, shard in shards.items() if _encoder_name(name) in expected}
            paths = {shard: self._file(shard) for shard in sorted(set(ours.values()))}
            absent = [shard for shard, path in paths.items() if path is None]
            if absent:
                raise StartupError(f"{self.model} lacks the file {absent[0]} that its index names")
            return {name: path for name, shard in ours.items() if (path := paths[shard])}
        single = self._file(SINGLE)
        if single is None:
            raise StartupError(
                f"neither {SINGLE} nor {INDEX} was found for {self.model}; other formats are not supported"
            )
        with _open(single) as reader:
            return {name: single for name in reader.keys() if _encoder_name(name) in expected}  # noqa: SIM118

    def _file(self, name: str) -> Path | None:
        """Local path of one of the checkpoint's files, downloaded if need be; None if there is no such file."""
        folder = Path(self.model)
        if folder.is_dir():
            return path if (path := folder / name).is_file() else None
        try:
            return Path(
                hf_hub_download(self.model, name, revision=self.revision, cache_dir=self.download_dir, token=self.token)
            )
        except LocalEntryNotFoundError as error:  # the hub cannot be reached
            reason = str(error).partition("\n")[0]
            raise StartupError(f"{name} of {self.model} cannot be fetched: {reason}") from None
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise StartupError(f"{name} of {self.model} cannot be read: {reason}") from None


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as reader:
            yield reader
    except (SafetensorError, OSError) as error:
        raise StartupError(f"{file} is not a readable safetensors file: {error}") from None


def _encoder_name(stored: str) -> str:
    """The encoder's own name of a stored weight.

    Checkpoints say ``vision_tower.vision_model.*`` and ``visual.*``; transformers 5 saves ``vision_tower.*``, and since
    4.52 it puts ``model.`` in front.
    """
    name = stored.removeprefix("model.")
    return name.replace("vision_tower.vision_model.", "vision_tower.", 1)

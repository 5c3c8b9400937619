"""The options of captioners, grounders and scorers, without any heavy import: a recipe is checked where no model is."""

import string
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from ..transforms.options import operational

ALT_CHARS = 2000  # of a web caption that enter a prompt: a page of text would pad the whole batch to its length
Dtype = Literal["auto", "bfloat16", "float16", "float32"]  # auto: bfloat16 on a GPU that has it, else float32


@dataclass(frozen=True)
class Endpoint:
    """Where an OpenAI-compatible server is and how hard it is asked. The key is read from the environment only.

    A worker asks for what its threads have prepared: at most batch * (threads + 2) images are with the server at once,
    each with all of its prompts, even where `in_flight` would allow more.
    """

    url: str = operational("http://127.0.0.1:8000/v1")
    key_from: str = operational("OPENAI_API_KEY")  # the environment variable; no key is sent where it is not set
    in_flight: int = operational(64)  # requests at a time, for each worker
    timeout_s: float = operational(120.0)  # of one request
    retries: int = operational(6)  # after 408, 409, 429, 5xx and broken connections, with growing waits
    detail: Literal["auto", "low", "high"] = "auto"

    def __post_init__(self) -> None:
        try:  # without repeating it: it may hold what must not be seen
            parts = urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.hostname or (parts.port or 1) < 1:
                raise ValueError
        except ValueError:
            raise ValueError("url: is not like http://host:8000/v1") from None
        if parts.username or parts.password:
            raise ValueError("url: has a user or password in it; put a key into the environment instead")
        for name in ("in_flight", "timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not a positive number")
        if self.retries < 0:
            raise ValueError(f"retries: {self.retries} is negative")


@dataclass(frozen=True)
class Captioning:
    """One captioner: `model` is `name@revision`, and `prompts` are asked one by one, each for a caption of its own.

    A prompt may use {alt_text}, the image's web caption. BLIP takes a prompt as the caption's beginning (or none: ""),
    Florence-2 its task, such as <MORE_DETAILED_CAPTION>. `temperature` 0 is greedy decoding; above it, `seed` and the
    image decide what is drawn, never the batch.
    """

    model: str
    backend: Literal["transformers", "vllm", "openai"] = "transformers"  # for models that are not built in
    prompts: tuple[str, ...] = ("Describe this image in one detailed paragraph.",)
    max_new_tokens: int = 160
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_pixels: int | None = None  # larger images are scaled down to that many before the model's own processor
    dtype: Dtype = "auto"
    device: Literal["auto", "cpu", "cuda"] = operational("auto")
    compile: bool = operational(False)  # torch.compile of what writes the text: worth it where many batches follow
    # Tokens that the model holds at once: of prompts (padding and the image's places counted) and those to be written.
    # A batch that has more goes in pieces; one image always goes. vLLM and servers have budgets of their own.
    batch_tokens: int = operational(65_536)
    endpoint: Endpoint = field(default_factory=Endpoint)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("prompts: is empty; a prompt may be the empty text")
        for prompt in self.prompts:
            _check_template(prompt, {"alt_text"}, "prompts")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: {self.max_new_tokens} is not a positive number")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature, top_p: {self.temperature}, {self.top_p} are not in 0 and up, and in 0..1")
        for name in ("max_pixels", "batch_tokens"):
            if (most := getattr(self, name)) is not None and most < 1:
                raise ValueError(f"{name}: {most} is not a positive number")
        if self.backend == "openai" and (self.compile or self.device != "auto" or self.dtype != "auto"):
            raise ValueError("device, dtype and compile: are the server's to choose where backend is openai")
        if self.backend == "vllm" and self.compile:
            raise ValueError("compile: vLLM compiles by itself; leave it out where backend is vllm")


@dataclass(frozen=True)
class Grounding:
    """One grounder: `model` is `name@revision`. Every pair at or above `score_floor` is stored; `select` decides."""

    model: str
    backend: Literal["transformers", "groundingdino"] = "transformers"  # for models that are not built in
    score_floor: float = 0.02
    max_detections: int = 300  # per image, the highest scores; `truncated` tells where there were more
    template: str = "{}"  # how a phrase is asked for, such as "a photo of a {}"; OWL-ViT and OWLv2 only
    # Side of the square that OWL models see (the paper: 448), or Grounding DINO's short side; default: the model's own.
    image_px: int | None = None
    dtype: Dtype = "auto"
    device: Literal["auto", "cpu", "cuda"] = operational("auto")
    compile: bool = operational(False)  # torch.compile of the image tower; OWL-ViT and OWLv2 only
    text_cache: int = operational(200_000)  # phrases whose embedding is remembered (OWL models)
    # What goes through the model at once, padding counted: pixels (in Grounding DINO, of an image for each text that is
    # asked of it) and text tokens. A batch that has more goes in pieces; one image always goes.
    batch_pixels: int = operational(16_000_000)
    batch_tokens: int = operational(65_536)

    def __post_init__(self) -> None:
        if self.template.count("{}") != 1:
            raise ValueError(f"template: {self.template!r} does not have one {{}} for the phrase")
        if self.image_px is not None and self.image_px < 32:
            raise ValueError(f"image_px: {self.image_px} is less than 32")
        for name in ("max_detections", "batch_pixels", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not a positive number")
        if self.text_cache < 0:
            raise ValueError(f"text_cache: {self.text_cache} is negative")


@dataclass(frozen=True)
class Scoring:
    """A second opinion on detections: `model` is a CLIP or SigLIP, or another grounder, as `name@revision`."""

    model: str
    above: float = 0.1  # detections with a lower score are not looked at
    template: str = "{}"  # how a phrase is asked for, such as "a photo of a {}"
    margin: float = 0.1  # CLIP and SigLIP: what is seen around a box, as a share of its longer side
    floor: float = 0.1  # another grounder: of its own detections
    image_px: int | None = None  # another grounder: as in `ground`
    dtype: Dtype = "auto"
    device: Literal["auto", "cpu", "cuda"] = operational("auto")
    compile: bool = operational(False)
    text_cache: int = operational(200_000)  # phrases whose embedding is remembered

    def __post_init__(self) -> None:
        if self.template.count("{}") != 1:
            raise ValueError(f"template: {self.template!r} does not have one {{}} for the phrase")
        for name in ("above", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not in 0..1")
        if not 0 <= self.margin <= 10:
            raise ValueError(f"margin: {self.margin} is not in 0..10")
        if self.image_px is not None and self.image_px < 32:
            raise ValueError(f"image_px: {self.image_px} is less than 32")
        if self.text_cache < 0:
            raise ValueError(f"text_cache: {self.text_cache} is negative")


def _check_template(text: str, known: set[str], name: str) -> None:
    try:
        used = {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}
    except ValueError as error:
        raise ValueError(f"{name}: {text!r}: {error}; write {{{{ for a brace") from None
    if used - known:
        raise ValueError(f"{name}: {text!r} uses {{{min(used - known)}}}; known is {{{', '.join(known)}}}")

"""Neural captioners behind one contract: transformers in this process, vLLM in this process, or a server."""

from ..contract import Captioner, ModelError
from ..options import Captioning


def open_captioner(options: Captioning) -> Captioner:
    """Load the captioner that backend and architecture call for. Raises ModelError."""
    if options.backend == "openai":
        from . import openai

        return openai.open_captioner(options)
    if options.backend == "vllm":
        from . import vllm

        return vllm.open_captioner(options)
    try:
        from . import generate
    except ModuleNotFoundError as error:
        raise ModelError(
            f"model {options.model}: needs `pip install 'vesl[models]'` ({error.name} is missing)"
        ) from None
    return generate.open_captioner(options)

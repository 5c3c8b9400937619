"""Open-vocabulary detectors behind one contract; a model's config says which architecture it is."""

from .. import hub
from ..contract import Grounder, ModelError
from ..options import Grounding


def open_grounder(options: Grounding) -> Grounder:
    """Load the grounder that backend and architecture call for. Raises ModelError."""
    try:
        if options.backend == "groundingdino":
            from . import original

            return original.open_grounder(options)
        folder = hub.find(options.model)
        kind = hub.config(folder).get("model_type")
        if kind in ("owlv2", "owlvit"):
            from . import owl

            return owl.open_grounder(options, folder)
        if kind == "grounding-dino":
            from . import dino

            return dino.open_grounder(options, folder)
    except ImportError as error:
        raise ModelError(
            f"model {options.model}: needs `pip install 'vesl[models]'` ({error.name} is missing)"
        ) from None
    raise ModelError(f"model {options.model}: {kind!r} is no grounder; there are owlv2, owlvit and grounding-dino")

"""caption: stored image and web caption -> captions, by the captioner that the recipe names."""

from dataclasses import dataclass
from typing import ClassVar

import pyarrow as pa

from ...models import ALT_TEXT, check_reference, open_captioner
from ...transforms.captions import clean
from ...transforms.outcomes import Drop
from ...transforms.records import ADDS
from ..stage import Function, answer, decoded


@dataclass(frozen=True)
class Caption:
    """Writes captions with `model`, given as `name@revision`; `alt_text@1` takes the web caption as it stands."""

    name: ClassVar[str] = "caption"
    version: ClassVar[int] = 1
    emits: ClassVar[pa.Schema] = ADDS["caption"]

    model: str

    def __post_init__(self) -> None:
        check_reference("captioner", self.model)

    @property
    def reads(self) -> tuple[str, ...]:
        """The image is not read where the web caption is all that is wanted."""
        return ("alt_text",) if self.model == ALT_TEXT else ("alt_text", "image")

    @property
    def opens_model(self) -> bool:
        """Whether there is a network to load."""
        return self.model != ALT_TEXT

    def open(self) -> Function:
        """Load the captioner."""
        captioner = open_captioner(self.model)

        def caption(batch: pa.Table) -> pa.Table:
            alt_texts = [clean(text or "") for text in batch["alt_text"].to_pylist()]
            images = decoded(batch) if self.opens_model else []
            written = captioner(images, alt_texts)
            results = [
                {"captions": [{"text": text, "model": self.model} for text in texts]}
                if texts
                else Drop("empty_caption")
                for texts in ([clean(text) for text in texts if clean(text)] for texts in written)
            ]
            return answer(batch, self.name, results, self.emits)

        return caption

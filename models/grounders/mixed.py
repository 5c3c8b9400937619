"""Grounding DINO of transformers on images of several sizes at once, each with the result that it has alone.

The library takes a batch with a pixel mask, but there padding changes a result in four places, which are mended here:
- Swin's windows mix it in, as the mask begins after the backbone, and group normalisation in the projections counts
  it. So these two see images size by size, each image once, and their features are padded.
- The encoder's positions in the padding compete to become queries.
- The positions of queries are read from boxes as shares of the padded image, and not of the image.
The rest, encoder and decoder, runs once for all rows; there the library's mask does what it should.

All of this leans on names inside of the library. So a model is tried when it is taken over: two small images of other
shapes together, against each of them alone, as the library has it.
"""

from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812  (its name everywhere)

_TOLERANCE = 1e-3  # on average, in scores and boxes: which position becomes the last query may hang on the last bit


class MismatchError(Exception):
    """The installed library computes otherwise than what is mended here expects."""


class Mixed:
    """The network of `dino.py`: takes over a GroundingDinoForObjectDetection that is on the CPU, in float32.

    Weights stay float32 and a lower precision is autocast's: in bfloat16 throughout, a box's corner would be one of
    256 steps, and so would the places that deformable attention looks at. Raises MismatchError.
    """

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._model, self._device, self._dtype = model, torch.device("cpu"), torch.float32
        try:
            self._mend(model)
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise MismatchError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None
        self._model, self._device, self._dtype = model.to(device), device, dtype

    @torch.inference_mode()
    def _mend(self, model: Any) -> None:
        """Take the model over, and see that an image of 2:3 beside one of 3:2 has the result that it has alone."""
        short = 192
        while sum((short // n) * (short * 3 // 2 // n) for n in (8, 16, 32)) < model.config.num_queries:
            short += 64
        noise = torch.Generator().manual_seed(0)
        sides = short, short * 3 // 2
        first, second = (torch.randn(1, 3, *shape, generator=noise) for shape in (sides, sides[::-1]))
        start, end, stop, _ = model.model.special_tokens.tolist()
        one, other = (model.config.text_config.vocab_size // n for n in (2, 3))  # any words
        ids = torch.tensor([[start, one, stop, end, 0, 0], [start, other, stop, one, stop, end]])
        mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
        alone = model(pixel_values=first, input_ids=ids[:1, :4])
        self._take_over(model)
        logits, boxes = self([first, second], torch.arange(2), ids, mask)
        if model.config.two_stage and not self._once.kept_out:
            raise ValueError("the encoder's logits do not pass where padding is kept out of them")
        scores, expected = logits[0, :, :4].sigmoid(), alone.logits[0, :, :4].sigmoid()
        for mine, theirs in ((scores, expected), (boxes[0], alone.pred_boxes[0])):
            off = (mine.sort(0).values - theirs.sort(0).values).abs().mean().item()  # queries come in any order
            if not off < _TOLERANCE:
                raise ValueError(f"an image beside another is off by {off:.2g} from what it is alone")

    def _take_over(self, model: Any) -> None:
        inner = model.model
        self._once = inner.backbone = _Once(inner.backbone, inner.input_proj_vision)
        inner.input_proj_vision = torch.nn.ModuleList(torch.nn.Identity() for _ in inner.input_proj_vision)
        if model.config.two_stage:
            inner.encoder_output_class_embed.register_forward_hook(self._once.only_images)
        inner.decoder.register_forward_pre_hook(self._once.whole, with_kwargs=True)
        for layer in inner.decoder.layers:
            layer.encoder_attn.register_forward_pre_hook(self._once.scaled, with_kwargs=True)

    def __call__(
        self, pixels: list[torch.Tensor], of: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute logits and boxes as `dino.Network` says."""
        self._once.pixels, self._once.of = pixels, of
        shape = pixels[0][:1].expand(len(of), -1, -1, -1)  # the model reads no more of it
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            out = self._model(
                pixel_values=shape, pixel_mask=of, input_ids=ids, attention_mask=mask, token_type_ids=ids * 0
            )
        return out.logits, out.pred_boxes


class _Once(torch.nn.Module):
    """Backbone and projections that see each image once, among those of its size, and serve all of the image's rows.

    Levels of smaller images are padded with zeros afterwards; `only_images`, `whole` and `scaled` are hooks.
    """

    def __init__(self, inner: Any, projections: torch.nn.ModuleList) -> None:
        super().__init__()
        self.backbone, self.position_embedding = inner.conv_encoder.model, inner.position_embedding
        self.projections = projections
        self.pixels: list[torch.Tensor] = []  # by size, float [n, 3, H, W] each
        self.of = torch.empty(0, dtype=torch.long)
        self._padding: torch.Tensor | None = None  # bool [R, positions of all levels]
        self.kept_out = False  # whether padding has been kept from becoming queries
        self._ratios = torch.empty(0)  # [R, 1, levels, 4], of the image to its padded levels, for x, y, w, h

    def forward(self, *_: torch.Tensor) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[torch.Tensor]]:
        """Give for each level features [R, d, h, w] with a mask bool [R, h, w], and positions [R, d, h, w]."""
        features, positions = [], []
        for same in zip(*map(self._levels, self.pixels), strict=True):
            height, width = (max(each.shape[axis] for each in same) for axis in (2, 3))
            padded = [F.pad(each, (0, width - each.shape[3], 0, height - each.shape[2])) for each in same]
            real = [each.new_ones(len(each), *each.shape[2:], dtype=torch.bool) for each in same]
            masks = [F.pad(each, (0, width - each.shape[2], 0, height - each.shape[1])) for each in real]
            level, mask = torch.cat(padded), torch.cat(masks)
            features.append((level[self.of], mask[self.of]))
            positions.append(self.position_embedding(level, mask).to(level.dtype)[self.of])
        padding = torch.cat([~mask.flatten(1) for _, mask in features], 1)
        self._padding = padding if len(self.pixels) > 1 else None
        return features, positions

    def _levels(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """All feature levels of images of one size: those of the backbone, projected, and coarser ones of the last."""
        maps = list(self.backbone(pixels, return_dict=True).feature_maps)
        levels = [project(each) for project, each in zip(self.projections, maps, strict=False)]
        for project in self.projections[len(maps) :]:
            levels.append(project(maps[-1] if len(levels) == len(maps) else levels[-1]))
        return [level.float() for level in levels]  # whose type an image's share of its padding takes: see Mixed

    def only_images(self, _: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
        """Hook: the encoder's logits [R, positions, T] without those of padding, so that no query begins there."""
        if self._padding is None or logits.shape[1] != self._padding.shape[1]:
            return logits
        self.kept_out = True
        return logits.masked_fill_(self._padding[..., None], -torch.inf)

    def whole(self, _: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hook: the decoder takes boxes as shares of their image, also for its queries' positions."""
        self._ratios = given["valid_ratios"].repeat(1, 1, 2)[:, None]
        return args, given | {"valid_ratios": torch.ones_like(given["valid_ratios"])}

    def scaled(self, _: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hook: only where it samples the levels, boxes are shares of these with their padding."""
        return args, given | {"reference_points": given["reference_points"] * self._ratios}

"""Prompts with images as lists of ids, which is all that continuous batching takes."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock, Thread, current_thread
from typing import Any

import torch
from torch import Tensor

from .._layout import Reduction
from ._attached import Attached
from ._families import Family
from ._rotary import IMAGE, RotaryPositions

ROWS = 16384  # of a table that nobody has sized: 128 MiB for 4096 features in 16 bits


def replayed(x: Tensor) -> bool:
    """Whether what is done with x now is noted down, to be done again without Python."""
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return capturing or torch.compiler.is_compiling()


@dataclass
class Stored:
    """An image in the table: its virtual ids, and how many requests hold it."""

    start: int
    count: int
    holders: int


class Table:
    """What images are, by virtual id: a ring whose oldest images make room, if nobody holds them.

    A virtual id is ``first``, the size of the vocabulary, or more. In one process a model is given
    none twice, not even by another handle, as caches of keys and values know images by their ids
    alone. The features never move, as CUDA graphs keep their address.

    ``features``: ``[rows, E, D]``, what is embedded and what later layers add; ``places``: i64
    ``[rows, 4]``, of rotary positions in three dimensions, see `PagedRotary`; ``owner``: i64
    ``[rows]``, the virtual id of each row, or -1.
    """

    issued = 0  # virtual ids of all tables of this process, less ``first``

    def __init__(self, rows: int, embedding: Any, entries: int) -> None:
        weight = embedding.weight
        # whoever writes into it later need not be in inference mode
        with torch.inference_mode(False):
            self.features = weight.new_zeros(rows, entries, weight.shape[1], requires_grad=False)
            self.places = torch.zeros(rows, 4, dtype=torch.int64, device=weight.device)
            self.owner = torch.full((rows,), -1, device=weight.device)
        self.first: int = embedding.num_embeddings
        self.images: dict[bytes, Stored] = {}

    def put(self, content: bytes, features: Tensor, places: Tensor) -> Stored:
        """Store an image, ``[count, E, D]`` and ``[count, 4]``, held once."""
        count, rows = len(features), len(self.owner)
        start = self._room(count)
        if self.first + start + count > 2**31:
            raise RuntimeError("request: all virtual ids of this process are used up: restart it")
        number = torch.arange(start, start + count, device=self.owner.device)
        self.features[number % rows] = features.to(self.features)
        self.places[number % rows] = places.to(self.places)
        self.owner[number % rows] = number + self.first
        Table.issued = start + count
        stored = self.images[content] = Stored(start, count, 1)
        return stored

    def _room(self, count: int) -> int:
        """The next ids whose rows nobody holds; images that had them are forgotten."""
        rows, start = len(self.owner), Table.issued
        lap = start + rows
        while start + count <= lap:
            there = {
                content: image
                for content, image in self.images.items()
                if (image.start - start) % rows < count
                or (start - image.start) % rows < image.count
            }
            held = next((image for image in there.values() if image.holders), None)
            if held is None:
                for content in there:
                    del self.images[content]
                return start
            start += (held.start + held.count - start) % rows or rows
        raise RuntimeError(
            f"request: no room for an image of {count} tokens among the {rows} of requests that"
            " were not released: call release with the ids of each request that is finished, or"
            " reserve more before the first request"
        )

    def ids(self, image: Stored) -> range:
        return range(self.first + image.start, self.first + image.start + image.count)

    def missing(self, ids: Tensor) -> Tensor:
        """bool, which of the ids are virtual but of no image in the table."""
        return (ids >= self.first) & (self.owner[self.rows(ids)] != ids)

    def rows(self, ids: Tensor) -> Tensor:
        """i64, the row of each virtual id; any row for others."""
        return (ids.long() - self.first) % len(self.owner)


class Requests(Attached):
    """Virtual ids for the images of requests, from `attach` until `detach`."""

    def __init__(
        self, family: Family, config: Reduction | None, rotary: RotaryPositions | None
    ) -> None:
        if getattr(family.model, "_cached_continuous_batching_manager", None) is not None:
            raise ValueError(
                "attach: the model keeps a manager of continuous batching from before, with what"
                " it noted of the model as it was: call"
                " model.destroy_cached_continuous_batching_manager() first"
            )
        self.family, self.config, self.rotary = family, config, rotary
        self.embedding = family.core.get_input_embeddings()
        self.table: Table | None = None
        self.attached = True
        self.server: Thread | None = None  # in which continuous batching last ran
        self.ids: Tensor | None = None  # of the embedding that runs
        # requests come from a server's threads, while another one generates
        self.lock = Lock()
        self.hooks = [family.model.register_forward_pre_hook(self._serve, with_kwargs=True)]

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.table, self.attached = None, False

    def finish(self) -> None:
        """Nothing runs that would miss the hooks, and nothing remains that noted them."""
        if self.server is not None and self.server.is_alive() and self.server != current_thread():
            raise RuntimeError(
                "detach: continuous batching runs with this model: leave its context, or call"
                " manager.stop(), before"
            )
        if getattr(self.family.model, "_cached_continuous_batching_manager", None) is not None:
            self.family.model.destroy_cached_continuous_batching_manager()

    def reserve(self, rows: int) -> None:
        with self.lock:
            if self.table is not None:
                raise RuntimeError(
                    f"reserve: there is room for {len(self.table.owner)} tokens already, and CUDA"
                    " graphs may hold its address: call reserve before the first request with an"
                    " image and before continuous batching starts"
                )
            self._open(rows)

    def _open(self, rows: int) -> Table:
        if not self.attached:
            raise RuntimeError("this handle is detached: make requests with a new one")
        if self.table is None:
            entries = 1 + len(self.family.side_projectors)
            self.table = Table(rows, self.embedding, entries)
            self.hooks.append(self.embedding.register_forward_pre_hook(self._hide))
            self.hooks.append(self.embedding.register_forward_hook(self._show))
        return self.table

    def _serve(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Continuous batching runs the model."""
        if "write_index" not in kwargs:
            return
        if self.table is None:
            # now at the latest, as CUDA graphs may be captured before there is a request
            with self.lock:
                self._open(ROWS)
        assert self.table is not None
        self.server = current_thread()
        ids = kwargs["input_ids"]
        if not replayed(ids) and self.table.missing(ids).any():
            raise RuntimeError(
                "a request holds an image that was released, or one of another handle: make ids"
                " with request, and release them when the request is finished"
            )

    def _hide(self, module: Any, args: tuple[Any, ...]) -> Any:
        assert self.table is not None
        self.ids = args[0]
        return (args[0].masked_fill(args[0] >= self.table.first, 0), *args[1:])

    def _show(self, module: Any, args: Any, output: Tensor) -> Tensor:
        assert self.table is not None and self.ids is not None
        ids, self.ids = self.ids, None
        features = self.table.features[self.table.rows(ids), 0].to(output.dtype)
        return torch.where((ids >= self.table.first)[..., None], features, output)

    def ids_of(self, inputs: Any, shrink: Callable[[Any], Any]) -> list[int]:
        """The ids of a prompt as the processor made it, placeholders replaced by virtual ids."""
        if not isinstance(inputs["input_ids"], Tensor) or len(inputs["input_ids"]) != 1:
            raise ValueError("request: give one prompt, as a string: each is a request of its own")
        if inputs.get("pixel_values_videos") is not None:
            raise NotImplementedError("request: videos are not supported: pass frames as images")
        given = dict(inputs)
        inputs = shrink(inputs)
        ids = inputs["input_ids"][0]
        if given.get("pixel_values") is None:
            return ids.tolist()
        layout = self.family.layout("image", given)
        counts = layout.splits
        if self.config is not None:
            shown = layout.placeholders(self.config)
            counts = [int(part.sum()) for part in shown.split(layout.splits)]
        contents = self._contents(given, len(counts))
        with self.lock:
            images = self._store(inputs, contents, counts)
            assert self.table is not None
            virtual = [i for content in contents for i in self.table.ids(images[content])]
        place = ids == self.family.tokens["image"]
        ids[place] = torch.tensor(virtual, dtype=ids.dtype, device=ids.device)
        return ids.tolist()

    def release(self, ids: list[int]) -> None:
        first = self.embedding.num_embeddings
        virtual = {i for i in ids if i >= first}
        with self.lock:
            images = [] if self.table is None else list(self.table.images.values())
            held = [image for image in images if image.holders and first + image.start in virtual]
            if sum(image.count for image in held) != len(virtual):
                raise ValueError(
                    "release: the ids hold an image that was released already, or one of another"
                    " handle"
                )
            for image in held:
                image.holders -= 1

    def _store(
        self, inputs: Mapping[str, Any], contents: list[bytes], counts: list[int]
    ) -> dict[bytes, Stored]:
        """The images by content, each held once more; new ones are encoded."""
        table = self._open(ROWS)
        images = {content: table.images[content] for content in contents if content in table.images}
        new = {content: i for i, content in enumerate(contents) if content not in images}
        for image in images.values():
            image.holders += 1
        try:
            if new:
                chosen = list(new.values())
                encoded = self._encode(inputs, chosen, [counts[i] for i in chosen], len(contents))
                for content, (features, places) in zip(new, encoded, strict=True):
                    images[content] = table.put(content, features, places)
        except BaseException:
            for image in images.values():
                image.holders -= 1
            raise
        if table.features.is_cuda:
            # continuous batching reads them on a stream of its own
            torch.cuda.current_stream(table.features.device).synchronize()
        return images

    def _encode(
        self, inputs: Mapping[str, Any], chosen: list[int], counts: list[int], images: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Features and places of the chosen ones of ``images``, which have ``counts`` tokens."""
        vision = self.family.model.config.vision_config
        if vision._attn_implementation.startswith("paged|"):
            # transformers 5.17 prepares the vision encoder too for continuous batching, in vain
            plain = vision._attn_implementation.removeprefix("paged|")
            self.family.model.set_attn_implementation({"vision_config": plain})
        picked = {
            name: torch.cat([parts[i] for i in chosen], axis)
            for name, parts, axis in self._pictures(inputs, images)
        }
        with torch.no_grad():
            output = self._encoder()(**picked, return_dict=True)
        entries = [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]
        features = torch.stack([_rows(entry) for entry in entries], dim=1)
        places = features.new_zeros(len(features), 4, dtype=torch.int64).split(counts)
        if hasattr(self.family.core, "get_rope_index"):
            places = self._places(picked["image_grid_thw"], counts)
        return list(zip(features.split(counts), places, strict=True))

    def _places(self, grids: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
        """See `PagedRotary`: of each image, i64 ``[count, 4]``."""
        ask, shown = self.family.core.get_rope_index, None
        if self.rotary is not None:
            ask, shown = self.rotary.original, self.rotary.shown.pop("image")
        places = []
        wholes = self.family.layout("image", {"image_grid_thw": grids}).splits
        for i, (grid, whole, count) in enumerate(zip(grids, wholes, counts, strict=True)):
            zeros = torch.zeros(1, whole, dtype=torch.int64, device=grid.device)
            positions, delta = ask(
                zeros, zeros + IMAGE, image_grid_thw=grid[None], attention_mask=zeros + 1
            )
            left = positions[:, 0]
            if shown is not None:
                left = left[:, shown[i].to(grid.device)]
            number = torch.arange(count, device=grid.device)
            skipped = torch.where(number == count - 1, whole + delta[0, 0] - count, 0)
            places.append(torch.cat([left - number, skipped[None]]).T)
        return tuple(places)

    def _contents(self, inputs: Mapping[str, Any], images: int) -> list[bytes]:
        """A digest of what the processor made of each image."""
        digests = [hashlib.blake2b(digest_size=16) for _ in range(images)]
        for name, parts, axis in self._pictures(inputs, images):
            for digest, part in zip(digests, parts, strict=True):
                part = part.cpu().squeeze(axis)
                if name == "pixel_values" and part.dim() == 4:
                    # tiles, zeros among them to have as many as the largest image of the prompt
                    part = part[(part != 0).flatten(1).any(1)]
                digest.update(f"{name} {tuple(part.shape)}".encode())
                digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
        return [digest.digest() for digest in digests]

    def _pictures(
        self, inputs: Mapping[str, Any], images: int
    ) -> list[tuple[str, Sequence[Tensor], int]]:
        """What the encoder takes, image by image, and the dimension in which they follow."""
        pictures: list[tuple[str, Sequence[Tensor], int]] = []
        taken = inspect.signature(self._encoder()).parameters
        for name, value in inputs.items():
            if name not in taken or not isinstance(value, Tensor):
                continue
            if len(value) == images:
                pictures.append((name, value.split(1), 0))
            elif "image_grid_thw" in inputs:  # patches of all images in a row
                patches = inputs["image_grid_thw"].prod(1).tolist()
                pictures.append((name, value.split(patches), 0))
            else:  # after the dimension of prompts
                pictures.append((name, value.split(1, dim=1), 1))
        return pictures

    def _encoder(self) -> Any:
        return getattr(self.family.core, self.family.methods["image"])


def _rows(features: Tensor | Sequence[Tensor]) -> Tensor:
    """``[tokens, D]`` of images, which are in one tensor or in one each."""
    parts = [features] if isinstance(features, Tensor) else features
    return torch.cat([part.flatten(0, -2) for part in parts])

"""The result of every method: one map per image, with its provenance."""

import json
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image
from safetensors import SafetensorError

from vitscope.display import Drawn, counted, ends, one_line
from vitscope.errors import CallError, WorkError, first_line
from vitscope.files import atomic_write, require_file_path
from vitscope.grid import Grid
from vitscope.images.image import InputImage, repeats_patches
from vitscope.results.colours import ColourScale, colour_scale, coloured
from vitscope.results.map_sizes import Size, common_size, enlarged, parse_sizes, restored
from vitscope.results.saved_arrays import read_arrays, write_arrays
from vitscope.results.saved_photos import check_provenance, matching_images, photo_record
from vitscope.typing import Maps
from vitscope.validation import (
    require_integer,
    require_mapping,
    require_ratio,
    require_tensor,
    short_text,
)

# Not typing.Self, which the tests' shape checks of individual methods cannot resolve.
Result = TypeVar("Result", bound="Attribution")


@dataclass(frozen=True, eq=False, repr=False)
class Attribution(Drawn):
    """One map for each image of a batch.

    ``len(result)`` is the number of images, ``result[0]`` the result of the first one, and iterating yields the
    results of the images one by one.

    Attributes:
        values: float32 (batch, height, width) on the token grid.
        grid: the token grid.
        images: the photos, each with the region that the model saw.
        provenance: method, parameters, model and versions of the libraries.
        target: label of the explained class; None if no class is explained, or if it differs between the images.
        signed: whether positive values support the target and negative values oppose it.
        dropped: bool (batch, height, width), patches that were left out, whose value is 0; None if there are none.
        sizes: (height, width) of each map, if these differ, as do those of pixels of different photos. ``values`` then
            holds each map enlarged to the largest height and width by repeating rows and columns, and ``result[i]`` has
            it at its own size. None if all maps are as large as the grid.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> trace = vs.capture(vs.load("vit-nano"), skimage.data.chelsea())
        >>> result = vs.rollout(trace)
        >>> len(result), result.provenance["method"], result.values.shape == (1, result.grid.height, result.grid.width)
        (1, 'rollout', True)
        >>> result.overlay(0.5).size
        (451, 300)
    """

    values: Maps
    grid: Grid
    images: Sequence[InputImage] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    target: str | None = None
    signed: bool = False
    dropped: Bool[torch.Tensor, "batch height width"] | None = None
    sizes: Sequence[Size] | None = None

    # Whether results of different sizes can be joined. Maps of tokens cannot: uniform attention depends on the grid.
    _covers_photo: ClassVar[bool] = False

    def __repr__(self) -> str:
        height, width = self.values.shape[1:]
        method, model = (short_text(self.provenance.get(key), f"no {key}") for key in ("method", "model"))
        target = f"target {short_text(self.target, 'none')}{', signed' if self.signed else ''}"
        photos = "" if self.images else "without photos"
        name = f"{type(self).__name__}: {method[:40]} of {model[:60]}"
        size = f"{counted(len(self), 'image')} of {f'{height}×{width}' if self.sizes is None else 'different sizes'}"
        return one_line(name, size, *self._extra_repr(), photos, ends(self.values), target)

    def _extra_repr(self) -> list[str]:
        """Return the facts that a subclass adds to the repr."""
        return []

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self: Result, index: int) -> Result:
        """Return the result of one image, as a batch of one."""
        return replace(self, **self._fields_of(self._require_index(index)))

    def __iter__(self: Result) -> Iterator[Result]:
        return (self[index] for index in range(len(self)))

    @classmethod
    def join(cls: type[Result], results: Sequence[Result]) -> Result:
        """Combine the results of single images into the result of a batch.

        Args:
            results: results of the same method, at least one. Maps of patches have the same size; those of LIME,
                KernelSHAP and RISE may differ, see :attr:`sizes`.

        Raises:
            CallError: the list is empty, or it mixes kinds of results, or the sizes of patch maps differ.

        Examples:
            >>> import torch, vitscope as vs
            >>> result = vs.Attribution(torch.ones(1, 2, 3), vs.Grid(2, 3))
            >>> len(vs.Attribution.join([result, result]))
            2
        """
        if not isinstance(results, Sequence) or not results or not all(isinstance(result, cls) for result in results):
            raise CallError(f"join takes a list of at least one {cls.__name__}: pass results of single images")
        kind = type(results[0])
        if any(type(result) is not kind for result in results):
            names = dict.fromkeys(type(result).__name__ for result in results)
            raise CallError(f"join takes results of one method, not of {' and '.join(names)}")
        sizes = dict.fromkeys(f"{result.grid.height}×{result.grid.width}" for result in results)
        if len(sizes) > 1 and not kind._covers_photo:
            raise CallError(
                f"cannot combine results of different sizes ({', '.join(sizes)}): explain these images separately"
            )
        return replace(results[0], **kind._joined_fields(results))

    def overlay(self, alpha: float = 0.6, *, index: int = 0) -> Image.Image:
        """Return the map of one image, drawn over its photo at the photo's size.

        The colours range from the lowest to the highest value of the map. Those of a signed map range from blue
        (opposes the target) through white (zero) to red (supports it). If the highest value exceeds three times the
        99.5th percentile of at least 100 values, the colours end at this percentile. Attention whose highest value is
        below 1.1 times its lowest is coloured from zero to twice its mean. Pixels that the model did not see and
        dropped patches are grey. The whole photo is grey if all values of the map are equal. Colours are interpolated
        between patches, unless the map repeats the values of coarser patches. Segments whose interval holds zero are
        pale.

        Args:
            alpha: opacity of the map, from 0 (only the photo) to 1 (only the map).
            index: index of the image in the batch, by default the first.

        Raises:
            CallError: ``alpha`` or ``index`` is out of range, or the result holds no photos.
        """
        opacity = require_ratio(alpha, "alpha")
        index = self._require_index(index)
        if not self.images:
            raise CallError(
                "this result was loaded from a file and holds no photos: attach them with result.with_photos(images)"
            )
        if self.sizes is not None:
            return self[index].overlay(opacity)
        image = self.images[index]
        values = self.values[index].cpu().numpy()
        dropped = None if self.dropped is None else self.dropped[index].cpu().numpy()
        heat = image.paint(values, smooth=not repeats_patches(values), dropped=dropped)
        pale = self.pale_pixels(index)
        return coloured(
            image.photo,
            heat,
            opacity,
            signed=self.signed,
            limits=self.colour_scale(index).limits,
            pale=None if pale is None else image.paint(pale, smooth=False) > 0.5,
        )

    def pale_pixels(self, index: int = 0) -> Bool[np.ndarray, "height width"] | None:  # noqa: ARG002 (of subclasses)
        """Return the part of an image's map that cannot be told from zero; None if the method does not estimate it."""
        return None

    @property
    def uniform(self) -> float | None:
        """The attention of each patch if it was the same for all tokens; None if the values are no attention."""
        return 1 / self.grid.num_tokens if self.provenance.get("rows_sum_to_one") is True else None

    def colour_scale(self, index: int = 0) -> ColourScale:
        """Return the values at the ends of the colours of one image's map.

        Args:
            index: index of the image in the batch, by default the first.
        """
        result = self[index]
        values = result.values[0].detach().cpu()
        if result.dropped is not None:
            values = values.masked_fill(result.dropped[0].cpu(), torch.nan)
        return colour_scale(values.numpy(), signed=self.signed, uniform=self.uniform)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return :attr:`values` as an array (batch, height, width), for ``numpy.asarray``.

        Raises:
            ValueError: ``copy`` is False, but the values are not in the memory of the CPU or have another dtype.
        """
        if copy is False and self.values.device.type != "cpu":
            raise ValueError(f"the values are on {self.values.device}: an array of them is a copy")
        values = self.values.detach().cpu().numpy()
        if copy is False and dtype is not None and np.dtype(dtype) != values.dtype:
            raise ValueError(f"the values are {values.dtype}: an array of {np.dtype(dtype)} is a copy")
        return np.array(values, dtype=dtype) if copy else np.asarray(values, dtype=dtype)

    def save(self, path: str | Path, *, index: int = 0) -> Path:
        """Save the result in the format that the suffix of ``path`` names.

        ================ ============================================================
        ``.png``         the overlay of image ``index``
        ``.safetensors`` the arrays of the whole batch and the provenance; :meth:`load` reads it
        ``.npz``         the same, for numpy
        ``.json``        the same as text, see :meth:`as_json`
        ================ ============================================================

        Args:
            path: file to write; an existing file is replaced.
            index: index of the image, for ``.png``; by default the first.

        Returns:
            the path.

        Raises:
            CallError: the suffix is none of these, ``path`` is not a path or is a folder, or there is no overlay to
                save (see :meth:`overlay`).
            SaveError: the file cannot be written; an older file at ``path`` is unchanged.

        Examples:
            >>> import tempfile, torch, vitscope as vs
            >>> result = vs.Attribution(torch.ones(1, 2, 3), vs.Grid(2, 3))
            >>> path = result.save(f"{tempfile.mkdtemp()}/map.safetensors")
            >>> vs.Attribution.load(path).values.shape
            torch.Size([1, 2, 3])
        """
        path = require_file_path(path)
        if path.suffix.lower() == ".png":
            image = self.overlay(index=index)
            with atomic_write(path) as temporary:
                image.save(temporary)
        elif path.suffix == ".json":
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(self.as_json(), indent=2, allow_nan=False), encoding="utf-8")
        elif path.suffix in (".npz", ".safetensors"):
            write_arrays(path, self._tensors(), self._saved_metadata())
        else:
            raise CallError(f"cannot save as {path.name!r}: end the name in .png, .safetensors, .npz or .json")
        return path

    @classmethod
    def load(cls: type[Result], path: str | Path) -> Result:
        """Load a result that :meth:`save` wrote as ``.safetensors``.

        Photos are not saved: ``provenance["photos"]`` describes them, and :meth:`with_photos` attaches them.

        Args:
            path: file to read.

        Raises:
            CallError: there is no such file.
            WorkError: the file is not a saved result, or its entries contradict each other.
        """
        path = require_file_path(path)
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise ValueError("it is not a regular file")
            return cls(**cls._parse(*read_arrays(path)))
        except FileNotFoundError:
            raise CallError(f"{path} does not exist") from None
        except KeyError as error:
            raise WorkError(f"{path} is not a saved result: {error} is missing") from None
        except (SafetensorError, TypeError, ValueError, OSError, RecursionError) as error:
            raise WorkError(f"{path} is not a saved result: {short_text(first_line(error), '')}") from None

    def with_photos(self: Result, images: Any) -> Result:
        """Return a loaded result with its photos, so that it can be drawn.

        Args:
            images: the photos, in any order, as all functions take them; others are ignored. They are recognised by the
                hash of their pixels.

        Raises:
            CallError: a photo is missing or was changed, or the file does not describe its photos.
            ImageError: an image cannot be read.

        Examples:
            >>> import skimage.data, tempfile, vitscope as vs
            >>> photo = skimage.data.chelsea()
            >>> path = vs.rollout(vs.load("vit-nano"), photo).save(f"{tempfile.mkdtemp()}/map.safetensors")
            >>> vs.Attribution.load(path).with_photos(photo).overlay().size
            (451, 300)
        """
        records = self.photo_records()
        if not records:
            raise CallError(
                "this result does not describe its photos, so they cannot be recognised: explain them again"
            )
        return replace(self, images=matching_images(records, images))

    def photo_records(self) -> list[dict[str, Any]]:
        """Return name, size, box (what the model saw) and hash of each photo; an empty list if they are unknown."""
        return [photo_record(image) for image in self.images] or list(self.provenance.get("photos", ()))

    def as_json(self) -> dict[str, Any]:
        """Return everything except the photos, and the samples of other classes, as JSON values."""
        dropped = {} if self.dropped is None else {"dropped": self.dropped.tolist()}
        return {**self._metadata(), "values": [result.values[0].tolist() for result in self], **dropped}

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of a saved file."""
        return {"values": self.values, **({} if self.dropped is None else {"dropped": self.dropped})}

    def _metadata(self) -> dict[str, Any]:
        """Return the metadata of every saved file."""
        grid = {"height": self.grid.height, "width": self.grid.width, "prefix": self.grid.prefix}
        provenance = {**self.provenance, **({"photos": records} if (records := self.photo_records()) else {})}
        sizes = {} if self.sizes is None else {"sizes": [list(size) for size in self.sizes]}
        return {"grid": grid, **sizes, "provenance": provenance, "target": self.target, "signed": self.signed}

    def _saved_metadata(self) -> dict[str, Any]:
        """Return the metadata of a file that :meth:`load` reads."""
        return self._metadata()

    @classmethod
    def _parse(cls, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a result from the tensors and metadata of a saved file.

        Raises:
            KeyError, TypeError, ValueError: an entry is missing, or contradicts the others.
        """
        grid = Grid(**require_mapping(metadata["grid"], "grid"))
        signed, target = metadata.get("signed", False), metadata["target"]
        provenance = require_mapping(metadata["provenance"], "provenance")
        values = require_tensor(tensors, "values", torch.float32, (None, grid.height, grid.width))
        if not len(values):
            raise ValueError("it holds no images")
        dropped = require_tensor(tensors, "dropped", torch.bool, values.shape) if "dropped" in tensors else None
        if not isinstance(signed, bool) or not (target is None or isinstance(target, str)):
            raise ValueError("its target is not text, or signed is not true or false")
        check_provenance(provenance, len(values))
        return {
            "values": values,
            "grid": grid,
            "signed": signed,
            "provenance": provenance,
            "target": target,
            "dropped": dropped,
            "sizes": parse_sizes(metadata.get("sizes"), values, grid),
        }

    def _require_index(self, index: Any) -> int:
        """Return the index of an image, which may be negative, counted from the start."""
        index = require_integer(index, "image")
        if not -len(self) <= index < len(self):
            raise CallError(f"image {index} does not exist: this result has images 0 to {len(self) - 1}")
        return index % len(self)

    def _fields_of(self, index: int) -> dict[str, Any]:
        """Return the fields that differ in the result of a single image."""
        fields: dict[str, Any] = {"values": self.values[index : index + 1], "images": self.images[index : index + 1]}
        if self.dropped is not None:
            fields["dropped"] = self.dropped[index : index + 1]
        if self.sizes is not None:
            size = self.sizes[index]
            fields |= {"values": restored(fields["values"], size), "grid": Grid(*size), "sizes": None}
        photos = {"photos": [self.provenance["photos"][index]]} if "photos" in self.provenance else {}
        if "images" not in self.provenance:
            return {**fields, "provenance": {**self.provenance, **photos}}
        provenance = dict(self.provenance["images"][index])
        return {**fields, "target": provenance.pop("target"), "provenance": {**provenance, **photos}}

    @classmethod
    def _joined_fields(cls: type[Result], results: Sequence[Result]) -> dict[str, Any]:
        """Return the fields in which a batch differs from the result of its first image."""
        targets = {result.target for result in results}
        provenances = [{key: value for key, value in r.provenance.items() if key != "photos"} for r in results]
        provenance = dict(provenances[0])
        if len(targets) > 1 or any(entry != provenance for entry in provenances):
            pairs = zip(results, provenances, strict=True)
            provenance["images"] = [{**entry, "target": result.target} for result, entry in pairs]
            for key in ("interrupted", "samples"):
                if key in provenance:
                    provenance[key] = type(provenance[key])(sum(result.provenance[key] for result in results))
        records = [result.provenance.get("photos", ()) for result in results]
        if all(records):
            provenance["photos"] = [record for photos in records for record in photos]
        masks = [torch.zeros_like(r.values, dtype=torch.bool) if r.dropped is None else r.dropped for r in results]
        singles = [single for result in results for single in ([result] if result.sizes is None else result)]
        sizes = [(single.grid.height, single.grid.width) for single in singles for _ in range(len(single))]
        differ = len(set(sizes)) > 1
        size = common_size(sizes)
        return {
            "dropped": None if all(result.dropped is None for result in results) else torch.cat(masks),
            "provenance": provenance,
            "values": torch.cat([enlarged(single.values, size) for single in singles]),
            "grid": Grid(*size) if differ else results[0].grid,
            "sizes": sizes if differ else None,
            "images": [image for result in results for image in result.images],
            "target": targets.pop() if len(targets) == 1 else None,
        }

"""COCO-style jsons: masks of objects, rendered to label images, and the regions of panoptic ones.
"""

from pathlib import Path

import numpy as np
from pycocotools import mask as coco_masks
from torch import Tensor

from util import UserError
from util.files import fields_of, read_json
from util.images import read_image


class Instances:
    """A COCO-instances json, rendered to label images.

    0 is background, 1 ... are the categories in the order of their ids.
    """

    def __init__(self, path: Path):
        self.path, content = path, read_json(path, "images", "annotations", "categories")
        with fields_of(path):
            ids = sorted(category["id"] for category in content["categories"])
            self.value = {id: place + 1 for place, id in enumerate(ids)}
            self.image_of = {image["file_name"]: image["id"] for image in content["images"]}
            self.of_image: dict[int, list[tuple]] = {}
            for annotation in content["annotations"]:
                kept = annotation["category_id"], annotation["segmentation"]
                self.of_image.setdefault(annotation["image_id"], []).append(kept)

    def render(self, file_name: str, height: int, width: int) -> np.ndarray:
        """The label image (height, width); of overlapping objects the smaller one is on top.

        Raises UserError for an image that the json does not list.
        """
        if file_name not in self.image_of:
            raise UserError(f"{self.path} says nothing of {file_name}; give the json and the "
                            "images of one split.")
        label = np.zeros((height, width), np.uint16)
        with fields_of(self.path):
            objects = [(instance_mask(shape, height, width), self.value[category])
                       for category, shape in self.of_image.get(self.image_of[file_name], [])]
            for mask, value in sorted(objects, key=lambda found: -int(found[0].sum())):
                label[mask] = value
        return label


def instance_mask(shape: list | dict, height: int, width: int) -> np.ndarray:
    """Polygons, or a run-length code in either of COCO's forms -> bool (height, width).

    Raises TypeError if it is neither, or of another size.
    """
    if isinstance(shape, dict) and list(shape["size"]) != [height, width]:
        raise TypeError(f"a mask of {shape['size']} for an image of {[height, width]}")
    try:
        is_compressed = isinstance(shape, dict) and isinstance(shape["counts"], str)
        codes = shape if is_compressed else coco_masks.frPyObjects(shape, height, width)
        codes = coco_masks.merge(codes) if isinstance(codes, list) else codes
        return coco_masks.decode(codes).astype(bool)
    except Exception as error:      # pycocotools raises anything
        raise TypeError(error) from None


class Panoptic:
    """A COCO-panoptic json: its categories in the order of ids, its images and annotations.

    names, is_thing: of each category. class_of: its place in that order, by its id. file_names: of
    the images, by id. Raises UserError if it is no such json.
    """

    def __init__(self, path: Path):
        self.path, content = path, read_json(path, "images", "annotations", "categories")
        with fields_of(path):
            categories = sorted(content["categories"], key=lambda category: category["id"])
            self.names = [category["name"] for category in categories]
            self.is_thing = [bool(category["isthing"]) for category in categories]
            self.class_of = {category["id"]: place for place, category in enumerate(categories)}
            self.file_names = {image["id"]: image["file_name"] for image in content["images"]}
            self.annotations = content["annotations"]
            if not self.annotations:
                raise UserError(f"{path} has no annotations; give a COCO-panoptic json.")
            if "segments_info" not in self.annotations[0]:
                raise UserError(f"{path} has no field 'segments_info' in its annotations; give "
                                "the panoptic json, such as panoptic_val2017.json, not instances "
                                "or captions.")

    def read_files(self, annotation: dict, images: Path, pngs: Path) -> tuple[Tensor, np.ndarray]:
        """An annotation's image, uint8 (3, H, W), and the ids of its pixels' regions, (H, W).

        Raises UserError if it is of an unknown image or has an unknown category, and for files
        that can't be read or are of two sizes.
        """
        self.check(annotation)
        png = pngs / annotation["file_name"]
        image = read_image(images / self.file_names[annotation["image_id"]])
        rgb = read_image(png).int()
        if rgb.shape != image.shape:
            raise UserError(f"{png} is {tuple(rgb.shape[1:])}, but its image "
                            f"{tuple(image.shape[1:])}; they must be of one size.")
        return image, (rgb[0] + 256 * rgb[1] + 65536 * rgb[2]).numpy()

    def check(self, annotation: dict) -> None:
        """Raises UserError if an annotation is of an unknown image or has an unknown category."""
        png = annotation["file_name"]
        if annotation["image_id"] not in self.file_names:
            raise UserError(f"{self.path} has the image_id {annotation['image_id']} for {png}, but "
                            "no such image in 'images'; download the json again.")
        for region in annotation["segments_info"]:
            if region["category_id"] not in self.class_of:
                raise UserError(f"{self.path} has the category_id {region['category_id']} in a "
                                f"segment of {png}, but no such category in 'categories'; "
                                "download the json again.")


def is_inside(bbox: list[float], height: int, width: int) -> bool:
    """Whether a box x, y, width, height has a part in an image."""
    x, y, w, h = bbox
    return w > 0 and h > 0 and x < width and y < height and x + w > 0 and y + h > 0

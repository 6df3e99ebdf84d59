"""Short side resized, then the centre cropped, as validation does it in PIL and in OpenCV.

Writes resize.json beside itself. Needs pillow, opencv-python-headless and numpy.
"""

import json
from pathlib import Path

import cv2
import numpy
import PIL
from PIL import Image

CASES = [(45, 34, 20, 16), (34, 45, 21, 16), (33, 30, 47, 16)]


def picture(width, height):
    y, x, c = numpy.mgrid[:height, :width, :3]
    return ((x * 37 + y * 91 + x * y * 13 + c * 50) % 256).astype(numpy.uint8)


def pil(rgb, short, size):
    height, width, _ = rgb.shape
    if width <= height:
        w, h = short, int(short * height / width)
    else:
        w, h = int(short * width / height), short
    left, top = int(round((w - size) / 2.0)), int(round((h - size) / 2.0))
    resized = Image.fromarray(rgb).resize((w, h), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


def opencv(rgb, short, size):
    height, width, _ = rgb.shape
    scale = short / min(width, height)
    w, h = int(width * scale + 0.5), int(height * scale + 0.5)
    left, top = (w - size) // 2, (h - size) // 2
    resized = cv2.resize(rgb, (w, h), interpolation=cv2.INTER_LINEAR)
    return resized[top : top + size, left : left + size]


def main():
    cases = []
    for width, height, short, size in CASES:
        rgb = picture(width, height)
        cases.append(
            {
                "width": width,
                "height": height,
                "short_side": short,
                "size": size,
                "pil": numpy.asarray(pil(rgb, short, size)).flatten().tolist(),
                "opencv": opencv(rgb, short, size).flatten().tolist(),
            }
        )
    versions = {"pillow": PIL.__version__, "opencv": cv2.__version__, "numpy": numpy.__version__}
    text = json.dumps({"versions": versions, "cases": cases}, separators=(",", ":"))
    Path(__file__).with_name("resize.json").write_text(text + "\n")


main()

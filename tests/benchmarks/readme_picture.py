"""The README's picture: samples of the base model and of the aligned one, same seeds, of a finished run.

    python tests/benchmarks/readme_picture.py runs/demo docs/before_after.png

Generated images only; the first seeds of each class, not chosen by looks. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw

from pathalign.images import ImageSet, contact_sheet

PER_CLASS, GAP_PX, HEADING_PX = 8, 24, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    names = {"samples_before": "before: base model", "samples_after": "after: aligned model, same seeds"}
    sets = [ImageSet.load(arguments.run / name).first_per_class(PER_CLASS) for name in names]
    sheets = [contact_sheet(images.images, columns=PER_CLASS) for images in sets]
    width, height = sheets[0].size
    picture = Image.new("RGB", (2 * width + GAP_PX, height + HEADING_PX), "white")
    draw = ImageDraw.Draw(picture)
    for index, (sheet, title) in enumerate(zip(sheets, names.values(), strict=True)):
        picture.paste(sheet, (index * (width + GAP_PX), HEADING_PX))
        draw.text((index * (width + GAP_PX), 4), title, fill="black")
    arguments.picture.parent.mkdir(exist_ok=True)
    picture.save(arguments.picture)
    print(json.dumps({"picture": str(arguments.picture), "rows": list(sets[0].class_names)}))


if __name__ == "__main__":
    main()

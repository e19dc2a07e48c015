"""Time and memory of all metrics on many images' features.

    python tests/benchmarks/metrics.py                                   # 10,000 images of 1,280 dimensions
    python tests/benchmarks/metrics.py --images 100000 --dimensions 256

Features are drawn, of five classes, and streamed in batches of 1,000 into each metric: so many real, so many generated
and so many training images. The first takes a minute or two on two free cores, the second a quarter of an hour. Prints,
last, one JSON object: seconds on the clock and of the processors for each metric (streaming included), their sums, and
the peak of resident memory, mapped file pages included. `libraries_mb` is the peak before the first metric.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import pathalign.evaluate as package
from pathalign.schema import peak_rss_mb

BATCH, CLASSES = 1000, 5
SHIFT = {"real": 0.0, "train": 0.0, "generated": 0.15}  # the generated images differ a little, in every dimension


def batches(images: int, dimensions: int, source: str) -> Iterator[dict[str, Any]]:
    """Rows of one source, the same each time."""
    rng = np.random.default_rng(list(SHIFT).index(source))
    directions = np.random.default_rng(99).normal(size=(CLASSES, dimensions)).astype(np.float32)
    scales = np.linspace(2, 0.2, dimensions, dtype=np.float32)  # as of real features: few directions vary most
    for start in range(0, images, BATCH):
        classes = np.arange(start, min(start + BATCH, images)) % CLASSES
        noise = rng.standard_normal((len(classes), dimensions), dtype=np.float32)
        features = 0.5 * directions[classes] + noise * scales + SHIFT[source]
        labels = [f"class {number}" for number in classes]
        yield {"features": features, "source": [source] * len(classes), "class_label": labels}


def measure(name: str, images: int, dimensions: int, folder: str) -> dict[str, Any]:
    """Stream the table into one metric and compute it."""
    wall, processor = time.perf_counter(), time.process_time()
    metric = getattr(package, name)(cache_dir=folder)
    if name == "PlausibleShare":
        rng = np.random.default_rng(0)
        for _ in range(0, images, BATCH):
            before, after = rng.uniform(size=(2, BATCH)) < [[0.5], [0.6]]
            metric.add_batch(plausible=after, before=before, class_label=[f"class {n % CLASSES}" for n in range(BATCH)])
    else:
        for source in metric.SOURCES:
            for batch in batches(images, dimensions, source):
                metric.add_batch(**batch)
    result = metric.compute()
    shown = {key: round(value, 5) for key, value in result.items() if isinstance(value, float)}
    seconds = {"wall_s": round(time.perf_counter() - wall, 1), "cpu_s": round(time.process_time() - processor, 1)}
    return {**seconds, "peak_rss_mb": round(peak_rss_mb()), **shown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000, help="of each source, a multiple of 1,000")
    parser.add_argument("--dimensions", type=int, default=1280)
    parser.add_argument("--folder", help="where the streamed rows lie; by default a temporary folder")
    parser.add_argument("--only", nargs="+", choices=list(package.METRICS), default=list(package.METRICS))
    arguments = parser.parse_args()
    libraries = round(peak_rss_mb())
    found = {}
    with TemporaryDirectory(dir=arguments.folder) as folder:
        for name in arguments.only:
            found[name] = measure(name, arguments.images, arguments.dimensions, folder)
            print(f"{name}: {found[name]}", flush=True)
    print(
        json.dumps(
            {
                "images": arguments.images,
                "dimensions": arguments.dimensions,
                "cpus": os.cpu_count(),
                "load": round(os.getloadavg()[0], 1),
                "wall_s": round(sum(entry["wall_s"] for entry in found.values()), 1),
                "cpu_s": round(sum(entry["cpu_s"] for entry in found.values()), 1),
                "libraries_mb": libraries,
                "peak_rss_mb": round(peak_rss_mb()),
                "metrics": found,
            }
        )
    )


if __name__ == "__main__":
    main()

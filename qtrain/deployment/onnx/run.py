"""The likeliest classes of images by the model.onnx beside this file: python run.py IMAGE..."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from PIL import Image, ImageOps


def decoded(image: Image.Image) -> Image.Image:
    """Upright, 8 bits for each channel, on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        return Image.fromarray(((np.asarray(image).astype(np.int64).clip(0, 65535) + 128) // 257).astype(np.uint8))
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert(mode)


here = Path(__file__).resolve().parent
options = ort.SessionOptions()
cpu = Path("/proc/cpuinfo")
if not (cpu.is_file() and "vnni" in cpu.read_text()):  # exact sums; processors with VNNI have them, and faster
    options.add_session_config_entry("session.x64quantprecision", "1")
session = ort.InferenceSession(here / "model.onnx", options, providers=["CPUExecutionProvider"])
p = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
batch = session.get_inputs()[0].shape[0]  # a number where the file is for so many images at a time
labels = json.loads((here / "labels.json").read_text(encoding="utf-8"))
for name in sys.argv[1:]:
    image = decoded(Image.open(name)).convert(p["mode"])
    short, (width, height) = min(image.size), image.size
    size = [p["resize"] if n == short else int(p["resize"] * n / short) for n in (width, height)]
    image = image.resize(size, Image.Resampling[p["interpolation"].upper()])
    left, top = (round((n - p["size"]) / 2.0) for n in size)
    pixels = np.asarray(image.crop((left, top, left + p["size"], top + p["size"])), dtype=np.float32)
    x = (pixels.reshape(p["size"], p["size"], -1) / np.float32(255) - np.float32(p["mean"])) / np.float32(p["std"])
    x = np.repeat(x.transpose(2, 0, 1)[None], batch if isinstance(batch, int) else 1, axis=0)
    logits = session.run(None, {"images": x})[0][0]
    odds = np.exp(logits - logits.max())
    best = np.argsort(-logits)[:5]
    print(name, *(f"{labels[i]} {odds[i] / odds.sum():.3f}" for i in best), sep="\t")
